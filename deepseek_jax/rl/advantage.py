"""How much better a sample was than its group, or than the batch.

All take the rewards [P, G] of G samples of each of P prompts: of the whole batch, since a part of it has another mean.
What they give is a value a sample; the loss wants it at each of the sample's tokens.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def group_advantages(
    rewards_PG: Float[Array, "P G"],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
    tolerance: float = 1e-6,
) -> Float[Array, "P G"]:
    """(reward - mean of its group) / (std + epsilon).

    Args:
        rewards_PG: float32.
        scale: whose standard deviation it is divided by: the "group"'s (DeepSeekMath, R1), the whole "batch"'s, or
            "none" (V3.2, Dr. GRPO).
        epsilon: added to the deviation.
        tolerance: of `zero_variance`.

    Returns:
        Advantages [P, G]; each row sums to 0. A group of equal rewards gives exactly 0.

    Raises:
        ValueError: a group of one, whose advantage would always be 0, rewards that are not [P, G], or another scale.

    Source: arXiv 2402.03300 section 4.1.2, arXiv 2501.12948 equation 3; the deviation has ddof 1 and epsilon 1e-4
    as in TRL's GRPOTrainer (`scale_rewards`).

    Differs: TRL has no tolerance, so that rewards which differ by rounding alone get advantages other than 0.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: got {scale!r}, wanted 'group', 'batch' or 'none'")
    rewards = _checked(rewards_PG)
    centred = _centred(rewards, tolerance)
    if scale == "none":
        return centred
    deviation = jnp.std(rewards, axis=1 if scale == "group" else None, keepdims=True, ddof=1)
    # Where the deviation is 0 so is the advantage, also when epsilon is 0.
    return centred / jnp.where(centred == 0, 1.0, deviation + epsilon)


def rloo_advantages(rewards_PG: Float[Array, "P G"], *, tolerance: float = 1e-6) -> Float[Array, "P G"]:
    """Reward minus the mean of the other samples of its group: G / (G - 1) times (reward - mean of its group).

    Args, Raises: as of `group_advantages`.

    Source: arXiv 2402.14740 (REINFORCE leave-one-out).
    """
    rewards = _checked(rewards_PG)
    group_size = rewards.shape[1]
    return _centred(rewards, tolerance) * (group_size / (group_size - 1))


def reinforce_advantages(
    rewards_PG: Float[Array, "P G"], *, epsilon: float = 1e-4, tolerance: float = 1e-6
) -> Float[Array, "P G"]:
    """(reward - mean of the batch) / (std of the batch + epsilon): REINFORCE++, to which the batch is one group.

    Args, Raises: as of `group_advantages`, but that groups of one will do for this function.

    Source: arXiv 2501.03262.

    Differs: the paper takes the KL of each token off the reward and normalises over tokens; here the KL is a term of
    the loss, and samples have equal weight.
    """
    batch = _two_axes(rewards_PG).reshape(1, -1)
    return group_advantages(batch, epsilon=epsilon, tolerance=tolerance).reshape(rewards_PG.shape)


def reinforce_baseline_advantages(
    rewards_PG: Float[Array, "P G"], *, epsilon: float = 1e-4, tolerance: float = 1e-6
) -> Float[Array, "P G"]:
    """(reward - mean of its group) over the deviation of these differences in the batch: REINFORCE++-baseline.

    Args, Raises: as of `group_advantages`. A group of equal rewards gives exactly 0.

    Source: arXiv 2501.03262, the variant with a group's mean as baseline.
    """
    centred = _centred(_checked(rewards_PG), tolerance)
    # Every group's differences sum to 0, and so do the batch's.
    deviation = jnp.std(centred, ddof=1)
    return centred / jnp.where(centred == 0, 1.0, deviation + epsilon)


def known_rewards(rewards_PG: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Rewards with those that are not known, NaN, at the mean of the known ones of their group.

    Such a sample's advantage is 0 wherever a group's mean is the baseline, and the others' means are what they would be
    without it. A group of which nothing is known gets zeros, and so teaches nothing.
    """
    rewards = _two_axes(rewards_PG)
    known = ~jnp.isnan(rewards)
    count = jnp.maximum(jnp.sum(known, axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(known, rewards, 0), axis=1, keepdims=True) / count
    return jnp.where(known, rewards, mean)


def zero_variance(rewards_PG: Float[Array, "P G"], *, tolerance: float = 1e-6) -> Bool[Array, "P"]:
    """Groups that teach nothing because their rewards are the same; dynamic sampling (DAPO) draws others instead.

    Args:
        rewards_PG: float32.
        tolerance: rewards are the same when largest and smallest are within this, times the group's largest
            magnitude where that is above 1. The same parts summed in another order differ by about 1e-7.
    """
    rewards = _checked(rewards_PG)
    spread = jnp.max(rewards, axis=1) - jnp.min(rewards, axis=1)
    return spread <= tolerance * jnp.maximum(1.0, jnp.max(jnp.abs(rewards), axis=1))


def _two_axes(rewards_PG: Array) -> Array:
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards: got shape {list(rewards_PG.shape)}, wanted [prompts, samples]")
    return jnp.asarray(rewards_PG, jnp.float32)


def _checked(rewards_PG: Array) -> Array:
    rewards = _two_axes(rewards_PG)
    if rewards.shape[1] < 2:
        raise ValueError("group size: got 1, wanted at least 2; a group of one has no one to be compared with")
    return rewards


def _centred(rewards: Array, tolerance: float) -> Array:
    """Rewards minus their group's mean, exactly 0 in groups of equal rewards."""
    equal = zero_variance(rewards, tolerance=tolerance)[:, None]
    return jnp.where(equal, 0.0, rewards - jnp.mean(rewards, axis=1, keepdims=True))
