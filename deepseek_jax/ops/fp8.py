"""Block-scaled FP8 weights, as DeepSeek's checkpoints store them."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float32

LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number; XLA takes what is below for zero


def blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks lie along the last two axes of a shape; those at the edges are smaller."""
    *rest, rows, columns = shape
    return (*rest, math.ceil(rows / block[0]), math.ceil(columns / block[1]))


def dequantize(
    weight: Float8e4m3fn[Array, "*stack rows columns"],
    scale: Float32[Array, "..."],
    block: tuple[int, int] = (128, 128),
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*stack rows columns"]:
    """Each weight times the scale of its block, in float32, rounded once to `dtype`.

    Under jit nothing of the weight's size is made beside the result.

    Args:
        weight: FP8 matrices.
        scale: [*stack, row blocks, column blocks], as `blocks(weight.shape, block)` counts them.
        block: rows and columns of a block, in the orientation of `weight`.
        dtype: of the result.

    Raises:
        ValueError: `scale` has another shape.

    Source: DeepSeek-V3 inference/kernel.py, weight_dequant_kernel.
    """
    wanted = blocks(weight.shape, block)
    if scale.shape != wanted:
        raise ValueError(
            f"scale: got shape {list(scale.shape)}, wanted {list(wanted)} for a weight of shape {list(weight.shape)} "
            f"in blocks of {block[0]} x {block[1]}; a transposed weight needs its scale and block transposed too"
        )
    return (weight.astype(jnp.float32) * spread(scale, weight.shape, block)).astype(dtype)


def quantize(
    weight: Float[Array, "*stack rows columns"], block: tuple[int, int], scale_fmt: str | None
) -> tuple[Float8e4m3fn[Array, "*stack rows columns"], Float32[Array, "*stack row_blocks column_blocks"]]:
    """FP8 weights and the scales that `dequantize` takes: the largest magnitude of a block becomes 448.

    A scale is the block's largest magnitude / 448 in float32, at least 2**-126, so that a block of zeros has a scale
    too. A code is the weight times the reciprocal of its scale, in float32, rounded to nearest even.

    Args:
        weight: finite.
        block: rows and columns of a block, in the orientation of `weight`.
        scale_fmt: "ue8m0" rounds the scales up to powers of two, as V3.1 and V3.2 do; None leaves them.

    Raises:
        ValueError: an unknown `scale_fmt`.

    Source: arXiv 2412.19437 section 3.3.2; DeepSeek-V3 inference/kernel.py, weight_quant_kernel.
    Differs: the source divides by the scale, and its block of zeros becomes NaN. XLA makes a division by what it
    broadcasts a product with the reciprocal in some programs and not in others; spelled out, it is one everywhere.
    """
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, wanted 'ue8m0' or None")
    x = weight.astype(jnp.float32)
    amax = largest_magnitudes(x, block)
    # XLA turns a division by a constant into a product with its inexact reciprocal; this divisor is no constant
    scale = jnp.maximum(amax / jnp.where(amax > 0, LARGEST, 1.0), _SMALLEST_SCALE)
    if scale_fmt == "ue8m0":
        scale = _power_of_two_above(scale)
    # products pass 448 by no more than a float32 rounding, and become NaN only beyond 464
    return (x * spread(1 / scale, weight.shape, block)).astype(jnp.float8_e4m3fn), scale


def spread(scale: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """Every element's scale: a broadcast, a reshape and a slice, which XLA fuses into what uses them."""
    *stack, rows, columns = scale.shape
    tiles = jnp.broadcast_to(scale[..., :, None, :, None], (*stack, rows, block[0], columns, block[1]))
    return tiles.reshape(*stack, rows * block[0], columns * block[1])[..., : shape[-2], : shape[-1]]


def largest_magnitudes(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Of each block: [*stack, row blocks, column blocks]."""
    *stack, rows, columns = blocks(x.shape, block)
    missing = (rows * block[0] - x.shape[-2], columns * block[1] - x.shape[-1])
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * len(stack) + [(0, n) for n in missing])
    return padded.reshape(*stack, rows, block[0], columns, block[1]).max(axis=(-3, -1))


def _power_of_two_above(x: jax.Array) -> jax.Array:
    """The smallest power of two that is not below a positive normal float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & jnp.uint32(0xFF800000), jnp.float32)
