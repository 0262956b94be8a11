"""Attention of a few new tokens a row over paged caches, as a TPU kernel that reads the row's blocks once.

A grid step is a row, and costs what the row sees. A tile of its blocks is copied into VMEM by their ids in the table;
while it is worked on, the next tile is on its way, after a row's last one that of the next row. Each tile adds to the
running maximum, sum and weighted values of every query, so that scores are never written to memory.

Latent attention is that of one head whose keys have two parts, latents and rotated keys, and whose values are the
first. jax's own kernels do not fit: paged_attention takes one query a row and lets NaN past the length through, and
ragged_paged_attention wants keys and values interleaved in one pool.

A tile of R1's 512 keys is 1,420 instructions by the compiler's schedule for v5e. Starting its copies is 310 more in
blocks of 16 tokens, 95 in blocks of 64. Given as operands of the kernel instead, with index maps of the table, the
blocks take 4,400 and 830.

Of a pool of codes, what is multiplied by their scales is scores and weights, [queries, keys], not codes. A product with
rows of 0 and a 1 takes the scales, a row a token, out of their columns and lays them along the keys.

Source: arXiv 2309.06180 (paged attention), arXiv 1805.02867 (online softmax).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.codes import SCALE, is_coded
from deepseek_jax.ops.pool import KVCache, LatentCache, Pool

KEYS_AT_ONCE = 512  # of a tile at most
_LANES = 128
_CODED_BLOCK = 16  # tokens
_BUFFERS = 4 * 2**20  # bytes of VMEM for keys and values, of the 16 MiB that v5e allows a kernel
_SUBLANES = 8  # a group has as many heads, or a multiple: XLA then merges them with the queries without a copy
_LOWEST = jnp.finfo(jnp.float32).min  # unlike -inf, may be taken from itself


def latent_decode(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    pool: LatentCache,
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    scale: float,
    *,
    keys_at_once: int = KEYS_AT_ONCE,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T N C"]:
    """`ops.paged_attention.latent_paged` on TPU, for as few queries a row as decoding has.

    Blocks that no query of a row sees are not read; what lies in the last one past them, NaN even, reaches nothing.
    Has no gradient. XLA cannot partition it: see `parallel.attention`.

    Args:
        q_latent, q_rope: bfloat16 or float32; taken in the cache's dtype, bfloat16 where it is codes, which the weights
            are cast to as well.
        pool: that `fits`.
        table_BM, seen_BT, scale: as of `latent_paged`.
        keys_at_once: of a tile, rounded down to whole blocks, one at least.
        interpret: run as plain JAX, on any device; or as jax's model of a TPU.

    Returns:
        In the queries' dtype; maximum, sum and weighted latents are float32. A query that sees nothing gets zeros.
    """
    c, r = pool.c[:, None], pool.r[:, None]
    wide = jnp.pad(q_rope, ((0, 0),) * 3 + ((0, r.shape[-1] - q_rope.shape[-1]),))
    coded = _Scales(pool=1, first=r.shape[-1] - 1, of_values=0) if is_coded(c.dtype) else None
    of_rows = table_BM, seen_BT, scale, keys_at_once, interpret
    return _decode([q_latent, wide], [c, r], coded, *of_rows, name="latent_decode")


def grouped_decode(
    q: Float[Array, "B T N K"],
    pool: KVCache,
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    scale: float,
    *,
    keys_at_once: int = KEYS_AT_ONCE,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T N K"]:
    """`ops.paged_attention.grouped_paged` on TPU, likewise.

    Args:
        q: bfloat16 or float32; taken in the cache's dtype, bfloat16 where it is codes, which the weights are cast to as
            well.
        pool: that `fits`.
        table_BM, seen_BT, scale, keys_at_once, interpret: as of `latent_decode`.
    """
    coded = None if pool.scale is None else _Scales(pool=2, first=0, of_values=pool.k.shape[1])
    of_rows = table_BM, seen_BT, scale, keys_at_once, interpret
    return _decode([q], jax.tree.leaves(pool), coded, *of_rows, name="grouped_decode")


def fits(pool: Pool) -> bool:
    """Whether a pool's arrays [..., K] lie in a TPU's memory as the kernel reads them: K fills whole rows of 128 lanes.

    XLA lays other widths out otherwise, and would copy the whole pool for each call. Store them wide, with zeros, or
    take the plain path. Codes in blocks of 64 tokens XLA lays out in other tiles to write to them, and copies the pool
    too; in blocks of 16 it does not. What lies between has not been compiled.
    """
    read = pool._replace(index=None) if isinstance(pool, LatentCache) else pool
    alike = not is_coded(pool[0].dtype) or pool[0].shape[-2] <= _CODED_BLOCK
    return alike and all(of.shape[-1] % _LANES == 0 for of in jax.tree.leaves(read))


class _Scales(NamedTuple):
    """Where the scales of codes are: of the heads' keys in columns from `first` of a pool, of values so many later."""

    pool: int
    first: int
    of_values: int


class _Plan(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
        T, G, s: queries a row, heads of the pools, tokens a block.
        heads: of the queries for each of the pools', some perhaps of zeros.
        blocks: of a tile.
        values: which pool has them.
        scale: of the scores.
        coded: where the pools are codes, their scales.
    """

    T: int
    G: int
    s: int
    heads: int
    blocks: int
    values: int
    scale: float
    coded: _Scales | None

    @property
    def keys(self) -> int:
        """Of a tile."""
        return self.blocks * self.s

    @property
    def queries(self) -> int:
        """Of a row and a head of the pools."""
        return self.T * self.heads


def _decode(queries, pools, coded, table_BM, seen_BT, scale, keys_at_once, interpret, *, name):
    """Queries [B, T, N, K] in one or two parts meet as many pools [P, G, s, K]; values are the second or the first."""
    (B, T, N, _), (_, G, s, _) = queries[0].shape, pools[0].shape
    heads = -(-(N // G) // _SUBLANES) * _SUBLANES
    blocks, values = _tile(pools, table_BM.shape[1], keys_at_once), 2 - len(queries)
    plan = _Plan(T=T, G=G, s=s, heads=heads, blocks=blocks, values=values, scale=scale, coded=coded)
    width, dtype = pools[values].shape[-1], queries[0].dtype
    call = pl.pallas_call(
        functools.partial(_attend_row, plan),
        grid_spec=_grid(plan, table_BM.shape, [q.shape[-1] for q in queries], pools),
        out_shape=jax.ShapeDtypeStruct((B, G, plan.queries, width), dtype),
        # Checks of every copy's bounds would take three times as long as to start it.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=_cost(queries, pools, table_BM.shape[1], width),
        interpret=interpret,
        name=name,
    )
    table_B1M = table_BM[:, None].astype(jnp.int32)
    grouped = [_grouped(q, G, heads).astype(SCALE if coded else pools[0].dtype) for q in queries]
    seen = jnp.minimum(seen_BT, table_BM.shape[1] * s).reshape(-1).astype(jnp.int32)
    out = call(seen, table_B1M, table_B1M, grouped, pools)
    return _ungrouped(out, N, heads)


def _tile(pools, M: int, keys_at_once: int) -> int:
    """How many blocks make so many keys, or what two buffers of them have room for."""
    of_block = sum(pool[0].size * pool.dtype.itemsize for pool in pools)
    return max(1, min(M, keys_at_once // pools[0].shape[-2], _BUFFERS // (2 * of_block)))


def _grid(plan: _Plan, table, widths, pools):
    """Rows in two halves, for the two cores of v5p; each with its own row of the table and the next one."""
    B, M = table
    cores = 2 if B % 2 == 0 else 1
    row = lambda core, step, *_: core * (B // cores) + step
    of_row = lambda width: pl.BlockSpec((None, plan.G, plan.queries, width), lambda *at: (row(*at), 0, 0, 0))
    of_table = lambda ahead: pl.BlockSpec(
        (None, 1, M), lambda *at: (jnp.minimum(row(*at) + ahead, B - 1), 0, 0), memory_space=pltpu.SMEM
    )
    width = pools[plan.values].shape[-1]
    state = [pltpu.VMEM((plan.G, plan.queries, width), jnp.float32) for width in (1, 1, width)]
    buffers = [pltpu.VMEM((2, plan.blocks, *pool.shape[1:]), pool.dtype) for pool in pools]
    in_place = [pl.BlockSpec(memory_space=pl.ANY) for _ in pools]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cores, B // cores),
        in_specs=[of_table(0), of_table(1), [of_row(width) for width in widths], in_place],
        out_specs=of_row(width),
        scratch_shapes=[state, buffers, pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2,))],
    )


def _grouped(q, G, heads):
    """[B, T, N, K] to [B, G, T * heads, K], with zeros for the heads that a group lacks."""
    B, T, N, K = q.shape
    grouped = jnp.moveaxis(q.reshape(B, T, G, N // G, K), 2, 1)
    return jnp.pad(grouped, ((0, 0),) * 3 + ((0, heads - N // G), (0, 0))).reshape(B, G, T * heads, K)


def _ungrouped(out, N, heads):
    """[B, G, T * heads, K] to [B, T, N, K]."""
    B, G, _, K = out.shape
    return jnp.moveaxis(out.reshape(B, G, -1, heads, K)[:, :, :, : N // G], 1, 2).reshape(B, -1, N, K)


def _cost(queries, pools, M, width):
    """What XLA's scheduler is told, of full tables: keys are read once, as are queries; the output is written."""
    (B, T, N, _), s = queries[0].shape, pools[0].shape[-2]
    of_query = sum(q.shape[-1] for q in queries) + width
    of_cache = sum(B * M * pool[0].size * pool.dtype.itemsize for pool in pools)
    return pl.CostEstimate(
        flops=2 * B * T * N * M * s * of_query,
        bytes_accessed=of_cache + B * T * N * of_query * queries[0].dtype.itemsize,
        transcendentals=B * T * N * M * s,
    )


def _attend_row(plan: _Plan, seen, table, next_table, queries, pools, out, state, buffers, slot, arrived):
    """One grid step. From step to step goes which half of the buffers, or slot, the row's first tile comes into."""
    step, steps = pl.program_id(1), pl.num_programs(1)
    row = pl.program_id(0) * steps + step
    sees = lambda row: functools.reduce(jnp.maximum, (seen[row * plan.T + t] for t in range(plan.T)))
    most, first = sees(row), jnp.where(step == 0, 0, slot[0])
    tiles = pl.cdiv(most, plan.keys)
    start = functools.partial(_copy_tile, plan, lambda copy: copy.start(), pools, buffers, arrived)
    wait = functools.partial(_copy_tile, plan, lambda copy: copy.wait(), pools, buffers, arrived)
    top, total, summed = state
    top[...] = jnp.full_like(top, _LOWEST)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)

    @pl.when((step == 0) | (sees(jnp.maximum(row - 1, 0)) == 0))  # otherwise the row before has started it
    def _():
        start(table, most, 0, first)

    def attend(tile, _):
        here = (first + tile) % 2

        @pl.when(tile + 1 < tiles)
        def _():
            start(table, most, tile + 1, 1 - here)

        @pl.when((tile + 1 == tiles) & (step + 1 < steps))
        def _():
            start(next_table, sees(row + 1), 0, 1 - here)

        wait(table, most, tile, here)
        limits = [seen[row * plan.T + t] for t in range(plan.T)]
        _attend_tile(plan, tile * plan.keys, limits, queries, [buffer.at[here] for buffer in buffers], state)
        return ()

    jax.lax.fori_loop(0, tiles, attend, ())
    slot[0] = (first + tiles) % 2
    out[...] = (summed[...] / jnp.where(total[...] == 0, 1.0, total[...])).astype(out.dtype)


def _copy_tile(plan: _Plan, act, pools, buffers, arrived, table, most, tile, slot):
    """Starts the copies of a tile's blocks, or waits for them: of those that hold any of the row's `most` keys."""
    blocks = jnp.minimum(plan.blocks, pl.cdiv(most, plan.s) - tile * plan.blocks)

    def copy(j, _):
        for pool, buffer in zip(pools, buffers, strict=True):
            block = pool.at[table[0, tile * plan.blocks + j]]
            act(pltpu.make_async_copy(block, buffer.at[slot, j], arrived.at[slot]))
        return ()

    @pl.when(blocks == plan.blocks)
    def _():
        for j in range(plan.blocks):  # half the instructions of the loop
            copy(j, ())

    @pl.when(blocks < plan.blocks)
    def _():
        jax.lax.fori_loop(0, blocks, copy, ())


def _attend_tile(plan: _Plan, start, limits, queries, tile, state):
    """Adds the keys from position `start`, with a mask where a query does not see them all; limits are the queries'."""

    def add(mask, live):
        scales = None if plan.coded is None else _scales(plan, tile[plan.coded.pool])
        for g in range(plan.G):
            parts = [part[:, g].reshape(plan.keys, part.shape[-1]) for part in tile[:2]]
            scores = [_product(q[g], _numbers(part), contracted=1) for q, part in zip(queries, parts, strict=False)]
            of_keys, of_values = (None, None) if scales is None else (scales[g], scales[plan.coded.of_values + g])
            scores[0] = scores[0] if of_keys is None else scores[0] * of_keys
            values = _numbers(parts[plan.values])
            values = values if live is None else jnp.where(live, values, 0)
            _add(sum(scores[1:], scores[0]) * plan.scale, values, of_values, mask, [of.at[g] for of in state])

    def position(shape, axis):
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def limit():
        """Of each row of a head's product, [T * heads, 1]."""
        at, of_row = jax.lax.broadcasted_iota(jnp.int32, (plan.queries, 1), 0), limits[0]
        for t in range(1, plan.T):
            of_row = jnp.where(at >= t * plan.heads, limits[t], of_row)
        return of_row

    least, most = functools.reduce(jnp.minimum, limits), functools.reduce(jnp.maximum, limits)

    @pl.when(start + plan.keys <= least)
    def _():
        add(None, None)

    # Values that no query sees are masked as well: a weight of 0 times NaN is NaN.
    @pl.when(start + plan.keys > least)
    def _():
        add(position((plan.queries, plan.keys), 1) < limit(), position((plan.keys, 1), 0) < most)


def _scales(plan: _Plan, rows) -> list[jax.Array]:
    """Those of a tile's codes by head, of keys and then of values, each [1, keys] in float32; values may have keys'."""
    rows = rows[:, 0].reshape(plan.keys, rows.shape[-1])
    count = plan.coded.of_values + plan.G
    shape = (-(-count // _SUBLANES) * _SUBLANES, rows.shape[-1])
    column, row = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
    taken = _product(jnp.where(column == plan.coded.first + row, 1.0, 0.0).astype(rows.dtype), rows, contracted=1)
    return [taken[n : n + 1] for n in range(count)]


def _numbers(part):
    """Codes as bfloat16, which has them all."""
    return part.astype(SCALE) if is_coded(part.dtype) else part


def _add(scores, values, of_values, mask, state):
    """The online softmax: scores [queries, keys] and values [keys, width] join what is kept of a head.

    Values may be codes, of which `of_values` [1, keys] are the scales.
    """
    top, total, summed = state
    scores = scores if mask is None else jnp.where(mask, scores, _LOWEST)
    new_top = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    kept, weights = jnp.exp(top[...] - new_top), jnp.exp(scores - new_top)
    scaled = weights if of_values is None else weights * of_values
    weights, scaled = (of if mask is None else jnp.where(mask, of, 0) for of in (weights, scaled))
    total[...] = kept * total[...] + jnp.sum(weights, axis=1, keepdims=True)
    summed[...] = kept * summed[...] + _product(scaled.astype(values.dtype), values, contracted=0)
    top[...] = new_top


def _product(left, right, contracted):
    """left [N, x] with the axis of `right` that is its x, summed up in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
