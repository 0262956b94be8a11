"""Paired tests beside hand cases and enumerations."""

import itertools
import math

import numpy as np
import pytest

from deepseek_jax.evals.paired import difference, mcnemar, permutation


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (5, 1, 2 * 7 / 64), (3, 3, 1.0), (10, 2, 2 * (1 + 12 + 66) / 4096)],
)
def test_mcnemar_by_hand(better: int, worse: int, p: float):
    assert mcnemar(better, worse) == pytest.approx(p, abs=1e-15) == mcnemar(worse, better)


def test_permutation_is_the_share_of_all_signs():
    gains = np.random.default_rng(3).normal(0.2, 1, 9).round(2)
    sums = [abs(sum(s * g for s, g in zip(signs, gains, strict=True)))
            for signs in itertools.product((1, -1), repeat=9)]  # fmt: skip
    assert permutation(gains) == pytest.approx(np.mean([total >= abs(gains.sum()) - 1e-9 for total in sums]), abs=1e-15)
    assert permutation(np.concatenate([gains, np.zeros(50)])) == permutation(gains)
    assert permutation(np.zeros(4)) == 1.0 and permutation(np.full(6, 0.25)) == 2 / 64


def test_of_verdicts_permutation_is_mcnemar():
    gains = np.array([1.0] * 10 + [-1.0] * 4)
    assert permutation(gains) == pytest.approx(mcnemar(10, 4), abs=1e-15)


def test_many_problems_are_drawn_and_the_same_each_time():
    gains = np.array([1.0] * 60 + [-1.0] * 40)
    exact = mcnemar(60, 40)
    error = math.sqrt(exact * (1 - exact) / 100_000)
    assert permutation(gains) == permutation(gains) == pytest.approx(exact, abs=4 * error)


def test_a_difference_of_single_samples():
    first = [[0.0], [1.0], [None], [0.0], [1.0], [0.0]]
    second = [[1.0], [1.0], [1.0], [1.0], [0.0], [None]]
    found = difference(first, second)
    assert (found.n, found.better, found.worse, found.test) == (4, 2, 1, "mcnemar")
    assert found.mean == 0.25 and found.p == 1.0
    assert found.stderr == pytest.approx(math.sqrt(0.75**2 * 2 + 0.25**2 + 1.25**2) / 4, rel=1e-12)
    assert found.low <= 0.25 <= found.high and (found.low, found.high) == (-0.5, 1.0)


def test_a_difference_of_several_samples_is_by_problem():
    first = [[0.0, 0.0, 1.0, 0.0]] * 5 + [[1.0, None, 1.0, 1.0]]
    second = [[1.0, 0.0, 1.0, 0.0]] * 5 + [[1.0, 1.0]]
    found = difference(first, second)
    assert (found.n, found.better, found.worse, found.test) == (6, 5, 0, "permutation")
    assert found.mean == pytest.approx(5 * 0.25 / 6, rel=1e-15) and found.p == 2 / 32
    assert difference([[None]], [[1.0]]) is None
