"""Random paged caches for the laws of paged attention: tables shuffled and shared, NaN wherever no row looks."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Pools [blocks, ..., s, width] in float64, and who sees what of them."""

    queries: list[np.ndarray]
    pools: list[np.ndarray]
    table_BM: np.ndarray
    seen_BT: np.ndarray


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
