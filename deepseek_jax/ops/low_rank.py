"""Products with a matrix that has two of low rank beside it: x W + s (x A) B, without ever forming W + s A B.

Formed in bfloat16, W + s A B loses what of s A B lies below W's last bit, and W's gradient would be as large as W.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.ops.packed import Packed, dense
from deepseek_jax.ops.transposed import Joined, Transposed, times_transposed


@partial(jax.tree_util.register_dataclass, data_fields=("w", "a", "b"), meta_fields=("scale",))
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Stands for the matrix w + scale a b: w [..., in, out], a [..., in, rank], b [..., rank, out].

    It has w's shape; w may be packed. Columns may be several axes, in w and b alike: w [in, *out], b [rank, *out]. As a
    tree it also holds other things of the three than arrays, such as how each lies on a mesh.

    Source: arXiv 2106.09685 section 4.1.
    """

    w: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim


Matrix = Float[Array, "..."] | LowRank | Packed | Transposed


def product(x: Float[Array, "*B D"], weight: Matrix) -> Float[Array, "*B F"]:
    """x @ weight, in the dtype of x.

    Of a LowRank, both terms are products of numbers in that dtype, added up in float32, and their sum is rounded once:
    rounded apart, a small second term would vanish beside the first. Gradients are products in the dtype of x. What is
    packed is made whole in that dtype.
    """
    if isinstance(weight, Transposed):
        return times_transposed(x, weight)
    weight = whole(weight, x.dtype)
    if not isinstance(weight, LowRank):
        return _times(x, weight)
    leading = "abcdefgh"[: x.ndim - 1]
    return einsum(f"{leading}i,io->{leading}o", x, weight)


def products(x: Float[Array, "*B D"], *weights: Matrix | Joined) -> list[Float[Array, "*B F"]]:
    """`product` of x with several matrices; in one where they are joined."""
    first = weights[0]
    if isinstance(first, Joined):
        return jnp.split(product(x, first.w), list(itertools.accumulate(first.widths))[:-1], axis=-1)
    return [product(x, weight) for weight in weights]


@jax.custom_vjp
def _times(x: Float[Array, "*B D"], weight: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    return x @ weight


def _times_backward(saved, d_out):
    """On a CPU over one axis of rows: of a sum over several, XLA makes a transposed copy of all that is summed."""
    x, weight = saved
    apart = lambda x, d_out: jax.vjp(jnp.matmul, x, weight)[1](d_out)

    def flat(x, d_out):
        d_x, d_weight = apart(x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1]))
        return d_x.reshape(x.shape), d_weight

    return jax.lax.platform_dependent(x, d_out, cpu=flat, default=apart)


_times.defvjp(lambda x, weight: (x @ weight, (x, weight)), _times_backward)


def split_product(
    x: Float[Array, "B T D"], weight: Matrix, heads: int, widths: Sequence[int]
) -> list[Float[Array, "B T N K"]]:
    """`product` by head, taken apart along heads into parts of these widths: for few tokens."""
    ends = list(itertools.accumulate(widths))
    return jnp.split(product(x, weight).reshape(*x.shape[:2], heads, -1), ends[:-1], axis=-1)


def split_columns(
    x: Float[Array, "B T D"], weight: Matrix, heads: int, widths: Sequence[int]
) -> list[Float[Array, "B T N K"]]:
    """The same of more tokens than the matrix has rows, where it is less work to take the matrix apart."""
    if isinstance(weight, Transposed) or x.shape[0] * x.shape[1] <= weight.shape[0]:
        return split_product(x, weight, heads, widths)
    by_head = columns(whole(weight, x.dtype), lambda w: w.reshape(w.shape[0], heads, -1))
    parts = [slice(end - width, end) for width, end in zip(widths, itertools.accumulate(widths), strict=True)]
    # by head, as attention reads queries: a TPU lays a product out as it is written
    of_part = lambda part: einsum("btd,dnk->bntk", x, columns(by_head, lambda w: w[..., part])).swapaxes(1, 2)
    return list(map(of_part, parts))


def einsum(spec: str, x: Float[Array, "..."], weight: Matrix) -> Float[Array, "..."]:
    """jnp.einsum of x and a weight, whose rows are its first letter in `spec`; in the dtype of x, as `product` is.

    A sum over rows goes through a and then b, one over columns through b and then a.
    """
    weight = whole(weight, x.dtype)
    if not isinstance(weight, LowRank):
        return jnp.einsum(spec, x, weight)
    of_x, of_w, out = spec.replace("->", ",").split(",")
    factors = [(of_w[0] + "z", weight.a), ("z" + of_w[1:], weight.b)]
    (of_first, first), (of_second, second) = factors if of_w[0] not in out else factors[::-1]
    between = "".join(letter for letter in of_x if letter in out) + "z"
    low = exact(f"{of_x},{of_first}->{between}", x, first).astype(x.dtype)
    return summed(exact(spec, x, weight.w), exact(f"{between},{of_second}->{out}", low, second), weight.scale, x.dtype)


def whole(weight: Matrix, dtype: Any) -> Float[Array, "..."] | LowRank:
    """A weight with what is packed of it made whole, in a dtype that others do not take on."""
    if isinstance(weight, LowRank):
        return LowRank(w=whole(weight.w, dtype), a=weight.a, b=weight.b, scale=weight.scale)
    return dense(weight, dtype) if isinstance(weight, Packed) else weight


def columns(weight: Float[Array, "..."] | LowRank, change: Callable[[jax.Array], jax.Array]) -> Matrix:
    """A weight, of which nothing is packed, with `change` of its columns, which leaves rows as they are."""
    if not isinstance(weight, LowRank):
        return change(weight)
    return LowRank(w=change(weight.w), a=weight.a, b=change(weight.b), scale=weight.scale)


def summed(high: Float[Array, "*S"], low: Float[Array, "*S"], scale: float, dtype: Any) -> Float[Array, "*S"]:
    """high + scale low, of float32 terms, rounded once."""
    return (high + scale * low).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def exact(spec: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """jnp.einsum in float32, whatever the operands' dtype; its gradient is of products in their own dtype."""
    return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)


def _exact_forward(spec, x, weight):
    return exact(spec, x, weight), (x, weight)


def _exact_backward(spec, saved, d_out):
    out, back = jax.vjp(partial(jnp.einsum, spec), *saved)
    return back(d_out.astype(out.dtype))


exact.defvjp(_exact_forward, _exact_backward)


def apart(tree: Any) -> tuple[Any, Any]:
    """What of a tree of matrices is frozen, the w of each LowRank, and the rest: what gradients are wanted of."""
    frozen = jax.tree.map(lambda leaf: leaf.w if _is_low_rank(leaf) else None, tree, is_leaf=_is_low_rank)
    without = lambda leaf: LowRank(w=None, a=leaf.a, b=leaf.b, scale=leaf.scale) if _is_low_rank(leaf) else leaf
    return frozen, jax.tree.map(without, tree, is_leaf=_is_low_rank)


def together(frozen: Any, rest: Any) -> Any:
    """The tree that `apart` took apart."""
    with_w = lambda leaf, w: LowRank(w=w, a=leaf.a, b=leaf.b, scale=leaf.scale) if _is_low_rank(leaf) else leaf
    return jax.tree.map(with_w, rest, frozen, is_leaf=_is_low_rank)


def _is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)
