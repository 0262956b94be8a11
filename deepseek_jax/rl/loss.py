"""The GRPO loss, a pure function of log-probabilities."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.ops.metrics import Metrics, masked_max, masked_mean


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of the loss, under the names that TRL's users know.

    Args:
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high; None means epsilon.
        beta: weight of the KL term towards the reference model.
        loss_type: "grpo" averages over a sample's tokens, then over samples (DeepSeekMath).
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.04
    loss_type: Literal["grpo"] = "grpo"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon: got {self.epsilon}, wanted 0 to 1")
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high: got {self.epsilon_high}, wanted 0 or more")
        if not self.beta >= 0:
            raise ValueError(f"beta: got {self.beta}, wanted 0 or more")
        if self.loss_type != "grpo":
            raise ValueError(f"loss_type: got {self.loss_type!r}, wanted 'grpo'")


def grpo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    config: GRPOConfig,
    *,
    samples: jax.Array | float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The clipped policy loss plus beta times the k3 KL estimate.

    Args:
        logprobs: of the sampled tokens under the policy, nats, float32.
        old_logprobs: under the policy that sampled them.
        ref_logprobs: under the reference model; not looked at when beta is 0.
        advantages: one a sample.
        mask: true at completion tokens. A sample without any counts as 0.
        config: clipping, beta and aggregation.
        samples: what the sum over samples is divided by: the size of the whole batch when this is a part of it.
            None means B.

    Returns:
        The loss to minimise and metrics as sums and counts: `policy_loss`, `kl`, `ratio`, `clip_ratio`,
        `sampling/sampling_logp_difference/mean` and `/max`.

    Source: arXiv 2402.03300 equation 3 (k3 from its equation 4). On the first update after a rollout the ratio is 1
    and the advantages of a group sum to 0: a loss near 0 is right, its gradient is not 0.
    """
    low, high = 1 - config.epsilon, 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    delta = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(delta)
    gain = advantages[:, None] * ratio
    clipped = advantages[:, None] * jnp.clip(ratio, low, high)
    policy = -jnp.minimum(gain, clipped)
    # Masked before exp: padding may hold anything, and inf * 0 would poison the gradient.
    log_ratio = jnp.where(mask, ref_logprobs - logprobs, 0.0) if config.beta else jnp.zeros_like(logprobs)
    k3 = jnp.exp(log_ratio) - log_ratio - 1
    per_token = policy + config.beta * k3
    lengths = jnp.maximum(jnp.sum(mask, axis=1), 1)
    per_sample = jnp.sum(jnp.where(mask, per_token, 0.0), axis=1) / lengths
    loss = jnp.sum(per_sample) / (logprobs.shape[0] if samples is None else samples)
    difference = jnp.abs(jax.lax.stop_gradient(delta))
    metrics = {
        "policy_loss": masked_mean(policy, mask),
        "kl": masked_mean(k3, mask),
        "ratio": masked_mean(ratio, mask),
        "clip_ratio": masked_mean(clipped < gain, mask),
        "sampling/sampling_logp_difference/mean": masked_mean(difference, mask),
        "sampling/sampling_logp_difference/max": masked_max(difference, mask),
    }
    return loss, metrics
