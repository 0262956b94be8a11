"""What decoding remembers of a sequence: MLA's latents with V3.2's indexer keys, or keys and values.

A token at position p lies in slot p of its sequence's row. A query at position p looks at slots up to p, which
are all written by then; whatever padding left in later slots is overwritten before anything looks there.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from deepseek_jax.config import MLAConfig, ModelConfig


class LatentCache(NamedTuple):
    """One MLA layer: c [B, S, C] after its norm, the rotated k_r [B, S, R], and V3.2's indexer keys [B, S, Z]."""

    c_BSC: jax.Array
    r_BSR: jax.Array
    index_BSZ: jax.Array | None

    def write(self, new: Self, positions_BT: jax.Array) -> Self:
        rows = jnp.arange(positions_BT.shape[0])[:, None]
        put = lambda old, values: old.at[rows, positions_BT].set(values.astype(old.dtype), mode="drop")
        return jax.tree.map(put, self, new)

    def prefix(self, new: Self) -> Self:
        put = lambda old, values: jax.lax.dynamic_update_slice(old, values.astype(old.dtype), (0, 0, 0))
        return jax.tree.map(put, self, new)

    def positions(self) -> jax.Array:
        B, S, _ = self.c_BSC.shape
        return jnp.broadcast_to(jnp.arange(S), (B, S))


class KVCache(NamedTuple):
    """One grouped-query layer: rotated keys and values, both [B, G, S, K]; head-major, as attention reads them."""

    k_BGSK: jax.Array
    v_BGSK: jax.Array

    def write(self, new: Self, positions_BT: jax.Array) -> Self:
        B, G = self.k_BGSK.shape[:2]
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(G)[None, :, None]
        slots = positions_BT[:, None, :]
        put = lambda old, values: old.at[rows, heads, slots].set(values.astype(old.dtype), mode="drop")
        return KVCache(put(self.k_BGSK, new.k_BGSK), put(self.v_BGSK, new.v_BGSK))

    def prefix(self, new: Self) -> Self:
        put = lambda old, values: jax.lax.dynamic_update_slice(old, values.astype(old.dtype), (0, 0, 0, 0))
        return KVCache(put(self.k_BGSK, new.k_BGSK), put(self.v_BGSK, new.v_BGSK))

    def positions(self) -> jax.Array:
        B, _, S, _ = self.k_BGSK.shape
        return jnp.broadcast_to(jnp.arange(S), (B, S))


Cache = tuple[LatentCache | KVCache, ...]


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros for `batch` sequences of up to `slots` tokens, one entry a layer."""
    a = config.attention
    if isinstance(a, MLAConfig):
        zeros = lambda width: jnp.zeros((batch, slots, width), dtype)
        index = lambda: None if a.indexer is None else zeros(a.indexer.index_head_dim)
        layer = lambda: LatentCache(zeros(a.kv_lora_rank), zeros(a.qk_rope_head_dim), index())
    else:
        shape = (batch, a.num_key_value_heads, slots, a.head_dim)
        layer = lambda: KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return tuple(layer() for _ in range(config.num_hidden_layers))
