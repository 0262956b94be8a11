"""The pools of blocks that hold what decoding remembers of tokens, and where a call's tokens stand in them.

A block holds the entries of s consecutive tokens of a sequence, and a table says which blocks a sequence has: the token
at position p lies in block table[p // s], in slot p % s of it. Blocks may be shared by sequences that begin alike. A
contiguous cache is a table that counts up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.codes import decode, encode, is_coded, round_trip


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
    entries of new tokens have the same form, [B, T, C] and so on. Where c is codes (`ops.codes`), the last column of
    the then wider r is their scale; r and the indexer's keys are bfloat16.

    Source: DeepSeek's own FP8 cache keeps 512 codes with scales and 64 rotated keys in bfloat16 (FlashMLA README).
    Differs: it has a float32 scale for each 128 of the codes, here is one for all.
    """

    c: jax.Array
    r: jax.Array
    index: jax.Array | None

    def write(self, new: "LatentCache", view: CacheView) -> "LatentCache":
        """With the entries of new tokens, in a pool of one layer."""
        blocks, size, _ = self.c.shape
        at = view.slots(size, blocks)
        return jax.tree.map(lambda old, of: old.at[at].set(_widened(of, old), mode="drop"), self, self._coded(new))

    def decoded(self) -> "LatentCache":
        """Entries that were read, or a pool: codes spelled out in float32, all else as it is."""
        return self._replace(c=decode(self.c, self.r[..., -1:]))

    def as_kept(self, new: "LatentCache") -> "LatentCache":
        """New entries as they will be read: rounded to what this pool keeps."""
        return jax.tree.map(lambda old, of: round_trip(of, old.dtype), self, new)

    def _coded(self, new: "LatentCache") -> "LatentCache":
        if not is_coded(self.c.dtype):
            return new
        c, scale = encode(new.c, self.c.dtype)
        zeros = jnp.zeros((*new.r.shape[:-1], self.r.shape[-1] - new.r.shape[-1] - 1), scale.dtype)
        return new._replace(c=c, r=jnp.concatenate([new.r.astype(scale.dtype), zeros, scale], axis=-1))


class KVCache(NamedTuple):
    """One grouped-query layer: rotated keys and values, both [P, G, s, K]; head-major, as attention reads them.

    P blocks of s tokens. Of a stack of L layers: [L, P, G, s, K]. The entries of new tokens are [B, G, T, K]. Where
    keys and values are codes (`ops.codes`), scale [P, 1, s, 2G] has those of all heads' keys and then of their values,
    a row a token, perhaps with zeros after them; on a mesh that cuts G in X parts it is [P, X, s, 2G/X].
    """

    k: jax.Array
    v: jax.Array
    scale: jax.Array | None = None

    def write(self, new: "KVCache", view: CacheView) -> "KVCache":
        """With the entries of new tokens, in a pool of one layer, on the device that has it."""
        blocks, _, size, _ = self.k.shape
        block_BT, slot_BT = view.slots(size, blocks)

        def put(old, of):
            at = block_BT[:, None], jnp.arange(old.shape[1])[:, None], slot_BT[:, None]
            return old.at[at].set(_widened(of, old), mode="drop")

        return jax.tree.map(put, self, self._coded(new))

    def decoded(self) -> "KVCache":
        """Entries that were read, on the device that has them: codes spelled out in float32, or numbers as they are."""
        if self.scale is None:
            return self
        G = self.k.shape[1]
        of_head = jnp.moveaxis(self.scale[:, 0, :, : 2 * G], -1, 1)[..., None]
        return KVCache(decode(self.k, of_head[:, :G]), decode(self.v, of_head[:, G:]))

    def as_kept(self, new: "KVCache") -> "KVCache":
        """New entries as they will be read: rounded to what this pool keeps."""
        return KVCache(*(round_trip(of, old.dtype) for old, of in zip(self[:2], new[:2], strict=True)))

    def _coded(self, new: "KVCache") -> "KVCache":
        if self.scale is None:
            return new
        (k, of_k), (v, of_v) = encode(new.k, self.k.dtype), encode(new.v, self.v.dtype)
        by_head = jnp.concatenate([of_k, of_v], axis=1)[..., 0]  # [B, 2G, T]
        return KVCache(k, v, jnp.moveaxis(by_head, 1, -1)[:, None])


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
