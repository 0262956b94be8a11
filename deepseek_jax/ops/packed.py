"""Matrices kept in 8 or 4 bits, and made whole where a product wants them.

Three formats have one form: codes of the matrix's own shape, and a scale for every block of them. "fp8" is that of
DeepSeek's checkpoints, "int8" has a scale an output, "int4" one for 128 inputs of an output.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepseek_jax.ops import fp8

Scheme = Literal["fp8", "int8", "int4"]
GROUP = 128  # inputs that share a scale of int4
_BITS = {"float8_e4m3fn": 8, "int8": 8, "int4": 4}
_SMALLEST_SCALE = 2.0**-126  # float32's and bfloat16's smallest normal number


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("block",))
@dataclass(frozen=True, kw_only=True)
class Packed:
    """Stands for the matrices codes x scale: codes [..., in, out], a scale for each block of rows and columns.

    It has the codes' shape; blocks at the edges are smaller. As a tree it also holds other things of the two than
    arrays, such as how each lies on a mesh.
    """

    codes: Any
    scale: Any
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes in a device's memory, where two codes of int4 share one."""
        return nbytes(self.codes) + nbytes(self.scale)

    def __getitem__(self, index: Any) -> "Packed":
        """Some of the matrices: an index of the axes in front."""
        return jax.tree.map(lambda part: part[index], self)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How matrices are packed.

    Args:
        scheme: which format.
        block: rows and columns of a block of fp8, in the orientation [in, out].
        scale_fmt: of fp8, see `ops.fp8.quantize`.
    """

    scheme: Scheme
    block: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None

    def block_of(self, rows: int) -> tuple[int, int]:
        """Rows and columns of a block of a matrix with so many rows."""
        return {"fp8": self.block, "int8": (rows, 1), "int4": (GROUP, 1)}[self.scheme]

    def like(self, shape: tuple[int, ...]) -> Packed:
        """Shapes and dtypes of matrices of a shape."""
        codes, scale = {
            "fp8": (jnp.float8_e4m3fn, jnp.float32),
            "int8": (jnp.int8, jnp.float32),
            "int4": (jnp.int4, jnp.bfloat16),
        }[self.scheme]
        block = self.block_of(shape[-2])
        blocks = fp8.blocks(shape, block)
        return Packed(codes=jax.ShapeDtypeStruct(shape, codes), scale=jax.ShapeDtypeStruct(blocks, scale), block=block)

    def pack(self, weight: Float[Array, "*stack rows columns"]) -> Packed:
        """Matrices with the nearest codes.

        Of int8 and int4 the largest magnitude of a block lies half a step beyond the largest code, to which it is
        rounded: no number is further than about half a step from its own, and steps are smaller than if it lay on it.

        Args:
            weight: finite.

        Source: fp8: `ops.fp8.quantize`. int8 and int4: qwix, qwix/_src/core/numerics.py, get_symmetric_bound.
        Differs: a last group of int4 may be smaller; a block of zeros has a scale above 0.
        """
        block = self.block_of(weight.shape[-2])
        if self.scheme == "fp8":
            codes, scale = fp8.quantize(weight, block, self.scale_fmt)
            return Packed(codes=codes, scale=scale, block=block)
        like, x = self.like(weight.shape), weight.astype(jnp.float32)
        largest = jnp.iinfo(like.codes.dtype).max
        amax = fp8.largest_magnitudes(x, block)
        # XLA turns a division by a constant into a product with its inexact reciprocal; this divisor is no constant
        scale = jnp.maximum(amax / jnp.where(amax > 0, largest + 0.5, 1.0), _SMALLEST_SCALE).astype(like.scale.dtype)
        steps = jnp.round(x * fp8.spread(1 / scale.astype(jnp.float32), x.shape, block))
        return Packed(codes=jnp.clip(steps, -largest, largest).astype(like.codes.dtype), scale=scale, block=block)


def dense(weight: Packed, dtype: DTypeLike) -> Float[Array, "*stack rows columns"]:
    """Each code times the scale of its block, in float32, rounded once to `dtype`."""
    scale = fp8.spread(weight.scale.astype(jnp.float32), weight.shape, weight.block)
    return (weight.codes.astype(jnp.float32) * scale).astype(dtype)


def nbytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array in a device's memory; jax counts a byte for a number of four bits."""
    bits = _BITS.get(array.dtype.name, 8 * array.dtype.itemsize)
    return math.ceil(math.prod(array.shape) * bits / 8)
