"""PPO's advantages: rewards a token, generalised advantage estimation, whitening. Pure functions of arrays.

mask_BT is True at the tokens of completions. Values where it is False are ignored (they may be NaN), and every result
is 0 there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.model.mtp import ahead


def token_rewards(
    scores_B: Float[Array, " B"], kl_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"], *, kl_coef: float
) -> Float[Array, "B T"]:
    """What each token earned: minus kl_coef times its KL, and at a row's last counted token the sample's score.

    Args:
        scores_B: float32, what a completion is worth; that of a row without counted tokens goes nowhere.
        kl_BT: float32, of the sampling policy from the reference, estimated at each token, nats.
        mask_BT: one sample a row.
        kl_coef: weight of the KL.

    Returns:
        float32 [B, T]. A row sums to its score minus kl_coef times its KL.

    Source: arXiv 2203.02155 equation 2; score and KL shared out over the tokens as TRL's PPOTrainer and OpenRLHF do.
    """
    later_BT = jax.lax.cummax(ahead(mask_BT, 1).astype(jnp.int32), axis=1, reverse=True) > 0
    penalty_BT = jnp.where(mask_BT, -kl_coef * kl_BT, 0.0)
    return penalty_BT + jnp.where(mask_BT & ~later_BT, scores_B[:, None], 0.0)


def gae(
    rewards_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t, and returns A_t + V_t.

    A run of counted tokens is one sample: after its last token there is no reward and no value. A finished sample
    ends so by its nature; a truncated one too, because the limit is part of the task that the reward judges, and the
    state after the last token is one that nobody scores.

    Args:
        rewards_BT: float32, for the token of each column.
        values_BT: float32, of the state that chooses this token.
        mask_BT: samples of one row are at least one uncounted column apart.
        gamma: discount a token; 1 for language models.
        lam: 1 gives the rewards to come minus the value, 0 the one-step difference d_t.

    Returns:
        Advantages and returns, float32 [B, T]. They are targets: do not differentiate through them.

    Source: arXiv 1506.02438; arXiv 1707.06347 equations 11 and 12. A truncated sample ends without a value in TRL,
    OpenRLHF and verl too. Differs from verl in a gap between counted tokens, which it reads across.
    """
    counted = lambda of: jnp.where(mask_BT, of, 0.0)
    rewards_BT, values_BT = counted(rewards_BT), counted(values_BT)
    differences_BT = rewards_BT + gamma * ahead(values_BT, 1) - values_BT
    decays_BT = gamma * lam * ahead(mask_BT, 1).astype(jnp.float32)

    # A_t = d_t + c_t A_{t+1} is linear, so that log T rounds do instead of T: on a GPU each would be a kernel.
    def joined(later, sooner):
        return sooner[0] * later[0], sooner[1] + sooner[0] * later[1]

    _, sums_BT = jax.lax.associative_scan(joined, (decays_BT, counted(differences_BT)), reverse=True, axis=1)
    advantages_BT = counted(sums_BT)
    return advantages_BT, advantages_BT + values_BT


def whitened(advantages_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Advantages with mean 0 and variance 1 over all counted tokens; take them of a whole batch, not of a part.

    The variance has ddof 1, and 1e-8 is added to it. Advantages that are all the same, or a single one, give 0.

    Source: TRL's masked_whiten, and verl's.
    """
    difference = centred(advantages_BT, mask_BT)
    variance = jnp.sum(jnp.square(difference)) / jnp.maximum(jnp.sum(mask_BT) - 1, 1)
    return difference * jax.lax.rsqrt(variance + 1e-8)


def centred(values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Values minus the mean of the counted ones; exactly 0 where all of these are the same."""
    mean = jnp.sum(jnp.where(mask_BT, values_BT, 0.0)) / jnp.maximum(jnp.sum(mask_BT), 1)
    # Rounding in the mean must not become a difference that whitening would blow up.
    smallest = jnp.min(jnp.where(mask_BT, values_BT, jnp.inf))
    largest = jnp.max(jnp.where(mask_BT, values_BT, -jnp.inf))
    return jnp.where(mask_BT & (smallest != largest), values_BT - mean, 0.0)
