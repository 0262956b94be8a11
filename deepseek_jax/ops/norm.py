"""Root-mean-square and layer normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * weight over the last axis, computed in float32 and returned in x's dtype.

    Source: arXiv 1910.07467. The rounding to x's dtype comes before the weight, as in transformers.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def layer_norm(
    x: Float[Array, "*B D"], weight: Float[Array, "D"], shift: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + eps) * weight + shift over the last axis, in float32, returned in x's dtype.

    Source: arXiv 1607.06450. One rounding at the end, weight and shift included, as in torch's layer_norm.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * weight.astype(jnp.float32) + shift.astype(jnp.float32)).astype(x.dtype)
