"""Figures of graded samples: means over problems with errors that know of problems, pass@k, votes, bootstrap.

Samples of one problem are alike, so a problem is the unit of every error. A sample without a score is in no mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Scores = Sequence[float | None]
_RESAMPLES, _SEED = 10_000, 0


class Estimate(NamedTuple):
    """A mean over problems, its standard error, and how many problems had a score."""

    mean: float
    stderr: float
    n: int


def clustered(scores: Sequence[Scores]) -> Estimate | None:
    """The mean over problems of the mean over a problem's graded samples; None where none is graded.

    Args:
        scores: of each problem those of its samples, None where not graded.

    Returns:
        Its standard error is that of clusters, sqrt(sum of (mean of problem - mean)^2) / n; with one sample a problem
        that is sqrt(p (1 - p) / n).

    Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640), section 2.2.
    """
    means = _means(scores)
    if not means.size:
        return None
    mean = float(means.mean())
    return Estimate(mean, float(np.sqrt(((means - mean) ** 2).sum())) / means.size, int(means.size))


def bootstrap(scores: Sequence[Scores], *, share: float = 0.95) -> tuple[float, float] | None:
    """The interval that holds the mean in a share of resamples of the problems; None where none is graded."""
    means = _means(scores)
    if not means.size:
        return None
    draw = np.random.default_rng(_SEED)
    step = max(1, 10_000_000 // means.size)
    found = []
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        found.append(means[draw.integers(0, means.size, (count, means.size))].mean(axis=1))
    tail = 50 * (1 - share)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    return float(low), float(high)


def interval(scores: Sequence[Scores], *, share: float = 0.95) -> tuple[float, float] | None:
    """The bootstrap's; where no sample is right, or every one, the exact one of as many problems, for resamples of
    equal problems would leave no doubt. None where none is graded.

    Source: Clopper and Pearson, The Use of Confidence or Fiducial Limits (Biometrika 1934).

    >>> [round(bound, 3) for bound in interval([[0.0]] * 10)]
    [0.0, 0.308]
    """
    means = _means(scores)
    if not means.size or means.min() != means.max() or means[0] not in (0.0, 1.0):
        return bootstrap(scores, share=share)
    least = ((1 - share) / 2) ** (1 / means.size)  # as many would all be right by chance
    return (least, 1.0) if means[0] else (0.0, 1 - least)


def pass_at_k(right: int, count: int, k: int) -> float:
    """Without bias, the chance that one of k samples is right, from `right` of `count`.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), figure 3.

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    if not 1 <= k <= count:
        raise ValueError(f"pass@k: got k {k} of {count} samples, wanted 1 to {count}")
    return 1.0 - math.prod(1.0 - k / i for i in range(count - right + 1, count + 1))


def pass_at(scores: Sequence[Scores], k: int) -> Estimate | None:
    """pass@k over the problems that have k graded samples; a sample is right where its score is 1."""
    graded = [[score for score in of if score is not None] for of in scores]
    return clustered([[pass_at_k(sum(s == 1.0 for s in of), len(of), k)] for of in graded if len(of) >= k])


def several(samples: int) -> list[int]:
    """The k of pass@k that are reported beside 1: powers of two, and all.

    >>> several(6)
    [2, 4, 6]
    """
    return sorted({*(1 << exponent for exponent in range(1, samples.bit_length())), samples} - {0, 1})


def vote(
    answers: Sequence[str | None], scores: Scores, same: Callable[[Sequence[tuple[str, str]]], list[bool]]
) -> float | None:
    """The score of the answer that most samples give; None where none is graded.

    Right answers are one answer, and others are where the grader says so. Of answers equally often the first counts;
    a sample without an answer has no vote, and where none has one the score is 0.
    """
    if all(score is None for score in scores):
        return None
    groups: list[tuple[str, float, int]] = []
    for answer, score in zip(answers, scores, strict=True):
        if answer is None or score is None:
            continue
        place = _group(answer, score, groups, same)
        if place is None:
            groups.append((answer, score, 1))
        else:
            groups[place] = (*groups[place][:2], groups[place][2] + 1)
    return max(groups, key=lambda group: group[2])[1] if groups else 0.0


def _group(answer: str, score: float, groups: Sequence[tuple[str, float, int]], same: Callable) -> int | None:
    alike = [place for place, group in enumerate(groups) if group[1] == score]
    if score == 1.0:
        return alike[0] if alike else None
    known = next((place for place in alike if groups[place][0] == answer), None)
    if known is not None or not alike:
        return known
    verdicts = same([(answer, groups[place][0]) for place in alike])
    return next((place for place, verdict in zip(alike, verdicts, strict=True) if verdict), None)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(scores: Sequence[Scores]) -> np.ndarray:
    return np.array([mean for mean in map(mean_of, scores) if mean is not None], np.float64)


# --- ratings --------------------------------------------------------------------------------------


class Rating(NamedTuple):
    """A rating with the bounds of its 95 % interval; None where all or none is solved, so that there is no bound."""

    rating: float | None
    low: float | None
    high: float | None


def elo(scores: Sequence[Scores], ratings: Sequence[float | None]) -> Rating | None:
    """The rating under which the scores are most likely, where a problem of rating r is solved with the chance
    1 / (1 + 10^((r - R) / 400)).

    Args:
        scores: of each problem those of its samples.
        ratings: of the problems; one without is left out.

    Returns:
        The root of sum over samples of (score - chance), by bisection; the interval is 1.96 errors wide on both sides,
        each problem a cluster. None where no problem with a rating is graded.

    Source: the Elo formula, as Codeforces rates problems (codeforces.com/blog/entry/62865).
    """
    known = [
        (rating, [score for score in of if score is not None])
        for rating, of in zip(ratings, scores, strict=True)
        if rating is not None and any(score is not None for score in of)
    ]
    if not known:
        return None
    place = np.array([rating for rating, _ in known])
    solved = np.array([sum(of) for _, of in known])
    count = np.array([len(of) for _, of in known])
    if not 0 < solved.sum() < count.sum():
        return Rating(None, None, None)
    chance = lambda rating: 1.0 / (1.0 + 10.0 ** ((place - rating) / 400.0))
    low, high = place.min() - 10_000.0, place.max() + 10_000.0
    while high - low > 1e-9 * max(1.0, abs(high)):
        middle = (low + high) / 2
        low, high = (middle, high) if (solved - count * chance(middle)).sum() > 0 else (low, middle)
    rating, slope = (low + high) / 2, math.log(10) / 400
    p = chance(rating)
    # of the likelihood's curvature and the spread of its slope the wider one: samples of a problem may be alike
    information = slope**2 * float((count * p * (1 - p)).sum())
    spread = slope**2 * float(((solved - count * p) ** 2).sum())
    error = max(math.sqrt(1 / information), math.sqrt(spread) / information)
    return Rating(rating, rating - 1.96 * error, rating + 1.96 * error)


def by_group(values: Mapping[str, int]) -> dict[str, int]:
    """Counts, the largest first, then by name."""
    return dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))
