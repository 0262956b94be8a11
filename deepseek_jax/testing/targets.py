"""Kernels compiled for accelerators that need not be there, by the compilers of TPUs and of GPUs."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import hypothesis
import jax
from jax.sharding import SingleDeviceSharding

from deepseek_jax.plan.topology import GPU_OPTIONS, topology
from deepseek_jax.testing.draw import Draw
from deepseek_jax.testing.kernel import Case, Kernel, Sizes
from deepseek_jax.testing.programs import apart, pulled

# Slices of eight devices, of which a kernel takes as many as it runs on. Of GPUs a Hopper stands for what has its
# memory and tensor cores: the compiler's choices are of sm90 for both.
TARGETS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "v7x": "v7x:2x2x1", "h200": "h200:8"}


def targets_of(kernel: Kernel) -> tuple[str, ...]:
    """What a kernel is to compile for."""
    return tuple(name for name in TARGETS if kernel.platform == "any" or (name[0] == "v") == (kernel.platform == "tpu"))


def compile_for(kernel: Kernel, target: str) -> str:
    """Compiles a kernel at its `compiled` sizes, in all of its dtypes, with its gradients where it has some.

    Args:
        kernel: with `compiled` sizes.
        target: a name in `TARGETS`.

    Returns:
        "" where all of it compiles, else in one line what the compiler says and of which sizes.

    Raises:
        ValueError: the compiler is not installed.
    """
    _, devices = topology(TARGETS[target])
    options = GPU_OPTIONS if target == "h200" else {}
    for sizes in kernel.compiled:
        for dtype in kernel.dtypes:
            for function, arguments in _programs(kernel, sizes, dtype, devices):
                try:
                    jax.jit(function).lower(*arguments).compile(compiler_options=options)
                except Exception as problem:  # compilers raise anything
                    said = next((line for line in str(problem).splitlines() if line.strip()), "")
                    return f"{type(problem).__name__}: {said[:300]} (sizes {dict(sizes)}, {dtype})"
    return ""


def _programs(kernel: Kernel, sizes: Sizes, dtype: str, devices: Sequence[jax.Device]) -> Iterator[tuple[Any, Any]]:
    """What is to compile, and the shapes that it is called with."""
    own = devices[: kernel.devices]
    placed = SingleDeviceSharding(own[0]) if kernel.devices == 1 else None  # else where its shard_map is
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
    # only shapes count, so that the simplest of what varies within them will do
    ragged = {name: hypothesis.find(of(sizes), lambda _: True) for name, of in kernel.ragged.items()}
    case = Case(sizes=dict(sizes), ragged=ragged, dtype=dtype, numbers="zeros")
    arrays, static = apart(kernel.inputs(Draw(case)))
    arguments = jax.tree.map(shape, arrays)
    given: dict[str, Any] = {} if kernel.platform == "any" else {"interpret": False}
    function = partial(kernel.run, **static, **(given if kernel.devices == 1 else {**given, "devices": own}))
    yield (lambda arguments: function(**arguments)), (arguments,)
    if kernel.gradients:
        out = jax.eval_shape(lambda arguments: function(**arguments), arguments)
        yield pulled(function, kernel.gradients), (arguments, jax.tree.map(shape, out))
