"""A kernel's compiled forms, of which each is traced once a shape."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.testing.invariance import Arguments
from deepseek_jax.testing.kernel import Kernel

Mode = Literal["own", "model"]
_NUMBER = itertools.count()  # of programs, in this process


class Programs:
    """Calls a kernel in compiled form, with NumPy arrays in and out; keeps what it compiled."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @property
    def count(self) -> int:
        """How many were compiled of the kernel."""
        return sum(kind in ("run", "pull") for kind, *_ in self._compiled)

    def run(self, arguments: Arguments, mode: Mode = "own") -> Any:
        """The result.

        Args:
            arguments: by name.
            mode: "model" interprets a TPU's kernel on jax's model of one; "own" runs it where it belongs, else plainly
                interpreted.
        """
        arrays, program = self.program(arguments, mode)
        return self._called(program, arrays)

    def program(self, arguments: Arguments, mode: Mode = "own") -> tuple[Arguments, Callable[[Arguments], Any]]:
        """What of arguments is arrays, and what is compiled of the kernel for such ones."""
        arrays, static = apart(arguments)
        function = partial(callable_of(self.kernel, mode), **static)
        return arrays, self._once("run", lambda arrays: function(**arrays), arrays, (mode, *static.items()))

    def pull(self, arguments: Arguments, d_out: Any) -> tuple[Any, dict[str, Any]]:
        """The result of a forward pass that keeps what a gradient needs, and the gradients by argument."""
        arrays, static = apart(arguments)
        function = pulled(partial(callable_of(self.kernel), **static), self.kernel.gradients)
        compiled = self._once("pull", function, arrays, tuple(static.items()))
        return self._called(compiled, arrays, d_out)

    def exact(self, arguments: Arguments) -> Any:
        """The twin's result; of one that has gradients, which is all in jax.numpy, in compiled form too."""
        if not self.kernel.gradients:
            return jax.tree.map(np.asarray, self.kernel.twin(**arguments))
        arrays, static = apart(arguments)
        function = partial(self.kernel.twin, **static)
        compiled = self._once("twin", lambda arrays: function(**arrays), arrays, tuple(static.items()))
        return self._called(compiled, arrays)

    def exact_gradients(self, arguments: Arguments, d_out: Any) -> dict[str, Any]:
        """The twin's, by argument."""
        arrays, static = apart(arguments)
        function = pulled(partial(self.kernel.twin, **static), self.kernel.gradients)
        compiled = self._once("twin's pull", function, arrays, tuple(static.items()))
        return self._called(compiled, arrays, d_out)[1]

    def _called(self, compiled: Callable[..., Any], *given: Any) -> Any:
        try:
            return jax.tree.map(np.asarray, compiled(*given))
        except Exception:  # a trace that broke off is none, so that the next one is the first
            self._compiled = {key: one for key, one in self._compiled.items() if one is not compiled}
            raise

    def _once(self, kind: str, function: Callable[..., Any], arrays: Arguments, others: tuple) -> Callable[..., Any]:
        """The program for arrays of a shape; that it is traced anew for them is an AssertionError of chex."""
        leaves, tree = jax.tree.flatten(arrays)
        key = (kind, others, tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:

            def program(*given):
                return function(*given)

            program.__name__ = f"{self.kernel.name} {next(_NUMBER)}"  # chex counts by name
            self._compiled[key] = jax.jit(chex.assert_max_traces(program, n=1))
        return self._compiled[key]


def apart(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """Arrays, or trees of them; and what a program is compiled for: numbers, texts, None."""
    static = {name: of for name, of in arguments.items() if of is None or isinstance(of, int | float | str)}
    return {name: of for name, of in arguments.items() if name not in static}, static


def on_arrays(change: Callable[[Any], Any], arguments: Arguments) -> Arguments:
    """The same arguments with every array changed."""
    arrays, static = apart(arguments)
    return {**jax.tree.map(change, arrays), **static}


def callable_of(kernel: Kernel, mode: Mode = "own") -> Callable[..., Any]:
    """A kernel's function with its options for the devices that there are."""
    options: dict[str, Any] = {}
    if kernel.platform != "any":
        options["interpret"] = jax.default_backend() != kernel.platform if mode == "own" else _model(kernel.races)
    if kernel.devices > 1:
        options["devices"] = jax.devices()[: kernel.devices]
    return partial(kernel.run, **options)


def pulled(function: Callable[..., Any], names: Any) -> Callable[[Arguments, Any], tuple[Any, dict[str, Any]]]:
    """A function of arguments and a gradient of its result to the result and the gradients by name."""

    def run(arguments, d_out):
        of = lambda some: function(**{**arguments, **some})
        out, back = jax.vjp(of, {name: arguments[name] for name in names})
        return out, back(d_out)[0]

    return run


def _model(races: bool) -> pltpu.InterpretParams:
    """A TPU of two cores: memory begins as NaN, copies arrive when waited for, parallel steps have any order."""
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    only_told = {} if races or "on_race" not in fields else {"on_race": "warn"}  # jax 0.12 raises, 0.10 prints
    return pltpu.InterpretParams(
        dma_execution_mode="on_wait",
        uninitialized_memory="nan",
        random_seed=0,
        num_cores_or_threads=2,
        detect_races=True,
        **only_told,
    )
