"""The GRPO loss and its variants, a pure function of log-probabilities."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, Sum, masked_max, masked_mean, masked_min
from deepseek_jax.rl import kl
from deepseek_jax.rl.loss_config import GRPOLossConfig


@dataclass(frozen=True)
class _Rows:
    """Which tokens of the rows count, and to which sample of its row each belongs."""

    mask_BT: Bool[Array, "B T"]
    member_BTK: Bool[Array, "B T K"]
    lengths_BK: Int[Array, "B K"]
    samples: Float[Array, ""]

    def total(self, values_BT: Float[Array, "B T"] | Bool[Array, "B T"]) -> Float[Array, "B K"] | Int[Array, "B K"]:
        """Sums over each sample, or counts in it. A masked sum: exact in float32, in the same order always."""
        return jnp.sum(jnp.where(self.member_BTK, values_BT[:, :, None], 0), axis=1)

    def mean(self, values_BT: Float[Array, "B T"] | Bool[Array, "B T"]) -> Float[Array, "B K"]:
        return self.total(values_BT) / jnp.maximum(self.lengths_BK, 1)

    def spread(self, values_BK: Float[Array, "B K"]) -> Float[Array, "B T"]:
        """A sample's value at each of its tokens, 0 elsewhere."""
        return jnp.sum(jnp.where(self.member_BTK, values_BK[:, None, :], 0), axis=2)

    def mean_of_samples(self, values_BT: Float[Array, "B T"] | Bool[Array, "B T"]) -> Mean:
        """Mean over samples with tokens of their means."""
        return masked_mean(self.mean(values_BT), self.lengths_BK > 0)

    def average(self, values_BT: Float[Array, "B T"] | Bool[Array, "B T"], level: str) -> Mean:
        return self.mean_of_samples(values_BT) if level == "sequence" else masked_mean(values_BT, self.mask_BT)

    def totals(self, acting_BT: Bool[Array, "B T"]) -> BatchTotals:
        tokens = jnp.sum(self.lengths_BK).astype(jnp.float32)
        return BatchTotals(self.samples, jnp.maximum(tokens, 1), jnp.maximum(jnp.sum(acting_BT), 1).astype(jnp.float32))


def _rows(mask_BT: Bool[Array, "B T"], segments_BT: Int[Array, "B T"] | None, per_row: int) -> _Rows:
    if segments_BT is None:
        member, samples = mask_BT[:, :, None], jnp.float32(mask_BT.shape[0])
    else:
        of_sample = segments_BT[:, :, None] == jnp.arange(1, per_row + 1)
        member = of_sample & mask_BT[:, :, None]
        mask_BT = jnp.any(member, axis=2)
        samples = jnp.sum(jnp.any(of_sample, axis=1)).astype(jnp.float32)
    return _Rows(mask_BT, member, jnp.sum(member, axis=1), samples)


@jax.named_scope("loss")
def grpo_loss(
    logprobs_BT: Float[Array, "B T"],
    old_logprobs_BT: Float[Array, "B T"],
    ref_logprobs_BT: Float[Array, "B T"],
    advantages_BT: Float[Array, "B T"] | Float[Array, "B"],
    mask_BT: Bool[Array, "B T"],
    config: GRPOLossConfig,
    *,
    totals: BatchTotals | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    per_row: int = 1,
    entropy_BT: Float[Array, "B T"] | None = None,
    sampler_logprobs_BT: Float[Array, "B T"] | None = None,
    high_entropy_BT: Bool[Array, "B T"] | None = None,
    entropy_coef: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Policy loss, plus beta times the KL to the reference, less the entropy bonus.

    Losses, and so gradients, of the parts of a batch add up to those of the batch when each is given the same `totals`,
    and packing samples into rows changes neither. Gradients reach `logprobs_BT` and `entropy_BT` alone. Values
    where mask_BT is False are ignored; they may be NaN.

    Args:
        logprobs_BT: of the sampled tokens under the policy, nats, float32.
        old_logprobs_BT: under the policy before this rollout's updates.
        ref_logprobs_BT: under the reference model; not looked at when beta is 0.
        advantages_BT: of each token, or [B], of each row's one sample, for all of its tokens.
        mask_BT: true at completion tokens. A sample without any adds 0 and is still one of `totals.samples`.
        config: the variant.
        totals: samples and tokens of the whole batch when this is a part of it. None: these arrays are all.
        segments_BT: int32, for packed rows: the number, from 1 to per_row, of the sample in its row; 0 at padding,
            which the mask leaves out anyway. None: a row is a sample.
        per_row: K, the most samples of a row; static. A number above it would not be counted.
        entropy_BT: of the policy's distribution at each token, nats; needed for entropy_coef.
        sampler_logprobs_BT: what the sampler said, where it is not the code that gave `old_logprobs_BT`. None: it is.
        high_entropy_BT: tokens of the whole batch's highest entropies (`rl.entropy.high_entropy`); needed for
            top_entropy_quantile below 1.
        entropy_coef: the weight now; needed for use_adaptive_entropy.

    Returns:
        The loss to minimise and metrics as sums and counts:
        `policy_loss`: the loss but for the entropy bonus, so with the KL term;
        `kl`, and `entropy` if given: means over tokens; `ratio`: mean over tokens, or over samples at their level;
        `clip_ratio/low_mean`, `/high_mean`, `/region_mean`: share of tokens (of samples at their level) with A < 0
        below the clip range, with A > 0 above it, and either; `/low_min`, `/high_max`: least and largest share of a
        sample. For cispo `cispo_clip_ratio`, for vespo `vespo/phi_seq_mean`, for sapo none;
        `entropy_of_bonus`: mean over the tokens that the bonus is of, with use_adaptive_entropy;
        `sampling/sampling_logp_difference/mean`, `/max`: of |old - sampler|, or of |logprobs - old| when the sampler is
        old, which on the first update is the same;
        `sampling/importance_sampling_ratio/min`, `/mean`, `/max`: of the bounded weights, when there are any;
        `sampling/off_policy_masked`: share of samples dropped, with off_policy_mask_threshold.

    Raises:
        ValueError: arrays of other shapes, settings without what they need, or per_row without segments.

    Source: see `GRPOLossConfig`. With loss_type "grpo" on the first update after a rollout the ratio is 1 and the
    advantages of a group sum to 0: a loss near 0 is right, its gradient is not 0.
    """
    if advantages_BT.ndim == 1 and segments_BT is None and len(advantages_BT) == len(logprobs_BT):
        advantages_BT = jnp.broadcast_to(advantages_BT[:, None], logprobs_BT.shape)
    arrays = {
        "old_logprobs": old_logprobs_BT,
        "ref_logprobs": ref_logprobs_BT,
        "advantages": advantages_BT,
        "mask": mask_BT,
        "segments": segments_BT,
        "entropy": entropy_BT,
        "sampler_logprobs": sampler_logprobs_BT,
        "high_entropy": high_entropy_BT,
    }
    _check_arrays(logprobs_BT.shape, arrays, config, per_row)
    if config.use_adaptive_entropy and entropy_coef is None:
        raise ValueError("entropy_coef: got None, wanted the weight now; use_adaptive_entropy moves it")
    rows = _rows(mask_BT, segments_BT, per_row)
    acting_BT = rows.mask_BT if high_entropy_BT is None else rows.mask_BT & high_entropy_BT
    totals = rows.totals(acting_BT) if totals is None else totals
    # Masked before anything is computed: padding may hold anything, and inf * 0 would poison the gradient.
    counted = lambda values: jnp.where(rows.mask_BT, values, 0.0)
    given = lambda values: jax.lax.stop_gradient(counted(values))
    logprobs, old, advantages = counted(logprobs_BT), given(old_logprobs_BT), given(advantages_BT)
    sampler = old if sampler_logprobs_BT is None else given(sampler_logprobs_BT)

    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        ratio = jnp.exp(rows.spread(rows.mean(log_ratio)))
    else:
        ratio = jnp.exp(log_ratio)
    weight = None
    if config.corrects_sampler and sampler_logprobs_BT is not None:
        weight = _sampler_weight(old - sampler, rows, config)
    if config.loss_type == "vespo":
        policy, metrics = _vespo(log_ratio, weight, logprobs, advantages, rows, config)
    else:
        policy, metrics = _policy_term(ratio, logprobs, advantages, rows, config)
    metrics["ratio"] = rows.average(ratio, config.importance_sampling_level)

    apart = jnp.abs(log_ratio if sampler_logprobs_BT is None else old - sampler)
    metrics["sampling/sampling_logp_difference/mean"] = masked_mean(apart, rows.mask_BT)
    metrics["sampling/sampling_logp_difference/max"] = masked_max(apart, rows.mask_BT)
    if config.off_policy_mask_threshold is not None:
        dropped = _off_policy(sampler - logprobs, advantages, rows, config.off_policy_mask_threshold)
        policy = jnp.where(dropped, 0.0, policy)
        metrics["sampling/off_policy_masked"] = rows.mean_of_samples(dropped)
    policy = jnp.where(acting_BT, policy, 0.0)
    if weight is not None:
        policy = policy if config.loss_type == "vespo" else policy * weight
        metrics |= _weight_metrics(weight, rows, config)

    per_token_kl = jnp.zeros_like(policy)
    if config.beta:
        of_level = ratio if config.use_bias_correction_kl else jnp.exp(log_ratio)
        per_token_kl = _kl_term(given(ref_logprobs_BT) - logprobs, of_level, config)
    metrics["kl"] = masked_mean(per_token_kl, rows.mask_BT)
    loss = _aggregate(policy + config.beta * per_token_kl, rows, totals, config)
    metrics["policy_loss"] = Sum(loss)
    if entropy_BT is not None:
        metrics["entropy"] = masked_mean(entropy_BT, rows.mask_BT)
        if config.use_adaptive_entropy:
            metrics["entropy_of_bonus"] = masked_mean(jax.lax.stop_gradient(entropy_BT), acting_BT)
        if config.has_entropy_bonus:
            weight = entropy_coef if config.use_adaptive_entropy else config.entropy_coef
            tokens = totals.tokens if high_entropy_BT is None else totals.high_entropy
            loss = loss - weight * jnp.sum(jnp.where(acting_BT, entropy_BT, 0.0)) / tokens
    return loss, metrics


def _check_arrays(
    shape: tuple[int, ...], arrays: dict[str, Array | None], config: GRPOLossConfig, per_row: int
) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}: got shape {list(array.shape)}, wanted {list(shape)}, a value for each log-prob")
    if config.has_entropy_bonus and arrays["entropy"] is None:
        raise ValueError(f"entropy: got None, wanted entropies [B, T]; entropy_coef is {config.entropy_coef}")
    if config.top_entropy_quantile < 1 and arrays["high_entropy"] is None:
        raise ValueError(f"high_entropy: got None, wanted bools [B, T] for quantile {config.top_entropy_quantile}")
    if per_row < 1 or (per_row > 1 and arrays["segments"] is None):
        raise ValueError(f"per_row: got {per_row}, wanted 1, or the most samples of a row together with segments")


def _policy_term(ratio, logprobs, advantages, rows: _Rows, config: GRPOLossConfig) -> tuple[Array, Metrics]:
    """The loss of each token before any weight on it, and what was clipped."""
    if config.loss_type == "sapo":
        return _gated(ratio, advantages, config), {}
    if config.loss_type == "cispo":
        clipped = (ratio > config.epsilon_high) & (advantages > 0)
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, config.epsilon_high))
        return -weight * advantages * logprobs, {"cispo_clip_ratio": masked_mean(clipped, rows.mask_BT)}
    return _clipped(ratio, advantages, config), _clip_metrics(ratio, advantages, rows, config)


def _vespo(log_ratio, weight, logprobs, advantages, rows: _Rows, config: GRPOLossConfig) -> tuple[Array, Metrics]:
    """-phi A log pi. Beyond the bounds of the logarithms, which are TRL's, phi is next to 0."""
    log_w = rows.total(jnp.clip(log_ratio, -_MOST, _MOST))
    if weight is not None:
        # a weight that is masked out, 0, counts as the least that there is
        log_w += rows.total(jnp.clip(jnp.log(jnp.maximum(weight, _LEAST)), math.log(_LEAST), _MOST))
    log_w = rows.spread(jnp.clip(jax.lax.stop_gradient(log_w), math.log(_LEAST), _MOST))
    k = jnp.where(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg)
    gamma = jnp.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
    phi = jnp.exp(gamma + k * log_w - gamma * jnp.exp(log_w))
    return -phi * advantages * logprobs, {"vespo/phi_seq_mean": rows.mean_of_samples(phi)}


_LEAST, _MOST = 1e-8, 20.0


def _clipped(ratio, advantages, config: GRPOLossConfig) -> Array:
    clipped = jnp.clip(ratio, 1 - config.epsilon, config.upper)
    # delta is above the clip range, so that where A > 0 the clipped side is the smaller one with or without it.
    capped = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
    return -jnp.minimum(capped * advantages, clipped * advantages)


def _gated(ratio, advantages, config: GRPOLossConfig) -> Array:
    temperature = jnp.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -jax.nn.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def _clip_metrics(ratio, advantages, rows: _Rows, config: GRPOLossConfig) -> Metrics:
    low = (ratio < 1 - config.epsilon) & (advantages < 0)
    high = (ratio > config.upper) & (advantages > 0)
    some = rows.lengths_BK > 0
    return {
        "clip_ratio/low_mean": rows.average(low, config.importance_sampling_level),
        "clip_ratio/high_mean": rows.average(high, config.importance_sampling_level),
        "clip_ratio/region_mean": rows.average(low | high, config.importance_sampling_level),
        "clip_ratio/low_min": masked_min(rows.mean(low), some),
        "clip_ratio/high_max": masked_max(rows.mean(high), some),
    }


def _off_policy(log_gap, advantages, rows: _Rows, threshold: float) -> Bool[Array, "B T"]:
    """Tokens of negative advantage in samples that the sampler found likelier, by more than the threshold."""
    return (advantages < 0) & (rows.spread(rows.mean(jax.lax.stop_gradient(log_gap))) > threshold)


def _sampler_weight(log_weight, rows: _Rows, config: GRPOLossConfig) -> Float[Array, "B T"]:
    if config.importance_sampling_mode.startswith("sequence"):
        log_weight = rows.spread(rows.total(log_weight))
    weight = jnp.exp(log_weight)
    least = 0.0 if config.importance_sampling_clip_min is None else config.importance_sampling_clip_min
    most = jnp.inf if config.importance_sampling_clip_max is None else config.importance_sampling_clip_max
    if config.importance_sampling_mode.endswith("truncate"):
        return jnp.clip(weight, least, most)
    return jnp.where((weight < least) | (weight > most), 0.0, weight)


def _weight_metrics(weight, rows: _Rows, config: GRPOLossConfig) -> Metrics:
    level = config.importance_sampling_mode.split("_")[0]
    return {
        "sampling/importance_sampling_ratio/min": masked_min(weight, rows.mask_BT),
        "sampling/importance_sampling_ratio/mean": rows.average(weight, level),
        "sampling/importance_sampling_ratio/max": masked_max(weight, rows.mask_BT),
    }


def _kl_term(log_ratio, policy_ratio, config: GRPOLossConfig) -> Array:
    if config.kl_estimator == "unbiased" or config.use_bias_correction_kl:
        return kl.unbiased(log_ratio, policy_ratio)
    return kl.k2(log_ratio) if config.kl_estimator == "k2" else kl.k3(log_ratio)


def _aggregate(per_token, rows: _Rows, totals: BatchTotals, config: GRPOLossConfig) -> Float[Array, ""]:
    if config.loss_type in ("grpo", "sapo"):
        return jnp.sum(rows.mean(per_token)) / totals.samples
    total = jnp.sum(jnp.where(rows.mask_BT, per_token, 0.0))
    if config.loss_type == "luspo":
        return total / totals.samples
    if config.loss_type == "dr_grpo":
        return total / (totals.samples * config.max_completion_length)
    return total / totals.tokens
