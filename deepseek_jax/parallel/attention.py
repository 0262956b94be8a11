"""Attention over the pools of a cache, each read and written by the device that holds it.

On a mesh a device has the blocks of its own sequences, and block numbers count within them; nothing is exchanged, but
for what new tokens of a prompt need of earlier ones. Nothing here has a gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from deepseek_jax.ops import indexer
from deepseek_jax.ops import paged_attention as paged
from deepseek_jax.ops.pool import CacheView, KVCache, LatentCache, Pool, as_one_layer
from deepseek_jax.sharding import Layout

_KEYS_AT_ONCE = 256  # that many new tokens read of the pool at a time


def write(pool: Pool, new: Pool, view: CacheView, layer_idx: jax.Array | None, layout: Layout) -> Pool:
    """A pool with the entries of new tokens.

    Args:
        pool: of a layer or of a stack of layers.
        new: entries [B, T, ...], or [B, G, T, K] of grouped-query attention.
        view: where the tokens stand; padding is not written.
        layer_idx: the layer's in the stack; None where the pool is of one layer.
        layout: whose mesh, if there is one, divides B.
    """

    def local(pool, new, view, layer_idx):
        of_one, own = as_one_layer(pool, view, layer_idx)
        return jax.tree.map(lambda old, of: of.reshape(old.shape), pool, of_one.write(new, own))

    with jax.named_scope("cache_write"):
        cuts = lambda of: (of.pool, of.entries, of.sequences, _SAME, of.pool)
        return _where_it_lies(local, pool, layout, cuts)(pool, new, view, layer_idx)


def laid_pool(pool: Pool, layout: Layout) -> Pool:
    """A pool where its blocks lie, so that it comes out of every program alike, and none is compiled for it anew."""
    cuts = _Cuts.of(pool, layout)
    if cuts is None:
        return pool
    return jax.lax.with_sharding_constraint(pool, NamedSharding(layout.mesh, cuts.pool))


def latent_attention(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    pool: LatentCache,
    view: CacheView,
    *,
    layer_idx: jax.Array | None,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """Latent attention of new tokens over all keys that they see, [B, T, N, C] in the queries' dtype.

    On TPU the kernel `ops.kernels.paged_decode.latent_decode`, elsewhere `ops.paged_attention.latent_paged`.

    Args:
        q_latent_BTNC: queries that meet the latents.
        q_rope_BTNR: rotated queries.
        pool: of a layer or of a stack; on TPU its rotated keys are 128 wide, which rows of 64 take up anyway.
        view: where the tokens stand, whose entries are written.
        layer_idx: the layer's in the stack.
        scale: of the scores.
        layout: whose mesh, if there is one, divides B by "cache_batch".
    """

    def local(pool, q_latent, q_rope, view, layer_idx):
        own, view = as_one_layer(pool, view, layer_idx)
        return _attend("latent", (q_latent, q_rope), own, view, scale)

    cuts = lambda of: (of.pool, of.queries, of.queries, of.sequences, _SAME, of.queries)
    run = _where_it_lies(local, pool, layout, cuts)
    return run(pool, q_latent_BTNC, q_rope_BTNR, view, layer_idx)


def chosen_attention(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    index: tuple[jax.Array, jax.Array],
    pool: LatentCache,
    view: CacheView,
    *,
    count: int,
    layer_idx: jax.Array | None,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """`latent_attention` where a query reads no more than the `count` keys that V3.2's indexer likes best.

    Args:
        index: the indexer's queries [B, T, J, Z] and the weights of their heads [B, T, J].
        count: of keys; the table has room for more.
        q_latent_BTNC, q_rope_BTNR, pool, view, layer_idx, scale, layout: as of `latent_attention`.
    """

    def local(pool, q_latent, q_rope, index, view, layer_idx):
        own, view = as_one_layer(pool, view, layer_idx)
        at = view.table_BM, view.seen_BT
        with jax.named_scope("indexer"):
            chosen = indexer.choose_paged(*index, own.index, *at, count)
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        return paged.chosen_paged(q, own, chosen, *at, scale)

    cuts = lambda of: (of.pool, of.queries, of.queries, of.sequences, of.sequences, _SAME, of.queries)
    run = _where_it_lies(local, pool, layout, cuts)
    return run(pool, q_latent_BTNC, q_rope_BTNR, index, view, layer_idx)


def grouped_attention(
    q_BTNK: jax.Array,
    pool: KVCache,
    view: CacheView,
    *,
    layer_idx: jax.Array | None,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """Grouped-query attention of new tokens over all keys that they see, [B, T, N, K].

    On TPU the kernel `ops.kernels.paged_decode.grouped_decode`, elsewhere `ops.paged_attention.grouped_paged`.

    Args:
        q_BTNK: queries.
        pool, view, layer_idx, scale, layout: as of `latent_attention`; the mesh divides B by "batch", N by "tensor".
    """

    def local(pool, q, view, layer_idx):
        own, view = as_one_layer(pool, view, layer_idx)
        return _attend("grouped", (q,), own, view, scale)

    cuts = lambda of: (of.pool, of.queries, of.sequences, _SAME, of.queries)
    return _where_it_lies(local, pool, layout, cuts)(pool, q_BTNK, view, layer_idx)


def _attend(kind: Literal["latent", "grouped"], queries, pool: Pool, view: CacheView, scale: float) -> jax.Array:
    """On a TPU by its kernel, where the pool lies as it reads it; elsewhere, and else, by the plain path."""
    arguments = *queries, pool, view.table_BM, view.seen_BT
    plain = partial(paged.latent_paged if kind == "latent" else paged.grouped_paged, scale=scale)

    def by_kernel(*arguments):
        from deepseek_jax.ops.kernels import paged_decode  # Pallas is slow to import

        if not paged_decode.fits(pool):
            return plain(*arguments)
        kernel = paged_decode.latent_decode if kind == "latent" else paged_decode.grouped_decode
        return kernel(*arguments, scale=scale)

    return jax.lax.platform_dependent(*arguments, tpu=by_kernel, default=plain)


def over_pool(
    q_BTNK: jax.Array,
    own: tuple[jax.Array, jax.Array],
    view: CacheView,
    of_pool: Callable[[jax.Array], Sequence[jax.Array]],
    pool: Pool,
    scale: float,
) -> jax.Array:
    """Attention of new tokens over what their sequences had before them and among themselves, [B, T, N, H].

    Args:
        q_BTNK: queries of the new tokens.
        own: what they attended to among themselves, and the logarithms of its sums, of `causal_attention`.
        view: where all new tokens stand.
        of_pool: keys and values of the blocks from a place in the tables on, as many as `read_blocks` reads.
        pool: whose blocks they are.
        scale: of the scores.
    """
    B, T = q_BTNK.shape[:2]
    before_B, span = view.before_B(), _at_once(pool) * block_size(pool)

    def add(trip, carried):
        inside = trip * span + jnp.arange(span) < before_B[:, None]
        mask = jnp.broadcast_to(inside[:, None], (B, T, span))
        return paged.join(carried, paged.attend_partial(q_BTNK, *of_pool(trip * _at_once(pool)), mask, scale))

    out, log_sum = own
    trips = -(-jnp.max(before_B) // span)

    def joined():
        first = paged.Partial(log_sum, jnp.ones_like(log_sum), out.astype(jnp.float32))
        return paged.finish(jax.lax.fori_loop(0, trips, add, first), out.dtype)

    with jax.named_scope("earlier_blocks"):  # by which plan.cost_analysis knows it
        return jax.lax.cond(trips > 0, joined, lambda: out)


def read_blocks(
    pool: Pool, view: CacheView, layer_idx: jax.Array | None, first: jax.Array, dtype: DTypeLike, layout: Layout
) -> Pool:
    """The entries of consecutive blocks of every sequence, as entries of new tokens are: from block `first` on."""
    count = _at_once(pool)

    def local(pool, view, layer_idx, first):
        own, view = as_one_layer(pool, view, layer_idx)
        table = jnp.pad(view.table_BM, ((0, 0), (0, -view.table_BM.shape[1] % count)))
        ids = jax.lax.dynamic_slice_in_dim(table, first, count, axis=1)
        entries = jax.tree.map(lambda of: _joined(of[ids]), own)
        return jax.tree.map(lambda of: of.astype(dtype), entries.decoded())

    cuts = lambda of: (of.pool, of.sequences, _SAME, _SAME, of.entries)
    return _where_it_lies(local, pool, layout, cuts)(pool, view, layer_idx, first)


def _joined(blocks: jax.Array) -> jax.Array:
    """[B, m, s, C] to [B, m s, C], and [B, m, G, s, K] to [B, G, m s, K]."""
    if blocks.ndim == 5:
        blocks = jnp.moveaxis(blocks, 1, 2)
        return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])
    return blocks.reshape(blocks.shape[0], -1, blocks.shape[-1])


def block_size(pool: Pool) -> int:
    """Tokens of a block."""
    return jax.tree.leaves(pool)[0].shape[-2]


def pooled_keys(pool: Pool, view: CacheView) -> int:
    """How many tokens a table has room for."""
    return view.table_BM.shape[1] * block_size(pool)


def _at_once(pool: Pool) -> int:
    return max(1, _KEYS_AT_ONCE // block_size(pool))


class _Cuts(NamedTuple):
    """How a pool, entries of new tokens, queries, and anything else by sequence are cut on the mesh."""

    pool: PartitionSpec
    entries: PartitionSpec
    queries: PartitionSpec
    sequences: PartitionSpec

    @classmethod
    def of(cls, pool: Pool, layout: Layout) -> "_Cuts | None":
        """None without a mesh."""
        if layout.mesh is None:
            return None
        spec = lambda *axes: layout.sharding(*axes).spec
        by_head = isinstance(pool, KVCache)
        one = ("batch", "kv_heads") if by_head else ("cache_batch",)
        stacked = jax.tree.leaves(pool)[0].ndim - (4 if by_head else 3)
        queries = ("batch", None, "tensor") if by_head else one
        return cls(spec(*("layer",) * stacked, *one), spec(*one), spec(*queries), spec(one[0]))


def _where_it_lies(local: Callable, pool: Pool, layout: Layout, given: Callable[[_Cuts], tuple]) -> Callable:
    """A function on each device with its own part of the arguments; `given` says how they and the result are cut."""
    cuts = _Cuts.of(pool, layout)
    if cuts is None:
        return local
    *arguments, result = given(cuts)
    # Unchecked: a kernel does not say over which axes its result differs; over `sequences`, as all that it reads.
    return jax.shard_map(local, mesh=layout.mesh, in_specs=tuple(arguments), out_specs=result, check_vma=False)


_SAME = PartitionSpec()  # on all devices
