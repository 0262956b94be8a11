"""PPO beside GRPO: a critic says what to expect, so that one sample a prompt is enough, at the price of training it.

A step: sample, score, `frozen_scores` of the reference, `frozen_values` of the critic, `ppo_targets`,
`with_targets`, `ppo_update`. The policy's objective is `grpo_objective` with advantages a token; for PPO proper its
config has loss_type "dapo" (a mean over the batch's tokens) and beta 0, for the KL is in the rewards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, masked_mean
from deepseek_jax.rl.batch import Batch
from experiments.ppo.critic import Critic, CriticOutput, value_of
from experiments.ppo.gae import centred, gae, token_rewards, whitened

Step = Callable[[Any, Any], tuple[Any, Metrics]]


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of advantages, critic and update; the policy's clipping is its loss's. Defaults are TRL's, but one.

    Args:
        gamma: discount a token.
        lam: GAE's lambda, see `gae`.
        kl_coef: weight of the KL from the reference in the rewards.
        value_clip: how far a value may move from that of the rollout, TRL's `cliprange_value`; None: anywhere.
        value_coef: weight of the value loss, TRL's `vf_coef`. There it is 0.1 beside the policy's loss; here the
            critic has an optimizer of its own, and 1 is the default.
        ppo_epochs: updates a rollout.
        whiten: advantages to mean 0 and variance 1 over the batch.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    ppo_epochs: int = 4
    whiten: bool = True

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, wanted 0 to 1")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef: got {self.kl_coef}, wanted a finite number from 0")
        if self.value_clip is not None and not self.value_clip > 0:
            raise ValueError(f"value_clip: got {self.value_clip}, wanted more than 0, or None for no clipping")
        if not 0 < self.value_coef < math.inf:
            raise ValueError(f"value_coef: got {self.value_coef}, wanted a finite number above 0")
        if self.ppo_epochs < 1:
            raise ValueError(f"ppo_epochs: got {self.ppo_epochs}, wanted at least 1")


class CriticBatch(NamedTuple):
    """What the critic learns from, in the columns of `Batch`.

    old_values_BT: its values before the update; returns_BT: what they should have been; both float32.
    """

    tokens_BT: np.ndarray | jax.Array
    mask_BT: np.ndarray | jax.Array
    old_values_BT: np.ndarray | jax.Array
    returns_BT: np.ndarray | jax.Array


class Targets(NamedTuple):
    """Of a whole batch, float32 [B, T], 0 where nothing counts: advantages for the policy, returns for the critic."""

    advantages_BT: jax.Array
    returns_BT: jax.Array


@partial(jax.jit, static_argnames="config")
def ppo_targets(
    rewards_B: Float[Array, " B"],
    old_logprobs_BT: Float[Array, "B T"],
    ref_logprobs_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    config: PPOConfig,
) -> tuple[Targets, Metrics]:
    """From what a rollout holds to what an update wants. Take it of a whole batch: whitening is over all of it.

    Args:
        rewards_B: what each completion is worth.
        old_logprobs_BT: the sampler's, nats.
        ref_logprobs_BT: the reference model's; not looked at when kl_coef is 0.
        values_BT: the critic's.
        mask_BT: true at completion tokens.
        config: settings. Only advantages are whitened: returns keep the rewards' scale.

    Returns:
        Targets, and the metrics `kl_from_reference` (per token, k1), `return`, `advantage` (before whitening) and
        `value/explained_variance` of the values given.

    Raises:
        ValueError: rewards that are not one a row.

    Source: as TRL's PPOTrainer with its kl_estimator "k1": log pi_old - log pi_ref of the sampled token. That is no
    loss here but a reward, whose expectation is the KL.
    """
    if rewards_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"rewards: got shape {list(rewards_B.shape)}, wanted [{len(mask_BT)}], one a row of the batch")
    difference = old_logprobs_BT - ref_logprobs_BT if config.kl_coef else jnp.zeros_like(old_logprobs_BT)
    kl_BT = jnp.where(mask_BT, difference, 0.0)
    rewards_BT = token_rewards(rewards_B, kl_BT, mask_BT, kl_coef=config.kl_coef)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    metrics = {
        "kl_from_reference": masked_mean(kl_BT, mask_BT),
        "return": masked_mean(returns_BT, mask_BT),
        "advantage": masked_mean(advantages_BT, mask_BT),
        "value/explained_variance": Mean(explained_variance(values_BT, returns_BT, mask_BT), jnp.float32(1)),
    }
    used_BT = whitened(advantages_BT, mask_BT) if config.whiten else advantages_BT
    return Targets(used_BT, returns_BT), metrics


def with_targets(batch: Batch, values_BT: jax.Array, targets: Targets) -> tuple[Batch, CriticBatch]:
    """The batches of policy and critic.

    Raises:
        ValueError: several samples a row; a critic reads rows of one.
    """
    if batch.segments_BT is not None:
        raise ValueError("batch: got packed rows, wanted one sample a row; lay it out with make_batch")
    critic_batch = CriticBatch(batch.tokens_BT, batch.mask_BT, values_BT, targets.returns_BT)
    return batch._replace(advantages_BT=targets.advantages_BT), critic_batch


def ppo_update(
    policy: Any,
    critic: Any,
    batch: Batch,
    critic_batch: CriticBatch,
    *,
    policy_step: Step,
    critic_step: Step,
    config: PPOConfig,
) -> tuple[Any, Any, list[Metrics]]:
    """ppo_epochs updates of policy and critic on one rollout.

    Args:
        policy, critic: their train states; a step may donate them.
        batch, critic_batch: of `with_targets`.
        policy_step, critic_step: (state, batch) -> (state, metrics).
        config: says how many.

    Returns:
        Both states, and each epoch's metrics, the critic's under `critic/`.
    """
    found: list[Metrics] = []
    for _ in range(config.ppo_epochs):
        policy, of_policy = policy_step(policy, batch)
        critic, of_critic = critic_step(critic, critic_batch)
        found.append(of_policy | {f"critic/{name}": metric for name, metric in of_critic.items()})
    return policy, critic, found


def critic_objective(
    model: Critic, batch: CriticBatch, totals: BatchTotals, *, config: PPOConfig
) -> tuple[jax.Array, Metrics, CriticOutput]:
    """value_coef times the value loss of a batch, or of a part of one, for `make_train_step`.

    Args:
        model: the critic.
        batch: states, and what they turned out to be worth.
        totals: of the whole batch.
        config: clipping and weight.
    """
    output = value_of(model, batch.tokens_BT, batch.mask_BT)
    loss, metrics = value_loss(
        output.values_BT, batch.old_values_BT, batch.returns_BT, batch.mask_BT, clip=config.value_clip, totals=totals
    )
    return config.value_coef * loss, metrics, output


@partial(jax.jit, static_argnames="graphdef")
def frozen_values(
    graphdef: nnx.GraphDef, weights: nnx.State, tokens_BT: jax.Array, mask_BT: jax.Array
) -> Float[Array, "B T"]:
    """The critic's values of a batch before an update."""
    return value_of(nnx.merge(graphdef, weights), tokens_BT, mask_BT).values_BT


def value_loss(
    values_BT: Float[Array, "B T"],
    old_values_BT: Float[Array, "B T"],
    returns_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    clip: float | None,
    totals: BatchTotals,
) -> tuple[Float[Array, ""], Metrics]:
    """Half the squared error, the larger one of the value and of the value clipped to clip around the old one.

    Args:
        values_BT, old_values_BT, returns_BT: float32; values where mask_BT is False are ignored.
        mask_BT: true at completion tokens.
        clip: None takes the plain error.
        totals: of the whole batch; the sum is divided by its tokens, so that losses of parts add up.

    Returns:
        The loss, and the metrics `value_loss`, `value/mean` and `value/clip_ratio`.

    Source: TRL's PPOTrainer and OpenRLHF's ValueLoss.
    """
    # Masked first: padding may hold anything, and inf * 0 would poison the gradient.
    values, old, returns = (jnp.where(mask_BT, of, 0.0) for of in (values_BT, old_values_BT, returns_BT))
    plain = jnp.square(values - returns)
    near = values if clip is None else jnp.clip(values, old - clip, old + clip)
    clipped = jnp.square(near - returns)
    per_token = 0.5 * jnp.maximum(plain, clipped)
    metrics = {
        "value_loss": masked_mean(per_token, mask_BT),
        "value/mean": masked_mean(values, mask_BT),
        "value/clip_ratio": masked_mean(clipped > plain, mask_BT),
    }
    return jnp.sum(per_token) / totals.tokens, metrics


def explained_variance(
    values_BT: Float[Array, "B T"], returns_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns) over counted tokens: 1 is a perfect critic, 0 one that says a constant.

    Below 0 it is worse than a constant. Returns that are all the same give 0: there is nothing to explain.
    """
    squares = lambda of: jnp.sum(jnp.square(centred(of, mask_BT)))
    total = squares(returns_BT)
    return jnp.where(total > 0, 1 - squares(returns_BT - values_BT) / jnp.where(total > 0, total, 1.0), 0.0)
