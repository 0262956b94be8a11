"""How much better a sample was than its group."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def group_advantages(
    rewards_PG: Float[Array, "P G"], *, scale: bool = True, epsilon: float = 1e-4
) -> Float[Array, "P G"]:
    """(reward - mean) / (std + epsilon) within each prompt's group.

    Args:
        rewards_PG: float32, G samples of each of P prompts.
        scale: divide by the standard deviation (DeepSeekMath, R1); False leaves the difference (V3.2, Dr. GRPO).
        epsilon: added to the deviation.

    Returns:
        Advantages [P, G]; each row sums to 0. A group of equal rewards gives exactly 0.

    Raises:
        ValueError: a group of one, whose advantage would always be 0, or rewards that are not [P, G].

    Source: arXiv 2402.03300 section 4.1.2, arXiv 2501.12948 equation 3; the deviation has ddof 1 and epsilon 1e-4
    as in TRL's GRPOTrainer.
    """
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards: got shape {list(rewards_PG.shape)}, wanted [prompts, samples]")
    if rewards_PG.shape[1] < 2:
        raise ValueError("group size: got 1, wanted at least 2; a group of one has no one to be compared with")
    rewards = jnp.asarray(rewards_PG, jnp.float32)
    # Rounding in the mean must not become an advantage where all rewards are the same.
    equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    centred = jnp.where(equal, 0.0, rewards - jnp.mean(rewards, axis=1, keepdims=True))
    return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + epsilon) if scale else centred
