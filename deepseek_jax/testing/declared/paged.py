"""Attention over paged caches, of numbers and of codes."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops import paged_attention as plain
from deepseek_jax.ops.codes import SCALE
from deepseek_jax.ops.kernels import paged_decode
from deepseek_jax.ops.pool import CacheView, KVCache, LatentCache
from deepseek_jax.parallel.attention import over_pool, read_blocks
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.sharding import LOCAL
from deepseek_jax.testing import Draw, Kernel, choices, counts, order, split

_OF_SCORES = 0.3
_ROUNDING = 2.0**-22  # of a score, as a part of the sum of its terms' magnitudes
_LARGEST = 448.0  # of float8_e4m3fn


# --- inputs --------------------------------------------------------------------------------------


def tables(draw: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of blocks, who sees how much, and which entries of the pool nobody sees; block 0 is nobody's."""
    B, M, s = draw.of("B", "M", "s")
    seen = draw.ragged["seen"]
    table = 1 + draw.ids.permutation(B * M).reshape(B, M).astype(np.int32)
    if draw.ragged["shared"]:
        table[:, 0] = table[0, 0]
    most = seen.max(axis=1)
    table = draw.dead(table, np.arange(M) >= -(-most // s)[:, None], below=B * M + 1)
    free = np.ones((B * M + 1, s), bool)
    for row, count in zip(table, most, strict=True):
        free[row[np.arange(count) // s], np.arange(count) % s] = False
    return table, seen, free


def _codes(draw: Draw, *shape: int) -> np.ndarray:
    if draw.sizes["codes"] == "int8":
        return draw.integers(-127, 128, *shape, dtype=np.int8)
    return np.clip(draw.numbers(*shape, scale=50, dtype=jnp.float32), -_LARGEST, _LARGEST).astype(jnp.float8_e4m3fn)


def _scales(draw: Draw, *shape: int) -> np.ndarray:
    return np.abs(draw.numbers(*shape, scale=1 / 64, dtype=SCALE))


def _of_rows(draw: Draw, table: np.ndarray, seen: np.ndarray) -> dict[str, object]:
    return {"table_BM": table, "seen_BT": seen, "scale": _OF_SCORES, "keys_at_once": draw.sizes["keys"]}


def _latents(draw: Draw) -> dict[str, object]:
    B, T, N, C, R, wide, s = draw.of("B", "T", "N", "C", "R", "wide", "s")
    table, seen, free = tables(draw)
    coded = "codes" in draw.sizes
    c = _codes(draw, *free.shape, C) if coded else draw.numbers(*free.shape, C)
    r = np.zeros((*free.shape, wide), SCALE if coded else draw.dtype)
    r[..., :R] = draw.numbers(*free.shape, R)
    if coded:
        r[..., -1:] = _scales(draw, *free.shape, 1)
    pool = LatentCache(*(draw.dead(of, free[..., None]) for of in (c, r)), None)
    queries = {"q_latent": draw.numbers(B, T, N, C), "q_rope": draw.numbers(B, T, N, R)}
    return {**queries, "pool": pool, **_of_rows(draw, table, seen)}


def _heads(draw: Draw) -> dict[str, object]:
    B, T, N, G, K, s = draw.of("B", "T", "N", "G", "K", "s")
    table, seen, free = tables(draw)
    shape = (free.shape[0], G, s, K)
    coded = "codes" in draw.sizes
    k, v = (_codes(draw, *shape) if coded else draw.numbers(*shape) for _ in range(2))
    scale = None
    if coded:
        wide = np.zeros((free.shape[0], 1, s, draw.sizes["wide"]), SCALE)
        wide[..., : 2 * G] = _scales(draw, free.shape[0], 1, s, 2 * G)
        scale = draw.dead(wide, free[:, None, :, None])
    pool = KVCache(draw.dead(k, free[:, None, :, None]), draw.dead(v, free[:, None, :, None]), scale)
    return {"q": draw.numbers(B, T, N, K), "pool": pool, **_of_rows(draw, table, seen)}


# --- twins ---------------------------------------------------------------------------------------


def _attended(queries, keys, values, table_BM, seen_BT, scale) -> tuple[np.ndarray, ...]:
    """The result in float64, of its scores the largest sum of magnitudes, and the sum of its own terms'."""
    (B, _, N, _), (_, G, _, _) = queries[0].shape, values.shape
    of_rows = lambda pool: np.moveaxis(pool[table_BM], 1, 2).reshape(B, G, -1, pool.shape[-1]).repeat(N // G, axis=1)
    product = lambda q, k: scale * np.einsum("btnk,bnsk->btns", q, of_rows(k))
    scores = sum(product(q, k) for q, k in zip(queries, keys, strict=True))
    sizes = sum(product(np.abs(q), np.abs(k)) for q, k in zip(queries, keys, strict=True))
    mask = (np.arange(scores.shape[-1]) < seen_BT[..., None])[:, :, None]
    top = np.max(np.where(mask, scores, -np.inf), axis=-1, keepdims=True)
    weights = np.where(mask, np.exp(np.where(mask, scores - top, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("btns,bnsh->btnh", weights / np.where(total == 0, 1, total), of_rows(values))
    terms = np.einsum("btns,bnsh->btnh", weights / np.where(total == 0, 1, total), np.abs(of_rows(values)))
    return out, np.max(sizes, axis=-1, where=mask, initial=0, keepdims=True), terms


def _of_latents(coded, q_latent, q_rope, pool):
    c = (pool.c * pool.r[..., -1:] if coded else pool.c)[:, None]
    return [q_latent, q_rope], [c, pool.r[:, None, :, : q_rope.shape[-1]]], c


def _of_heads(coded, q, pool):
    k, v, G = pool.k, pool.v, pool.k.shape[1]
    if coded:
        by_head = np.moveaxis(pool.scale[:, 0, :, : 2 * G], -1, 1)[..., None]
        k, v = k * by_head[:, :G], v * by_head[:, G:]
    return [q], [k], v


def _twin(parts, coded, *, table_BM, seen_BT, scale, keys_at_once=0, **arguments):
    return _attended(*parts(coded, **arguments), table_BM, seen_BT, scale)[0]


def _bound(parts, coded, tolerance, *, table_BM, seen_BT, scale, keys_at_once=0, **arguments):
    """Weights are rounded by a part of their terms, the result by a part of itself, scores by a part of their terms."""
    queries, keys, values = parts(coded, **arguments)
    out, sizes, terms = _attended(queries, keys, values, table_BM, seen_BT, scale)
    return tolerance * (np.abs(out) + terms) + _ROUNDING * sizes * np.max(np.abs(values), initial=0)


def _kernel(name: str, run: Any, *, coded: bool = False, heads: bool = False, **others: Any) -> Kernel:
    """Attention over pools of latents, or of heads."""
    parts = _of_heads if heads else _of_latents
    small = {"G": (1, 2), "K": (8,)} if heads else {"C": (16,), "R": (8,), "wide": (16,)}
    large = {"G": 8, "K": 128} if heads else {"C": 512, "R": 64, "wide": 128}
    if coded:
        small |= {"codes": ("int8", "float8_e4m3fn"), "wide": (16,)}
        large |= {"codes": "int8", "wide": 128}
    decode = {"B": 16, "T": 1, "N": 32 if heads else 128, "s": 16, "M": 64, "keys": 512, **large}
    queries = {"q": 0} if heads else {"q_latent": 0, "q_rope": 0}
    return Kernel(
        name=name,
        run=run,
        twin=partial(_twin, parts, coded),
        bound=partial(_bound, parts, coded),
        inputs=_heads if heads else _latents,
        sizes={"B": (1, 2, 3), "T": (1, 3), "N": (4,), "s": (4,), "M": (1, 5), "keys": (8, 512), **small},
        ragged={"seen": counts(lambda of: of["s"] * of["M"], "B", "T"), "shared": choices(0, 1)},
        tolerance={"float32": 2.0**-19, "bfloat16": 2.0**-8},
        invariances=(order(table_BM=0, seen_BT=0, **queries), split(table_BM=0, seen_BT=0, **queries)),
        compiled=(decode, {**decode, "T": 3}),
        **others,
    )


# A kernel of codes computes in bfloat16, whatever its queries are.
_CODED = {"coded": True, "dtypes": ("bfloat16",), "platform": "tpu"}
LATENT_DECODE = _kernel("latent_decode", paged_decode.latent_decode, platform="tpu")
LATENT_DECODE_CODES = _kernel("latent_decode_codes", paged_decode.latent_decode, **_CODED)
GROUPED_DECODE = _kernel("grouped_decode", paged_decode.grouped_decode, heads=True, platform="tpu")
GROUPED_DECODE_CODES = _kernel("grouped_decode_codes", paged_decode.grouped_decode, heads=True, **_CODED)
LATENT_PAGED = _kernel("latent_paged", plain.latent_paged)
LATENT_PAGED_CODES = _kernel("latent_paged_codes", plain.latent_paged, coded=True)
GROUPED_PAGED = _kernel("grouped_paged", plain.grouped_paged, heads=True)
GROUPED_PAGED_CODES = _kernel("grouped_paged_codes", plain.grouped_paged, heads=True, coded=True)


# --- new tokens, among themselves and over what was there before them ----------------------------


def _continued_inputs(draw: Draw) -> dict[str, object]:
    B, T, N, G, K, M, s = draw.of("B", "T", "N", "G", "K", "M", "s")
    before, P = draw.ragged["before"], B * M + 1
    table = 1 + draw.ids.permutation(B * M).reshape(B, M).astype(np.int32)
    table = draw.dead(table, np.arange(M) >= -(-before // s)[:, None], below=P)
    free = np.ones((P, s), bool)
    for row, count in zip(table, before, strict=True):
        free[row[np.arange(count) // s], np.arange(count) % s] = False
    k, v = (draw.dead(draw.numbers(P, G, s, K), free[:, None, :, None]) for _ in range(2))
    new = {"q": draw.numbers(B, T, N, K), "k": draw.numbers(B, G, T, K), "v": draw.numbers(B, G, T, K)}
    return {**new, "pool": KVCache(k, v), "table_BM": table, "before": before, "valid": draw.ragged["valid"]}


def _continued(q, k, v, pool, table_BM, before, valid):
    at = jnp.arange(q.shape[1])
    view = CacheView.of(table_BM, before[:, None] + at, at < valid[:, None])
    of_pool = lambda first: read_blocks(pool, view, None, first, q.dtype, LOCAL)[:2]
    own = causal_attention(q, k, v, None, scale=_OF_SCORES, layout=LOCAL, sums=True)
    return over_pool(q, own, view, of_pool, pool, _OF_SCORES)


def _joined(q, k, v, pool, table_BM, before, valid):
    """As rows whose keys lie in one block each."""
    (B, G, T, K), room = k.shape, table_BM.shape[1] * pool.k.shape[2]
    at = np.arange(room + T)
    at = np.where(at < before[:, None], at, np.minimum(at - before[:, None] + room, room + T - 1))[:, None, :, None]
    rows = lambda pool: np.moveaxis(pool[table_BM], 1, 2).reshape(B, G, room, K)
    keys, values = (
        np.take_along_axis(np.concatenate([rows(old), new], axis=2), at, axis=2)
        for old, new in ((pool.k, k), (pool.v, v))
    )
    seen = np.where(np.arange(T) < valid[:, None], before[:, None] + np.arange(T) + 1, 0)
    return [q], [keys], values, np.arange(B)[:, None], seen, _OF_SCORES


def _continued_twin(valid, **arguments):
    out = _attended(*_joined(valid=valid, **arguments))[0]
    return np.where((np.arange(out.shape[1]) < valid[:, None])[..., None, None], out, np.nan)


def _continued_bound(tolerance, **arguments):
    parts = _joined(**arguments)
    return np.max(np.abs(parts[2]), initial=0) * (tolerance + _ROUNDING * _attended(*parts)[1])


OVER_POOL = Kernel(
    name="over_pool",
    run=_continued,
    twin=_continued_twin,
    bound=_continued_bound,
    inputs=_continued_inputs,
    sizes={"B": (1, 2), "T": (1, 3, 9), "N": (4,), "G": (1, 2), "K": (8,), "s": (4,), "M": (1, 5, 70)},
    ragged={"before": counts(lambda of: of["s"] * of["M"], "B"), "valid": counts("T", "B")},
    # what tokens attend to among themselves is rounded before it is joined
    tolerance={"float32": 2.0**-19, "bfloat16": 2.0**-7},
    invariances=tuple(law(q=0, k=0, v=0, table_BM=0, before=0, valid=0) for law in (order, split)),
    compiled=({"B": 8, "T": 256, "N": 32, "G": 8, "K": 128, "s": 16, "M": 64},),
)


# --- chosen keys ---------------------------------------------------------------------------------


def _chosen_inputs(draw: Draw) -> dict[str, object]:
    found = _latents(draw)
    B, T, M, s = draw.of("B", "T", "M", "s")
    chosen = np.stack([draw.ids.permutation(M * s)[: draw.sizes["U"]] for _ in range(B * T)]).reshape(B, T, -1)
    q = np.concatenate([found["q_latent"], found["q_rope"]], axis=-1)
    of_rows = {name: found[name] for name in ("pool", "table_BM", "seen_BT", "scale")}
    return {"q": q, "chosen_BTU": chosen.astype(np.int32), **of_rows}


def _of_chosen(q, pool, chosen_BTU, table_BM, seen_BT, scale):
    """Each query as a row of its own, whose pool is the keys chosen for it, those that it sees first."""
    (B, T, U), s, C = chosen_BTU.shape, pool.c.shape[1], pool.c.shape[-1]
    seen = chosen_BTU < seen_BT[..., None]
    first = np.take_along_axis(chosen_BTU, np.argsort(~seen, axis=-1, kind="stable"), axis=-1)
    block = np.take_along_axis(table_BM, first.reshape(B, -1) // s, axis=1).reshape(first.shape)
    of_pool = lambda x: x[block, first % s].reshape(B * T, 1, U, -1)
    c, r = of_pool(pool.c), of_pool(pool.r[..., : q.shape[-1] - C])
    alone = q.reshape(B * T, 1, *q.shape[2:])
    table = np.arange(B * T)[:, None]
    return [alone[..., :C], alone[..., C:]], [c, r], c, table, seen.sum(axis=-1).reshape(-1, 1), scale


def _chosen_twin(**arguments):
    return _attended(*_of_chosen(**arguments))[0].reshape(*arguments["q"].shape[:3], -1)


def _chosen_bound(tolerance, **arguments):
    parts = _of_chosen(**arguments)
    sizes = _attended(*parts)[1].reshape(*arguments["q"].shape[:3], 1)
    return np.max(np.abs(parts[2]), initial=0) * (tolerance + _ROUNDING * sizes)


CHOSEN_PAGED = Kernel(
    name="chosen_paged",
    run=plain.chosen_paged,
    twin=_chosen_twin,
    bound=_chosen_bound,
    inputs=_chosen_inputs,
    sizes={**LATENT_PAGED.sizes, "U": (1, 3), "keys": (0,)},
    ragged=LATENT_PAGED.ragged,
    tolerance=LATENT_PAGED.tolerance,
    invariances=tuple(law(q=0, chosen_BTU=0, table_BM=0, seen_BT=0) for law in (order, split)),
    compiled=({**LATENT_PAGED.compiled[0], "M": 128, "U": 1024, "keys": 0},),
)
