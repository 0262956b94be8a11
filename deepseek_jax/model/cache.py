"""The cache of a model: a pool of blocks a layer, its shapes and how they lie on a mesh.

On a mesh every part of the batch has a pool of its own, and block numbers count within it. Reads and writes are made
where the pool lies, in `parallel.attention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.ops.codes import SCALE, is_coded
from deepseek_jax.ops.pool import KVCache, LatentCache, Pool
from deepseek_jax.sharding import LOCAL, Layout


class Cache(NamedTuple):
    """The pools of the layers, one a layer or, stacked, one a stack; and that of the MTP module that drafts, if any."""

    layers: tuple[Pool, ...]
    mtp: Pool | None = None


def cache_axis(config: ModelConfig) -> str:
    """The logical axis that cuts the sequences whose cache a device holds."""
    return "cache_batch" if isinstance(config.attention, MLAConfig) else "batch"


def empty_cache(
    config: ModelConfig,
    blocks: int,
    block_size: int,
    dtype: jnp.dtype,
    layout: Layout = LOCAL,
    *,
    drafts: bool = False,
) -> Cache:
    """Pools of zeros; arguments as of `abstract_cache`."""

    def zeros(leaf):
        value = jnp.zeros(leaf.shape, leaf.dtype)
        return value if leaf.sharding is None else jax.lax.with_sharding_constraint(value, leaf.sharding)

    return jax.tree.map(zeros, abstract_cache(config, blocks, block_size, dtype, layout, drafts=drafts))


def abstract_cache(
    config: ModelConfig,
    blocks: int,
    block_size: int,
    dtype: jnp.dtype,
    layout: Layout = LOCAL,
    *,
    drafts: bool = False,
) -> Cache:
    """Shapes of a cache, and how they lie on the layout's mesh.

    Args:
        config: the model's.
        blocks: of each pool, all parts of the mesh together.
        block_size: tokens of a block.
        dtype: of the entries; float8_e4m3fn or int8 codes (`ops.codes`), beside which the rest is bfloat16.
        layout: of the model.
        drafts: with a pool for the first MTP module, the one that drafts.
    """
    stacks = [(count,) for count in stack_sizes(config)] if layout.scan_layers else [()] * config.num_hidden_layers
    pool = lambda leading: _abstract_pool(config, leading, blocks, block_size, dtype, layout)
    return Cache(tuple(map(pool, stacks)), pool(()) if drafts else None)


def _abstract_pool(config, leading, blocks, block_size, dtype, layout) -> Pool:
    a, coded = config.attention, is_coded(dtype)
    widened = lambda width: -(-width // layout.lanes) * layout.lanes

    def array(*sizes, axes, dtype):
        axes = ("layer",) * len(leading) + (cache_axis(config), *axes)
        sharding = None if layout.mesh is None else layout.sharding(*axes)
        return jax.ShapeDtypeStruct((*leading, blocks, *sizes), dtype, sharding=sharding)

    if isinstance(a, MLAConfig):
        latent = lambda width, dtype: array(block_size, width, axes=(None, None), dtype=dtype)
        beside = SCALE if coded else dtype
        index = None if a.indexer is None else latent(a.indexer.index_head_dim, beside)
        return LatentCache(latent(a.kv_lora_rank, dtype), latent(widened(a.qk_rope_head_dim + coded), beside), index)
    heads, axes = a.num_key_value_heads, ("kv_heads", None, None)
    by_head = lambda: array(heads, block_size, a.head_dim, axes=axes, dtype=dtype)
    if not coded:
        return KVCache(by_head(), by_head())
    parts = 1 if layout.mesh is None else layout.parts("kv_heads")
    scale = array(parts, block_size, widened(2 * heads // parts), axes=axes, dtype=SCALE)
    return KVCache(by_head(), by_head(), scale)


def stack_sizes(config: ModelConfig) -> tuple[int, ...]:
    """How many layers of one kind follow one another: dense ones, then those with experts."""
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    return tuple(count for count in (kinds.count(False), kinds.count(True)) if count)
