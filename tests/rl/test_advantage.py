"""Advantages against their formulas in float64, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rl.advantage import (
    group_advantages,
    normalized_sum_advantages,
    reinforce_advantages,
    reinforce_baseline_advantages,
    rloo_advantages,
    zero_variance,
)
from tests.rl import twins

CLOSE = {"rtol": 2e-6, "atol": 1e-6}
SCALES = ["group", "batch", "none"]
ALL = [group_advantages, rloo_advantages, reinforce_advantages, reinforce_baseline_advantages]
OF_GROUPS = [group_advantages, rloo_advantages, reinforce_baseline_advantages]
by_name = {"ids": lambda f: f.__name__}
advantages = jax.jit(group_advantages, static_argnames=("scale", "epsilon", "tolerance"))
seeds = st.integers(0, 2**31)


def rewards(seed, P=4, G=5):
    return np.random.default_rng(seed).normal(size=(P, G)).astype(np.float32)


@pytest.mark.parametrize("scale", SCALES)
@given(seed=seeds, epsilon=st.sampled_from([1e-4, 1e-6, 0.5]))
def test_group_advantages_equal_the_twin(scale, seed, epsilon):
    r = rewards(seed)
    wanted = twins.group_advantages(r.astype(np.float64), scale, epsilon)
    np.testing.assert_allclose(advantages(jnp.asarray(r), scale=scale, epsilon=epsilon), wanted, **CLOSE)


@given(seed=seeds, epsilon=st.sampled_from([1e-4, 0.5]))
def test_rloo_and_reinforce_equal_their_twins(seed, epsilon):
    r, r64 = jnp.asarray(rewards(seed)), rewards(seed).astype(np.float64)
    np.testing.assert_allclose(rloo_advantages(r), twins.rloo_advantages(r64), **CLOSE)
    wanted = twins.reinforce_advantages(r64, epsilon)
    np.testing.assert_allclose(reinforce_advantages(r, epsilon=epsilon), wanted, **CLOSE)
    wanted = twins.reinforce_baseline_advantages(r64, epsilon)
    np.testing.assert_allclose(reinforce_baseline_advantages(r, epsilon=epsilon), wanted, **CLOSE)


def test_known_values():
    r = jnp.asarray([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    half, zero = 1 / np.sqrt(2), [0.0, 0.0]
    np.testing.assert_allclose(advantages(r, epsilon=0.0), [[half, -half], zero, [-half, half]], rtol=1e-6)
    np.testing.assert_allclose(advantages(r, scale="none"), [[0.5, -0.5], zero, [-1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(rloo_advantages(r), [[1.0, -1.0], zero, [-2.0, 2.0]], rtol=1e-6)
    # Six differences whose squares sum to 2.5, and so have variance 0.5.
    wanted = np.array([[0.5, -0.5], zero, [-1.0, 1.0]]) / np.sqrt(0.5)
    np.testing.assert_allclose(reinforce_baseline_advantages(r, epsilon=0.0), wanted, rtol=1e-6)


@given(seed=seeds, scale=st.sampled_from(SCALES))
def test_every_row_sums_to_zero(seed, scale):
    np.testing.assert_allclose(advantages(jnp.asarray(rewards(seed)), scale=scale).sum(axis=1), 0, atol=2e-6)


# 0.1 and 1/3 have no exact mean in float32: rounding must not become an advantage, not even without an epsilon.
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.77, 1e8])
@pytest.mark.parametrize("of", ALL, **by_name)
def test_equal_rewards_give_exactly_zero(value, of):
    r = jnp.full((2, 7), value, jnp.float32)
    np.testing.assert_array_equal(of(r), np.zeros((2, 7)))
    if of is not rloo_advantages:
        np.testing.assert_array_equal(of(r, epsilon=0.0), np.zeros((2, 7)))


def nearly_equal() -> np.ndarray:
    """The same three parts of a reward, summed in each order: float32 makes several numbers of them."""
    parts = np.float32([1.0, 0.3 * 0.7, 0.2 * 0.9])
    orders = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)]
    return np.float32([[(parts[a] + parts[b]) + parts[c] for a, b, c in orders]])


@pytest.mark.parametrize("of", OF_GROUPS, **by_name)
def test_rewards_that_differ_by_rounding_alone_give_exactly_zero(of):
    r = nearly_equal()
    assert len(np.unique(r)) > 1
    np.testing.assert_array_equal(of(jnp.asarray(r)), np.zeros((1, 4)))
    spread = np.ptp(np.asarray(group_advantages(jnp.asarray(r), epsilon=0.0, tolerance=0.0)))
    assert spread > 1, "without the tolerance they would be told apart"


def test_zero_variance_marks_the_groups_that_teach_nothing():
    r = np.concatenate([rewards(0, 2, 4), nearly_equal(), np.full((1, 4), 0.1), nearly_equal() * 1e6]).astype(
        np.float32
    )
    np.testing.assert_array_equal(zero_variance(jnp.asarray(r)), [False, False, True, True, True])
    apart = jnp.asarray([[0.0, 1e-3], [1.0, 1.0 + 1e-5], [1e6, 1e6 + 8]], jnp.float32)
    assert not zero_variance(apart).any()
    assert zero_variance(apart, tolerance=0.01).all()


def test_one_group_does_not_touch_another():
    r = rewards(0)
    changed = r.copy()
    changed[1] *= 100
    for of in (advantages, rloo_advantages):
        first, second = of(jnp.asarray(r)), of(jnp.asarray(changed))
        np.testing.assert_array_equal(np.delete(first, 1, axis=0), np.delete(second, 1, axis=0))


@given(seed=seeds, shift=st.floats(-3, 3))
def test_a_shift_of_a_groups_rewards_changes_nothing(seed, shift):
    r = rewards(seed)
    np.testing.assert_allclose(
        advantages(jnp.asarray(r + np.float32(shift))), advantages(jnp.asarray(r)), rtol=1e-3, atol=1e-4
    )


@given(seed=seeds, factor=st.floats(0.1, 10))
def test_a_scale_of_a_groups_rewards_changes_nothing_but_epsilons_share(seed, factor):
    r = rewards(seed)
    first, second = (np.asarray(advantages(jnp.asarray(r * np.float32(f)), epsilon=0.0)) for f in (1, factor))
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)
    scaled = advantages(jnp.asarray(r * np.float32(factor)), scale="none")
    np.testing.assert_allclose(scaled, advantages(jnp.asarray(r), scale="none") * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("of", ALL, **by_name)
def test_the_order_within_a_group_and_of_groups_does_not_matter(of):
    r = rewards(1)
    np.testing.assert_allclose(of(jnp.asarray(r[::-1, ::-1])), of(jnp.asarray(r))[::-1, ::-1], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("of", [*OF_GROUPS, zero_variance], **by_name)
def test_a_group_of_one_and_a_wrong_shape_are_refused(of):
    with pytest.raises(ValueError, match="group size: got 1, wanted at least 2"):
        of(jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"rewards: got shape \[4\], wanted \[prompts, samples\]"):
        of(jnp.zeros(4))


@pytest.mark.usefixtures("unchecked_shapes")
def test_reinforce_takes_groups_of_one_but_no_batch_of_one():
    np.testing.assert_allclose(
        reinforce_advantages(jnp.asarray([[0.0], [1.0]]), epsilon=0.0), [[-np.sqrt(0.5)], [np.sqrt(0.5)]], rtol=1e-6
    )
    with pytest.raises(ValueError, match="got 1, wanted at least 2"):
        reinforce_advantages(jnp.zeros((1, 1)))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("scale", [True, False, "std"])
def test_another_scale_is_refused(scale):
    with pytest.raises(ValueError, match="^scale: got .*, wanted 'group', 'batch' or 'none'"):
        group_advantages(jnp.zeros((2, 2)), scale=scale)


def with_unknown(seed, P=5, G=6) -> np.ndarray:
    """Some rewards are not known; of the last group one is, of the one before it none."""
    r = rewards(seed, P, G)
    r[np.random.default_rng(seed + 1).random((P, G)) < 0.3] = np.nan
    r[-2], r[-1, 1:] = np.nan, np.nan
    return r


def ragged(r, of) -> np.ndarray:
    """A formula on the known rewards of each group alone; 0 elsewhere, and where only one is known."""
    groups = [[float(x) for x in row if not np.isnan(x)] for row in r]
    found = iter(np.concatenate([np.ravel(row) for row in of([g for g in groups if len(g) > 1])]))
    counts = [len(g) > 1 for g in groups]
    return np.array(
        [[next(found) if many and not np.isnan(x) else 0.0 for x in row] for row, many in zip(r, counts, strict=True)]
    )


@pytest.mark.parametrize("seed", range(4))
def test_an_unknown_reward_is_as_if_it_had_not_been_drawn(seed):
    r = with_unknown(seed)
    of_group = lambda groups: [(np.array(g) - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) for g in groups]
    np.testing.assert_allclose(group_advantages(jnp.asarray(r)), ragged(r, of_group), rtol=1e-4, atol=1e-5)
    of_others = lambda groups: [(np.array(g) - np.mean(g)) * len(g) / (len(g) - 1) for g in groups]
    np.testing.assert_allclose(rloo_advantages(jnp.asarray(r)), ragged(r, of_others), rtol=1e-4, atol=1e-5)
    everything = r[~np.isnan(r)].astype(np.float64)
    wanted = np.nan_to_num((r - everything.mean()) / (everything.std(ddof=1) + 1e-4))
    np.testing.assert_allclose(reinforce_advantages(jnp.asarray(r)), wanted, rtol=1e-4, atol=1e-5)
    centred = np.array([x - np.mean(g) for g in ([y for y in row if not np.isnan(y)] for row in r) for x in g])
    wanted = ragged(r, lambda groups: [(np.array(g) - np.mean(g)) / (centred.std(ddof=1) + 1e-4) for g in groups])
    np.testing.assert_allclose(reinforce_baseline_advantages(jnp.asarray(r)), wanted, rtol=1e-4, atol=1e-5)
    batch = wanted * (centred.std(ddof=1) + 1e-4) / (everything.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(jnp.asarray(r), scale="batch"), batch, rtol=1e-4, atol=1e-5)


def test_two_known_rewards_of_four_have_their_own_deviation():
    r = jnp.asarray([[1, 0, np.nan, np.nan]], jnp.float32)
    half = 1 / np.sqrt(2)
    np.testing.assert_allclose(group_advantages(r, epsilon=0.0), [[half, -half, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(rloo_advantages(r), [[1, -1, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("of", ALL, **by_name)
def test_a_group_of_which_nothing_or_little_is_known_gets_no_advantage(of):
    r = np.full((3, 4), np.nan, np.float32)
    np.testing.assert_array_equal(of(jnp.asarray(r)), np.zeros((3, 4)))
    r[1, 2] = 5
    np.testing.assert_array_equal(of(jnp.asarray(r)), np.zeros((3, 4)))
    r[0] = [0, 1, 0, 1]
    np.testing.assert_array_equal(of(jnp.asarray(r))[2], np.zeros(4))


def parts(seed, P=3, G=5, F=3) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(P, G, F)).astype(np.float32) * np.float32([1, 100, 0.01])
    found[np.random.default_rng(seed + 1).random((P, G, F)) < 0.2] = np.nan
    found[0, 0], found[1, :, 0] = np.nan, 0.25
    return found


@pytest.mark.parametrize("seed", range(4))
def test_each_reward_by_itself_then_summed_equals_the_formula(seed):
    p, weights = parts(seed), np.float32([1.0, 0.5, -2.0])
    total = np.zeros(p.shape[:2])
    for f, weight in enumerate(weights):
        of_group = lambda groups: [(np.array(g) - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) for g in groups]
        total += weight * ragged(p[:, :, f], of_group)
    total[np.isnan(p).all(axis=2)] = np.nan
    wanted = np.nan_to_num((total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4))
    found = normalized_sum_advantages(jnp.asarray(p), jnp.asarray(weights))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.usefixtures("unchecked_shapes")
def test_weights_must_be_as_many_as_functions():
    with pytest.raises(ValueError, match="a weight for each function"):
        normalized_sum_advantages(jnp.zeros((2, 2, 3)), jnp.ones(2))
