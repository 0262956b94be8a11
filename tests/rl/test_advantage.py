"""Group-relative advantages against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rl.advantage import group_advantages

advantages = jax.jit(group_advantages, static_argnames=("scale", "epsilon"))


def rewards(seed, P=4, G=5):
    return np.random.default_rng(seed).normal(size=(P, G)).astype(np.float32)


@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([1e-4, 1e-6, 0.5]))
def test_equals_the_formula_with_ddof_1(seed, epsilon):
    r = rewards(seed)
    r64 = r.astype(np.float64)
    centred = r64 - r64.mean(axis=1, keepdims=True)
    wanted = centred / (r64.std(axis=1, ddof=1, keepdims=True) + epsilon)
    np.testing.assert_allclose(advantages(jnp.asarray(r), epsilon=epsilon), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(advantages(jnp.asarray(r), scale=False), centred, rtol=1e-4, atol=1e-6)


def test_known_values():
    got = advantages(jnp.asarray([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), epsilon=0.0)
    half = 1 / np.sqrt(2)
    np.testing.assert_allclose(got[np.array([0, 2])], [[half, -half], [-half, half]], rtol=1e-6)


@given(seed=st.integers(0, 2**31), scale=st.booleans())
def test_every_row_sums_to_zero(seed, scale):
    np.testing.assert_allclose(advantages(jnp.asarray(rewards(seed)), scale=scale).sum(axis=1), 0, atol=2e-6)


# 0.1 and 1/3 have no exact mean in float32: rounding must not become an advantage.
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.77, 1e8])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_zero(value, scale):
    got = np.asarray(advantages(jnp.full((2, 7), value, jnp.float32), scale=scale))
    np.testing.assert_array_equal(got, np.zeros((2, 7)))


def test_one_group_does_not_touch_another():
    r = rewards(0)
    changed = r.copy()
    changed[1] *= 100
    first, second = advantages(jnp.asarray(r)), advantages(jnp.asarray(changed))
    np.testing.assert_array_equal(np.delete(first, 1, axis=0), np.delete(second, 1, axis=0))


@given(seed=st.integers(0, 2**31), shift=st.floats(-3, 3))
def test_a_shift_of_a_groups_rewards_changes_nothing(seed, shift):
    r = rewards(seed)
    np.testing.assert_allclose(
        advantages(jnp.asarray(r + np.float32(shift))), advantages(jnp.asarray(r)), rtol=1e-3, atol=1e-4
    )


@given(seed=st.integers(0, 2**31), factor=st.floats(0.1, 10))
def test_a_scale_of_a_groups_rewards_changes_nothing_but_epsilons_share(seed, factor):
    r = rewards(seed)
    first, second = (np.asarray(advantages(jnp.asarray(r * np.float32(f)), epsilon=0.0)) for f in (1, factor))
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)
    scaled = advantages(jnp.asarray(r * np.float32(factor)), scale=False)
    np.testing.assert_allclose(scaled, advantages(jnp.asarray(r), scale=False) * factor, rtol=1e-3, atol=1e-5)


def test_the_order_within_a_group_does_not_matter():
    r = rewards(1)
    np.testing.assert_allclose(advantages(jnp.asarray(r[:, ::-1])), advantages(jnp.asarray(r))[:, ::-1], rtol=1e-5)


@pytest.mark.parametrize(("shape", "message"), [((3, 1), "group size: got 1"), ((4,), r"rewards: got shape \[4\]")])
def test_a_group_of_one_and_a_wrong_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.zeros(shape))
