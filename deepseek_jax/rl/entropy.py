"""Entropy as a guide: the tokens of a batch where it is high, and a weight of its bonus that follows it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deepseek_jax.rl.loss import GRPOLossConfig


def high_entropy(entropy_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"], share: float) -> Bool[Array, "B T"]:
    """The share of counted tokens whose entropies are highest: those at or above the (1 - share) quantile.

    Args:
        entropy_BT: nats, of the whole batch of an update: those of a part of it have another quantile.
        mask_BT: tokens that count.
        share: 0 leaves the highest alone, 1 all.

    Source: arXiv 2506.01939; the quantile is interpolated as TRL 1.16's `get_high_entropy_mask` has it.
    """
    if share == 1:
        return mask_BT
    entropies = jnp.where(mask_BT, entropy_BT, jnp.nan)
    # of no tokens the quantile is NaN, and nothing is above it
    return mask_BT & (entropy_BT >= jnp.nanquantile(entropies, 1 - share))


def first_control(config: GRPOLossConfig) -> Float[Array, "2"]:
    """The weight of the bonus, and the entropy of the update before: infinite, so that the first has no bonus."""
    return jnp.asarray([config.entropy_coef, jnp.inf], jnp.float32)


def weight_now(control: Float[Array, "2"], config: GRPOLossConfig) -> jax.Array:
    """What the bonus of the next update is weighed with."""
    return jnp.where(control[1] <= config.entropy_target, control[0], 0.0)


def next_control(control: Float[Array, "2"], entropy: jax.Array, config: GRPOLossConfig) -> Float[Array, "2"]:
    """After an update in which the mean entropy of the tokens that the bonus is of was so much.

    Source: Skywork-OR1, arXiv 2505.22312, as TRL 1.16's `use_adaptive_entropy`.
    """
    rises = entropy <= config.entropy_target
    moved = control[0] + jnp.where(rises, config.entropy_coef_delta, -config.entropy_coef_delta)
    # a bound holds on the side that the weight moves to
    least, most = config.entropy_coef_min, config.entropy_coef_max
    coef = jnp.where(rises, jnp.minimum(moved, most), jnp.maximum(moved, least))
    return jnp.stack([coef, jnp.asarray(entropy, jnp.float32)])
