"""Random paged caches for the laws of paged attention: tables shuffled and shared, NaN wherever no row looks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.codes import SCALE
from deepseek_jax.ops.pool import CacheView, KVCache, LatentCache, Pool

CODES = [jnp.int8, jnp.float8_e4m3fn]


class Case(NamedTuple):
    """Pools [blocks, ..., s, width] in float64, and who sees what of them."""

    queries: list[np.ndarray]
    pools: list[np.ndarray]
    table_BM: np.ndarray
    seen_BT: np.ndarray


def pool_of(case: Case, dtype, *, lanes: int = 1) -> Pool:
    """The case's pools in a dtype, latents where they have no heads; of codes, written block by block as a cache is."""
    a, b = (jnp.asarray(pool, jnp.float32) for pool in case.pools)
    kind = LatentCache(a, b, None) if a.ndim == 3 else KVCache(a, b)
    if dtype not in CODES:
        return jax.tree.map(lambda of: of.astype(dtype), kind)
    wide = lambda width: -(-width // lanes) * lanes
    blocks, size = len(a), a.shape[-2]
    if a.ndim == 3:
        empty = LatentCache(jnp.zeros(a.shape, dtype), jnp.zeros((blocks, size, wide(b.shape[-1] + 1)), SCALE), None)
    else:
        scale = jnp.zeros((blocks, 1, size, wide(2 * a.shape[1])), SCALE)
        empty = KVCache(jnp.zeros(a.shape, dtype), jnp.zeros(b.shape, dtype), scale)
    every = jnp.broadcast_to(jnp.arange(size), (blocks, size))
    return empty.write(kind, CacheView.of(jnp.arange(blocks)[:, None], every, every >= 0))


def spelled(pool: Pool, case: Case) -> Case:
    """The case with what a pool of codes means in place of its numbers, in float64."""
    found = pool.decoded()
    widths = [of.shape[-1] for of in case.pools]
    return case._replace(pools=[np.asarray(of, np.float64)[..., :n] for of, n in zip(found[:2], widths, strict=True)])


def apart(case: Case, coded: Case, largest_score: float) -> float:
    """How far attention over numbers and over their codes may be apart.

    Scores are at most d = `largest_score` apart, so weights by a factor of e^(2d), and values by what one is.
    """
    values = [case.pools[-1], coded.pools[-1]] if len(case.queries) == 1 else [case.pools[0], coded.pools[0]]
    of_values = np.nanmax(np.abs(values[0] - values[1]))
    return np.expm1(2 * largest_score) * np.nanmax(np.abs(values[0])) + of_values


def scores_apart(case: Case, coded: Case, scale: float) -> float:
    """The most that a query's scores of numbers and of codes may be apart: by the sum of |q| and the largest errors."""
    errors = [np.nanmax(np.abs(a - b)) for a, b in zip(case.pools, coded.pools, strict=True)]
    return scale * sum(np.abs(q).sum(axis=-1).max() * error for q, error in zip(case.queries, errors, strict=False))


def seen_by(length_B, T) -> np.ndarray:
    """Tokens that are new in this call are in the cache as well: query t sees t more than the first; 0 is idle."""
    length_B = np.asarray(length_B, np.int32)[:, None]
    return np.where(length_B > 0, length_B + np.arange(T, dtype=np.int32), 0).astype(np.int32)


def make_case(seed, seen_BT, *, s, M, N, widths, heads=(), shared=False, spoil=np.nan) -> Case:
    """A pool for every width, and queries as wide.

    Args:
        seed: of tables and values.
        seen_BT: keys that each query sees.
        s, M: tokens a block, blocks a row.
        N: heads of the queries.
        widths: of the pools' keys, and so of the queries of each.
        heads: () or (G,), of the pools.
        shared: rows 1 and up begin with the first block of row 0.
        spoil: what stands where no row looks, which includes the null block.
    """
    rng = np.random.default_rng(seed)
    B, T = seen_BT.shape
    table = 1 + rng.permutation(B * M).reshape(B, M).astype(np.int32)
    if shared:
        table[:, 0] = table[0, 0]
    needed = -(-seen_BT.max(axis=1) // s)
    table[np.arange(M) >= needed[:, None]] = 0
    live = np.zeros((B * M + 1, s), bool)
    for row, most in zip(table, seen_BT.max(axis=1), strict=True):
        live[row[np.arange(most) // s], np.arange(most) % s] = True
    shape = lambda width: (len(live), *heads, s, width)
    pools = [rng.normal(size=shape(width)) for width in widths]
    pools = [np.where(live.reshape(-1, *(1 for _ in heads), s, 1), pool, spoil) for pool in pools]
    return Case([rng.normal(size=(B, T, N, width)) for width in widths], pools, table, seen_BT)


def oracle(queries, keys, values, table_BM, seen_BT, scale) -> np.ndarray:
    """One query and one head at a time, in float64: pools of several parts, [blocks, G, s, width]."""
    (B, T, N, _), (_, G, s, _) = queries[0].shape, values.shape
    out = np.zeros((B, T, N, values.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        at = np.arange(seen_BT[b, t])
        if len(at) == 0:
            continue
        of = lambda pool, b=b, n=n, at=at: pool[table_BM[b][at // s], n // (N // G), at % s]
        scores = scale * sum(of(pool) @ q[b, t, n] for pool, q in zip(keys, queries, strict=True))
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ of(values) / weights.sum()
    return out
