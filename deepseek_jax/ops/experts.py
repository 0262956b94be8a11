"""Dropless expert computation: rows sorted by expert, then one matrix product a group.

No row is dropped and no capacity is set. `jax.lax.ragged_dot` is a native kernel on TPU but dense over all
experts on CPU and GPU, where its cost grows with their number; there a loop over tiles of rows takes its place.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.low_rank import LowRank, Matrix, summed, whole
from deepseek_jax.ops.packed import Packed

TILES = "tiles_"  # names a loop over so many tiles, for the cost analysis of a compiled program


def expert_mlp(
    x: Float[Array, "W D"],
    weights: Float[Array, "W A"],
    experts: Int[Array, "W A"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
) -> Float[Array, "W D"]:
    """sum_a weights[:, a] * SwiGLU_{experts[:, a]}(x), every row through all its experts.

    Args:
        x: rows, one a token.
        weights: float32; see `weighed_swiglu`.
        experts: int32. Of a whole stack of L layers all are of one layer, l E to (l + 1) E - 1. A number past the
            last expert is nobody's: it costs nothing and adds nothing.
        gate, up, down: the experts' matrices, [*L, E, D, M] twice and [*L, E, M, D].

    Returns:
        In the dtype of x.
    """
    W, A = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    groups = math.prod(gate.shape[:-2])
    sizes = jnp.sum(flat[:, None] == jnp.arange(groups), axis=0, dtype=jnp.int32)
    rows, by_row = x[order // A], weights.reshape(-1, 1)[order]
    hidden = weighed_swiglu(grouped_matmul(rows, gate, sizes), grouped_matmul(rows, up, sizes), by_row)
    filled = (jnp.arange(flat.size) < jnp.sum(sizes))[:, None]
    out = jnp.where(filled, grouped_matmul(hidden, down, sizes), 0)
    back = jnp.argsort(order)
    return jnp.sum(out[back].reshape(W, A, -1), axis=1, dtype=jnp.float32).astype(x.dtype)


def weighed_swiglu(
    gate: Float[Array, "W M"], up: Float[Array, "W M"], weights: Float[Array, "W 1"] | None
) -> Float[Array, "W M"]:
    """weights * silu(gate) * up in float32, rounded once to the dtype of up; without weights these are 1.

    DeepSeek's code weighs the experts' outputs. Here their inputs to the last product are, which is linear: weights
    then have their gradient where the hidden numbers are, and nobody computes, keeps or sends an output twice.
    """
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (hidden if weights is None else weights * hidden).astype(up.dtype)


def grouped_matmul(lhs: Float[Array, "W K"], rhs: Matrix, sizes: Int[Array, "G"]) -> Float[Array, "W N"]:
    """Rows of group e times rhs[e]; the groups lie one after another and fill all W rows.

    Args:
        lhs: rows sorted by group.
        rhs: one matrix a group, [E, K, N], or those of a stack of L layers, [L, E, K, N], of which one layer's groups
            alone have rows.
        sizes: rows of each of the G = L E groups. Rows past the last group cost nothing, and are undefined in the
            result.
    """
    if not isinstance(rhs, LowRank):
        return _grouped(lhs, rhs, sizes)
    exact = partial(_grouped, dtype=jnp.float32)
    filled = (jnp.arange(lhs.shape[0]) < jnp.sum(sizes))[:, None]
    low = jnp.where(filled, exact(lhs, rhs.a, sizes), 0).astype(lhs.dtype)
    return summed(exact(lhs, rhs.w, sizes), exact(low, rhs.b, sizes), rhs.scale, lhs.dtype)


def _grouped(lhs, rhs, sizes, dtype=None):
    """grouped_matmul of a stack of matrices, plain or packed; None is the dtype of lhs."""
    of = partial(Tiles.of, lhs.shape[0], rhs.shape[-3])
    tiled = lambda least, most: partial(tiled_matmul, tiles=of(least, most), dtype=dtype)
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[-2:]), rhs)
    # a GPU reads a group's weights once a tile, and computes sixteen rows in the time of one
    ragged = (
        partial(ragged_matmul, dtype=dtype)
        if not isinstance(rhs, Packed)
        else _packed_on_tpu(flat, rhs.shape[-3], dtype, tiled)
    )
    branches = {"tpu": ragged, "cpu": tiled(1, 128), "default": tiled(16, 512)}
    return jax.lax.platform_dependent(lhs, flat, sizes, **branches)


def _packed_on_tpu(rhs, layer, dtype, tiled):
    from deepseek_jax.ops.kernels.packed_matmul import fits, packed_matmul  # Pallas is slow to import

    return partial(packed_matmul, dtype=dtype, layer=layer) if fits(rhs) else tiled(16, 512)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ragged_matmul(lhs, rhs, sizes, dtype=None, interpret=False):
    """`grouped_matmul` of one layer's matrices as TPU has it natively, but for the gradient of rhs.

    XLA computes that one densely over all groups (4 times the work with 4 groups, 16 times with 16; jax 0.10); the
    kernel of jax's own megablox does each group's rows, which `interpret` runs as plain JAX. Gradients are products in
    the dtype of lhs, whatever that of the result.
    """
    return jax.lax.ragged_dot(lhs, rhs, sizes, preferred_element_type=dtype)


def _ragged_forward(lhs, rhs, sizes, dtype, interpret):
    return ragged_matmul(lhs, rhs, sizes, dtype, interpret), (lhs, rhs, sizes)


def _ragged_backward(dtype, interpret, saved, d_out):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # Pallas is slow to import

    lhs, rhs, sizes = saved
    d_out = d_out.astype(lhs.dtype)
    # each operand is read once for every tile of the other's width
    tiling = (math.gcd(lhs.shape[0], 512), 1024, 1024)
    d_rhs = tgmm(lhs.T, d_out, sizes, rhs.dtype, tiling=tiling, interpret=interpret)
    return ragged_matmul(d_out, jnp.swapaxes(rhs, 1, 2), sizes), d_rhs, None


ragged_matmul.defvjp(_ragged_forward, _ragged_backward)


class Tiles(NamedTuple):
    """How rows are cut into tiles: `rows` of one, and how many an even load of the groups makes."""

    rows: int
    even: int

    @classmethod
    def of(cls, rows: int, groups: int, least: int = 1, most: int = 128) -> "Tiles":
        """A power of two near a quarter of the mean group: its last tile then wastes little, however many groups.

        >>> Tiles.of(4096, 16), Tiles.of(72, 16, 16, 512)
        (Tiles(rows=64, even=64), Tiles(rows=16, even=16))
        """
        block = min(most, max(least, 1 << (max(1, rows // (4 * groups)) - 1).bit_length()))
        filled = max(1, min(rows, groups))
        return cls(block, filled * -(-rows // (filled * block)))

    def named(self):
        """Says in the program how many there are, which only the data know there."""
        return jax.named_scope(f"{TILES}{self.even}")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def tiled_matmul(lhs, rhs, sizes, tiles=None, dtype=None):
    """`grouped_matmul` of one layer's matrices as a loop over tiles of rows; only tiles that hold rows are computed.

    Of packed ones a tile's matrix is made whole. They have no gradient.

    Gradients are products in the dtype of lhs, whatever that of the result.

    A tile may reach past its group's end. The rows there are wrong when written and right in the end, because
    the tiles of the next group come later and write them again.
    """
    W, N = lhs.shape[0], rhs.shape[-1]
    tiles = tiles or Tiles.of(W, rhs.shape[0])
    block = tiles.rows
    padded = jnp.pad(lhs, ((0, block), (0, 0)))

    def body(tile, out):
        group, row, _ = locate(tile)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, block)
        product = jnp.matmul(rows, whole(rhs[group], lhs.dtype), preferred_element_type=dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, product, row, axis=0)

    locate, count = _tiles(sizes, block)
    with tiles.named():
        out = jax.lax.fori_loop(0, count, body, jnp.zeros((W + block, N), dtype or lhs.dtype))
    return out[:W]


def _forward(lhs, rhs, sizes, tiles, dtype):
    return tiled_matmul(lhs, rhs, sizes, tiles, dtype), (lhs, rhs, sizes)


def _backward(tiles, dtype, saved, d_out):
    lhs, rhs, sizes = saved
    d_out = d_out.astype(lhs.dtype)
    d_lhs = tiled_matmul(d_out, jnp.swapaxes(rhs, 1, 2), sizes, tiles)
    return d_lhs, _tiled_outer(lhs, d_out, sizes, rhs.shape, tiles).astype(rhs.dtype), None


tiled_matmul.defvjp(_forward, _backward)


def _tiled_outer(lhs, d_out, sizes, shape, tiles):
    """d rhs in float32: for each group the product lhs^T d_out over its own rows only."""
    tiles = tiles or Tiles.of(lhs.shape[0], shape[0])
    block = tiles.rows
    lhs, d_out = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, d_out))

    def body(tile, total):
        group, row, left = locate(tile)
        mine = (jnp.arange(block) < left)[:, None]
        # both: what lies past the last group may be NaN in either
        a, b = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(of, row, block), 0) for of in (lhs, d_out))
        return total.at[group].add(jnp.matmul(a.T, b, preferred_element_type=jnp.float32))

    locate, count = _tiles(sizes, block)
    with tiles.named():
        return jax.lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32))


def _tiles(sizes, block):
    """How a tile's number gives its group, its first row and how many of its group's rows are left; and the count."""
    ends = jnp.cumsum(sizes)
    per_group = -(-sizes // block)
    tile_ends = jnp.cumsum(per_group)

    def locate(tile):
        group = jnp.sum(tile_ends <= tile)
        row = ends[group] - sizes[group] + (tile - tile_ends[group] + per_group[group]) * block
        return group, row, ends[group] - row

    return locate, tile_ends[-1]
