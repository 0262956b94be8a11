"""The indexer's choice of keys: of scores, of whole sequences, and over a paged cache."""

from typing import Any

import numpy as np

from deepseek_jax.ops.indexer import choose_paged, choose_whole, chosen_mask
from deepseek_jax.testing import Draw, Kernel, choices, counts, order, padding, split
from deepseek_jax.testing.declared.paged import LATENT_PAGED, tables

# Powers of four, and whole numbers: scores are exact, and often equal.
_EXACT = {"J": (1, 4), "Z": (4, 16)}
_NUMBERS = ("whole", "equal", "zeros")


def liking(q: np.ndarray, weights: np.ndarray, k: np.ndarray) -> np.ndarray:
    """How much each query wants each key, [B, T, S]."""
    J, Z = q.shape[2:]
    by_head = np.maximum(np.einsum("btjz,bsz->btjs", q, k), 0) * Z**-0.5
    return np.einsum("btj,btjs->bts", weights * J**-0.5, by_head)


def _ranked(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Visible keys first, best first, among equals the earlier one."""
    return np.argsort(np.where(visible, -scores, np.inf), axis=-1, kind="stable")


def best_keys(scores: np.ndarray, visible: np.ndarray, count: int) -> np.ndarray:
    """True for the `count` best of the visible ones, or for all where they are fewer."""
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, _ranked(scores, visible)[..., :count], True, axis=-1)
    return chosen & visible


# --- of scores, and of whole sequences -----------------------------------------------------------


def _visible(draw: Draw) -> np.ndarray:
    """What queries see: the first keys, or any; as many as the example says."""
    B, T, S = draw.of("B", "T", "S")
    anywhere = np.argsort(draw.ids.random((B, T, S)), axis=-1)
    ranks = anywhere if draw.ragged["anywhere"] else np.arange(S)
    return ranks < draw.ragged["seen"][..., None]


def _score_inputs(draw: Draw) -> dict[str, Any]:
    visible = _visible(draw)
    scores = draw.dead(draw.numbers(*visible.shape), ~visible)
    return {"scores": scores, "visible": visible, "count": draw.sizes["count"]}


def _whole_inputs(draw: Draw) -> dict[str, Any]:
    B, T, S, J, Z = draw.of("B", "T", "S", "J", "Z")
    visible = _visible(draw)
    k = draw.dead(draw.numbers(B, S, Z), ~visible.any(axis=1)[..., None])
    queries = {"q": draw.numbers(B, T, J, Z), "weights": draw.numbers(B, T, J)}
    return {**queries, "k": k, "visible": visible, "count": draw.sizes["count"]}


_SEEN: dict[str, Any] = {"seen": counts("S", "B", "T"), "anywhere": choices(0, 1)}
CHOSEN_MASK = Kernel(
    name="chosen_mask",
    run=chosen_mask,
    twin=best_keys,
    inputs=_score_inputs,
    sizes={"B": (1, 3), "T": (1, 3), "S": (1, 9, 70), "count": (1, 4)},
    ragged=_SEEN,
    dtypes=("float32",),
    invariances=(*(law(scores=0, visible=0) for law in (order, split)), padding(3, 2, scores=2, visible=2)),
    compiled=({"B": 2, "T": 128, "S": 4096, "count": 2048},),
)
CHOOSE_WHOLE = Kernel(
    name="choose_whole",
    run=choose_whole,
    twin=lambda q, weights, k, visible, count: best_keys(liking(q, weights, k), visible, count),
    inputs=_whole_inputs,
    # the last: keys are scored some at a time
    sizes={"B": (1, 3), "T": (1, 3), **_EXACT, "S": (1, 9, 1100), "count": (1, 4)},
    ragged=_SEEN,
    numbers=_NUMBERS,
    invariances=(
        *(law(q=0, weights=0, k=0, visible=0) for law in (order, split)),
        padding(3, 2, k=1, visible=2),
    ),
    compiled=({"B": 2, "T": 128, "J": 64, "Z": 128, "S": 4096, "count": 2048},),
)


# --- over a paged cache --------------------------------------------------------------------------


def _paged_inputs(draw: Draw) -> dict[str, object]:
    B, T, J, Z = draw.of("B", "T", "J", "Z")
    table, seen, free = tables(draw)
    pool = draw.dead(draw.numbers(*free.shape, Z), free[..., None])
    index = {"q": draw.numbers(B, T, J, Z), "weights": draw.numbers(B, T, J), "pool": pool}
    return {**index, "table_BM": table, "seen_BT": seen, "count": draw.sizes["count"]}


def _paged_twin(q, weights, pool, table_BM, seen_BT, count):
    k = pool[table_BM].reshape(len(table_BM), -1, pool.shape[-1])
    visible = np.arange(k.shape[1]) < seen_BT[..., None]
    return _ranked(liking(q, weights, k), visible)[..., :count].astype(np.int32)


CHOOSE_PAGED = Kernel(
    name="choose_paged",
    run=choose_paged,
    twin=_paged_twin,
    inputs=_paged_inputs,
    sizes={"B": (1, 3), "T": (1, 3), **_EXACT, "s": (4,), "M": (1, 5), "count": (1, 4)},
    ragged=LATENT_PAGED.ragged,
    numbers=_NUMBERS,
    invariances=tuple(law(q=0, weights=0, table_BM=0, seen_BT=0) for law in (order, split)),
    compiled=({"B": 16, "T": 1, "J": 64, "Z": 128, "s": 64, "M": 64, "count": 2048},),
)
