"""A checkpoint seen in another dtype: FP8 unpacked to bfloat16 or float32, or packed again, part by part."""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.headers import DTYPES, NAMES, Entry
from deepseek_jax.checkpoint.names import SCALE, Tensor
from deepseek_jax.checkpoint.stored_arrays import PIECE, TensorSource
from deepseek_jax.config import FP8Config, ModelConfig
from deepseek_jax.ops.fp8 import LARGEST, blocks, dequantize, quantize

Format = Literal["stored", "bfloat16", "float32", "fp8", "fp8-ue8m0"]
_ALL = slice(None)
_LARGEST_SCALE = np.finfo(np.float32).max / LARGEST  # beyond it the largest code unpacks to infinity


def recast(
    source: TensorSource, config: ModelConfig, table: list[Tensor], to: Format
) -> tuple[TensorSource, ModelConfig]:
    """The same checkpoint in another format, with the configuration that describes it.

    Args:
        source: the checkpoint.
        config: of the checkpoint.
        table: of `names.tensors` for FP8 (as the published checkpoints choose): which matrices "fp8" packs.
        to: "stored" leaves everything; "float32" unpacks FP8 and casts the rest; "bfloat16" does so but leaves what is
            float32 by nature (router biases, V3.2's norms); "fp8" packs what is not packed yet, with the kind of scales
            that the checkpoint has; "fp8-ue8m0" does so with powers of two as scales, as V3.1 has them, in float32.

    Raises:
        ValueError: "fp8-ue8m0" of a checkpoint with other scales; and on reading a part, where it has numbers too large
            for the format.
    """
    if to == "stored":
        return source, config
    if to in ("fp8", "fp8-ue8m0"):
        quantization = config.quantization or FP8Config(scale_fmt="ue8m0" if to == "fp8-ue8m0" else None)
        if to == "fp8-ue8m0" and quantization.scale_fmt != "ue8m0":
            raise ValueError(
                f"{source.folder}: got FP8 weights with other scales than ue8m0; write it --to bfloat16 first, and "
                "that --to fp8-ue8m0"
            )
        packed = {tensor.name for tensor in table if tensor.dtype == "F8_E4M3"}
        return Packed(source, quantization, packed), dataclasses.replace(config, quantization=quantization)
    block = (config.quantization or FP8Config()).weight_block_size
    kept = {tensor.name for tensor in table if tensor.dtype == "F32"} if to == "bfloat16" else set()
    dtype = NAMES[jnp.dtype(to)]
    return Unpacked(source, block, dtype, kept), dataclasses.replace(config, quantization=None)


class Unpacked:
    """Every tensor in one dtype, FP8 weights multiplied by their scales; `kept` ones stay as they are."""

    def __init__(self, source: TensorSource, block: tuple[int, int], dtype: str, kept: set[str]):
        self.folder, self.where = source.folder, source.where
        self._source, self._block, self._dtype = source, block, dtype
        cast = lambda name, entry: entry if name in kept else entry._replace(dtype=dtype)
        self.entries = {n: cast(n, entry) for n, entry in source.entries.items() if not n.endswith(SCALE)}

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> np.ndarray:
        target = DTYPES[self.entries[name].dtype]
        if self._source.entries[name].dtype != "F8_E4M3":
            return self._finite(name, self._source.read(name, rows, columns).astype(target))
        wide_rows, wide_columns, crop = _widened(self._source.entries[name], rows, columns, self._block)
        weight = self._source.read(name, wide_rows, wide_columns)
        of_blocks = map(_per_block, (wide_rows, wide_columns), self._block)
        scale = self._source.read(name + SCALE, *of_blocks).astype(np.float32)
        with _on_host():
            return self._finite(name, np.asarray(_unpack(weight, scale, self._block, target))[crop])

    def _finite(self, name: str, value: np.ndarray) -> np.ndarray:
        """Large numbers may round to infinity, and such a checkpoint could not be read again."""
        if not np.all(np.isfinite(value)):
            raise _too_large(self, name)
        return value


class Packed:
    """The matrices of `packed` as FP8 with their scales, the others as they are."""

    def __init__(self, source: TensorSource, quantization: FP8Config, packed: set[str]):
        self.folder = source.folder
        self._source, self._block, self._scale_fmt = source, quantization.weight_block_size, quantization.scale_fmt
        self._packed = {n for n in packed if n in source.entries and source.entries[n].dtype != "F8_E4M3"}
        self.entries = {}
        for name, entry in source.entries.items():
            self.entries[name] = entry._replace(dtype="F8_E4M3") if name in self._packed else entry
            if name in self._packed:
                self.entries[name + SCALE] = Entry("F32", blocks(entry.shape, self._block), 0)

    def where(self, name: str) -> str:
        return self._source.where(name.removesuffix(SCALE))

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> np.ndarray:
        if name in self._packed:
            wide_rows, wide_columns, crop = _widened(self._source.entries[name], rows, columns, self._block)
            return self._quantized(name, wide_rows, wide_columns)[0][crop]
        owner = name.removesuffix(SCALE)
        if owner != name and owner in self._packed:
            return self._scales(owner, rows, columns)
        return self._source.read(name, rows, columns)

    def _scales(self, owner: str, rows: slice, columns: slice) -> np.ndarray:
        """A few rows of blocks at a time, since many weights make one scale."""
        entry, side = self._source.entries[owner], self._block[0]
        step = max(1, PIECE // (entry.nbytes // entry.shape[0] * side))
        first, last, _ = rows.indices(math.ceil(entry.shape[0] / side))
        columns = _of_blocks(columns, self._block[1], entry.shape[1])
        strips = []
        for start in range(first, max(last, first + 1), step):
            strip = _of_blocks(slice(start, min(start + step, last)), side, entry.shape[0])
            strips.append(self._quantized(owner, strip, columns)[1])
        return np.concatenate(strips)

    def _quantized(self, name: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        weight = self._source.read(name, rows, columns)
        with _on_host():
            packed, scale = map(np.asarray, _pack(weight, self._block, self._scale_fmt))
        if np.any(scale > _LARGEST_SCALE):
            raise _too_large(self, name)
        return packed, scale


def _too_large(source: TensorSource, name: str) -> ValueError:
    return ValueError(f"{source.where(name)}: tensor {name!r} has numbers too large for the format asked for")


def _on_host():
    """Recasting is the host's work, part by part; an accelerator would only wait for the disk."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@partial(jax.jit, static_argnums=(2, 3))
def _unpack(weight, scale, block, dtype):
    return dequantize(weight, scale, block, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _pack(weight, block, scale_fmt):
    return quantize(weight.astype(jnp.float32), block, scale_fmt)


def _widened(entry: Entry, rows: slice, columns: slice, block: tuple[int, int]):
    """The part grown to whole blocks, and where the part lies in it."""
    wide, crop = [], []
    for asked, length, side in zip((rows, columns), entry.shape, block, strict=True):
        first, last, _ = asked.indices(length)
        start = first // side * side
        wide.append(slice(start, min(math.ceil(last / side) * side, length)))
        crop.append(slice(first - start, last - start))
    return *wide, tuple(crop)


def _per_block(part: slice, side: int) -> slice:
    return slice(part.start // side, math.ceil(part.stop / side))


def _of_blocks(asked: slice, side: int, length: int) -> slice:
    """The rows of a matrix that some rows of its scales speak of."""
    first, last, _ = asked.indices(math.ceil(length / side))
    return slice(first * side, min(last * side, length))
