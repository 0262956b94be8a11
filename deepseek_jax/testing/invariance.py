"""Changes of a kernel's arguments that must not change its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Invariance:
    """A law: `together` of the results of `apart` is the result.

    Attributes:
        name: of the law.
        apart: (arguments, a generator) to other arguments, a list of them and what `together` wants to know; None where
            the change does not apply.
        together: (results, NumPy arrays or trees of them; what apart gave beside) to a result.
    """

    name: str
    apart: Callable[[Arguments, np.random.Generator], tuple[Sequence[Arguments], Any] | None]
    together: Callable[[Sequence[Any], Any], Any]


def order(out: int = 0, **axes: int) -> Invariance:
    """The order of a batch.

    Args:
        out: the batch's axis in all of the result.
        axes: that of each argument that has one; of a tree, in all of it.
    """

    def apart(arguments, rng):
        turned = rng.permutation(_length(arguments, axes))
        return [_mapped(arguments, axes, lambda x, axis: np.take(x, turned, axis))], np.argsort(turned)

    def together(results, back):
        return jax.tree.map(lambda x: np.take(x, back, out), results[0])

    return Invariance("batch order", apart, together)


def split(out: int = 0, **axes: int) -> Invariance:
    """A batch in two parts. Arguments are those of `order`."""

    def apart(arguments, rng):
        length = _length(arguments, axes)
        if length < 2:
            return None
        parts = (slice(0, length // 2), slice(length // 2, length))
        return [_mapped(arguments, axes, lambda x, axis, part=part: _sliced(x, axis, part)) for part in parts], None

    def together(results, _):
        return jax.tree.map(lambda *parts: np.concatenate(parts, out), *results)

    return Invariance("batch split", apart, together)


def padding(by: int, out: int | None, **axes: int) -> Invariance:
    """More of what nothing looks at, at the end of some axes: NaN, or 0 of integers.

    Args:
        by: how many elements more.
        out: the axis of the result that grows with them; None where none does.
        axes: of each argument that grows.
    """

    def apart(arguments, rng):
        def grown(x, axis):
            fill = np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
            shape = list(x.shape)
            shape[axis] = by
            return np.concatenate([x, np.full(shape, fill, x.dtype)], axis)

        return [_mapped(arguments, axes, grown)], None

    def together(results, _):
        if out is None:
            return results[0]
        return jax.tree.map(lambda x: _sliced(x, out, slice(0, x.shape[out] - by)), results[0])

    return Invariance("padding", apart, together)


def _length(arguments: Arguments, axes: dict[str, int]) -> int:
    name, axis = next(iter(axes.items()))
    return jax.tree.leaves(arguments[name])[0].shape[axis]


def _mapped(arguments: Arguments, axes: dict[str, int], change: Callable[[Any, int], Any]) -> Arguments:
    changed = {
        name: jax.tree.map(lambda x, axis=axis: change(np.asarray(x), axis), arguments[name])
        for name, axis in axes.items()
    }
    return {**arguments, **changed}


def _sliced(x: np.ndarray, axis: int, part: slice) -> np.ndarray:
    return x[(slice(None),) * (axis % x.ndim) + (part,)]
