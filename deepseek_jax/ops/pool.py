"""The pools of blocks that hold what decoding remembers of tokens, and where a call's tokens stand in them.

A block holds the entries of s consecutive tokens of a sequence, and a table says which blocks a sequence has: the token
at position p lies in block table[p // s], in slot p % s of it. Blocks may be shared by sequences that begin alike. A
contiguous cache is a table that counts up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CacheView(NamedTuple):
    """Where the tokens of a call stand in the cache. All int32.

    table_BM: the blocks of each sequence in order.
    seen_BT: how many keys each token sees, those from position 0 to its own; 0 for padding, which nothing is kept of.
    """

    table_BM: jax.Array
    seen_BT: jax.Array

    @classmethod
    def of(cls, table_BM: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array) -> "CacheView":
        """Of tokens at these positions, those that are valid."""
        return cls(table_BM, jnp.where(valid_BT, positions_BT + 1, 0))

    def before_B(self) -> jax.Array:
        """Tokens that each sequence had before the call; the tokens of a call follow one another, padding last."""
        return jnp.maximum(self.seen_BT[:, 0] - 1, 0)

    def slots(self, block_size: int, blocks: int) -> tuple[jax.Array, jax.Array]:
        """The block and the slot in it that each token is written to; block `blocks`, which is none, for padding."""
        at = jnp.maximum(self.seen_BT - 1, 0)
        block_BT = jnp.take_along_axis(self.table_BM, at // block_size, axis=1)
        return jnp.where(self.seen_BT > 0, block_BT, blocks), at % block_size


class LatentCache(NamedTuple):
    """One MLA layer: c [P, s, C] after its norm, the rotated k_r [P, s, R], and V3.2's indexer keys [P, s, Z].

    P blocks of s tokens. k_r may be wider, with zeros after it. Of a stack of L layers: [L, P, s, C] and so on. The
    entries of new tokens have the same form, [B, T, C] and so on.
    """

    c: jax.Array
    r: jax.Array
    index: jax.Array | None

    def write(self, new: "LatentCache", view: CacheView) -> "LatentCache":
        """With the entries of new tokens, in a pool of one layer."""
        blocks, size, _ = self.c.shape
        at = view.slots(size, blocks)
        return jax.tree.map(lambda old, of: old.at[at].set(_widened(of, old), mode="drop"), self, new)


class KVCache(NamedTuple):
    """One grouped-query layer: rotated keys and values, both [P, G, s, K]; head-major, as attention reads them.

    P blocks of s tokens. Of a stack of L layers: [L, P, G, s, K]. The entries of new tokens are [B, G, T, K].
    """

    k: jax.Array
    v: jax.Array

    def write(self, new: "KVCache", view: CacheView) -> "KVCache":
        """With the entries of new tokens, in a pool of one layer."""
        blocks, heads, size, _ = self.k.shape
        block_BT, slot_BT = view.slots(size, blocks)
        at = block_BT[:, None], jnp.arange(heads)[:, None], slot_BT[:, None]
        return jax.tree.map(lambda old, of: old.at[at].set(_widened(of, old), mode="drop"), self, new)


def _widened(values: jax.Array, old: jax.Array) -> jax.Array:
    """In the cache's dtype, with zeros up to the width that it has, see `Layout.lanes`."""
    missing = old.shape[-1] - values.shape[-1]
    padded = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, missing),)) if missing else values
    return padded.astype(old.dtype)


Pool = LatentCache | KVCache


def as_one_layer(pool: Pool, view: CacheView, layer_idx: jax.Array | None) -> tuple[Pool, CacheView]:
    """The pools of a stack's layers as one pool, and a view of one layer in it: nothing is sliced or copied."""
    if layer_idx is None:
        return pool, view
    blocks = jax.tree.leaves(pool)[0].shape[1]
    return jax.tree.map(lambda of: of.reshape(-1, *of.shape[2:]), pool), view._replace(
        table_BM=view.table_BM + layer_idx * blocks
    )
