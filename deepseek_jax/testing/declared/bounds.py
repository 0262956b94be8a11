"""What rounding may leave of products, experts and attention, and of their gradients: each element's own bound."""

from typing import Any

import numpy as np

from deepseek_jax.testing.rounding import Near, exact, product, silu, silu_slope, softmax


def grouped(unit: float, rows: Any, of: Any, matrices: Near, d_out: Any) -> dict[str, Near]:
    """Rows times the matrices of their groups: "out", and the gradients of "rows" and "matrices".

    Args:
        unit: of the dtype.
        rows: [W, K].
        of: 1.0 for the group of each row, [W, E]; a row without one counts in no matrix's gradient.
        matrices: [E, K, N].
        d_out: [W, N].
    """
    x, d, by_row = exact(rows), exact(d_out), matrices[of.argmax(axis=1)]
    return {
        "out": product("wk,wkn->wn", x, by_row).rounded(unit),
        "rows": product("wn,wkn->wk", d, by_row).rounded(unit),
        "matrices": product("we,wk,wn->ekn", exact(of), x, d).rounded(unit),
    }


def low_rank(unit: float, rows: Any, of: Any, w: Any, a: Any, b: Any, scale: float, d_out: Any) -> dict[str, Near]:
    """The same of matrices w + scale a b: "out", and the gradients of "rows", "w", "a" and "b".

    Args: as of `grouped`; w [E, K, N], a [E, K, rank] and b [E, rank, N].
    """
    at = of.argmax(axis=1)
    x, d = exact(rows), exact(d_out)
    of_w, of_a, of_b = (exact(matrix[at]) for matrix in (w, a, b))
    low = product("wk,wkr->wr", x, of_a).rounded(unit)
    d_second = (exact(scale) * d).rounded(unit)
    d_low = product("wn,wrn->wr", d_second, of_b).rounded(unit)
    back = lambda d, matrix: product("wn,wkn->wk", d, matrix).rounded(unit)
    d_matrix = lambda into, d: product("we,wk,wn->ekn", exact(of), into, d).rounded(unit)
    return {
        "out": (product("wk,wkn->wn", x, of_w) + exact(scale) * product("wr,wrn->wn", low, of_b)).rounded(unit),
        "rows": (back(d, of_w) + back(d_low, of_a)).rounded(unit),
        "w": d_matrix(x, d),
        "a": d_matrix(x, d_low),
        "b": d_matrix(low, d_second),
    }


def swiglu(unit: float, rows: Any, of: Any, gate: Any, up: Any, down: Any, weights: Any, d_out: Any) -> dict[str, Near]:
    """Rows through the matrices of their groups: "out", and by argument the gradients.

    Args:
        unit: of the dtype.
        rows: [W, D].
        of: 1.0 for the group of each row, [W, E]; a row without one counts in no matrix's gradient.
        gate, up, down: [E, D, M] twice and [E, M, D].
        weights: [W, 1], of the hidden numbers.
        d_out: [W, D].
    """
    at = of.argmax(axis=1)
    x, d, w = map(exact, (rows, d_out, weights))
    by = lambda matrix: exact(matrix[at])
    times = lambda rows, matrix, order: product(f"wi,w{order}->wo", rows, matrix).rounded(unit)
    gated, raised = times(x, by(gate), "io"), times(x, by(up), "io")
    active = silu(gated)
    hidden = (w * (active * raised)).rounded(unit)
    d_hidden = times(d, by(down), "oi")
    weighed = w * d_hidden
    d_gated, d_raised = (weighed * raised * silu_slope(gated)).rounded(unit), (weighed * active).rounded(unit)
    d_matrix = lambda into, out: product("we,wi,wo->eio", exact(of), into, out).rounded(unit)
    return {
        "out": times(hidden, by(down), "io"),
        "rows": (times(d_gated, by(gate), "oi") + times(d_raised, by(up), "oi")).rounded(unit),
        "weights": product("wm,wm,wm->w", d_hidden, active, raised).reshape(-1, 1),
        "gate": d_matrix(x, d_gated),
        "up": d_matrix(x, d_raised),
        "down": d_matrix(hidden, d),
    }


def expert_mlp(
    unit: float, x: Any, weights: Any, experts: Any, gate: Any, up: Any, down: Any, d_out: Any
) -> dict[str, Near]:
    """The same of rows that go to several experts each, of `ops.experts.expert_mlp`; "x" in the place of "rows"."""
    (W, A), E = experts.shape, len(gate)
    of = (experts.reshape(-1, 1) == np.arange(E)).astype(np.float64)
    there = exact((experts < E).astype(np.float64))
    each = lambda x: x.repeat(A, axis=0)
    found = swiglu(unit, each(x), of, gate, up, down, weights.reshape(-1, 1), each(d_out))
    # an entry's part is rounded when it is added to a row's gradient; those of the result are added up before
    summed = lambda name, unit: product("wad,wa->wd", found.pop(name).reshape(W, A, -1), there, unit=unit)
    out, d_x = summed("out", 0).rounded(unit), summed("rows", A * unit)
    return {**found, "out": out, "x": d_x, "weights": found["weights"].reshape(W, A) * there}


def attention(
    unit: float,
    q: Any,
    k: Any,
    v: Any,
    mask: np.ndarray,
    scale: float,
    d_out: Any,
    d_log_sum: Any = 0.0,
    *,
    scaled: bool = False,
) -> dict[str, Near]:
    """Softmax attention: "out" [B, T, N, H], "log_sum" [B, T, N], and the gradients of "q", "k" and "v".

    Args:
        unit: of the dtype.
        q: [B, T, N, K].
        k, v: [B, G, S, K] and [B, G, S, H].
        mask: [B, T, S], or [1, T, S].
        scale: of the scores.
        d_out: as "out".
        d_log_sum: as "log_sum".
        scaled: whether queries are scaled, and rounded so, before there are scores.
    """
    (B, G), N = k.shape[:2], q.shape[2]
    queries, of_scores, d = exact(q), exact(scale), exact(d_out)
    keys, values = (exact(x.repeat(N // G, axis=1)) for x in (k, v))
    if scaled:
        queries, of_scores = (queries * of_scores).rounded(unit), exact(1.0)
    scores = product("btnk,bnsk->bnts", queries, keys) * of_scores
    weights, log_sum = softmax(scores, np.broadcast_to(mask[:, None], scores.value.shape))
    rounded = weights.rounded(unit)
    out = product("bnts,bnsh->btnh", rounded, values).rounded(unit)
    # the gradient of a score: a difference, of which little may be left
    inner = product("btnh,btnh->bnt", out, d) - exact(np.moveaxis(np.broadcast_to(d_log_sum, q.shape[:3]), 1, 2))
    d_weights = product("btnh,bnsh->bnts", d, values).rounded(unit)
    d_scores = (weights * (d_weights - inner[..., None]) * of_scores).rounded(unit)
    # sums are cut by tiles and devices, and rounded in parts
    summed = lambda subscripts, *of: product(subscripts, *of, unit=2 * unit)
    d_q = summed("bnts,bnsk->btnk", d_scores, keys)
    by_group = lambda x: Near(*(of.reshape(B, G, N // G, *of.shape[2:]).sum(axis=2) for of in (x.value, x.error)))
    return {
        "out": out,
        "log_sum": Near(*(np.moveaxis(of[..., 0], 1, 2) for of in (log_sum.value, log_sum.error))),
        "q": (d_q * exact(scale)).rounded(unit) if scaled else d_q,
        "k": by_group(summed("bnts,btnk->bnsk", d_scores, queries)),
        "v": by_group(summed("bnts,btnh->bnsh", rounded, d)),
    }
