"""Whether two runs differ: both answered the same problems, so that each problem is its own control."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from deepseek_jax.evals.measures import Scores, bootstrap, clustered, mean_of

_EXACT = 16  # problems that differ up to which all signs are tried
_DRAWS, _SEED = 100_000, 0


class Difference(NamedTuple):
    """The second run's mean less the first one's, over the problems that both have graded.

    mean, stderr, low, high: of it; the error and the 95 % interval (bootstrap) are of problems as clusters. p: chance
    of one as large, on either side, were the runs alike. n: problems. better, worse: problems on which the second did
    better or worse. test: "mcnemar" where every problem has one sample that is right or wrong, else "permutation".
    """

    mean: float
    stderr: float
    low: float
    high: float
    p: float
    n: int
    better: int
    worse: int
    test: Literal["mcnemar", "permutation"]


def difference(first: Sequence[Scores], second: Sequence[Scores]) -> Difference | None:
    """How two runs differ; None where no problem is graded in both.

    Args:
        first: of each problem the scores of its samples, None where not graded.
        second: of the same problems in the same order.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if mean_of(a) is not None and mean_of(b) is not None]
    if not pairs:
        return None
    gains = np.array([mean_of(b) - mean_of(a) for a, b in pairs])
    found, interval = clustered([[gain] for gain in gains]), bootstrap([[gain] for gain in gains])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    single = all(_verdict(a) and _verdict(b) for a, b in pairs)
    p = mcnemar(better, worse) if single else permutation(gains)
    named = "mcnemar" if single else "permutation"
    return Difference(found.mean, found.stderr, *interval, p, len(pairs), better, worse, named)


def _verdict(scores: Scores) -> bool:
    return len(scores) == 1 and scores[0] in (0.0, 1.0)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of McNemar's test: of problems that only one run solved, either is as likely.

    >>> mcnemar(1, 5)
    0.21875
    """
    count, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(few + 1)) / 2**count)


def permutation(gains: np.ndarray) -> float:
    """The two-sided p of the mean gain, were each problem's sign a coin's: all signs, or 100,000 draws of them.

    Args:
        gains: of each problem, second run less first.
    """
    moved = gains[gains != 0]
    if not moved.size:
        return 1.0
    seen = abs(moved.sum()) * (1 - 1e-12)  # sums in another order are no other sums
    if moved.size <= _EXACT:
        signs = 1 - 2 * (np.arange(2**moved.size)[:, None] >> np.arange(moved.size) & 1)
        return float((abs(signs @ moved) >= seen).mean())
    draw, count = np.random.default_rng(_SEED), 0
    step = max(1, 4_000_000 // moved.size)
    for start in range(0, _DRAWS, step):
        signs = 1 - 2 * draw.integers(0, 2, (min(step, _DRAWS - start), moved.size))
        count += int((abs(signs @ moved) >= seen).sum())
    return (1 + count) / (1 + _DRAWS)
