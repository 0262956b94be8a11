"""Vectors as codes of eight bits and a scale each: what quantised caches keep."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Shaped

SCALE = jnp.bfloat16  # of scales, and of what lies beside codes as it is
_LARGEST = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}
_SMALLEST = 2.0**-126  # float32's smallest normal number; XLA takes what is below for zero


def is_coded(dtype: DTypeLike) -> bool:
    """Whether numbers of a dtype are codes that mean something only with their scale."""
    return jnp.dtype(dtype) in _LARGEST


def encode(
    x: Float[Array, "*rest width"], dtype: DTypeLike
) -> tuple[Shaped[Array, "*rest width"], BFloat16[Array, "*rest 1"]]:
    """Codes of the vectors along the last axis, each with a scale of its own.

    The largest magnitude of a vector / 448 (float8_e4m3fn) or 127 (int8), rounded up to bfloat16, is its scale, and a
    code is the number times the scale's reciprocal in float32, rounded to nearest even. So a number x of a vector whose
    largest is m comes back within |x| / 16 + m / 2^18 of float8_e4m3fn, and within m / 252 of int8.

    Args:
        x: finite; a vector that is not spoils no other one.
        dtype: float8_e4m3fn or int8.

    Source: arXiv 2412.19437 section 3.3.2 (scales by the largest magnitude).
    """
    x = x.astype(jnp.float32)
    largest = _LARGEST[jnp.dtype(dtype)]
    scale = _up_to_bfloat16(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest, _SMALLEST))
    codes = x * (1 / scale.astype(jnp.float32))  # spelled out: XLA makes a division so in some programs, not in others
    codes = jnp.clip(codes, -largest, largest)
    return (jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else codes).astype(dtype), scale


def decode(codes: Shaped[Array, "*rest width"], scale: Float[Array, "*rest 1"]) -> Float[Array, "*rest width"]:
    """What codes mean, float32. Numbers that are no codes stay as they are, whatever stands for their scale."""
    if not is_coded(codes.dtype):
        return codes
    return codes.astype(jnp.float32) * scale.astype(jnp.float32)


def round_trip(x: Float[Array, "*rest width"], dtype: DTypeLike) -> Float[Array, "*rest width"]:
    """What x is once it has been kept in a dtype, codes or not, in its own dtype."""
    kept = decode(*encode(x, dtype)) if is_coded(dtype) else x.astype(dtype)
    return kept.astype(x.dtype)


def _up_to_bfloat16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is not below a positive float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0xFFFF) & jnp.uint32(0xFFFF0000), jnp.float32).astype(SCALE)
