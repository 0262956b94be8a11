"""Writing a Hugging Face folder tensor by tensor: shards planned first, then filled in place by several threads."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.checkpoint.files import INDEX, SINGLE, write_whole, writing
from deepseek_jax.checkpoint.headers import Entry, Header, make_header
from deepseek_jax.checkpoint.stored_arrays import PIECE, TensorSource, largest_divisor

SHARD = 5_000_000_000


class Plan(NamedTuple):
    """The files of a folder by name, and the content of its index, None where there is one file."""

    files: Mapping[str, Header]
    index: bytes | None


def plan(source: TensorSource, shard_bytes: int = SHARD) -> Plan:
    """One file where everything fits, else shards in the order of the tensors."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, entry in source.entries.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry.dtype, entry.shape
        size += entry.nbytes
    if len(shards) == 1:
        return Plan({SINGLE: make_header(shards[0])}, None)
    name_of = lambda number: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    files = {name_of(number): make_header(shard) for number, shard in enumerate(shards, 1)}
    return Plan(files, _index(files))


def _index(files: Mapping[str, Header]) -> bytes:
    total = sum(entry.nbytes for header in files.values() for entry in header.entries.values())
    weight_map = {name: file for file, header in files.items() for name in header.entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True).encode()


class ShardWriter:
    """The files of a plan, of their full size, to be filled tensor by tensor in any order, from several threads.

    Files that an interrupted writer of the same plan left behind are gone on with.
    """

    def __init__(self, folder: Path, plan: Plan):
        self._place: dict[str, tuple[int, Entry]] = {}
        self._descriptors: list[int] = []
        self._folder = folder
        if plan.index is not None:
            write_whole(folder / INDEX, plan.index)
        for name, header in plan.files.items():
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
            self._descriptors.append(descriptor)
            with writing(folder / name):
                _pwrite(descriptor, header.raw, 0)
            os.truncate(descriptor, len(header.raw) + sum(entry.nbytes for entry in header.entries.values()))
            for tensor, entry in header.entries.items():
                self._place[tensor] = descriptor, entry

    def write(self, name: str, start: int, value: np.ndarray) -> None:
        """Write a part of a tensor, `start` bytes from its beginning."""
        descriptor, entry = self._place[name]
        with writing(self._folder):  # a full disk is said without a name
            _pwrite(descriptor, np.ascontiguousarray(value).reshape(-1).view(np.uint8), entry.start + start)

    def written(self, name: str) -> Iterator[bytes]:
        """What the file holds for a tensor now, piece by piece."""
        descriptor, entry = self._place[name]
        for start in range(0, entry.nbytes, PIECE):
            yield os.pread(descriptor, min(PIECE, entry.nbytes - start), entry.start + start)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _pwrite(descriptor: int, content, start: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(descriptor, view, start)
        view, start = view[done:], start + done


def parts(source: TensorSource, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor in parts along its first axis, the pieces it is stored in, each with the number of bytes before it."""
    entry = source.entries[name]
    if not entry.shape or entry.nbytes <= PIECE:
        yield 0, source.read(name)
        return
    row = entry.nbytes // entry.shape[0]
    step = largest_divisor(entry.shape[0], PIECE // row)
    for first in range(0, entry.shape[0], step):
        yield first * row, source.read(name, slice(first, first + step))
