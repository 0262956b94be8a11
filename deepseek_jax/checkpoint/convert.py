"""Hugging Face folders to converted ones and back, in bounded memory, exactly, and resumable."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from deepseek_jax import distributed
from deepseek_jax.checkpoint import files, writer
from deepseek_jax.checkpoint.files import TensorFolder, new_folder, read_json, shared_folder, write_whole
from deepseek_jax.checkpoint.headers import Entry, parse_header
from deepseek_jax.checkpoint.model_folder import ModelFolder
from deepseek_jax.checkpoint.orbax_layers import MANIFEST, WEIGHTS, ConvertedFolder, OrbaxLayerWriter, create_layer
from deepseek_jax.checkpoint.sidecars import drop_missing_code
from deepseek_jax.checkpoint.stored_arrays import StoredArray, TensorSource, by_unit

VERSION = 1  # of the converted folder's form
ORIGIN = "source"  # holds the headers of the Hugging Face files, so that an export gives back the very files
THREADS = 8  # in flight at once, each with a piece of at most 8 MiB (stored_arrays.PIECE) and its copies
Advance = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


def convert_hf(opened: ModelFolder, target: Path, *, advance: Advance = lambda count: None) -> None:
    """Write a Hugging Face folder as a converted one: an Orbax checkpoint a layer, and a manifest of hashes.

    Memory stays at a few pieces of 8 MiB whatever the size of the checkpoint. Killed at any moment, the same call
    goes on after the last whole layer. Several processes divide the layers between them; the folders, source and
    target, are shared ones. A failure in one process is a failure in all.

    Args:
        opened: the source, of `open_folder`.
        target: the folder to make; it appears when it is whole.
        advance: called with the number of bytes written, as they are, from several threads; a resumed run reports
            what was there first, and the main process what the others wrote last.

    Raises:
        ValueError: the source is damaged or converted already, or the target exists; nothing is left behind.
    """
    if not isinstance(opened.stored, TensorFolder):
        raise ValueError(f"{opened.folder}: is a converted folder already; wanted a Hugging Face one")
    files.refuse_existing(target, opened.folder)
    everything = by_unit(opened.arrays)
    nbytes = lambda names: sum(_nbytes(opened.source, everything[unit]) for unit in names)
    with shared_folder(target, resume=_identity(opened)) as partial:
        left = distributed.on_main(lambda: [unit for unit in everything if not _is_whole(partial, unit)])
        ours = left[distributed.process_index() :: distributed.process_count()]
        for unit in left:
            create_layer(partial / WEIGHTS / unit, everything[unit])
        advance(nbytes(everything.keys() - set(left)))
        with distributed.together():
            # two units at a time, so that one is read while the other waits for the disk
            write = lambda unit: _write_unit(opened.source, unit, everything[unit], partial, advance)
            _in_threads(write, ours, 2)
        if distributed.is_main():
            advance(nbytes(set(left) - set(ours)))
            _complete(opened, partial, list(everything))


def _complete(opened: ModelFolder, partial: Path, units: Sequence[str]) -> None:
    """What a converted folder holds beside its weights; the notes of its units become lines of the manifest."""
    opened.write_sidecars(partial)
    _keep_origin(opened, partial)
    notes = [_note(partial, unit) for unit in units]
    hashes = {name: digest for note in notes for name, digest in read_json(note).items()}
    lines = {name: _line(entry, hashes[name]) for name, entry in opened.source.entries.items() if name in hashes}
    manifest = {"version": VERSION, "format": opened.to, "tensors": lines}
    write_whole(partial / MANIFEST, json.dumps(manifest, indent=0).encode())
    for note in notes:
        note.unlink()


def export_hf(opened: ModelFolder, target: Path, *, advance: Advance = lambda count: None) -> None:
    """Write a converted folder as a Hugging Face one; as "stored" these are the very files it was converted from.

    Every tensor is held against its hash; for another format they are all read once more, before anything is written.
    Killed at any moment, or stopped by a full disk, the same call goes on after the last whole tensor.
    Of several processes the main one does it all, while the others wait.

    Args:
        opened: the source, of `open_folder`; a Hugging Face folder is taken too.
        target: the folder to make; it appears when it is whole.
        advance: called with the number of bytes written, as they are, from several threads.

    Raises:
        ValueError: the source is damaged, or the target exists; nothing is left behind.
    """
    with distributed.together():
        if distributed.is_main():
            _export(opened, target, advance)


def _export(opened: ModelFolder, target: Path, advance: Advance) -> None:
    stored = opened.to == "stored"
    hashes = opened.source.hashes if isinstance(opened.source, ConvertedFolder) else {}
    files.refuse_existing(target, opened.folder)
    if not stored and isinstance(opened.stored, ConvertedFolder):
        _verify(opened.stored, list(opened.stored.hashes), opened.stored.hashes, lambda count: None)
    with new_folder(target, resume=_identity(opened)) as partial:
        opened.write_sidecars(partial)
        drop_missing_code(partial)
        plan = _origin(opened) if stored and (opened.folder / ORIGIN).is_dir() else writer.plan(opened.source)
        write_hf(opened.source, partial, plan, hashes=hashes, advance=advance)


def write_hf(
    source: TensorSource,
    folder: Path,
    plan: writer.Plan,
    *,
    hashes: Mapping[str, str] | None = None,
    advance: Advance = lambda count: None,
) -> None:
    """Write a checkpoint's tensors as safetensors into an existing folder.

    Tensors that an interrupted call wrote there to their end, as its log and their hashes in the file say, stay.

    Args:
        source: the tensors.
        folder: where the files go.
        plan: the files and what they hold.
        hashes: what the tensors must be; ValueError for one that is not.
        advance: called with the number of bytes written, as they are.
    """
    shards = writer.ShardWriter(folder, plan)
    expected, log = hashes or {}, _Log(folder / ".written")

    def write(name: str) -> None:
        held = log.digests.get(name)
        if held is not None and held == expected.get(name, held) == _digest(shards.written(name)):
            advance(source.entries[name].nbytes)
            return
        digest = xxhash.xxh3_128()
        for start, part in writer.parts(source, name):
            digest.update(_bytes(part))
            shards.write(name, start, part)
            advance(part.nbytes)
        if digest.hexdigest() != expected.get(name, digest.hexdigest()):
            raise _changed(source, name)
        log.add(name, digest.hexdigest())

    try:
        _in_threads(write, [name for header in plan.files.values() for name in header.entries])
    finally:
        shards.close()
    log.path.unlink(missing_ok=True)


class _Log:
    """The tensors that are written to their end, and their hashes: a line each, the last of which may be cut."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.digests = {name: digest for digest, found, name in (line.partition(" ") for line in lines) if found}

    def add(self, name: str, digest: str) -> None:
        with self._lock, files.writing(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{digest} {name}\n")


def _digest(parts: Iterable[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def verify(source: TensorSource, hashes: Mapping[str, str], *, advance: Advance = lambda count: None) -> None:
    """Read every tensor again and hold it against its hash. ValueError names the first that changed.

    Several processes divide the tensors between them; the main one tells `advance` last what the others read.
    """
    ours = list(hashes)[distributed.process_index() :: distributed.process_count()]
    with distributed.together():
        _verify(source, ours, hashes, advance)
    if distributed.is_main():
        advance(sum(source.entries[name].nbytes for name in hashes.keys() - set(ours)))


def _verify(source: TensorSource, names: Sequence[str], hashes: Mapping[str, str], advance: Advance) -> None:
    def check(name: str) -> None:
        digest = xxhash.xxh3_128()
        for _, part in writer.parts(source, name):
            digest.update(_bytes(part))
            advance(part.nbytes)
        if digest.hexdigest() != hashes[name]:
            raise _changed(source, name)

    _in_threads(check, names)


def _bytes(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _changed(source: TensorSource, name: str) -> ValueError:
    return ValueError(f"{source.where(name)}: tensor {name!r} is not what was converted; the checkpoint is damaged")


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int = THREADS) -> list[Result]:
    """The results of `work`; the first failure stops what has not begun."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _note(partial: Path, unit: str) -> Path:
    """The file that says that a unit is whole, and the hash of each of its tensors."""
    return partial / f"{unit}.done"


def _is_whole(partial: Path, unit: str) -> bool:
    """Whether a killed run wrote a unit to its end; what else it left of it goes."""
    layer = partial / WEIGHTS / unit
    if _note(partial, unit).is_file() and layer.is_dir():
        return True
    files.remove(layer)
    layer.parent.mkdir(exist_ok=True)
    return False


def _nbytes(source: TensorSource, members: list[StoredArray]) -> int:
    return sum(source.entries[tensor.name].nbytes for array in members for tensor in array.tensors)


def _write_unit(source: TensorSource, unit: str, members: list[StoredArray], partial: Path, advance: Advance) -> None:
    """Write one unit and its note."""
    layer = OrbaxLayerWriter(partial / WEIGHTS / unit, members)

    def put(job: tuple[StoredArray, slice]) -> dict[str, str]:
        array, experts = job
        tensors = array.tensors[experts]
        digests = [xxhash.xxh3_128() for _ in tensors]
        for rows in _rows(array):
            values = [source.read(tensor.name, rows) for tensor in tensors]
            for digest, value in zip(digests, values, strict=True):
                digest.update(_bytes(value))
            if array.stacked:
                layer.write(array, (experts, rows), values[0][None] if len(values) == 1 else np.stack(values))
            else:
                layer.write(array, (rows,), values[0])
            advance(sum(value.nbytes for value in values))
        return {tensor.name: digest.hexdigest() for tensor, digest in zip(tensors, digests, strict=True)}

    jobs = [(array, experts) for array in members for experts in _experts(array)]
    # in the order of the files, which disks read ahead
    place = lambda job: (source.where(name := job[0].tensors[job[1]][0].name), source.entries[name].start)
    results = _in_threads(put, sorted(jobs, key=place), THREADS // 2)
    layer.close()
    hashes = {name: digest for result in results for name, digest in result.items()}
    write_whole(_note(partial, unit), json.dumps(hashes).encode())


def _experts(array: StoredArray) -> Iterator[slice]:
    """The groups of tensors that a piece is made of."""
    step = array.pieces()[0] if array.stacked else 1
    for first in range(0, len(array.tensors), step):
        yield slice(first, first + step)


def _rows(array: StoredArray) -> Iterator[slice]:
    """The rows of a tensor, piece by piece."""
    axis = 1 if array.stacked else 0
    step = array.pieces()[axis]
    for first in range(0, array.shape[axis], step):
        yield slice(first, first + step)


def _line(entry: Entry, digest: str) -> dict:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "xxh3_128": digest}


def _identity(opened: ModelFolder) -> str:
    """What a resumed conversion or export must have in common with the one before it."""
    digest = xxhash.xxh3_128((opened.folder / "config.json").read_bytes())
    if isinstance(opened.stored, ConvertedFolder):
        digest.update((opened.folder / MANIFEST).read_bytes())
        return f"{VERSION} {opened.to} {digest.hexdigest()}"
    for name, header in opened.stored.headers.items():
        state = (opened.folder / name).stat()
        digest.update(header.raw)
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}".encode())
    return f"{VERSION} {opened.to} {digest.hexdigest()}"


def _keep_origin(opened: ModelFolder, target: Path) -> None:
    """The headers and the index as they are, where all that the files hold is converted as stored."""
    if opened.to != "stored" or opened.stored.entries.keys() != opened.tensor_names():
        return
    origin = target / ORIGIN
    origin.mkdir(exist_ok=True)
    for name, header in opened.stored.headers.items():
        write_whole(origin / f"{name}.header", header.raw)
    if (opened.folder / files.INDEX).is_file():
        write_whole(origin / files.INDEX, (opened.folder / files.INDEX).read_bytes())


def _origin(opened: ModelFolder) -> writer.Plan:
    """The files that a folder was converted from."""
    origin = opened.folder / ORIGIN
    headers = {path.stem: parse_header(path.read_bytes(), None, path) for path in sorted(origin.glob("*.header"))}
    held = {name: (entry.dtype, entry.shape) for name, entry in opened.source.entries.items()}
    listed = {n: (entry.dtype, entry.shape) for header in headers.values() for n, entry in header.entries.items()}
    if listed != held or sum(len(header.entries) for header in headers.values()) != len(listed):
        raise ValueError(f"{origin}: the headers are not those of the tensors in {MANIFEST}; convert the folder again")
    index = origin / files.INDEX
    return writer.Plan(headers, index.read_bytes() if index.is_file() else None)
