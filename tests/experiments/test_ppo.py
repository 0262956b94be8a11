"""PPO: targets and value loss against float64 twins, the critic's step, and a task that is learnt only by learning."""

import dataclasses
import math
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.ops.metrics import BatchTotals, Mean, values
from deepseek_jax.rl.batch import Batch
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.train.step import StepConfig, init_state, make_train_step
from experiments.ppo.critic import critic_from
from experiments.ppo.ppo import (
    CriticBatch,
    PPOConfig,
    critic_objective,
    explained_variance,
    frozen_values,
    ppo_targets,
    ppo_update,
    value_loss,
    with_targets,
)

V, B, T = 16, 8, 10
MODEL = dataclasses.replace(
    preset("tiny"),
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    attention=MLAConfig(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=0),
)
CLIPS = st.sampled_from([None, 0.05, 0.2, 1.0])


def draw(seed, width=T):
    """Values, old values, returns and a mask with one run of 1 to 6 tokens a row."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, 4, B), rng.integers(1, 7, B)
    columns = np.arange(width)
    mask = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    arrays = np.zeros((3, B, width), np.float32)
    arrays[:, :, :T] = rng.normal(size=(3, B, T)) * 0.5
    return *arrays, mask


def totals(mask):
    return BatchTotals(jnp.float32(len(mask)), jnp.float32(mask.sum()))


def value_twin(new, old, returns, mask, clip):
    """Loss, its gradient in the new values, and the metrics, token by token in float64."""
    loss, clipped, gradient = 0.0, 0, np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        v, o, r = (float(of[b, t]) for of in (new, old, returns))
        near = v if clip is None else min(max(v, o - clip), o + clip)
        worse = (near - r) ** 2 > (v - r) ** 2  # the clipped side, which does not move with v
        loss += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        clipped += worse
        gradient[b, t] = 0.0 if worse else v - r
    return loss / mask.sum(), gradient / mask.sum(), clipped / mask.sum()


@partial(jax.jit, static_argnames="clip")
def losses(new, old, returns, mask, totals, *, clip):
    loss = lambda new: value_loss(new, old, returns, mask, clip=clip, totals=totals)
    return jax.value_and_grad(loss, has_aux=True)(new)


@given(seed=st.integers(0, 2**31), clip=CLIPS)
def test_value_loss_and_gradient_equal_the_twin(seed, clip):
    arrays = draw(seed)
    (loss, metrics), gradient = losses(*arrays, totals(arrays[-1]), clip=clip)
    wanted, wanted_gradient, wanted_clipped = value_twin(*arrays, clip)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)
    found = values(metrics)
    assert found["value_loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["value/clip_ratio"] == pytest.approx(wanted_clipped, abs=1e-6)
    assert found["value/mean"] == pytest.approx(np.float64(arrays[0])[arrays[-1]].mean(), abs=1e-6)


def test_known_value_losses():
    """At the old value 0 and the return 1 a value of 0.5 may count as 0.2 only: half of .64, not of .25."""
    one = lambda x: jnp.full((1, 1), x, jnp.float32)
    of = lambda value, clip: losses(one(value), one(0), one(1), one(1) > 0, BatchTotals(1.0, 1.0), clip=clip)
    (loss, _), gradient = of(0.5, 0.2)
    assert float(loss) == pytest.approx(0.32) and float(gradient[0, 0]) == 0.0
    (loss, _), gradient = of(0.5, None)
    assert float(loss) == pytest.approx(0.125) and float(gradient[0, 0]) == pytest.approx(-0.5)
    (loss, _), gradient = of(-0.5, 0.2)  # moved away from the return: nothing is held back
    assert float(loss) == pytest.approx(1.125) and float(gradient[0, 0]) == pytest.approx(-1.5)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, B - 1))
def test_value_losses_of_parts_add_up(seed, cut):
    *arrays, mask = draw(seed)
    first = np.arange(B)[:, None] < cut
    loss = lambda of: float(losses(*arrays, mask & of, totals(mask), clip=0.2)[0][0])
    assert loss(first) + loss(~first) == pytest.approx(loss(True), rel=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_padding_never_changes_the_value_loss(junk, clip):
    *arrays, mask = draw(5)
    assert not mask.all()
    spoilt = [np.where(mask, a, np.float32(junk)) for a in arrays]
    clean = losses(*arrays, mask, totals(mask), clip=clip)
    jax.tree.map(np.testing.assert_array_equal, losses(*spoilt, mask, totals(mask), clip=clip), clean)


@given(seed=st.integers(0, 2**31))
def test_explained_variance_equals_the_formula(seed):
    new, _, returns, mask = draw(seed)
    r, gap = np.float64(returns)[mask], (np.float64(returns) - new)[mask]
    wanted = 1 - gap.var() / r.var()
    assert float(explained_variance(new, returns, mask)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    spoilt = (np.where(mask, a, np.nan) for a in (new, returns))
    assert float(explained_variance(*spoilt, mask)) == float(explained_variance(new, returns, mask))


@pytest.mark.parametrize(("slope", "shift", "wanted"), [(1, 0, 1), (1, 3, 1), (0, 0.1, 0), (-1, 0, -3)])
def test_explained_variance_of_known_critics(slope, shift, wanted):
    """Right, right but for a constant, a constant, and the wrong way round."""
    *_, returns, mask = draw(0)
    found = float(explained_variance(slope * returns + np.float32(shift), returns, mask))
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_returns_that_are_all_the_same_explain_nothing(value):
    new, *_, mask = draw(0)
    assert float(explained_variance(new, jnp.full(mask.shape, value, jnp.float32), mask)) == 0.0


def targets_twin(rewards, old, ref, new, mask, config):
    """Advantages before whitening and returns, float64, from the last token to the first."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in np.flatnonzero(mask[b])[::-1]:
            earned = -config.kl_coef * (float(old[b, t]) - float(ref[b, t])) if config.kl_coef else 0.0
            earned += float(rewards[b]) if not mask[b, t + 1 :].any() else 0.0
            difference = earned + config.gamma * next_value - float(new[b, t])
            next_advantage = advantages[b, t] = difference + config.gamma * config.lam * next_advantage
            next_value = float(new[b, t])
    return advantages, advantages + np.where(mask, new, 0)


CONFIGS = [PPOConfig(), PPOConfig(gamma=0.9, lam=0.5, kl_coef=0.3, whiten=False), PPOConfig(kl_coef=0.0, lam=1.0)]


@given(seed=st.integers(0, 2**31), config=st.sampled_from(CONFIGS))
def test_targets_equal_the_twin(seed, config):
    old, ref, new, mask = draw(seed)
    rewards = np.random.default_rng(seed).normal(size=B).astype(np.float32)
    targets, metrics = ppo_targets(rewards, old, ref, new, mask, config=config)
    advantages, returns = targets_twin(rewards, old, ref, new, mask, config)
    found = values(metrics)
    assert found["advantage"] == pytest.approx(advantages[mask].mean(), abs=1e-5)
    assert found["return"] == pytest.approx(returns[mask].mean(), abs=1e-5)
    kl = np.float64(old - ref)[mask].mean() if config.kl_coef else 0.0
    assert found["kl_from_reference"] == pytest.approx(kl, abs=1e-6)
    wanted = 1 - (returns - new)[mask].var() / returns[mask].var()
    assert found["value/explained_variance"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(targets.returns_BT, returns, rtol=0, atol=1e-5)
    if config.whiten:
        counted = advantages[mask]
        advantages = np.where(mask, (advantages - counted.mean()) / counted.std(ddof=1), 0)
    np.testing.assert_allclose(targets.advantages_BT, advantages, rtol=1e-4, atol=1e-4)


def test_without_kl_the_reference_is_not_looked_at_and_padding_never():
    old, ref, new, mask = draw(1)
    rewards = np.ones(B, np.float32)
    spoilt = [np.where(mask, of, np.nan) for of in (old, new)]
    for config, used in ((CONFIGS[2], np.full_like(ref, np.nan)), (CONFIGS[0], np.where(mask, ref, np.nan))):
        clean = ppo_targets(rewards, old, ref, new, mask, config=config)
        found = ppo_targets(rewards, spoilt[0], used, spoilt[1], mask, config=config)
        jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_rewards_by_prompt_and_sample_are_refused():
    old, ref, new, mask = draw(1)
    with pytest.raises(ValueError, match=r"rewards: got shape \[4, 2\], wanted \[8\], one a row of the batch"):
        ppo_targets(np.ones((4, 2), np.float32), old, ref, new, mask, config=CONFIGS[0])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("gamma", 1.1, "0 to 1"),
        ("lam", -0.1, "0 to 1"),
        ("lam", math.nan, "0 to 1"),
        ("kl_coef", -1.0, "a finite number from 0"),
        ("kl_coef", math.nan, "a finite number from 0"),
        ("value_clip", 0.0, "more than 0, or None"),
        ("value_coef", 0.0, "a finite number above 0"),
        ("ppo_epochs", 0, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, wanted):
    with pytest.raises(ValueError, match=f"{name}: got {value}, wanted {wanted}"):
        PPOConfig(**{name: value})


@cache
def models():
    """A policy and a critic of its trunk, each as graph and weights."""
    graphdef, _ = abstract_weights(MODEL)
    weights = jax.jit(lambda: split(Decoder(MODEL, rngs=nnx.Rngs(0)))[1])()
    return (graphdef, weights), critic_from(MODEL, weights)


def critic_batch(width=T, junk=None):
    """Off the first critic's values, all 0; tokens beyond the last counted one are padding."""
    _, old, returns, mask = draw(3, width)
    tokens = np.zeros((B, width), np.int32)
    tokens[:, :T] = np.random.default_rng(4).integers(3, V, (B, T))
    real = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    tokens = np.where(real, tokens, 0 if junk is None else 5)
    spoil = lambda of: of if junk is None else np.where(mask, of, np.float32(junk))
    return CriticBatch(tokens, mask, spoil(old * 0.5), spoil(returns))


SETTINGS = PPOConfig(value_coef=0.5)


@cache
def stepped(parts=1, width=T, junk=None, steps=2):
    """Weights and metrics after SGD; the first step moves the vector alone, the second the trunk as well."""
    graphdef, weights = models()[1]
    objective = partial(critic_objective, config=SETTINGS)
    of_step = StepConfig(micro_batches=parts, balance_alpha=0.01, bias_gamma=0.1)
    update = make_train_step(graphdef, objective, optax.sgd(1.0), of_step)
    state = init_state(weights, optax.sgd(1.0))
    for _ in range(steps):
        state, metrics = update(state, critic_batch(width, junk))
    return state.weights, values(metrics)


def test_neither_micro_batches_nor_padding_change_the_critics_step():
    (weights, metrics), (other, other_metrics) = stepped(), stepped(parts=4, width=16, junk=np.nan)
    assert metrics["grad_norm"] > 0.01
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for first, second in zip(jax.tree.leaves(weights), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6)


def test_the_critics_step_moves_everything_that_it_has():
    """The trunk, its routers' biases and the vector; a trunk that got no gradient would stay."""
    before = dict(nnx.to_flat_state(models()[1][1]))
    for path, leaf in nnx.to_flat_state(stepped()[0]):
        assert np.any(leaf[...] != before[path][...]), path


def test_the_first_steps_loss_gradient_and_biases():
    """Values of 0, so that all is known: the vector's gradient is the states' product with -returns, unless clipped."""
    graphdef, weights = models()[1]
    batch = critic_batch()
    after, metrics = stepped(steps=1)
    zeros = np.zeros_like(batch.returns_BT)
    loss, gradient, clipped = value_twin(zeros, batch.old_values_BT, batch.returns_BT, batch.mask_BT, 0.2)
    assert metrics["loss"] == pytest.approx(0.5 * loss, rel=1e-5) and metrics["value_loss"] == pytest.approx(loss)
    assert 0 < clipped == pytest.approx(metrics["value/clip_ratio"])
    real = np.cumsum(batch.mask_BT[:, ::-1], axis=1)[:, ::-1] > 0
    hidden = jax.jit(lambda w, tokens, real: nnx.merge(graphdef, w)(tokens, real)[1])(weights, batch.tokens_BT, real)
    wanted = -0.5 * np.einsum("bt,btd->d", gradient, np.float64(hidden.x_BTD))
    np.testing.assert_allclose(after["value_D"][...], wanted, rtol=0, atol=1e-6)
    biases = [leaf[...] for _, leaf in nnx.to_flat_state(after) if isinstance(leaf, RouterBias)]
    load = np.asarray(hidden.stats[0].load_BE).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(biases, 0.1 * np.sign(load.mean(axis=1, keepdims=True) - load), rtol=0, atol=1e-7)


def test_packed_rows_are_refused():
    zeros = np.zeros((1, 2), np.float32)
    batch = Batch(*[zeros] * 6, segments_BT=np.ones((1, 2), np.int32), lengths_BK=np.ones((1, 1), np.int32))
    with pytest.raises(ValueError, match="batch: got packed rows, wanted one sample a row"):
        with_targets(batch, zeros, SimpleNamespace(advantages_BT=zeros, returns_BT=zeros))


def test_every_epoch_updates_both():
    def step(state, batch):
        return [*state, batch], {"loss": Mean(jnp.float32(len(state)), jnp.float32(1))}

    policy, critic, found = ppo_update(
        [], ["x"], "p", "c", policy_step=step, critic_step=step, config=PPOConfig(ppo_epochs=3)
    )
    assert (policy, critic) == (["p"] * 3, ["x", "c", "c", "c"])
    assert [values(of) for of in found] == [{"loss": i, "critic/loss": i + 1} for i in range(3)]


# A task: after a token, say it twice. By chance 1 in 16 tokens is right.
SAMPLES, LENGTH = 64, 2
PPO, ADAM = PPOConfig(kl_coef=0.01, ppo_epochs=2), optax.adam(1e-2)


@partial(jax.jit, static_argnames="graphdef")
def sampled(graphdef, weights, key):
    """Prompts of one token, completions of two, and the log-probs of their tokens."""
    model = nnx.merge(graphdef, weights)
    first, *keys = jax.random.split(key, 1 + LENGTH)
    tokens = jax.random.randint(first, (SAMPLES, 1), 0, V)
    logprobs = []
    for key in keys:
        padded = jnp.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))
        logits = model.logits(model(padded).x_BTD)[:, tokens.shape[1] - 1]
        drawn = jax.random.categorical(key, logits)[:, None]
        logprobs.append(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, axis=1))
        tokens = jnp.concatenate([tokens, drawn], axis=1)
    return tokens, jnp.concatenate(logprobs, axis=1)


@cache
def steps():
    """Of policy and critic, compiled once for all runs."""
    (graphdef, _), (critic_graphdef, _) = models()
    objective = partial(grpo_objective, config=GRPOLossConfig(loss_type="dapo", beta=0.0), temperature=1.0)
    return {
        "policy_step": make_train_step(graphdef, objective, ADAM, StepConfig()),
        "critic_step": make_train_step(critic_graphdef, partial(critic_objective, config=PPO), ADAM, StepConfig()),
    }


def train(alter, rounds=40):
    """Mean reward and the critic's explained variance, a round each; `alter` makes what is learnt from."""
    (graphdef, weights), (critic_graphdef, critic_weights) = models()
    policy, critic = init_state(weights, ADAM), init_state(critic_weights, ADAM)
    mask, zeros = jnp.ones((SAMPLES, LENGTH), bool), jnp.zeros((SAMPLES, LENGTH))
    found, explained = [], []
    for number in range(rounds):
        tokens, old = sampled(graphdef, policy.weights, jax.random.key(number))
        rewards = np.mean(np.asarray(tokens[:, 1:] == tokens[:, :1]), axis=1, dtype=np.float32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, old, zeros, zeros)
        batch = batch._replace(ref_logprobs_BT=frozen_scores(graphdef, weights, batch, temperature=1.0))
        expected = frozen_values(critic_graphdef, critic.weights, batch.tokens_BT, mask)
        targets, metrics = ppo_targets(alter(rewards, number), old, batch.ref_logprobs_BT, expected, mask, config=PPO)
        policy, critic, _ = ppo_update(policy, critic, *with_targets(batch, expected, targets), **steps(), config=PPO)
        found.append(rewards.mean())
        explained.append(values(metrics)["value/explained_variance"])
    return np.asarray(found), np.asarray(explained)


def test_ppo_learns_what_is_rewarded():
    """And the critic comes to know, from the prompt and the first token, what the policy will earn."""
    found, explained = train(lambda rewards, number: rewards)
    assert found[:3].mean() < 0.15
    assert found[-5:].mean() > 0.6
    assert explained[0] == 0.0 and explained[-10:].mean() > 0.3


@pytest.mark.slow
def test_ppo_learns_nothing_from_shuffled_rewards():
    """The control: the same rewards, each for another sample. Whatever rises without learning would rise here too."""
    found, explained = train(lambda rewards, number: np.random.default_rng(number).permutation(rewards))
    assert found[-5:].mean() < 0.25
    assert explained[-10:].mean() < 0.15
