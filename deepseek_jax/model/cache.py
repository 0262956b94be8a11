"""What decoding remembers of a sequence: MLA's latents with V3.2's indexer keys, or keys and values.

A token at position p lies in slot p of its sequence's row. A query at position p looks at slots up to p, which
are all written by then; whatever padding left in later slots is overwritten before anything looks there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.sharding import LOCAL, Layout


class LatentCache(NamedTuple):
    """One MLA layer: c [B, S, C] after its norm, the rotated k_r [B, S, R], and V3.2's indexer keys [B, S, Z].

    k_r may be wider, with zeros after it.
    Or a stack of L of them: [B, L, S, C] and so on.
    """

    c_BSC: jax.Array
    r_BSR: jax.Array
    index_BSZ: jax.Array | None

    def write(self, new: "LatentCache", positions_BT: jax.Array, layer_idx: jax.Array | None = None) -> "LatentCache":
        """With the new tokens' entries; `layer_idx` is the layer's in a stack, where this is the cache of one."""
        return jax.tree.map(
            lambda old, values: _written(old, values, positions_BT, layer_idx, lambda at: (at,)), self, new
        )

    def layer(self, layer_idx: jax.Array | None) -> "LatentCache":
        return jax.tree.map(lambda of: _layer(of, layer_idx), self)

    def prefix(self, new: "LatentCache") -> "LatentCache":
        """With what whole sequences left, in the first slots; that of a stack comes with its layers in front."""
        return jax.tree.map(lambda old, values: _prefixed(old, values, stack_rank=4), self, new)

    def positions(self) -> jax.Array:
        B, S, _ = self.c_BSC.shape
        return jnp.broadcast_to(jnp.arange(S), (B, S))


class KVCache(NamedTuple):
    """One grouped-query layer: rotated keys and values, both [B, G, S, K]; head-major, as attention reads them.

    Or a stack of L of them: [B, L, G, S, K].
    """

    k_BGSK: jax.Array
    v_BGSK: jax.Array

    def write(self, new: "KVCache", positions_BT: jax.Array, layer_idx: jax.Array | None = None) -> "KVCache":
        """With the new tokens' entries; `layer_idx` is the layer's in a stack, where this is the cache of one."""
        # by arrays alone: a slice between a place and positions would put its axis after theirs
        heads = jnp.arange(self.k_BGSK.shape[-3])[:, None]
        at = lambda positions: (heads, positions)
        return jax.tree.map(lambda old, values: _written(old, values, positions_BT, layer_idx, at), self, new)

    def layer(self, layer_idx: jax.Array | None) -> "KVCache":
        return jax.tree.map(lambda of: _layer(of, layer_idx), self)

    def prefix(self, new: "KVCache") -> "KVCache":
        """With what whole sequences left, in the first slots; that of a stack comes with its layers in front."""
        return jax.tree.map(lambda old, values: _prefixed(old, values, stack_rank=5), self, new)

    def positions(self) -> jax.Array:
        B, _, S, _ = self.k_BGSK.shape
        return jnp.broadcast_to(jnp.arange(S), (B, S))


def _written(old, values, positions_BT, layer_idx, at):
    """`values` of each sequence put at at(positions); what lies beyond the last slot is dropped."""
    lead, values = () if layer_idx is None else (layer_idx,), _widened(values, old)
    of_one = lambda old, positions, new: old.at[(*lead, *at(positions))].set(new.astype(old.dtype), mode="drop")
    return jax.vmap(of_one)(old, positions_BT, values)


def _prefixed(old: jax.Array, values: jax.Array, stack_rank: int) -> jax.Array:
    values = _widened(jnp.moveaxis(values, 0, 1) if values.ndim == stack_rank else values, old)
    return jax.lax.dynamic_update_slice(old, values.astype(old.dtype), (0,) * old.ndim)


def _widened(values: jax.Array, old: jax.Array) -> jax.Array:
    """With zeros up to the width that the cache has, see `Layout.lanes`."""
    missing = old.shape[-1] - values.shape[-1]
    return jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, missing),)) if missing else values


def _layer(of: jax.Array, layer_idx: jax.Array | None) -> jax.Array:
    return of if layer_idx is None else jax.lax.dynamic_index_in_dim(of, layer_idx, axis=1, keepdims=False)


Cache = tuple[LatentCache | KVCache, ...]


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, layout: Layout = LOCAL) -> Cache:
    """A cache of zeros for `batch` sequences of up to `slots` tokens: an entry a layer, or, stacked, one a stack."""

    def zeros(leaf):
        value = jnp.zeros(leaf.shape, leaf.dtype)
        return value if leaf.sharding is None else jax.lax.with_sharding_constraint(value, leaf.sharding)

    return jax.tree.map(zeros, abstract_cache(config, batch, slots, dtype, layout))


def abstract_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, layout: Layout = LOCAL) -> Cache:
    """Its shapes, and how they lie on the layout's mesh."""
    a = config.attention
    stacks = [(count,) for count in stack_sizes(config)] if layout.scan_layers else [()] * config.num_hidden_layers

    def entry(leading):
        def array(*sizes, axes):
            axes = axes[:1] + ("layer",) * len(leading) + axes[1:]
            sharding = None if layout.mesh is None else layout.sharding(*axes)
            return jax.ShapeDtypeStruct(sizes[:1] + leading + sizes[1:], dtype, sharding=sharding)

        if isinstance(a, MLAConfig):
            latent = lambda width: array(batch, slots, width, axes=("cache_batch", None, None))
            index = None if a.indexer is None else latent(a.indexer.index_head_dim)
            rotated = -(-a.qk_rope_head_dim // layout.lanes) * layout.lanes
            return LatentCache(latent(a.kv_lora_rank), latent(rotated), index)
        by_head = lambda: array(batch, a.num_key_value_heads, slots, a.head_dim, axes=("batch", "kv_heads", None, None))
        return KVCache(by_head(), by_head())

    return tuple(entry(leading) for leading in stacks)


def stack_sizes(config: ModelConfig) -> tuple[int, ...]:
    """How many layers of one kind follow one another: dense ones, then those with experts."""
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    return tuple(count for count in (kinds.count(False), kinds.count(True)) if count)
