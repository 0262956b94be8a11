"""Reading and writing safetensors folders: every problem one ValueError that names the file and the tensor."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What travels with the weights from folder to folder, where it exists.
SIDECARS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "LICENSE"),
)
_EXPONENT = {np.dtype(np.float32): (np.uint32, 0x7F800000), np.dtype(np.float16): (np.uint16, 0x7C00)}
_EXPONENT[np.dtype(ml_dtypes.bfloat16)] = (np.uint16, 0x7F80)


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, wanted an object")
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written, whatever kills the writer."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(content)
    os.replace(draft, path)


class TensorFolder:
    """The tensors of a safetensors folder, single file or sharded, read one by one.

    Raises:
        ValueError: no weights, a shard that is missing, truncated or not safetensors, an index that names files
            outside the folder or tensors that the shards do not hold, or a tensor that two shards hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self._open = {}
        for file, names in self._listing().items():
            if not file.is_file():
                raise ValueError(f"{file}: missing; the index places {len(names or ()) or 'some'} tensors there")
            held = self._handle(file).keys()
            lost = set(names or ()) - set(held)
            if lost:
                raise ValueError(f"{file}: tensor {sorted(lost)[0]!r} is not there, though the index says so")
            for name in held:
                if name in self.file_of:
                    raise ValueError(f"{file}: tensor {name!r} is also in {self.file_of[name].name}")
                self.file_of[name] = file

    def _listing(self) -> dict[Path, list[str] | None]:
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: weight_map: wanted an object of tensor names and files")
            listing: dict[Path, list[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                    raise ValueError(f"{index}: tensor {name!r}: file {file!r} lies outside the folder")
                listing.setdefault(self.folder / file, []).append(name)
            return listing
        if (self.folder / SINGLE).is_file():
            return {self.folder / SINGLE: None}
        raise ValueError(f"{self.folder}: no {SINGLE} and no {INDEX}; pickled .bin weights are not read")

    def _handle(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as problem:
                raise ValueError(f"{file}: not a whole safetensors file ({problem})") from None
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(self.file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._handle(self.file_of[name]).get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored. ValueError when it holds NaN or infinity, or is no float of 16 or 32 bits."""
        file = self.file_of[name]
        if self.dtype(name) not in ("F32", "F16", "BF16"):
            raise ValueError(f"{file}: tensor {name!r}: got dtype {self.dtype(name)}, wanted F32, F16 or BF16")
        value = self._handle(file).get_tensor(name)
        bits, exponent = _EXPONENT[value.dtype]
        if np.any((np.ascontiguousarray(value).view(bits) & exponent) == exponent):
            raise ValueError(f"{file}: tensor {name!r} holds NaN or infinite values; the checkpoint is damaged")
        return value


def write_tensors(
    folder: Path, named: Iterator[tuple[str, np.ndarray]], total_bytes: int, shard_bytes: int = 5_000_000_000
) -> None:
    """Write tensors in the order given: one file where they fit, else shards with an index.

    Args:
        folder: an existing folder.
        named: names and arrays, produced one by one; at most one shard is held in memory.
        total_bytes: of all tensors; decides between one file and shards.
        shard_bytes: a shard is closed before it would pass this size.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def close() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, value in named:
        if pending and sum(v.nbytes for v in pending.values()) + value.nbytes > shard_bytes:
            close()
        pending[name] = np.ascontiguousarray(value)
    close()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files, those that exist."""
    for name in SIDECARS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when whole.

    Yields a temporary neighbour to write into; it is renamed at the end, or removed after an exception.

    Raises:
        ValueError: the target exists already; nothing is overwritten.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already; choose a new folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
