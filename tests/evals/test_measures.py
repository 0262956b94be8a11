"""Figures of an evaluation, beside what NumPy, exact fractions or a hand gives."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from deepseek_jax.evals.measures import bootstrap, clustered, elo, interval, pass_at, pass_at_k, several, vote


def test_one_sample_a_problem_has_the_binomial_error():
    found = clustered([[1.0], [0.0], [1.0], [1.0], [None]])
    assert found.mean == 0.75 and found.n == 4
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=1e-12)


def test_errors_are_of_problems_and_not_of_samples():
    """Eight equal samples of a problem say no more than one; NumPy's clusters agree on a ragged draw."""
    once = [[1.0], [0.0], [1.0]]
    assert clustered([of * 8 for of in once]) == clustered(once)
    draw = np.random.default_rng(0)
    scores = [draw.integers(0, 2, draw.integers(1, 7)).astype(float).tolist() for _ in range(50)]
    means = np.array([np.mean(of) for of in scores])
    found = clustered(scores)
    assert found.mean == pytest.approx(means.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(means.std() / math.sqrt(50), rel=1e-12)


def test_what_was_not_graded_is_in_no_mean():
    assert clustered([[1.0, None], [None, None], [0.0, 0.0]])[:1] == (0.5,)
    assert clustered([[1.0, None], [None, None], [0.0, 0.0]]).n == 2
    assert clustered([[None]]) is None and bootstrap([[None]]) is None
    assert vote([None, "4"], [None, None], lambda pairs: []) is None


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    """Over all subsets, counted as fractions."""
    for count in range(1, 7):
        for right in range(count + 1):
            for k in range(1, count + 1):
                subsets = list(itertools.combinations(range(count), k))
                wanted = Fraction(sum(min(of) < right for of in subsets), len(subsets))
                assert pass_at_k(right, count, k) == pytest.approx(float(wanted), abs=1e-12)
    with pytest.raises(ValueError, match="got k 5 of 4 samples, wanted 1 to 4"):
        pass_at_k(1, 4, 5)
    found = pass_at([[1.0, 0.0, 0.0, 0.0], [None, 1.0], [0.0, 0.0]], 2)
    assert found.n == 2 and found.mean == 0.25  # one problem has no two graded samples
    assert several(1) == [] and several(64) == [2, 4, 8, 16, 32, 64] and several(6) == [2, 4, 6]


def test_the_bootstrap_interval_is_that_of_the_normal_law_for_many_problems():
    draw = np.random.default_rng(1)
    scores = [[float(of)] for of in draw.random(2_000) < 0.3]
    found, (low, high) = clustered(scores), bootstrap(scores)
    assert low == pytest.approx(found.mean - 1.96 * found.stderr, abs=2e-3)
    assert high == pytest.approx(found.mean + 1.96 * found.stderr, abs=2e-3)
    assert bootstrap(scores) == (low, high) == interval(scores)


def test_the_interval_of_none_or_all_right_is_the_exact_one():
    """Under its bound no, or every, problem is right with a chance of 2.5 %; samples of a problem add nothing."""
    for count in (1, 2, 20, 500):
        low, high = interval([[0.0] * 3] * count)
        assert low == 0.0 and (1 - high) ** count == pytest.approx(0.025)
        assert interval([[1.0]] * count) == pytest.approx((1 - high, 1.0))
    assert interval([[None]]) is None and interval([[0.5]] * 3) == (0.5, 0.5)


def test_the_vote_counts_equal_answers_together():
    same = lambda pairs: [float(first) == float(second) for first, second in pairs]
    # 5 and 5.0 are one wrong answer of three votes, the right one has two in two spellings
    assert vote(["4", "5", "5.0", "4.0", "5"], [1.0, 0.0, 0.0, 1.0, 0.0], same) == 0.0
    assert vote(["4", "5", "6", "4.0", "7"], [1.0, 0.0, 0.0, 1.0, 0.0], same) == 1.0
    assert vote(["5", "4"], [0.0, 1.0], same) == 0.0  # of two equal ones the first
    assert vote([None, "4", None], [0.0, 1.0, 0.0], same) == 1.0  # no answer, no vote
    assert vote([None, None], [0.0, 0.0], same) == 0.0


def test_elo_beside_a_hand():
    # One problem solved half of the time: its own rating, and half of all information of four samples.
    found = elo([[1.0, 0.0, 1.0, 0.0]], [1500])
    error = 1 / (math.log(10) / 400 * math.sqrt(4 * 0.25))
    assert found.rating == pytest.approx(1500, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((1500 - 1.96 * error, 1500 + 1.96 * error), abs=1e-6)
    # 1200 solved and 1600 not: the chances add up to one in the middle; each is missed by 1 / 11.
    found = elo([[1.0], [0.0], [1.0]], [1200, 1600, None])
    p = 1 / (1 + 10**-0.5)
    error = 1 / (math.log(10) / 400 * math.sqrt(2 * p * (1 - p)))
    assert found.rating == pytest.approx(1400, abs=1e-6)
    assert found.high - found.rating == pytest.approx(1.96 * error, rel=1e-9)


def test_elo_is_the_likeliest_rating():
    draw = np.random.default_rng(2)
    ratings = draw.integers(800, 3000, 300).tolist()
    chance = lambda rating: 1 / (1 + 10 ** ((np.array(ratings) - rating) / 400))
    scores = [[float(of)] for of in draw.random(300) < chance(1900)]
    solved = np.array(scores)[:, 0]
    grid = np.arange(1500, 2300, 0.5)
    likelihoods = [np.sum(np.log(np.where(solved == 1, chance(r), 1 - chance(r)))) for r in grid]
    found = elo(scores, ratings)
    assert found.rating == pytest.approx(grid[int(np.argmax(likelihoods))], abs=0.5)
    assert found.low < 1900 < found.high


def test_elo_without_a_bound_is_none():
    assert elo([[1.0], [1.0]], [1500, 1600]) == (None, None, None)
    assert elo([[0.0]], [1500]) == (None, None, None)
    assert elo([[None], [1.0]], [1500, None]) is None
