"""The header of a safetensors file: what lies where. Hostile until every rule of the format has been checked.

The `safetensors` library checks the same rules but gives no offsets, and without them a tensor can be read only
through a memory map, whose pages count as this process's memory.
"""

import itertools
import json
import math
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# By the names that safetensors gives them; the others are listed by inspection and never read.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
SCALES = ("F32", "BF16", "F8_E8M0")  # what FP8 weights' scales come in; the last, powers of two, is nothing else's
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_BYTES |= {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
_BYTES |= {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8, "C64": 8}
_HALVES = re.compile("[\ud800-\udfff]")
_LFS = b"version https://git-lfs.github.com/spec/"
LONGEST = 100_000_000  # bytes of a header, the library's own bound


class Entry(NamedTuple):
    """One tensor: its dtype's name, its shape, and where its bytes start in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


class Header(NamedTuple):
    """A checked header: `raw`, the bytes at the file's start, and the tensors in the order of their data."""

    raw: bytes
    entries: dict[str, Entry]


def read_header(file: Path) -> Header:
    """Read and check a file's header.

    Raises:
        ValueError: the file is shorter or longer than its header says; the header is no JSON object or names a tensor
            twice; a dtype is unknown, a shape does not multiply to its bytes, or offsets leave the data, overlap or
            leave holes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        raw = stream.read(8)
        refuse_lfs_pointer(file, raw + stream.read(len(_LFS)))
        stream.seek(len(raw))
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
        if not 2 <= length <= min(LONGEST, size - 8):
            raise _broken(file, f"{size} bytes, and a header of {length} by the first 8")
        raw += stream.read(length)
    return parse_header(raw, size, file)


def refuse_lfs_pointer(file: Path, start: bytes) -> None:
    """ValueError for a file that begins as what Git leaves in place of a large one that was not fetched."""
    if start.startswith(_LFS):
        raise ValueError(
            f"{file}: is a Git LFS pointer, a note in place of the file; fetch the files with `git lfs pull`, or "
            "download the folder again"
        )


def parse_header(raw: bytes, size: int | None, file: Path) -> Header:
    """Check a header's bytes, length and all, for a file of `size` bytes if it is known; `file` is for messages."""
    if len(raw) < 8 or struct.unpack("<Q", raw[:8])[0] != len(raw) - 8:
        raise _broken(file, f"{len(raw)} bytes of header are not as many as the first 8 say")
    try:
        listing = json.loads(raw[8:].decode(), object_pairs_hook=_once, parse_int=_natural)
    except (ValueError, RecursionError) as problem:
        raise _broken(file, f"header: {problem}") from None
    if not isinstance(listing, dict):
        raise _broken(file, "header: not a JSON object")
    if not _is_metadata(listing.pop("__metadata__", None)):
        raise _broken(file, "header: __metadata__ must be an object of texts")
    entries = {name: entry_of(file, name, values, len(raw)) for name, values in listing.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    ends = [len(raw), *(entry.start + entry.nbytes for entry in entries.values())]
    for (name, entry), end in zip(entries.items(), ends, strict=False):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise _broken(file, f"tensor {name!r:.200} {fault}")
    if size is not None and ends[-1] != size:
        raise _broken(file, f"tensors end at byte {ends[-1]}, the file has {size}")
    return Header(raw, entries)


def make_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Header:
    """A header for tensors that lie one after another, given as names and (dtype, shape)."""
    sizes = [math.prod(shape) * _BYTES[dtype] for dtype, shape in tensors.values()]
    starts = list(itertools.accumulate(sizes, initial=0))
    listing: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, (dtype, shape)), start, size in zip(tensors.items(), starts, sizes, strict=False):
        listing[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
    text = json.dumps(listing, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    entries = {name: Entry(*tensors[name], 8 + len(text) + start) for name, start in zip(tensors, starts, strict=False)}
    return Header(struct.pack("<Q", len(text)) + text, entries)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r:.200} stands there twice")
    if not all(map(_is_text, found)):
        raise ValueError("a name is no Unicode text")
    return found


def _natural(digits: str) -> int:
    """JSON has signed numbers, the format none: not even -0, which Python takes for 0."""
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"got {digits:.40}, wanted whole numbers from 0 to 2**63 - 1")
    return int(digits)


def _is_text(value: Any) -> bool:
    """A string without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return isinstance(value, str) and not _HALVES.search(value)


def _is_metadata(values: Any) -> bool:
    return values is None or (isinstance(values, dict) and all(map(_is_text, values.values())))


def entry_of(file: Path, name: str, values: Any, data: int) -> Entry:
    """One tensor's line, checked; `data` is where the file's data start. ValueError for what cannot be."""
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"tensor {name!r:.200}: wanted dtype, shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _broken(file, f"tensor {name!r:.200}: unknown dtype {dtype!r:.40}")
    if not _whole_numbers(shape, 8) or not _whole_numbers(offsets, 2) or len(offsets) != 2:
        raise _broken(file, f"tensor {name!r:.200}: shape and data_offsets must be short lists of whole numbers")
    if math.prod(max(width, 1) for width in shape) * _BYTES[dtype] >= 2**63:  # nor may it with a 0 among them
        raise _broken(file, f"tensor {name!r:.200}: no tensor can have the shape {shape}")
    entry = Entry(dtype, tuple(shape), data + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise _broken(file, f"tensor {name!r:.200}: {dtype} {shape} is not {offsets[1] - offsets[0]} bytes")
    return entry


def _whole_numbers(values: Any, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _broken(file: Path, what: str) -> ValueError:
    return ValueError(f"{file}: not a whole safetensors file ({what})")
