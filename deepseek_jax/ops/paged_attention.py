"""Attention over paged caches: a row's keys lie in blocks of a pool, which its block table names in order.

The plain path: block by block with an online softmax, as many times as the row that sees most needs. What a row does
not see costs nothing, reaches nothing and may be NaN. Codes of a quantised pool are spelled out in float32 as they are
read. Has no gradient.

Source: arXiv 2309.06180 (paged attention), arXiv 1805.02867 (online softmax).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.pool import KVCache, LatentCache

_GATHERED_AT_ONCE = 2**26  # numbers of chosen keys
KEYS_AT_ONCE = 64  # what a CPU's cache holds of them; fewer cost more trips, more cost memory traffic


class Partial(NamedTuple):
    """A softmax over some of the keys, to be joined to those over the others; all float32.

    Attributes:
        top: the largest score, -inf where no key is seen.
        total: the sum of exp(score - top).
        summed: the sum of the values, weighted so.
    """

    top: Float[Array, "..."]
    total: Float[Array, "..."]
    summed: Float[Array, "... width"]


def join(a: Partial, b: Partial) -> Partial:
    """The softmax over the keys of both, which must not share any."""
    top = jnp.maximum(a.top, b.top)
    kept = lambda old: jnp.exp(jnp.where(old == top, 0.0, old - top))  # both may be -inf
    of_a, of_b = kept(a.top), kept(b.top)
    summed = of_a[..., None] * a.summed + of_b[..., None] * b.summed
    return Partial(top, of_a * a.total + of_b * b.total, summed)


def finish(partial: Partial, dtype: DTypeLike) -> Float[Array, "... width"]:
    """What the queries attended to; zeros where a query saw no key."""
    total = jnp.where(partial.total == 0, 1.0, partial.total)
    return (partial.summed / total[..., None]).astype(dtype)


def grouped_paged(
    q: Float[Array, "B T N K"],
    pool: KVCache,
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    scale: float,
    *,
    keys_at_once: int = KEYS_AT_ONCE,
) -> Float[Array, "B T N H"]:
    """`ops.attention.attend` over pools of keys and values.

    Args:
        q: queries; each of the G key-value heads serves N/G consecutive ones.
        pool: keys and values, blocks of s; of numbers or of codes.
        table_BM: int32, the pool's blocks that hold a row's keys, in order; what is not seen may be any block.
        seen_BT: int32, how many keys a query sees, from the row's first; 0 gives zeros.
        scale: of the scores, which are float32, as are sums.
        keys_at_once: of a row, rounded down to whole blocks, one at least.

    Returns:
        In the dtype of q.
    """
    spell = lambda entries: ([entries.decoded().k], entries.decoded().v)
    return finish(_over_blocks([q], pool, pool.v.shape[-1], spell, table_BM, seen_BT, scale, keys_at_once), q.dtype)


def latent_paged(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    pool: LatentCache,
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    scale: float,
    *,
    keys_at_once: int = KEYS_AT_ONCE,
) -> Float[Array, "B T N C"]:
    """`ops.attention.attend_latents` over pools of latents and rotated keys.

    Args:
        q_latent: queries in the latent space.
        q_rope: rotated queries.
        pool: latents and rotated keys, blocks of s; of numbers or of codes.
        table_BM, seen_BT, scale, keys_at_once: as of `grouped_paged`.

    Returns:
        In the dtype of q_latent.
    """

    def spell(entries):  # one head, whose keys have two parts and whose values are the first
        c = entries.decoded().c
        return [c, entries.r[..., : q_rope.shape[-1]]], c

    by_head = jax.tree.map(lambda of: of[:, None], pool._replace(index=None))
    found = _over_blocks([q_latent, q_rope], by_head, pool.c.shape[-1], spell, table_BM, seen_BT, scale, keys_at_once)
    return finish(found, q_latent.dtype)


def chosen_paged(
    q: Float[Array, "B T N CR"],
    pool: LatentCache,
    chosen_BTU: Int[Array, "B T U"],
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N C"]:
    """`latent_paged` where each query reads only the keys chosen for it, and of those only what it sees.

    The cost is that of U keys a query, however many the cache has; a part of the queries is worked on at a time, so
    that the gathered keys stay within bounds.

    Args:
        q: queries, the latent part and then the rotated one.
        chosen_BTU: positions of the keys that each query reads.
        pool, table_BM, seen_BT, scale: as of `latent_paged`.

    Source: DeepSeek-V3.2-Exp report section 1, equation 2.
    """
    (B, _, U), (_, s, C), width = chosen_BTU.shape, pool.c.shape, q.shape[-1]

    def attend_some(of):
        q, chosen, seen = of  # [B, t, ...]
        block = jnp.take_along_axis(table_BM, chosen.reshape(B, -1) // s, axis=1).reshape(chosen.shape)
        at = block, chosen % s
        alone = lambda x: x.reshape(-1, 1, U, x.shape[-1])  # each query a sequence of its own
        entries = jax.tree.map(lambda of: of[at], pool._replace(index=None))
        keys = jnp.concatenate([entries.decoded().c, entries.r[..., : width - C]], axis=-1)
        mask = chosen < seen[..., None]
        part = attend_partial(
            q.reshape(-1, 1, *q.shape[2:]), alone(keys), alone(keys[..., :C]), mask.reshape(-1, 1, U), scale
        )
        return finish(part, q.dtype).reshape(*q.shape[:3], C)

    return in_parts(attend_some, (q, chosen_BTU, seen_BT), _GATHERED_AT_ONCE // (B * U * width))


def in_parts(function: Callable[[tuple[Array, ...]], Array], of: tuple[Array, ...], most: int) -> Array:
    """A function of queries [B, T, ...] that treats each by itself, called with `most` of T at a time, one at least."""
    B, T = of[0].shape[:2]
    pieces = next(n for n in range(1, T + 1) if T % n == 0 and T // n <= max(1, most))
    if pieces == 1:
        return function(of)
    out = jax.lax.map(function, tuple(jnp.moveaxis(x.reshape(B, pieces, T // pieces, *x.shape[2:]), 1, 0) for x in of))
    return jnp.moveaxis(out, 0, 1).reshape(B, T, *out.shape[3:])


def attend_partial(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Partial:
    """`ops.attention.attend` before its end, of shape [B, T, N]; a query may see no key."""
    return _ungrouped(_attend([_grouped(q, k.shape[1])], [k], v, mask, scale))


def _over_blocks(queries, pool, width, spell, table_BM, seen_BT, scale, keys_at_once) -> Partial:
    """Joins what the blocks give. Queries [B, T, N, K] may be of several parts; arrays of the pool are [P, G, s, K].

    `spell` makes keys, of as many parts, and values of this width of the entries of a few blocks, all [B, G, S, K].
    """
    _, G, s, _ = jax.tree.leaves(pool)[0].shape
    blocks = max(1, keys_at_once // s)
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % blocks)))
    queries = [_grouped(q, G) for q in queries]

    def add(trip, carried):
        ids = jax.lax.dynamic_slice_in_dim(table_BM, trip * blocks, blocks, axis=1)
        mask = trip * blocks * s + jnp.arange(blocks * s) < seen_BT[:, :, None]
        keys, values = spell(jax.tree.map(lambda of: _in_order(of, ids), pool))
        return join(carried, _attend(queries, keys, values, mask, scale))

    shape = queries[0].shape[:-1]
    empty = Partial(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))
    trips = jnp.minimum(-(-jnp.max(seen_BT) // (blocks * s)), table_BM.shape[1] // blocks)
    return _ungrouped(jax.lax.fori_loop(0, trips, add, empty))


def _in_order(pool, ids_Bm):
    """[P, G, s, K] to what blocks of every row hold, [B, G, m s, K]."""
    blocks = jnp.moveaxis(pool[ids_Bm], 1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, pool.shape[-1])


def _attend(queries, keys, values, mask, scale) -> Partial:
    """Of head-major queries [B, G, T, N/G, K] over keys [B, G, S, K] in as many parts and values [B, G, S, H].

    Values that no query sees are taken as 0: a weight of 0 times NaN is NaN.
    """
    of_part = lambda q, k: jnp.einsum("bgtnk,bgsk->bgtns", q, k, preferred_element_type=jnp.float32)
    scores = sum(of_part(q, k) for q, k in zip(queries, keys, strict=True)) * scale
    seen = mask[:, None, :, None]
    top = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    values = jnp.where(jnp.any(mask, axis=1)[:, None, :, None], values, 0)
    # a cache that is narrower than the computation rounds what it keeps, and nothing else
    of_values = weights.astype(jnp.promote_types(queries[0].dtype, values.dtype))
    summed = jnp.einsum("bgtns,bgsh->bgtnh", of_values, values, preferred_element_type=jnp.float32)
    return Partial(top, jnp.sum(weights, axis=-1), summed)


def _grouped(q, G):
    """[B, T, N, K] to [B, G, T, N/G, K], so that neither the product nor the loop around it transposes."""
    B, T, N, K = q.shape
    return jnp.moveaxis(q.reshape(B, T, G, N // G, K), 2, 1)


def _ungrouped(partial: Partial) -> Partial:
    """[B, G, T, N/G, ...] to [B, T, N, ...]."""
    merge = lambda x: jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, *x.shape[4:])
    return jax.tree.map(merge, partial)
