"""What must hold of a kernel at one example."""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.testing.draw import Draw
from deepseek_jax.testing.invariance import Arguments
from deepseek_jax.testing.kernel import Case, Fault, Kernel
from deepseek_jax.testing.programs import Programs, apart, callable_of, on_arrays

_RACE = "RACE DETECTED"  # as jax's model of a TPU says it


class Held(NamedTuple):
    """Of an example that holds: the worst error as a part of what is allowed, and how many numbers were compared."""

    error: float
    compared: int


def examine(kernel: Kernel, programs: Programs, case: Case) -> Held:
    """Holds one example to all laws.

    Args:
        kernel: what is tested.
        programs: its compiled forms.
        case: the example.

    Raises:
        Fault: a law does not hold.
    """
    try:
        with jax.default_matmul_precision("highest"):
            return _examine(kernel, programs, case)
    except Fault as fault:
        raise Fault(fault.law, fault.said, case) from fault.__cause__
    except Exception as problem:  # the kernel may raise anything
        said = " ".join(str(problem).split())
        raise Fault("runs", f"{type(problem).__name__}: {said[:300]}", case) from problem


def _examine(kernel: Kernel, programs: Programs, case: Case) -> Held:
    clean, arguments, noisy = (kernel.inputs(Draw(case, dead)) for dead in ("zero", "nan", "noise"))
    wide = on_arrays(_wide, clean)
    with jax.enable_x64(True):
        want = programs.exact(wide)
    allowed = _allowed(kernel, case.dtype, want, wide)
    beside = lambda law, got: compared(law, got, want, allowed)
    got = programs.run(arguments)
    worst = beside("values", got)
    _same("repeat", programs.run(arguments), got, want, "the same call gave another result")
    if _differ(arguments, noisy):
        _same("padding", programs.run(noisy), got, want, "depends on what it must not look at")
    if kernel.gradients:
        worst = max(worst, _gradients(kernel, programs, case, (clean, arguments, wide), want, beside, got))
    for law in kernel.invariances:
        changed = law.apart(arguments, np.random.default_rng(case.seed))
        if changed is not None:
            results = [programs.run(some) for some in changed[0]]
            beside(law.name, law.together(results, changed[1]))
    if case.thorough:
        _in_other_ways(kernel, programs, arguments, beside)
    return Held(worst, sum(int(np.sum(~np.isnan(one))) for one in jax.tree.leaves(want)))


def _gradients(kernel, programs, case, given, want, beside, got) -> float:
    """Those of arguments beside the twin's; of the forward pass that they begin with, its result."""
    clean, arguments, wide = given
    rng = np.random.default_rng([case.seed, 4])
    d_out = jax.tree.map(
        lambda out, is_ours: np.where(np.isnan(is_ours), 0, rng.normal(size=out.shape)).astype(out.dtype), got, want
    )
    out, found = programs.pull(arguments, d_out)
    beside("values before a gradient", out)
    with jax.enable_x64(True):
        wanted = programs.exact_gradients(wide, jax.tree.map(_wide, d_out))
    bounds = _allowed_gradients(kernel, case.dtype, wanted, jax.tree.map(_wide, d_out), wide)
    if kernel.dead_gradients == "undefined":
        is_dead = lambda argument, one: np.where(np.isnan(_wide(argument)), np.nan, one)
        wanted = {name: jax.tree.map(is_dead, arguments[name], wanted[name]) for name in wanted}
    return max(compared(f"gradient of {name}", found[name], one, bounds[name]) for name, one in wanted.items())


def _in_other_ways(
    kernel: Kernel, programs: Programs, arguments: Arguments, beside: Callable[[str, Any], float]
) -> None:
    """A TPU's kernel on a model of one; any without jit, and with arguments on the device and not."""
    if kernel.platform == "tpu":
        beside("model of a TPU", _on_model(programs, arguments))
    arrays, compiled = programs.program(arguments)
    function = partial(callable_of(kernel), **apart(arguments)[1])

    def check(variant: Any) -> None:
        of_device = variant.type.name.endswith("DEVICE")
        called = variant(compiled) if of_device else variant(lambda arrays: function(**arrays))
        given = arrays if of_device else jax.tree.map(jnp.asarray, arrays)
        beside(variant.type.name.lower().replace("_", " "), jax.tree.map(np.asarray, called(given)))

    for name in _Variants.names():
        case = _Variants(name)
        case.check = check
        getattr(case, name)()


def _on_model(programs: Programs, arguments: Arguments) -> Any:
    """On jax's model of a TPU, which prints or raises it where two cores use the same memory and none waits."""
    printed = io.StringIO()
    race = Fault("model of a TPU", "a race: two steps of the grid that run in parallel use the same memory")
    try:
        with contextlib.redirect_stdout(printed):
            found = programs.run(arguments, "model")
    except Exception as problem:  # whatever it was, the model's state would stay for the next call
        pltpu.reset_tpu_interpret_mode_state()
        if _RACE in str(problem):
            raise race from problem
        raise
    if programs.kernel.races and _RACE in printed.getvalue():
        raise race
    return found


class _Variants(chex.TestCase):
    """What chex makes of one test: calls without jit, as all others have it, with and without the device."""

    check: Callable[[Any], None]

    @chex.variants(without_jit=True, with_device=True, without_device=True)
    def test(self):
        self.check(self.variant)

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in dir(cls) if name.startswith("test")]


# --- comparing -----------------------------------------------------------------------------------


def compared(law: str, got: Any, want: Any, allowed: Any) -> float:
    """The worst error as a part of what is allowed.

    Args:
        law: the fault's name.
        got: a tree of arrays.
        want: likewise, in float64; what is NaN there is not looked at.
        allowed: likewise; each broadcasts to its array.

    Raises:
        Fault: it is above 1, something is not finite, or shapes differ.
    """
    found, wanted, bounds = (jax.tree.leaves(tree) for tree in (got, want, allowed))
    if [one.shape for one in found] != [one.shape for one in wanted]:
        shapes = [" and ".join(str(list(one.shape)) for one in some) for some in (found, wanted)]
        raise Fault(law, f"got shape {shapes[0]}, wanted {shapes[1]}")
    return max((_ratio(law, *of) for of in zip(found, wanted, bounds, strict=True)), default=0.0)


def _ratio(law: str, got: np.ndarray, want: np.ndarray, allowed: Any) -> float:
    got, allowed = _wide(got), np.broadcast_to(allowed, want.shape)
    if want.dtype == bool:  # of which there are no differences
        got, want = got.astype(np.int8), want.astype(np.int8)
    looked_at = ~np.isnan(want)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where((got == want) | ~looked_at, 0.0, np.abs(got - want))
        part = np.where(error == 0, 0.0, error / allowed)
    broken = looked_at & ~np.isfinite(got) & (got != want)
    part = np.where(broken, np.inf, part)
    if part.size == 0 or part.max() <= 1:
        return float(part.max(initial=0.0))
    at = np.unravel_index(np.argmax(part), part.shape)
    place = f"at {[int(n) for n in at]}: got {got[at]:.6g}, wanted {want[at]:.6g}"
    if broken[at]:
        raise Fault("finite" if law == "values" else law, place)
    raise Fault(law, f"{place}, {error[at]:.2g} apart where {allowed[at]:.2g} is allowed")


def _allowed(kernel: Kernel, dtype: str, want: Any, wide: Arguments) -> Any:
    if kernel.bound is not None:
        return kernel.bound(kernel.tolerance[dtype], **wide)
    return jax.tree.map(lambda of: kernel.tolerance[dtype] * _largest(of), want)


def _allowed_gradients(kernel: Kernel, dtype: str, wanted: Any, d_out: Any, wide: Arguments) -> Any:
    if kernel.gradient_bound is not None:
        return kernel.gradient_bound(kernel.tolerance[dtype], d_out, **wide)
    tolerance, noise = (kernel.gradient_tolerance or kernel.tolerance)[dtype], kernel.gradient_noise.get(dtype, 0.0)
    return jax.tree.map(lambda of: tolerance * _largest(of) + noise, wanted)


def _largest(of: np.ndarray) -> float:
    """Integers have no rounding, and -inf is a choice."""
    if not jnp.issubdtype(of.dtype, jnp.inexact):
        return 0.0
    return float(np.max(np.abs(of), where=np.isfinite(of), initial=0.0))


def _same(law: str, other: Any, got: Any, want: Any, said: str) -> None:
    """Bit for bit, where it is looked at."""
    for one, two, of in zip(*map(jax.tree.leaves, (got, other, want)), strict=True):
        differ = (_wide(one) != _wide(two)) & ~np.isnan(of)
        if differ.any():
            at = np.unravel_index(np.argmax(differ), differ.shape)
            raise Fault(law, f"{said}, at {[int(n) for n in at]}: {_wide(one)[at]:.6g} and {_wide(two)[at]:.6g}")


def _differ(one: Arguments, other: Arguments) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)


def _wide(x: Any) -> np.ndarray:
    """Numbers in float64; integers, those of 8 or 4 bits too, as they are."""
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x
