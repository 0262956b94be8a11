"""Rotary position embedding: frequencies (plain, YaRN, Llama 3) and the two pairings of dimensions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config import Llama3RopeConfig, RopeConfig, YarnConfig


def frequencies(rope: RopeConfig, width: int) -> np.ndarray:
    """Angle per position of each pair of dimensions.

    Args:
        rope: the kind and its numbers.
        width: rotary dimensions R of a head, even.

    Returns:
        float64 [R/2], radians a position.

    Source: arXiv 2104.09864; YaRN: DeepSeek-V3 inference/model.py precompute_freqs_cis; Llama 3:
    transformers modeling_rope_utils.py.
    """
    plain = rope.theta ** -(np.arange(0, width, 2) / width)
    if isinstance(rope, YarnConfig):
        return _yarn(rope, plain, width)
    if isinstance(rope, Llama3RopeConfig):
        return _llama3(rope, plain)
    return plain


def _yarn(rope: YarnConfig, plain: np.ndarray, width: int) -> np.ndarray:
    """Slow pairs are interpolated by `factor`, fast ones kept, with a linear ramp between."""

    def pair_that_turns(times: float) -> float:
        turns = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), width - 1)
    span = high - low if high != low else 0.001
    interpolate = np.clip((np.arange(width // 2) - low) / span, 0, 1)
    return plain * (1 - interpolate) + plain / rope.factor * interpolate


def _llama3(rope: Llama3RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Wavelengths beyond the original context are stretched by `factor`, with a smooth middle band."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(smooth, 0, 1)
    return plain * keep + plain / rope.factor * (1 - keep)


def amplitude(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: YaRN's amplitude, else 1."""
    return rope.amplitude if isinstance(rope, YarnConfig) else 1.0


def angles(
    rope: RopeConfig, width: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T r"], Float[Array, "B T r"]]:
    """cos and sin, float32 [B, T, R/2], of every pair at every position."""
    turned = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(rope, width), jnp.float32)
    scale = amplitude(rope)
    return jnp.cos(turned) * scale, jnp.sin(turned) * scale


def rotate_interleaved(
    x: Float[Array, "B T N R"], cos: Float[Array, "B T r"], sin: Float[Array, "B T r"]
) -> Float[Array, "B T N R"]:
    """Rotate DeepSeek's pairs (2i, 2i+1); the result holds all first members, then all second ones.

    Queries and keys come out in the same order, so their dot products are those of the checkpoint's order.
    """
    return _rotate(x[..., 0::2], x[..., 1::2], cos, sin, x.dtype)


def rotate_half(
    x: Float[Array, "B T N R"], cos: Float[Array, "B T r"], sin: Float[Array, "B T r"]
) -> Float[Array, "B T N R"]:
    """Rotate the pairs (i, i + R/2) of Qwen and Llama."""
    first, second = jnp.split(x, 2, axis=-1)
    return _rotate(first, second, cos, sin, x.dtype)


def _rotate(first, second, cos, sin, dtype):
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)
