"""grpo_loss against a float64 twin, value and gradient, and the laws it has to keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.metrics import values
from deepseek_jax.rl.loss import GRPOConfig, grpo_loss

B, T = 6, 7
CONFIGS = [
    GRPOConfig(),
    GRPOConfig(epsilon=0.1, epsilon_high=0.28, beta=0.0),
    GRPOConfig(epsilon=0.3, epsilon_high=0.05, beta=0.5),
]


def twin(logprobs, old, ref, advantages, mask, config, samples=None):
    """Loss and its gradient in logprobs, token by token: -min(r A, clip(r) A) + beta (e^d - d - 1), d = ref - logp."""
    low, high = 1 - config.epsilon, 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    loss, gradient = 0.0, np.zeros_like(logprobs)
    sums = {"policy_loss": 0.0, "kl": 0.0, "ratio": 0.0, "clip_ratio": 0.0}
    for b in range(logprobs.shape[0]):
        tokens = np.flatnonzero(mask[b])
        for t in tokens:
            A, ratio = advantages[b], np.exp(logprobs[b, t] - old[b, t])
            clipped = min(max(ratio, low), high)
            active = clipped * A < ratio * A  # the clipped side is the smaller one: no gradient through it
            policy = -min(ratio * A, clipped * A)
            d = ref[b, t] - logprobs[b, t]
            k3 = np.exp(d) - d - 1 if config.beta else 0.0
            weight = 1 / len(tokens) / (len(mask) if samples is None else samples)
            loss += weight * (policy + config.beta * k3)
            d_policy = 0.0 if active else -A * ratio
            gradient[b, t] = weight * (d_policy + config.beta * (1 - np.exp(d)))
            for name, value in zip(sums, (policy, k3, ratio, active), strict=True):
                sums[name] += value
    return loss, gradient, {name: total / max(mask.sum(), 1) for name, total in sums.items()}


def batch(seed, spread=0.4):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (B, T))
    logprobs, ref = old + rng.normal(size=(B, T)) * spread, old + rng.normal(size=(B, T)) * spread
    lengths = rng.integers(1, T + 1, B)
    starts = rng.integers(0, T - lengths + 1)
    columns = np.arange(T)
    mask = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    return [logprobs, old, ref, rng.normal(size=B), mask]


@partial(jax.jit, static_argnames="config")
def ours(logprobs, old, ref, advantages, mask, samples, *, config):
    loss = lambda lp: grpo_loss(lp, old, ref, advantages, mask, config, samples=samples)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    return value, gradient, metrics


def run(arrays, config, samples=None):
    single = [jnp.asarray(a) if a.dtype == bool else jnp.asarray(a, jnp.float32) for a in arrays]
    loss, gradient, metrics = ours(*single, jnp.float32(len(arrays[0]) if samples is None else samples), config=config)
    return float(loss), np.asarray(gradient), values(metrics)


# One step of 0.4 nats moves half of the tokens past a clip; 3 moves most of them.
@given(seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS), spread=st.sampled_from([0.05, 0.4, 3.0]))
def test_loss_gradient_and_metrics_equal_the_twin(seed, config, spread):
    arrays = batch(seed, spread)
    loss, gradient, metrics = run(arrays, config)
    wanted_loss, wanted_gradient, wanted_metrics = twin(*arrays, config)
    assert loss == pytest.approx(wanted_loss, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-3, atol=1e-5)
    for name, wanted in wanted_metrics.items():
        assert metrics[name] == pytest.approx(wanted, rel=1e-4, abs=1e-5), name


def test_the_twins_gradient_is_that_of_its_value():
    """Central differences, away from the kinks of clip and min."""
    arrays = batch(3)
    _, gradient, _ = twin(*arrays, CONFIGS[2])
    for b, t in np.ndindex(B, T):
        moved = []
        for h in (1e-6, -1e-6):
            shifted = arrays[0].copy()
            shifted[b, t] += h
            moved.append(twin(shifted, *arrays[1:], CONFIGS[2])[0])
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(gradient[b, t], abs=1e-6)


@given(seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS))
def test_on_policy_the_ratio_is_one_and_kl_zero(seed, config):
    """Then the gradient is -A / length / B for every token of a sample: nothing is clipped."""
    logprobs, _, _, advantages, mask = batch(seed)
    loss, gradient, metrics = run([logprobs, logprobs, logprobs, advantages, mask], config)
    assert metrics["ratio"] == 1.0 and metrics["kl"] == 0.0 and metrics["clip_ratio"] == 0.0
    assert metrics["sampling/sampling_logp_difference/max"] == 0.0
    assert loss == pytest.approx(-advantages.mean(), rel=1e-5, abs=1e-6)
    wanted = np.where(mask, -(advantages / mask.sum(axis=1) / B)[:, None], 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 2**31))
def test_zero_advantages_give_a_zero_policy_gradient(seed):
    """What equal rewards become; with beta there is the KL's gradient alone."""
    logprobs, old, ref, _, mask = batch(seed)
    loss, gradient, _ = run([logprobs, old, ref, np.zeros(B), mask], CONFIGS[1])
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((B, T)))
    _, gradient, _ = run([logprobs, old, ref, np.zeros(B), mask], CONFIGS[2])
    wanted = np.where(mask, 0.5 * (1 - np.exp(ref - logprobs)) / mask.sum(axis=1, keepdims=True) / B, 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@given(
    seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS), junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e30])
)
def test_padding_never_changes_the_loss(seed, config, junk):
    arrays = batch(seed)
    mask = arrays[4]
    dirty = [np.where(mask, a, junk) for a in arrays[:3]] + arrays[3:]
    clean_loss, clean_gradient, clean_metrics = run(arrays, config)
    loss, gradient, metrics = run(dirty, config)
    assert loss == clean_loss and metrics == clean_metrics
    np.testing.assert_array_equal(gradient, clean_gradient)
    # each of the three alone, so that no two kinds of junk cancel
    for i in range(3):
        one = [a if j != i else dirty[i] for j, a in enumerate(arrays)]
        assert run(one, config)[0] == clean_loss
        np.testing.assert_array_equal(run(one, config)[1], clean_gradient)


def test_the_reference_is_not_looked_at_without_beta():
    arrays = batch(0)
    arrays[2] = np.full((B, T), np.nan)
    loss, gradient, metrics = run(arrays, CONFIGS[1])
    assert np.isfinite(loss) and np.isfinite(gradient).all() and metrics["kl"] == 0.0


@pytest.mark.parametrize("advantage", [1.5, np.nan])
def test_a_sample_without_tokens_counts_as_zero(advantage):
    arrays = batch(1)
    arrays[4][2] = False
    arrays[3][2] = advantage
    loss, gradient, metrics = run(arrays, GRPOConfig())
    others = [np.delete(a, 2, axis=0) for a in arrays]
    wanted, wanted_gradient, _ = run(others, GRPOConfig(), samples=B)
    assert loss == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_array_equal(gradient[2], np.zeros(T))
    np.testing.assert_allclose(np.delete(gradient, 2, axis=0), wanted_gradient, rtol=1e-6)
    assert all(np.isfinite(v) for v in metrics.values())


def test_a_batch_without_tokens_gives_zero():
    arrays = batch(1)
    arrays[4][:] = False
    loss, gradient, metrics = run(arrays, GRPOConfig())
    assert loss == 0.0 and not gradient.any() and all(np.isfinite(v) for v in metrics.values())


@given(seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS))
def test_parts_of_a_batch_sum_to_the_whole(seed, config):
    arrays = batch(seed)
    loss, gradient, _ = run(arrays, config)
    parts = [run([a[i : i + 2] for a in arrays], config, samples=B) for i in (0, 2, 4)]
    assert sum(p[0] for p in parts) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS))
def test_the_order_of_samples_does_not_matter(seed, config):
    arrays = batch(seed)
    order = np.random.default_rng(seed).permutation(B)
    loss, gradient, _ = run(arrays, config)
    loss2, gradient2, _ = run([a[order] for a in arrays], config)
    assert loss2 == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient2, gradient[order], rtol=1e-6)


def test_width_of_the_padding_does_not_matter():
    arrays = batch(4)
    wide = [np.pad(a, ((0, 0), (0, 9))) if a.ndim == 2 else a for a in arrays]
    loss, gradient, metrics = run(arrays, GRPOConfig())
    wide_loss, wide_gradient, wide_metrics = run(wide, GRPOConfig())
    assert wide_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(wide_gradient[:, :T], gradient, rtol=1e-6)
    assert wide_metrics == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": -0.1},
        {"epsilon": 1.5},
        {"epsilon": float("nan")},
        {"epsilon_high": -0.1},
        {"epsilon_high": float("nan")},
        {"beta": -0.01},
        {"beta": float("nan")},
        {"loss_type": "ppo"},
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: got "):
        GRPOConfig(**bad)
