"""Drawing a token without a sort of the vocabulary, beside sorts."""

from typing import Any

import numpy as np

from deepseek_jax.ops import sampling
from deepseek_jax.testing import Draw, Kernel, choices, order, split

_SHARES = (0.1, 0.5, 0.9, 0.99, 1.0)
_ALIKE = {"dtypes": ("float32",), "tolerance": {"float32": 0.0}}
_SIZES = {"B": (1, 3), "V": (5, 256, 600)}
_LARGE = {"B": 16, "V": 129280}


def _logits(draw: Draw) -> np.ndarray:
    """Some of them perhaps forbidden, and not all of a row."""
    logits = draw.numbers(*draw.of("B", "V"), scale=2.0)
    if draw.ragged["forbidden"]:
        forbidden = draw.ids.random(logits.shape) < 0.5
        forbidden[np.arange(len(logits)), draw.ids.integers(0, logits.shape[1], len(logits))] = False
        logits = np.where(forbidden, -np.inf, logits).astype(logits.dtype)
    return logits


def _shares(draw: Draw) -> np.ndarray:
    return draw.ids.choice(_SHARES, draw.sizes["B"]).astype(np.float32)


def _falling(logits):
    return np.take_along_axis(logits, np.argsort(-logits, axis=-1, kind="stable"), axis=-1)


def _weights(logits):
    return np.exp(logits - np.max(logits, axis=-1, keepdims=True))


def _top_k(logits, k):
    least = _falling(logits)[np.arange(len(k)), np.where(k > 0, k, logits.shape[1]) - 1]
    return np.where(logits >= least[:, None], logits, -np.inf)


def _top_p(logits, p):
    falling = _falling(logits)
    share = np.cumsum(_weights(falling), axis=-1)
    last = np.argmax(share >= p[:, None] * share[:, -1:], axis=-1)
    kept = np.where(logits >= np.take_along_axis(falling, last[:, None], axis=1), logits, -np.inf)
    return np.where(p[:, None] >= 1, logits, kept)


def _min_p(logits, p):
    with np.errstate(divide="ignore"):
        return np.where(logits >= np.max(logits, axis=-1, keepdims=True) + np.log(p)[:, None], logits, -np.inf)


def _best(logits, count):
    tokens = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(logits, tokens, axis=1), tokens.astype(np.int32)


def _of_count(draw: Draw) -> np.ndarray:
    return draw.ids.choice([0, 1, 3, draw.sizes["V"]], draw.sizes["B"]).astype(np.int32)


def _kernel(name: str, run: Any, twin: Any, further: Any, rows: dict[str, int], **others: Any) -> Kernel:
    return Kernel(
        name=name,
        run=run,
        twin=twin,
        inputs=lambda draw: {"logits": _logits(draw), **further(draw)},
        **{"sizes": _SIZES, "compiled": (_LARGE,), **others},
        ragged={"forbidden": choices(0, 1)},
        invariances=(order(logits=0, **rows), split(logits=0, **rows)),
        **_ALIKE,
    )


KEEP_TOP_K = _kernel("keep_top_k", sampling.keep_top_k, _top_k, lambda draw: {"k": _of_count(draw)}, {"k": 0})
KEEP_TOP_P = _kernel("keep_top_p", sampling.keep_top_p, _top_p, lambda draw: {"p": _shares(draw)}, {"p": 0})
KEEP_MIN_P = _kernel(
    "keep_min_p",
    sampling.keep_min_p,
    _min_p,
    lambda draw: {"p": draw.ids.choice([0.0, 0.05, 0.3, 1.0], draw.sizes["B"]).astype(np.float32)},
    {"p": 0},
)
BEST_TOKENS = _kernel(
    "best_tokens",
    sampling.best_tokens,
    _best,
    lambda draw: {"count": draw.sizes["count"]},
    {},
    sizes={**_SIZES, "count": (1, 5)},
    compiled=({**_LARGE, "count": 20},),
)


def _noise(draw: Draw, logits: np.ndarray) -> np.ndarray:
    """In the middle of a likely token's part of all probability, where rounding decides nothing."""
    share = _weights(logits.astype(np.float64))
    share /= share.sum(axis=-1, keepdims=True)
    likely = [draw.ids.choice(np.flatnonzero(row >= min(1e-3, row.max()))) for row in share]
    at = np.arange(len(share)), likely
    return (np.cumsum(share, axis=-1)[at] - share[at] / 2).astype(np.float32)


def _sample_inputs(draw: Draw) -> dict[str, Any]:
    logits = _logits(draw)
    return {"logits": logits, "noise": _noise(draw, logits)}


def _sampled(logits, noise):
    share = np.cumsum(_weights(logits), axis=-1)
    return np.argmax(share > noise[:, None] * share[:, -1:], axis=-1).astype(np.int32)


SAMPLE = Kernel(
    name="sample",
    run=sampling.sample,
    twin=_sampled,
    inputs=_sample_inputs,
    sizes=_SIZES,
    ragged={"forbidden": choices(0, 1)},
    invariances=(order(logits=0, noise=0), split(logits=0, noise=0)),
    compiled=(_LARGE,),
    **_ALIKE,
)
