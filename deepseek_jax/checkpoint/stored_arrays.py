"""From tensors by name to arrays by path: what a checkpoint must hold, and whether it does."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.headers import DTYPES, SCALES, Entry
from deepseek_jax.config import ModelConfig

PIECE = 8 << 20  # bytes that are read and written at once, where a tensor can be cut
_ALL = slice(None)


class Listing(Protocol):
    """Anything that knows a checkpoint's tensors by their headers."""

    folder: Path
    entries: Mapping[str, Entry]

    def where(self, name: str) -> str:
        """The file of a tensor, for messages."""
        ...


class TensorSource(Listing, Protocol):
    """Anything that holds the tensors too: a Hugging Face folder, a converted one, a model in memory."""

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> np.ndarray:
        """A tensor as the file holds it, or a part of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One of our arrays and the tensors that make it up: one, or one an expert.

    `shape` is the file's, [E, out, in] for stacked experts; we hold the last two axes the other way round where
    `transposed`. `dtype` is as stored, and as safetensors spells it.
    """

    path: names.Path
    tensors: tuple[names.Tensor, ...]
    dtype: str

    @property
    def stacked(self) -> bool:
        return self.tensors[0].expert is not None

    @property
    def transposed(self) -> bool:
        return self.tensors[0].transposed

    @property
    def copy_of(self) -> names.Path | None:
        return self.tensors[0].copy_of

    @property
    def shape(self) -> tuple[int, ...]:
        return ((len(self.tensors),) if self.stacked else ()) + self.tensors[0].shape

    @property
    def unit(self) -> str:
        """The part of the model that the array is saved and loaded with: one layer, or what belongs to none."""
        return names.key(self.path[:2]) if self.path[0] in ("layers", "mtp") else "model"

    @property
    def key(self) -> str:
        """Its name within the unit."""
        return names.key(self.path[2:] if self.path[0] in ("layers", "mtp") else self.path)

    def pieces(self) -> tuple[int, ...]:
        """The shape of the pieces that the array is stored in, each read or written at once.

        Whole experts while they are small, else rows of one; always an even division, because storage would pad.
        """
        *stack, rows = self.shape[:-1] or (self.shape[0],)
        columns = self.shape[-1:] if len(self.shape) > 1 else ()
        row = DTYPES[self.dtype].itemsize * math.prod(columns)
        if not stack:
            return (largest_divisor(rows, PIECE // row), *columns)
        experts = largest_divisor(stack[0], PIECE // (row * rows))
        return (experts, rows if row * rows <= PIECE else largest_divisor(rows, PIECE // row), *columns)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`; 1 where even that is too much."""
    return max((d for d in range(1, min(number, max(most, 1)) + 1) if number % d == 0), default=1)


def arrays(source: TensorSource, config: ModelConfig, abstract: nnx.State) -> list[StoredArray]:
    """The arrays that a checkpoint holds, after checking it against its configuration by names and headers alone.

    Raises:
        ValueError: a tensor is missing, unexpected or misshapen, has a dtype that no weight has, experts of one
            matrix differ in dtype, or FP8 weights come without their scales.
    """
    table = names.tensors(config, abstract)
    problems = differences(source, config, table)
    for problem in ("missing", "unexpected"):
        if problems[problem]:
            first, *rest = sorted(problems[problem])
            more = f" (and {len(rest)} more)" if rest else ""
            raise ValueError(f"{source.folder}: {problem} tensor {first!r}{more} for its config.json")
    parts: dict[names.Path, list[names.Tensor]] = {}
    for tensor in _stored(source, config, table):
        _check_entry(source, tensor)
        parts.setdefault(tensor.path, []).append(tensor)
    return [_array(source, path, tensors) for path, tensors in parts.items()]


def differences(source: Listing, config: ModelConfig, table: list[names.Tensor]) -> dict[str, list[str]]:
    """Names that a checkpoint lacks ("missing") and that its configuration does not explain ("unexpected")."""
    wanted = {tensor.name for tensor in _stored(source, config, table)}
    # rotary tables that old exports stored; they follow from the configuration
    held = {name for name in source.entries if not name.endswith("rotary_emb.inv_freq")}
    return {"missing": sorted(wanted - held), "unexpected": sorted(held - wanted)}


def _stored(source: Listing, config: ModelConfig, table: list[names.Tensor]) -> Iterator[names.Tensor]:
    """The table as this checkpoint should have it: with the copies that it holds, and scales beside FP8 tensors."""
    head = names.tied_head(config, table)
    for tensor in table if head is None else [*table, head]:
        entry = source.entries.get(tensor.name)
        if entry is None and tensor.copy_of is not None:
            continue
        yield tensor
        if entry is not None and entry.dtype == "F8_E4M3" and len(tensor.shape) == 2:
            if config.quantization is None:
                raise ValueError(
                    f"{source.where(tensor.name)}: tensor {tensor.name!r}: got FP8 weights, wanted a "
                    "quantization_config in config.json that gives the size of their blocks"
                )
            yield tensor.scale(config.quantization.weight_block_size)


def _check_entry(source: TensorSource, tensor: names.Tensor) -> None:
    entry = source.entries[tensor.name]
    if entry.shape != tensor.shape:
        raise ValueError(
            f"{source.where(tensor.name)}: tensor {tensor.name!r}: got shape {list(entry.shape)}, "
            f"wanted {list(tensor.shape)} by config.json"
        )
    scale, matrix = tensor.path[-1] == "scale", len(tensor.shape) == 2
    if scale:
        allowed: tuple[str, ...] = SCALES
    else:
        allowed = ("F32", "F16", "BF16", "F8_E4M3") if matrix else ("F32", "F16", "BF16")
    if entry.dtype not in allowed:
        place = f"{source.where(tensor.name)}: tensor {tensor.name!r}"
        raise ValueError(f"{place}: got dtype {entry.dtype}, wanted {' or '.join(allowed)}")


def _array(source: TensorSource, path: names.Path, tensors: list[names.Tensor]) -> StoredArray:
    dtypes = sorted({source.entries[tensor.name].dtype for tensor in tensors})
    if len(dtypes) > 1:
        got = " and ".join(dtypes)
        raise ValueError(f"{source.folder}: tensors like {tensors[0].name!r}: got {got}, wanted one dtype")
    return StoredArray(path=path, tensors=tuple(tensors), dtype=dtypes[0])


def by_unit(found: list[StoredArray]) -> dict[str, list[StoredArray]]:
    """Arrays by the unit that they are saved and loaded with."""
    groups: dict[str, list[StoredArray]] = {}
    for array in found:
        groups.setdefault(array.unit, []).append(array)
    return groups


def read_part(source: TensorSource, array: StoredArray, index: tuple[slice, ...]) -> np.ndarray:
    """A part of an array, in the file's orientation.

    Args:
        source: where its tensors are.
        array: of shape [E, out, in], [out, in] or [width].
        index: a slice along each axis, of step 1.
    """
    if not array.stacked:
        return source.read(array.tensors[0].name, *index)
    experts, *rest = index
    tensors = array.tensors[experts]
    sizes = (len(range(*at.indices(size))) for at, size in zip(rest, array.shape[1:], strict=True))
    whole = np.empty((len(tensors), *sizes), DTYPES[array.dtype])
    for place, tensor in enumerate(tensors):
        whole[place] = source.read(tensor.name, *rest)
    return whole
