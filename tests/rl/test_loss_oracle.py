"""The loss, its gradients, its metrics and the advantages are those of TRL 1.16's own trainers.

The trainers' methods are called as they stand, on a stand-in that has the attributes they read. Log-probs are put in
where they would ask a model, rewards where they would ask reward functions. They compute in float64, we in float32.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.completion import Completion
from deepseek_jax.ops.metrics import BatchTotals, values
from deepseek_jax.rl.advantage import group_advantages, normalized_sum_advantages, rloo_advantages
from deepseek_jax.rl.entropy import first_control, high_entropy, next_control, weight_now
from deepseek_jax.rl.loss import GRPOLossConfig, grpo_loss
from deepseek_jax.rl.rollout import Rollout, rollout_metrics

pytestmark = pytest.mark.oracle

P, G, T, EOS = 2, 3, 6, 2
B = P * G
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
WEIGHTS = [1.0, 0.3, -0.5]


def trl_trainer(name: str) -> Any:
    trl = pytest.importorskip("trl", reason="needs TRL 1.16 of the oracle extra")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"compares with TRL 1.16, got {trl.__version__}")
    return getattr(trl, name)


def numbers(seed: int, spread: float = 0.4, *, truncated: bool = False) -> dict[str, np.ndarray]:
    """Float32 arrays of completions that start in the first column, rewards [P, G], and lengths.

    Truncated: the last sample was cut off, and is masked out for it.
    """
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (B, T))
    near = lambda width: old + rng.normal(size=(B, T)) * width
    found = {
        "logprobs": near(spread),
        "old": old,
        "ref": near(spread),
        "sampler": near(spread / 3),
        "entropy": rng.exponential(1.0, (B, T)),
        "rewards": rng.normal(size=(P, G)),
    }
    lengths = rng.integers(1, T + 1, B)
    lengths[0] = T
    mask = np.arange(T) < lengths[:, None]
    mask[-1] &= not truncated
    return {name: a.astype(np.float32) for name, a in found.items()} | {"mask": mask, "lengths": lengths}


def stand_in(config: GRPOLossConfig, scale: str = "group") -> SimpleNamespace:
    """What the methods of TRL's trainer read, for one process and one micro-batch a step."""
    metrics = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(
        device="cpu",
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=lambda x: x,
        pad_across_processes=lambda x, dim, pad_index: x,
        reduce=lambda x, reduction: x,
    )
    args = SimpleNamespace(
        delta=config.delta,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        use_bias_correction_kl=config.kl_estimator == "unbiased" or config.use_bias_correction_kl,
        vespo_k_pos=config.vespo_k_pos,
        vespo_lambda_pos=config.vespo_lambda_pos,
        vespo_k_neg=config.vespo_k_neg,
        vespo_lambda_neg=config.vespo_lambda_neg,
        entropy_target=config.entropy_target,
        entropy_coef_min=config.entropy_coef_min,
        entropy_coef_max=config.entropy_coef_max,
        entropy_coef_delta=config.entropy_coef_delta,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=B,
    )
    return SimpleNamespace(
        _metrics=metrics,
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _is_vlm=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _entropy_bonus_enabled=config.has_entropy_bonus,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        entropy_coef=config.entropy_coef,
        environment_factories=None,
        environments=None,
        eos_token_ids=[EOS],
        epsilon_high=config.upper - 1,
        epsilon_low=config.epsilon,
        importance_sampling_level=config.importance_sampling_level,
        log_multimodal=False,
        loss_type=config.loss_type,
        mask_truncated_completions=True,
        max_completion_length=config.max_completion_length,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        multi_objective_aggregation="sum_then_normalize",
        num_generations=G,
        num_iterations=1,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        pad_to_multiple_of=None,
        ref_model="the reference",
        reward_func_names=["reward"],
        scale_rewards=scale,
        tools=None,
        top_entropy_quantile=config.top_entropy_quantile,
        use_adaptive_entropy=config.use_adaptive_entropy,
        use_vllm=True,
        vllm_importance_sampling_clip_max=config.importance_sampling_clip_max,
        vllm_importance_sampling_clip_min=config.importance_sampling_clip_min,
        vllm_importance_sampling_correction=config.corrects_sampler,
        vllm_importance_sampling_mode=config.importance_sampling_mode,
    )


def trl_rollout(of_trainer: Any, self: SimpleNamespace, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What TRL makes of sampled completions and their rewards: advantages, and weights against the sampler."""
    import torch

    double = lambda name: torch.tensor(arrays[name], dtype=torch.float64)
    ends = np.where(arrays["mask"].any(axis=1), EOS, 7)
    completions = [[7] * (n - 1) + [int(end)] for n, end in zip(arrays["lengths"], ends, strict=True)]
    sampler = [row[:n].tolist() for row, n in zip(arrays["sampler"], arrays["lengths"], strict=True)]
    found = ([[5]] * B, completions, None, completions, sampler, {}, None, None)
    is_rloo = of_trainer.__name__ == "RLOOTrainer"
    self._generate = lambda prompts: (found[0], found[1], found[3]) if is_rloo else found
    scores = arrays.get("scores", arrays["rewards"].reshape(B, 1))
    self._calculate_rewards = lambda *_: torch.tensor(scores, dtype=torch.float64)
    self._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        double("ref" if model == "the reference" else "old"),
        None,
        None,
    )
    self.reward_weights = torch.tensor(WEIGHTS[: scores.shape[1]], dtype=torch.float64)
    inputs = of_trainer._generate_and_score_completions(self, [{"prompt": "?"}] * B)
    assert torch.equal(inputs["completion_mask"].bool(), torch.tensor(arrays["mask"]))
    return inputs


def trl_loss(of_trainer: Any, self: SimpleNamespace, inputs: dict[str, Any], arrays: dict[str, np.ndarray]):
    """TRL's loss and its gradients in log-probs and entropies."""
    import torch

    # TRL leaves it out where a rollout has one update.
    inputs = {**inputs, "old_per_token_logps": torch.tensor(arrays["old"], dtype=torch.float64)}
    logprobs, entropy = (torch.tensor(arrays[k], dtype=torch.float64).requires_grad_() for k in ("logprobs", "entropy"))
    self._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
    self.get_off_policy_mask = of_trainer.get_off_policy_mask
    self.get_gamma_weights = of_trainer.get_gamma_weights
    self.get_high_entropy_mask = partial(of_trainer.get_high_entropy_mask, self)
    loss = of_trainer._compute_loss(self, self.model, inputs)
    loss.backward()
    of_entropy = np.zeros(entropy.shape) if entropy.grad is None else entropy.grad.numpy()
    return loss.item(), logprobs.grad.numpy(), of_entropy


def our_loss(
    arrays: dict[str, np.ndarray],
    advantages: np.ndarray,
    config: GRPOLossConfig,
    totals: BatchTotals | None = None,
    coef=None,
):
    def loss(logprobs, entropy):
        given = (*(jnp.asarray(arrays[k]) for k in ("old", "ref")), advantages, jnp.asarray(arrays["mask"]))
        sampler = jnp.asarray(arrays["sampler"])
        high = None
        if config.top_entropy_quantile < 1:
            high = high_entropy(jnp.asarray(arrays["entropy"]), given[3], config.top_entropy_quantile)
        options = {"sampler_logprobs_BT": sampler, "high_entropy_BT": high, "entropy_coef": coef}
        return grpo_loss(logprobs, *given, config, entropy_BT=entropy, totals=totals, **options)

    inputs = jnp.asarray(arrays["logprobs"]), jnp.asarray(arrays["entropy"])
    (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
    return float(value), np.asarray(gradients[0]), np.asarray(gradients[1]), values(metrics)


@st.composite
def configs(draw) -> GRPOLossConfig:
    """Any combination of settings that both know."""
    kind = draw(st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]))
    levels = {"luspo": ["sequence"], "grpo": ["token", "sequence"], "sapo": ["token", "sequence"]}
    level = draw(st.sampled_from(levels.get(kind, ["token"])))
    high = draw(st.sampled_from([1.2, 5.0] if kind == "cispo" else [None, 0.05, 0.28]))
    limits = {} if kind in ("cispo", "sapo", "vespo") else {"delta": draw(st.sampled_from([None, 1.3, 1.6]))}
    # At the sequence level TRL's corrected KL takes the sequence's ratio, "unbiased" the token's.
    estimator = draw(st.sampled_from(["k3", "unbiased"] if level == "token" else ["k3"]))
    bounds = draw(st.sampled_from([(None, None), (1.1, None), (1.3, 0.8), (None, 0.9)]))
    modes = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"][: 2 if kind == "vespo" else 4]
    return GRPOLossConfig(
        loss_type=kind,
        importance_sampling_level=level,
        max_completion_length=9,
        epsilon=draw(st.sampled_from([0.05, 0.2])),
        epsilon_high=high,
        sapo_temperature_neg=1.5,
        beta=draw(st.sampled_from([0.0, 0.5])),
        kl_estimator=estimator,
        use_bias_correction_kl=estimator == "k3" and draw(st.booleans()),
        top_entropy_quantile=draw(st.sampled_from([1.0, 1.0, 0.5, 0.2, 0.0])),
        entropy_coef=draw(st.sampled_from([0.0, 0.3])),
        off_policy_mask_threshold=draw(st.sampled_from([None, 0.02, 0.2])),
        importance_sampling_clip_max=bounds[0],
        importance_sampling_clip_min=bounds[1],
        importance_sampling_mode="token_truncate" if bounds == (None, None) else draw(st.sampled_from(modes)),
        **limits,
    )


@settings(max_examples=60)
@given(
    config=configs(),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.05, 0.4, 0.8]),
    truncated=st.booleans(),
    per_token=st.booleans(),
)
def test_loss_gradients_and_metrics_equal_trls(config, seed, spread, truncated, per_token):
    of_trainer = trl_trainer("GRPOTrainer")
    import torch

    arrays, self = numbers(seed, spread, truncated=truncated), stand_in(config)
    inputs = trl_rollout(of_trainer, self, arrays)
    inputs["advantages"] = inputs["advantages"].float().double()  # both are to see the same
    if per_token:  # TRL allows its subclasses advantages of tokens
        given_advantages = np.random.default_rng(seed).normal(size=(B, T)).astype(np.float32)
        inputs["advantages"] = torch.tensor(given_advantages, dtype=torch.float64)
    advantages = inputs["advantages"].numpy().reshape(B, -1).astype(np.float32)
    wanted, of_logprobs, of_entropy = trl_loss(of_trainer, self, inputs, arrays)
    found, *gradients, metrics = our_loss(arrays, jnp.broadcast_to(advantages, (B, T)), config)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    np.testing.assert_allclose(gradients[0], of_logprobs, **CLOSE)
    np.testing.assert_allclose(gradients[1], of_entropy, **CLOSE)
    if per_token and (config.importance_sampling_level == "sequence" or config.loss_type == "vespo"):
        return  # TRL's metrics take an advantage a sample there, or are means over tokens
    if truncated:
        return  # TRL counts samples without tokens among the samples of its means
    theirs = {name: mean for name, (mean,) in self._metrics["train"].items()}
    shared = theirs.keys() & metrics.keys()
    assert {
        name for name in theirs if name.startswith(("clip_ratio", "cispo", "vespo", "kl", "policy", "sampling"))
    } <= shared
    assert {name: metrics[name] for name in shared} == pytest.approx(
        {name: theirs[name] for name in shared}, rel=2e-6, abs=1e-6
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_accumulation_equals_trls(loss_type):
    """Two micro-batches of a step, summed; all but bnpo, whose loss in TRL depends on the cut."""
    of_trainer = trl_trainer("GRPOTrainer")
    level = "sequence" if loss_type == "luspo" else "token"
    config = GRPOLossConfig(
        loss_type=loss_type, max_completion_length=9, epsilon_high=0.3, importance_sampling_level=level, beta=0.2
    )
    for seed in range(5):
        arrays, self = numbers(seed), stand_in(config)
        self.current_gradient_accumulation_steps = self.args.steps_per_generation = 2
        inputs = trl_rollout(of_trainer, self, arrays)
        totals = BatchTotals(jnp.float32(B), jnp.float32(arrays["mask"].sum()))
        wanted, gradient, found, ours = 0.0, [], 0.0, []
        for part in (slice(0, 3), slice(3, 6)):
            cut = {k: v[part] if k != "num_items_in_batch" else v for k, v in inputs.items()}
            cut_arrays = {k: v[part] for k, v in arrays.items() if len(v) == B}
            loss, of_logprobs, _ = trl_loss(of_trainer, self, cut, cut_arrays)
            wanted, gradient = wanted + loss, [*gradient, of_logprobs]
            advantages = jnp.asarray(cut["advantages"].numpy(), jnp.float32)[:, None]
            loss, of_logprobs, *_ = our_loss(cut_arrays, jnp.broadcast_to(advantages, (3, T)), config, totals)
            found, ours = found + loss, [*ours, of_logprobs]
        np.testing.assert_allclose(found, wanted, **CLOSE)
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(gradient), **CLOSE)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_equal_trls(scale):
    of_trainer = trl_trainer("GRPOTrainer")
    for seed in range(10):
        arrays = numbers(seed)
        if seed == 0:
            arrays["rewards"][1] = 0.25  # a group that teaches nothing
        inputs = trl_rollout(of_trainer, stand_in(GRPOLossConfig(), scale), arrays)
        found = group_advantages(jnp.asarray(arrays["rewards"]), scale=scale)
        np.testing.assert_allclose(np.ravel(found), inputs["advantages"].numpy(), **CLOSE)


def test_advantages_and_metrics_with_unknown_rewards_equal_trls():
    """Of two groups of three; TRL's rewards of a row are its functions' weighted sum, NaN where none applies."""
    of_trainer = trl_trainer("GRPOTrainer")
    for seed in range(20):
        arrays, rng = numbers(seed), np.random.default_rng(seed)
        arrays["rewards"].reshape(-1)[rng.permutation(B)[: rng.integers(1, 5)]] = np.nan
        for scale in ("group", "batch", "none"):
            self = stand_in(GRPOLossConfig(), scale)
            inputs = trl_rollout(of_trainer, self, arrays)
            found = group_advantages(jnp.asarray(arrays["rewards"]), scale=scale)
            np.testing.assert_allclose(np.ravel(found), inputs["advantages"].numpy(), **CLOSE)
        theirs = {name: mean for name, (mean,) in self._metrics["train"].items()}
        parts = {"reward": [None if np.isnan(x) else float(x) for x in arrays["rewards"].ravel()]}
        drawn = [Completion(np.arange(n), np.zeros(n), True) for n in arrays["lengths"]]
        ours = rollout_metrics(Rollout([Prompt("?", [5], {})] * P, drawn, arrays["rewards"], parts))
        for name in ("reward", "reward_std", "rewards/reward/mean", "rewards/reward/std", "frac_reward_zero_std"):
            if not np.isnan(theirs[name]):
                wanted = theirs[name]
                if name == "frac_reward_zero_std" and np.isnan(group_deviations(arrays["rewards"])).any():
                    continue  # TRL does not count a group of one known reward, whose deviation is NaN
                assert ours[name] == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


def group_deviations(rewards_PG: np.ndarray) -> np.ndarray:
    known = [row[~np.isnan(row)] for row in rewards_PG]
    return np.array([row.std(ddof=1) if len(row) > 1 else np.nan for row in known])


def test_normalize_then_sum_equals_trls():
    of_trainer = trl_trainer("GRPOTrainer")
    for seed in range(20):
        arrays, rng = numbers(seed), np.random.default_rng(seed)
        scores = (rng.normal(size=(B, 3)) * [1, 50, 0.1]).astype(np.float32)
        scores[rng.random((B, 3)) < 0.2] = np.nan
        if seed % 2:
            scores[rng.integers(B)] = np.nan
            scores[:G, 0] = 0.5
        arrays["scores"], self = scores, stand_in(GRPOLossConfig())
        names = ["a", "b", "c"]
        self.multi_objective_aggregation = "normalize_then_sum"
        self.reward_func_names = self.reward_funcs = names
        inputs = trl_rollout(of_trainer, self, arrays)
        found = normalized_sum_advantages(jnp.asarray(scores.reshape(P, G, 3)), jnp.asarray(WEIGHTS, jnp.float32))
        np.testing.assert_allclose(np.ravel(found), inputs["advantages"].numpy(), rtol=1e-5, atol=1e-5)


def test_the_adaptive_entropy_bonus_equals_trls():
    """Update after update, some below the target and some above, up to both bounds."""
    of_trainer = trl_trainer("GRPOTrainer")
    config = GRPOLossConfig(
        loss_type="dapo",
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        entropy_coef_delta=0.02,
        entropy_coef_max=0.05,
        entropy_target=1.0,
        top_entropy_quantile=0.7,
    )
    self, control, weights = stand_in(config), first_control(config), []
    for seed in range(14):
        arrays = numbers(seed)
        arrays["entropy"] = arrays["entropy"] * np.float32(0.3 if seed % 7 < 4 else 3.0)
        inputs = trl_rollout(of_trainer, self, arrays)
        advantages = jnp.asarray(inputs["advantages"].numpy(), jnp.float32)
        wanted, _, of_entropy = trl_loss(of_trainer, self, inputs, arrays)
        coef = weight_now(control, config)
        found, _, gradient, metrics = our_loss(arrays, advantages, config, coef=coef)
        np.testing.assert_allclose(found, wanted, **CLOSE)
        np.testing.assert_allclose(gradient, of_entropy, **CLOSE)
        control = next_control(control, jnp.float32(metrics["entropy_of_bonus"]), config)
        assert float(control[0]) == pytest.approx(self.entropy_coef, abs=1e-6)
        weights.append(float(coef))
    assert weights[0] == 0 and 0 < max(weights) <= 0.05 + 1e-6


def test_rloo_advantages_equal_trls():
    of_trainer = trl_trainer("RLOOTrainer")
    for seed in range(10):
        arrays, self = numbers(seed), stand_in(GRPOLossConfig(beta=0.0))
        self.normalize_advantages, self.reward_clip_range = False, None
        inputs = trl_rollout(of_trainer, self, arrays)
        found = rloo_advantages(jnp.asarray(arrays["rewards"]))
        np.testing.assert_allclose(np.ravel(found), inputs["advantages"].numpy(), **CLOSE)
