"""Grouped products with packed matrices as a TPU kernel, which makes them whole nowhere.

XLA fuses the scales of int8 into a product. Those of fp8 and int4, which change along the rows that are summed over, it
writes to memory for every number first: 8 bytes beside the one that is read. Here a grid step reads the codes of a
group's columns once, and 128 rows of them at a time meet the rows of lhs and their scales.

jax's megablox, whose order of tiles this has, and tokamax's kernels do not fit: the former takes plain matrices, the
latter, at 0.0.12, one scale along the columns or blocks that divide the matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.packed import Packed, nbytes

_STEP = 128  # rows that are made whole at once, and lanes
_CODES = 2**21  # bytes of a tile of codes at most, twice in VMEM
_ROWS = 128  # of lhs in a tile at most


def packed_matmul(
    lhs: Float[Array, "W K"],
    rhs: Packed,
    sizes: Int[Array, "G"],
    dtype: DTypeLike | None = None,
    *,
    layer: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "W N"]:
    """`ops.experts.grouped_matmul` of packed matrices [G, K, N] that `fits`, on TPU.

    Codes are exact in the dtype of lhs, bfloat16 or float32. Sums over 128 rows are scaled in float32 and added up so;
    nothing else is rounded. It has no gradient, and XLA cannot partition it.

    Args:
        lhs: rows sorted by group.
        rhs: one matrix a group.
        sizes: rows of each group.
        dtype: of the result; None is that of lhs.
        layer: how many of the groups can have rows, one layer's of a stack; None is all. For the stated cost alone.
        interpret: run as plain JAX, on any device; or as jax's model of a TPU.

    Returns:
        Rows past the last group are undefined.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    (W, K), (G, _, N) = lhs.shape, rhs.shape
    rows = min(_ROWS, -(-W // 16) * 16)
    padded = -(-W // rows) * rows
    columns = _columns(rhs)
    order, visits = make_group_metadata(
        group_sizes=sizes.astype(jnp.int32), m=padded, tm=rows, start_group=jnp.int32(0), num_nonzero_groups=G,
        visit_empty_groups=False,
    )  # fmt: skip
    blocks, wide = rhs.scale.shape[-2:], rhs.block[1] > 1
    of_scale = (1, blocks[0], blocks[1] if wide else columns)
    out = dtype or lhs.dtype
    call = pl.pallas_call(
        functools.partial(_kernel, block=rhs.block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(N // columns, visits),
            in_specs=[
                pl.BlockSpec((rows, K), lambda n, v, starts, group, tile: (tile[v], 0)),
                pl.BlockSpec((1, K, columns), lambda n, v, starts, group, tile: (group[v], 0, n)),
                pl.BlockSpec(of_scale, lambda n, v, starts, group, tile: (group[v], 0, 0 if wide else n)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda n, v, starts, group, tile: (tile[v], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((padded, N), out),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(lhs, rhs, (layer or G) / G, jnp.dtype(out).itemsize),
        interpret=interpret,
        name="packed_matmul",
    )
    return call(*order, jnp.pad(lhs, ((0, padded - W), (0, 0))), rhs.codes, rhs.scale)[:W]


def fits(rhs: Packed) -> bool:
    """Whether the kernel takes such matrices: whole lanes of columns, and rows whose scales change at whole steps."""
    rows, columns = rhs.shape[-2:]
    return rows % _STEP == 0 and columns % _STEP == 0 and (rhs.block[0] % _STEP == 0 or rhs.block[0] >= rows)


def _columns(rhs: Packed) -> int:
    """Of a tile: as many as divide the matrix and have room."""
    rows, columns = rhs.shape[-2:]
    most = max(_STEP, _CODES // rows)
    return max(n for n in range(_STEP, columns + 1, _STEP) if columns % n == 0 and n <= most)


def _cost(lhs: jax.Array, rhs: Packed, share: float, itemsize: int) -> pl.CostEstimate:
    """Of one layer's groups, a share of all; but of all codes, since `plan.hlo_bytes` takes other layers' off."""
    (W, K), N = lhs.shape, rhs.shape[-1]
    read = nbytes(rhs.codes) + round(nbytes(rhs.scale) * share) + nbytes(lhs)
    return pl.CostEstimate(flops=2 * W * K * N, bytes_accessed=read + W * N * itemsize, transcendentals=0)


def _kernel(starts, group, tile, lhs, codes, scale, out, *, block):
    visit, n = pl.program_id(1), pl.program_id(0)
    rows, columns = out.shape
    scales = scale[0].astype(jnp.float32)
    if block[1] > 1:  # a column of scales for so many of the matrix: spread by a product with ones and zeros
        shape = (scales.shape[1], columns)
        column = n * columns + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        ones = (jax.lax.div(column, block[1]) == jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)
        scales = jnp.dot(scales, ones, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    total = jnp.zeros((rows, columns), jnp.float32)
    for first in range(0, lhs.shape[1], _STEP):
        at = first // block[0]
        part = lhs[:, first : first + _STEP]
        plain = codes[0, first : first + _STEP].astype(part.dtype)  # of 4 or 8 bits, exact in bfloat16
        total += jnp.dot(part, plain, preferred_element_type=jnp.float32) * scales[at : at + 1]
    row = tile[visit] * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    own = (row >= starts[group[visit]]) & (row < starts[group[visit] + 1])
    out[...] = jnp.where(own, total, out[...].astype(jnp.float32)).astype(out.dtype)
