"""Products with matrices that lie transposed or side by side: a CPU multiplies a few rows with them faster."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_FEW = 64  # rows up to which the order of the operands matters to a CPU


@partial(jax.tree_util.register_dataclass, data_fields=("w",), meta_fields=())
@dataclass(frozen=True)
class Transposed:
    """Stands for the matrix w.T [in, out], which is held as w [out, in]."""

    w: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape[::-1]

    @property
    def ndim(self) -> int:
        return self.w.ndim

    def __getitem__(self, everything: Any) -> "Transposed":
        """What `[...]` of a plain matrix is."""
        return self


@partial(jax.tree_util.register_dataclass, data_fields=("w",), meta_fields=("widths",))
@dataclass(frozen=True)
class Joined:
    """Stands for the first of several matrices of the same rows, and holds all of them: w [in, the sum of `widths`].

    The others are held as ones without w.
    """

    w: Any
    widths: tuple[int, ...]

    def __getitem__(self, everything: Any) -> "Joined":
        """What `[...]` of a plain matrix is."""
        return self


def times_transposed(
    x: Float[Array, "*B D"], weight: Transposed, dtype: DTypeLike | None = None
) -> Float[Array, "*B F"]:
    """x @ weight.w.T, added up and given in `dtype`, by default that of x; no copy of the weight is made."""
    rows = x.reshape(-1, x.shape[-1])
    multiply = partial(jax.lax.dot_general, preferred_element_type=dtype)
    plain = lambda rows, w: multiply(rows, w, (((1,), (1,)), ((), ())))

    def weight_first(rows, w):
        # the barrier keeps XLA from swapping the operands back
        return jax.lax.optimization_barrier(multiply(w, rows, (((1,), (1,)), ((), ())))).T

    if rows.shape[0] > _FEW:
        out = plain(rows, weight.w)
    else:
        out = jax.lax.platform_dependent(rows, weight.w, cpu=weight_first, default=plain)
    return out.reshape(*x.shape[:-1], -1).astype(dtype or x.dtype)
