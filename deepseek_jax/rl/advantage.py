"""How much better a sample was than its group, or than the batch.

All take the rewards [P, G] of G samples of each of P prompts: of the whole batch, since a part of it has another mean.
What they give is a value a sample; the loss wants it at each of the sample's tokens.

A reward that is not known is NaN. Its sample's advantage is 0, and it counts in no mean, deviation or number of
samples: the others get what they would get if it had not been drawn. Its tokens stay tokens of the batch, which a loss
divides by and whose KL counts, as in TRL.
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
        rewards_PG: float32, NaN where not known.
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
    return centred if scale == "none" else _scaled(centred, _std(rewards, 1 if scale == "group" else None), epsilon)


def rloo_advantages(rewards_PG: Float[Array, "P G"], *, tolerance: float = 1e-6) -> Float[Array, "P G"]:
    """Reward minus the mean of the other samples of its group: n / (n - 1) times (reward - mean of its group).

    n is the number of samples of the group whose rewards are known.

    Args, Raises: as of `group_advantages`.

    Source: arXiv 2402.14740 (REINFORCE leave-one-out).
    """
    rewards = _checked(rewards_PG)
    count = jnp.sum(~jnp.isnan(rewards), axis=1, keepdims=True)
    return _centred(rewards, tolerance) * (count / jnp.maximum(count - 1, 1))


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
    rewards = _checked(rewards_PG)
    centred = _centred(rewards, tolerance)
    # Every group's differences sum to 0, and so do the batch's.
    return _scaled(centred, _std(jnp.where(jnp.isnan(rewards), jnp.nan, centred), None), epsilon)


def normalized_sum_advantages(
    parts_PGF: Float[Array, "P G F"],
    weights_F: Float[Array, "F"],
    *,
    epsilon: float = 1e-4,
    tolerance: float = 1e-6,
) -> Float[Array, "P G"]:
    """Each reward function by itself over its group's deviation, then their weighted sum, over the batch's deviation.

    So a function whose scores spread widely does not drown the others, as it does where scores are summed first.

    Args:
        parts_PGF: float32, the scores of F functions; NaN where one does not apply.
        weights_F: of the functions.
        epsilon: added to either deviation.
        tolerance: of `zero_variance`, for the scores of each function, and for the sums of the batch.

    Returns:
        Advantages [P, G], 0 for samples to which no function applies.

    Raises:
        ValueError: shapes that do not fit, or a group of one.

    Source: GDPO, arXiv 2601.05242, as TRL 1.16's `multi_objective_aggregation="normalize_then_sum"`.
    """
    if parts_PGF.ndim != 3 or weights_F.shape != parts_PGF.shape[2:]:
        raise ValueError(
            f"parts: got shape {list(parts_PGF.shape)} with weights {list(weights_F.shape)}, wanted "
            "[prompts, samples, functions] and a weight for each function"
        )
    total = jnp.zeros(parts_PGF.shape[:2], jnp.float32)
    for number in range(parts_PGF.shape[2]):
        scaled = group_advantages(parts_PGF[:, :, number], epsilon=epsilon, tolerance=tolerance)
        # of a group in which it applies once the deviation is not known, and its 0 the same as not to apply
        total += weights_F[number] * scaled
    unscored = jnp.all(jnp.isnan(parts_PGF), axis=2)
    return reinforce_advantages(jnp.where(unscored, jnp.nan, total), epsilon=epsilon, tolerance=tolerance)


def zero_variance(rewards_PG: Float[Array, "P G"], *, tolerance: float = 1e-6) -> Bool[Array, "P"]:
    """Groups that teach nothing because their rewards are the same; dynamic sampling (DAPO) draws others instead.

    Args:
        rewards_PG: float32; NaN, not known, is left out, and a group with none or one that is known teaches nothing.
        tolerance: rewards are the same when largest and smallest are within this, times the group's largest
            magnitude where that is above 1. The same parts summed in another order differ by about 1e-7.
    """
    rewards = _checked(rewards_PG)
    known = ~jnp.isnan(rewards)
    spread = jnp.max(rewards, axis=1, where=known, initial=-jnp.inf) - jnp.min(
        rewards, axis=1, where=known, initial=jnp.inf
    )
    largest = jnp.max(jnp.abs(rewards), axis=1, where=known, initial=0.0)
    return spread <= tolerance * jnp.maximum(1.0, largest)


def _two_axes(rewards_PG: Array) -> Array:
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards: got shape {list(rewards_PG.shape)}, wanted [prompts, samples]")
    return jnp.asarray(rewards_PG, jnp.float32)


def _checked(rewards_PG: Array) -> Array:
    rewards = _two_axes(rewards_PG)
    if rewards.shape[1] < 2:
        raise ValueError("group size: got 1, wanted at least 2; a group of one has no one to be compared with")
    return rewards


def _mean(rewards: Array) -> Array:
    """Of each group's known rewards; 0 where there is none."""
    known = ~jnp.isnan(rewards)
    return jnp.sum(rewards, axis=1, keepdims=True, where=known) / jnp.maximum(jnp.sum(known, axis=1, keepdims=True), 1)


def _std(rewards: Array, axis: int | None) -> Array:
    """Of the known rewards, ddof 1; 0 where there are fewer than two."""
    known = ~jnp.isnan(rewards)
    count = jnp.sum(known, axis=axis, keepdims=True)
    mean = jnp.sum(rewards, axis=axis, keepdims=True, where=known) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.square(rewards - mean), axis=axis, keepdims=True, where=known)
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _scaled(centred: Array, deviation: Array, epsilon: float) -> Array:
    # Where the deviation is 0 so is the advantage, also when epsilon is 0.
    return centred / jnp.where(centred == 0, 1.0, deviation + epsilon)


def _centred(rewards: Array, tolerance: float) -> Array:
    """Rewards minus their group's mean, exactly 0 in groups of equal rewards and where not known."""
    flat = zero_variance(rewards, tolerance=tolerance)[:, None]
    return jnp.where(flat | jnp.isnan(rewards), 0.0, rewards - _mean(rewards))
