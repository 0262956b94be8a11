"""One optimizer step: micro-batches, padding, router bias, and AdamW against NumPy."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scoring import score
from deepseek_jax.ops.metrics import values
from deepseek_jax.rl.batch import Batch
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import grpo_objective
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deepseek_jax.train.sft_loss import SFTBatch, make_sft_objective, sft_objective
from deepseek_jax.train.step import StepConfig, init_state, make_train_step

V, B, T = 16, 8, 10
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    attention=MLAConfig(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=0),
)
TWO_LAYERS = dataclasses.replace(CONFIG, num_hidden_layers=2)
GRPO = partial(grpo_objective, config=GRPOLossConfig(beta=0.1), temperature=0.8)
OBJECTIVES = {"grpo": GRPO, "sft": sft_objective, "mtp": make_sft_objective(mtp_weight=0.3)}
WITH_MTP = dataclasses.replace(CONFIG, num_nextn_predict_layers=1)


@cache
def model(config=CONFIG):
    graphdef, _ = abstract_weights(config)
    return graphdef, jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()


def grpo_batch(seed=0, width=T):
    """Prompts of 1 to 3 tokens, completions of 1 to 6; off-policy by about 0.3 nats."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(1, 4, B), rng.integers(1, 7, B)
    columns = np.arange(width)
    mask = (columns >= starts[:, None] - 1) & (columns < (starts + lengths)[:, None] - 1)
    tokens = np.zeros((B, width + 1), np.int32)
    tokens[:, :T] = rng.integers(3, V, (B, T))
    tokens[np.arange(width + 1) >= (starts + lengths)[:, None]] = 0
    noise = rng.normal(size=(2, B, T)).astype(np.float32)
    old, ref = (np.pad(-2.5 + 0.3 * n, ((0, 0), (0, width - T))) for n in noise)
    advantages = np.broadcast_to(rng.normal(size=(B, 1)).astype(np.float32), mask.shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, old, ref, advantages)


def batch_of(name, **settings):
    batch = grpo_batch(**settings)
    return batch if name == "grpo" else SFTBatch(*batch[:3])


def run(objective, batch, optimizer, config=CONFIG, **settings):
    graphdef, weights = model(config)
    update = make_train_step(graphdef, objective, optimizer, StepConfig(**settings))
    state, metrics = update(init_state(weights, optimizer), batch)
    return state.weights, values(metrics)


# A rate of 1: what is compared is the whole gradient, which AdamW's division by its root would hide.
SGD = optax.sgd(1.0)


def run_named(name, batch, **settings):
    config = WITH_MTP if name == "mtp" else CONFIG
    return run(OBJECTIVES[name], batch, SGD, config, balance_alpha=0.01, bias_gamma=0.1, **settings)


@cache
def reference_run(name):
    return run_named(name, batch_of(name))


# The loss of "mtp" is that of "sft" and more.
@pytest.mark.parametrize(("name", "parts"), [pytest.param("sft", 2, marks=pytest.mark.slow), ("grpo", 4), ("mtp", 4)])
def test_micro_batches_change_nothing(name, parts):
    weights, metrics = reference_run(name)
    parted_weights, parted_metrics = run_named(name, batch_of(name), micro_batches=parts)
    assert parted_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert metrics["grad_norm"] > 0.01
    for first, second in zip(jax.tree.leaves(weights), jax.tree.leaves(parted_weights), strict=True):
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6)


def test_micro_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="micro_batches: got 3, which does not divide the batch of 8 samples"):
        run(sft_objective, batch_of("sft"), SGD, micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches: got 0"):
        StepConfig(micro_batches=0)


# 160 columns are two chunks of log-probs, the second of them half full.
@pytest.mark.parametrize(("name", "width"), [("grpo", 160), ("mtp", 64)])
def test_the_width_of_padding_changes_nothing(name, width):
    weights, metrics = reference_run(name)
    batch = batch_of(name, width=width)
    wide_weights, wide_metrics = run_named(name, batch)
    assert wide_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for first, second in zip(jax.tree.leaves(weights), jax.tree.leaves(wide_weights), strict=True):
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6)


def biases(weights):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(weights) if isinstance(v, RouterBias)}


def test_the_router_bias_moves_by_its_own_layers_load_and_by_nothing_else():
    """Weight decay of a large rate would show if the optimizer ever touched it."""
    graphdef, weights = model(TWO_LAYERS)
    weights = jax.tree.map(jnp.copy, weights)
    for i, end in enumerate((0.3, -0.2)):
        weights.layers[i].mlp.bias = RouterBias(jnp.linspace(-end, end, 8))
    before, batch = biases(weights), batch_of("sft")
    load = np.asarray(jax.jit(lambda w, batch: score(nnx.merge(graphdef, w), *batch[:3]).load_LE)(weights, batch))
    assert load.shape == (2, 8) and (load[0] != load[1]).any()
    real = np.cumsum(batch.mask_BT[:, ::-1], axis=1)[:, ::-1] > 0
    np.testing.assert_array_equal(load.sum(axis=1), 2 * real.sum())
    optimizer = optax.adamw(0.1, weight_decay=10.0)
    update = make_train_step(graphdef, sft_objective, optimizer, StepConfig(bias_gamma=0.01))
    state, _ = update(init_state(weights, optimizer), batch)
    after = biases(state.weights)
    assert len(after) == 2
    for layer, path in enumerate(sorted(after, key=lambda path: path[1])):
        moved = 0.01 * np.sign(load[layer].mean() - load[layer])
        np.testing.assert_allclose(after[path], before[path] + moved, rtol=0, atol=1e-7)


def test_the_biases_of_mtp_modules_move_by_their_own_load():
    """The model's layer first, then the modules': three loads that differ, and biases that differ."""
    objective, batch = OBJECTIVES["mtp"], batch_of("mtp")
    graphdef, weights = model(dataclasses.replace(CONFIG, num_nextn_predict_layers=2))
    weights = jax.tree.map(jnp.copy, weights)
    layers = lambda weights: [weights.layers[0], weights.mtp[0].layer, weights.mtp[1].layer]
    for layer, end in zip(layers(weights), (0.3, -0.2, 0.1), strict=True):
        layer.mlp.bias = RouterBias(jnp.linspace(-end, end, 8))

    @jax.jit
    def loads(weights, batch):
        model = nnx.merge(graphdef, weights)
        real = jax.lax.cummax(jnp.int32(batch.mask_BT), axis=1, reverse=True) > 0
        hidden = model(batch.tokens_BT, real)
        drafts = model.draft(hidden.x_BTD, batch.targets_BT, real)
        return [jnp.sum(of.stats[0].load_BE, axis=0) for of in (hidden, *drafts)]

    load = np.array(loads(weights, batch))
    assert load.shape == (3, 8) and len(np.unique(np.sign(load.mean(axis=1, keepdims=True) - load), axis=0)) == 3
    update = make_train_step(graphdef, objective, SGD, StepConfig(bias_gamma=0.01))
    state, _ = update(init_state(weights, SGD), batch)
    for number, (before, after) in enumerate(zip(layers(weights), layers(state.weights), strict=True)):
        moved = 0.01 * np.sign(load[number].mean() - load[number])
        np.testing.assert_allclose(after.mlp.bias[...], before.mlp.bias[...] + moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize("first_k_dense", [0, 1])
def test_mtp_weights_that_no_objective_runs_stay_and_change_nothing_else(first_k_dense):
    """Router biases too; also where a module's layer is the only one with experts, so that there is no load at all."""
    moe = dataclasses.replace(CONFIG.moe, first_k_dense_replace=first_k_dense)
    config, plain = dataclasses.replace(WITH_MTP, moe=moe), dataclasses.replace(CONFIG, moe=moe)
    settings = {"balance_alpha": 0.01, "bias_gamma": 0.1}
    weights, metrics = run(sft_objective, batch_of("sft"), SGD, config, **settings)
    same = plain == CONFIG  # which another test has run already
    plain_run = reference_run("sft") if same else run(sft_objective, batch_of("sft"), SGD, plain, **settings)
    plain_weights, plain_metrics = plain_run
    assert metrics == pytest.approx(plain_metrics, rel=1e-6)
    start, found, wanted = (dict(nnx.to_flat_state(w)) for w in (model(config)[1], weights, plain_weights))
    assert ("mtp", 0, "layer", "mlp", "bias") in found
    for path, leaf in found.items():
        if path[0] == "mtp":
            np.testing.assert_array_equal(leaf[...], start[path][...], err_msg=str(path))
        else:
            np.testing.assert_allclose(leaf[...], wanted[path][...], rtol=0, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("method", ["greedy", "dense"])
def test_models_without_a_router_bias_train_with_gamma_all_the_same(method):
    """The experiment's default gamma meets V2's softmax routing and dense models too."""
    moe = dataclasses.replace(CONFIG.moe, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False)
    config = dataclasses.replace(CONFIG, moe=moe if method == "greedy" else None)
    graphdef, weights = model(config)
    update = make_train_step(graphdef, sft_objective, SGD, StepConfig(bias_gamma=1e-3, balance_alpha=1e-4))
    state, metrics = update(init_state(weights, SGD), batch_of("sft"))
    assert np.isfinite(values(metrics)["loss"]) and int(state.step) == 1


@cache
def adamw_update():
    """One update without KL, weight decay and bias rule, for two tests."""
    objective = partial(grpo_objective, config=GRPOLossConfig(beta=0.0), temperature=0.8)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2), 10)
    graphdef, weights = model()
    return make_train_step(graphdef, objective, optimizer, StepConfig()), lambda: init_state(weights, optimizer)


def test_equal_rewards_without_kl_and_decay_leave_every_weight_alone():
    """Router biases too, since gamma is 0."""
    update, start = adamw_update()
    state, metrics = update(start(), grpo_batch()._replace(advantages_BT=np.zeros((B, T), np.float32)))
    metrics = values(metrics)
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0
    for before, after in zip(jax.tree.leaves(model()[1]), jax.tree.leaves(state.weights), strict=True):
        np.testing.assert_array_equal(after, before)


def test_one_compilation_serves_all_steps_and_the_callers_weights_survive():
    update, start = adamw_update()
    state, losses = start(), []
    for number in range(5):
        state, metrics = update(state, grpo_batch(0))
        losses.append(values(metrics)["loss"])
        assert int(state.step) == number + 1
    assert update._cache_size() == 1
    assert losses[-1] < losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model()[1]))  # not donated away


# --- the optimizer ---------------------------------------------------------------------------------


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {"matrix": rng.normal(size=(3, 4)) * scale, "norm": rng.normal(size=4) * scale}


AXES = {"matrix": ("embed", "mlp"), "norm": (None,)}


def as_weights(tree):
    return nnx.State({k: nnx.Param(jnp.asarray(a, jnp.float32), axes=AXES[k]) for k, a in tree.items()})


def adamw_twin(params, gradients, config, rates):
    """Clipped AdamW in float64, decay for matrices only. Source: arXiv 1711.05101 algorithm 2."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for k, g in gradient.items():
            g = g * min(1, config.clip_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            step = m[k] / (1 - config.b1**t) / (np.sqrt(v[k] / (1 - config.b2**t)) + 1e-8)
            decay = config.weight_decay * params[k] if params[k].ndim >= 2 else 0
            params = {**params, k: params[k] - rate * (step + decay)}
    return params


@pytest.mark.parametrize("scale", [0.01, 10.0])  # below and above the clip
def test_adamw_equals_a_numpy_twin(scale):
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=2, final_ratio=0.1, weight_decay=0.3)
    assert (config.b1, config.b2, config.clip_norm) == (0.9, 0.95, 1.0)
    optimizer = make_optimizer(config, 6)
    gradients = [tree(seed, scale) for seed in (1, 2, 3)]
    params = as_weights(tree(0))
    moments = optimizer.init(params)
    for gradient in gradients:
        updates, moments = optimizer.update(as_weights(gradient), moments, params)
        params = optax.apply_updates(params, updates)
    wanted = adamw_twin(tree(0), gradients, config, [float(schedule(config, 6)(n)) for n in range(3)])
    for name, value in wanted.items():
        np.testing.assert_allclose(params[name][...], value, rtol=1e-4, atol=1e-6)


def test_weight_decay_reaches_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    params = as_weights(tree(0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"][...], -0.05 * params["matrix"][...], rtol=1e-5)
    np.testing.assert_array_equal(updates["norm"][...], np.zeros(4))


def test_schedule_rises_in_a_line_and_falls_in_a_cosine():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_ratio=0.1), 14)
    rise = np.array([float(rate(n)) for n in range(5)])
    assert rise[0] == pytest.approx(0.5) and rise[4] == pytest.approx(2.0)
    np.testing.assert_allclose(np.diff(rise), np.diff(rise)[0], rtol=1e-5)
    for n in (4, 9, 14, 100):
        done = min((n - 4) / 10, 1)
        assert float(rate(n)) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2), rel=1e-5)


def test_schedule_stays_at_its_peak_where_final_ratio_is_one():
    rate = schedule(OptimizerConfig(learning_rate=3.0, warmup_steps=2), 5)
    assert [float(rate(n)) for n in (2, 5, 50)] == [3.0, 3.0, 3.0]
    assert float(schedule(OptimizerConfig(learning_rate=3.0), 5)(0)) == 3.0


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"clip_norm": 0.0}])
def test_bad_optimizer_settings_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: got "):
        OptimizerConfig(**{"learning_rate": 1e-3, **bad})


SCOPES = (
    *("jvp(embed)", "jvp(layer)/attention", "jvp(layer)/router", "jvp(layer)/experts", "jvp(layer)/mlp", "jvp(logits)"),
    *("jvp(loss)", "transpose(jvp(layer))/attention", "optimizer"),
)


def test_a_profile_of_a_step_names_layers_and_stages():
    update, start = adamw_update()
    program = update.lower(jax.eval_shape(start), grpo_batch()).as_text(debug_info=True)
    assert not [scope for scope in SCOPES if f"jit(step)/{scope}/" not in program]
