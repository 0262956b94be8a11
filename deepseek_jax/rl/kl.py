"""Estimates of the KL divergence from a reference, from the log-probs of sampled tokens.

All take log_ratio = log pi_ref - log pi_theta of each token, in nats, and give a value a token. They are used as terms
of a loss, so it is their gradients that count. The estimator k1 = -log_ratio is not among them: its gradient is
grad log pi_theta, whose mean under the policy is 0, so that as a loss it pulls nowhere.

Source: arXiv 2402.03300 equation 4 (k3); the names k1, k2, k3 are those of J. Schulman's note "Approximating KL
divergence".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def k2(log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Half the squared log-ratio: biased, but its gradient on-policy is that of the reverse KL."""
    return jnp.square(log_ratio) / 2


def k3(log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """exp(log_ratio) - log_ratio - 1: never negative, and unbiased as a value, not as a gradient."""
    return jnp.expm1(log_ratio) - log_ratio


def unbiased(log_ratio: Float[Array, "*B"], policy_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """policy_ratio times k3, whose gradient is that of the reverse KL, off-policy too.

    Args:
        log_ratio: as above.
        policy_ratio: pi_theta / pi_old of the token, with its gradient: that is what takes the bias away.

    Source: arXiv 2512.02556 section 3.1, "Unbiased KL Estimate".
    """
    return policy_ratio * k3(log_ratio)
