"""Rewards a token, GAE and whitening against float64 twins, and the laws they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from experiments.ppo.gae import gae, token_rewards, whitened

B, T = 5, 24
ours = jax.jit(gae)
per_token = jax.jit(token_rewards)
white = jax.jit(whitened)
GAMMAS = LAMS = st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0])


def draw(seed):
    """Rewards and values, and a mask with one run of 0 to T tokens a row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, B)
    starts = rng.integers(0, T - lengths + 1)
    columns = np.arange(T)
    mask = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    rewards, values = rng.normal(size=(2, B, T)).astype(np.float32)
    return rewards, values, mask


def twin(rewards, values, mask, gamma, lam):
    """The sum over all later tokens of a run, token by token, float64; and the sum of what went in, unsigned."""
    rewards, values = np.float64(rewards), np.float64(values)
    advantages, size = np.zeros((2, *mask.shape))
    for b, t in zip(*np.nonzero(mask), strict=True):
        for later in range(t, mask.shape[1]):
            if not mask[b, later]:
                break
            after = values[b, later + 1] if later + 1 < mask.shape[1] and mask[b, later + 1] else 0.0
            weight = (gamma * lam) ** (later - t)
            advantages[b, t] += weight * (rewards[b, later] + gamma * after - values[b, later])
            size[b, t] += weight * (abs(rewards[b, later]) + gamma * abs(after) + abs(values[b, later]))
    return advantages, advantages + np.where(mask, values, 0), size


@given(seed=st.integers(0, 2**31), gamma=GAMMAS, lam=LAMS)
def test_gae_equals_the_double_sum(seed, gamma, lam):
    """To 1e-6 of what is added up: single precision loses that much where large terms cancel."""
    arrays = draw(seed)
    advantages, returns = ours(*arrays, gamma=gamma, lam=lam)
    wanted, wanted_returns, size = twin(*arrays, gamma, lam)
    assert (np.abs(advantages - wanted) <= 1e-6 * size).all()
    assert (np.abs(returns - wanted_returns) <= 1e-6 * (size + np.abs(arrays[1]))).all()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
def test_every_width_is_right(length):
    """The log-depth scan takes odd and even widths apart."""
    rewards, values, _ = (of[:, :length] for of in draw(1))
    mask = np.ones((B, length), bool)
    advantages, _ = ours(rewards, values, mask, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, twin(rewards, values, mask, 0.9, 0.8)[0], rtol=0, atol=2e-6)


@given(seed=st.integers(0, 2**31))
def test_with_lambda_and_gamma_one_it_is_the_rewards_to_come_minus_the_value(seed):
    rewards, values, mask = draw(seed)
    advantages, returns = ours(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = np.where(mask, np.cumsum(np.where(mask, np.float64(rewards), 0)[:, ::-1], axis=1)[:, ::-1], 0)
    np.testing.assert_allclose(returns, to_come, rtol=0, atol=2e-5)
    np.testing.assert_allclose(advantages, np.where(mask, to_come - values, 0), rtol=0, atol=2e-5)


@given(seed=st.integers(0, 2**31), gamma=GAMMAS)
def test_right_values_leave_no_advantage(seed, gamma):
    """Values that are the discounted rewards to come: every difference is 0, whatever lambda is."""
    rewards, _, mask = draw(seed)
    values = twin(rewards, np.zeros((B, T)), mask, gamma, 1.0)[0].astype(np.float32)
    advantages, _ = ours(rewards, values, mask, gamma=gamma, lam=0.95)
    np.testing.assert_allclose(advantages, 0, atol=2e-5)


def test_known_values():
    """d = (2 + .5 * 4 - 1, 3 - 4); A = (3 + .25 * -1, -1); and a second sample of the row for itself."""
    rewards, values = jnp.asarray([[9.0, 2, 3, 9, 5]]), jnp.asarray([[9.0, 1, 4, 9, 2]])
    advantages, returns = ours(rewards, values, jnp.asarray([[False, True, True, False, True]]), gamma=0.5, lam=0.5)
    np.testing.assert_array_equal(advantages, [[0, 2.75, -1, 0, 3]])
    np.testing.assert_array_equal(returns, [[0, 3.75, 3, 0, 5]])


@jax.jit
def chain(scores, kl, values, mask, junk):
    """Everything one after another, with junk where nothing counts, and the gradient through all of it."""

    def run(scores, kl, values):
        spoilt = lambda of: jnp.where(mask, of, junk)
        earned = token_rewards(scores, spoilt(kl), mask, kl_coef=0.1)
        advantages, returns = gae(spoilt(earned), spoilt(values), mask, gamma=0.9, lam=0.8)
        return earned, advantages, returns, whitened(spoilt(advantages), mask)

    loss = lambda *arrays: jnp.sum(jnp.stack(run(*arrays)) ** 2)
    return run(scores, kl, values), jax.grad(loss, argnums=(0, 1, 2))(scores, kl, values)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_what_does_not_count_changes_no_value_and_no_gradient(junk):
    kl, values, mask = draw(7)
    scores = values[:, 0]
    clean, spoilt = chain(scores, kl, values, mask, 0.0), chain(scores, kl, values, mask, junk)
    jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
    assert 0 < mask.sum() < mask.size
    for of in clean[0]:
        assert np.any(of) and not np.any(np.where(mask, 0, of))


@given(seed=st.integers(0, 2**31), kl_coef=st.sampled_from([0.0, 0.05, 1.0]))
def test_a_rows_rewards_are_its_score_and_its_kl(seed, kl_coef):
    kl, scores, mask = draw(seed)
    scores = scores[:, 0]
    earned = np.asarray(per_token(scores, kl, mask, kl_coef=kl_coef))
    wanted = np.where(mask, -np.float32(kl_coef) * kl, 0)
    for row in range(B):
        if mask[row].any():
            wanted[row, np.flatnonzero(mask[row])[-1]] += scores[row]
    np.testing.assert_allclose(earned, wanted, rtol=0, atol=1e-6)


def test_the_score_is_paid_once_where_counted_tokens_have_a_gap():
    mask = jnp.asarray([[True, True, False, True, False]])
    earned = per_token(jnp.asarray([2.0]), jnp.zeros((1, 5)), mask, kl_coef=0.1)
    np.testing.assert_array_equal(earned, [[0, 0, 0, 2, 0]])


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_whitening_equals_the_formula_with_ddof_1(seed, scale):
    values, _, mask = draw(seed)
    values = values * np.float32(scale)
    assume(mask.sum() >= 2)
    counted = values[mask].astype(np.float64)
    wanted = (counted - counted.mean()) / np.sqrt(counted.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.asarray(white(values, mask))[mask], wanted, rtol=1e-4, atol=1e-5)


# 0.1 and 1/3 have no exact mean in float32: rounding must not become an advantage.
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8])
def test_advantages_that_are_all_the_same_whiten_to_exactly_zero(value):
    mask = draw(3)[2]
    np.testing.assert_array_equal(white(jnp.full((B, T), value, jnp.float32), mask), np.zeros((B, T)))


@pytest.mark.parametrize("counted", [0, 1])
def test_fewer_than_two_tokens_whiten_to_zero(counted):
    mask = jnp.zeros((1, 3), bool).at[0, 1].set(bool(counted))
    np.testing.assert_array_equal(white(jnp.asarray([[3.0, 5.0, 7.0]]), mask), np.zeros((1, 3)))
