"""Safetensors folders read tensor by tensor, and folders that appear whole: every problem one ValueError."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax import distributed
from deepseek_jax.checkpoint.headers import DTYPES, Entry, Header, read_header, refuse_lfs_pointer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
_NAN = {"F8_E4M3": (b"\x7f", b"\xff"), "F8_E8M0": (b"\xff",)}
# What `save_pretrained` calls the files of a model. Others, such as consolidated.safetensors, are no part of it.
_OF_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_ALL = slice(None)


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError names the file."""
    if not path.is_file():
        raise ValueError(_absent(path))
    content = path.read_bytes()
    refuse_lfs_pointer(path, content)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, wanted an object")
    return value


def _absent(path: Path) -> str:
    """What to say of a path where there is no file to read, but perhaps a folder, a pipe, or a link to nothing."""
    return f"{path}: {'is no regular file' if os.path.lexists(path) else 'no such file'}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written, whatever kills the writer."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as problem:  # a full disk is said without a name
        draft.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None


class TensorFolder:
    """The tensors of a safetensors folder, single file or sharded, read one by one.

    Only headers are read when it is made. Reading is safe from several threads, and takes no more bytes from the disk
    than the rows and columns asked for.

    Attributes:
        headers: of each file, by its name.
        entries: every tensor's dtype, shape and place.

    Raises:
        ValueError: no weights, a shard that is missing, truncated or not safetensors, an index that names files
            outside the folder or tensors that the shards do not hold, or a tensor that two shards hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, Path] = {}
        for file, names in self._listing().items():
            if not file.is_file():
                raise ValueError(_absent(file) + (f"; the index places {len(names)} tensors there" if names else ""))
            header = self.headers[file.name] = read_header(file)
            lost = set(names or ()) - header.entries.keys()
            if lost:
                raise ValueError(f"{file}: tensor {min(lost)!r} is not there, though the index says so")
            for name, entry in header.entries.items():
                if name in self.entries:
                    raise ValueError(f"{file}: tensor {name!r} is also in {self._file_of[name].name}")
                self.entries[name], self._file_of[name] = entry, file
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in set(self._file_of.values())}
        weakref.finalize(self, _close_all, tuple(self._descriptors.values()))

    def _listing(self) -> dict[Path, list[str] | None]:
        index = self.folder / INDEX
        if os.path.lexists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: weight_map: wanted an object of tensor names and files")
            listing: dict[Path, list[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or len(file) > 255:
                    raise ValueError(f"{index}: tensor {name!r:.200}: file {file!r:.80} lies outside the folder")
                listing.setdefault(self.folder / file, []).append(name)
        elif os.path.lexists(self.folder / SINGLE):
            listing = {self.folder / SINGLE: None}
        else:
            raise ValueError(f"{self.folder}: no {SINGLE} and no {INDEX}; pickled .bin weights are not read")
        self._refuse_others(listing)
        return listing

    def _refuse_others(self, listing: Collection[Path]) -> None:
        """Weights of another save in the same folder: which of the two are meant, nobody can tell."""
        there = (path for path in self.folder.iterdir() if _OF_MODEL.fullmatch(path.name))
        if others := sorted(set(there) - set(listing)):
            why = f"{INDEX} does not name it" if INDEX in os.listdir(self.folder) else f"{SINGLE} is there as well"
            raise ValueError(f"{others[0]}: {why}; remove the weights that are not meant, or the index")

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._file_of[name])

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> np.ndarray:
        """A tensor as stored, or a part of it along the first two axes.

        Raises:
            ValueError: the part holds NaN or infinity, or the tensor is no float that a model is made of.
        """
        entry, file = self.entries[name], self._file_of[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r}: got dtype {entry.dtype}, wanted {', '.join(DTYPES)}")
        raw, shape = self._read_raw(file, entry, rows, columns)
        if not _finite(raw, entry.dtype):
            raise ValueError(f"{file}: tensor {name!r} holds NaN or infinite values; the checkpoint is damaged")
        return np.frombuffer(raw, DTYPES[entry.dtype]).reshape(shape)

    def _read_raw(self, file: Path, entry: Entry, rows: slice, columns: slice) -> tuple[bytes, tuple[int, ...]]:
        size = DTYPES[entry.dtype].itemsize
        if not entry.shape:
            return self._pread(file, entry.start, size), ()
        first, last, _ = rows.indices(entry.shape[0])
        row = entry.nbytes // max(entry.shape[0], 1)
        start = entry.start + first * row
        if len(entry.shape) == 1 or columns == _ALL or columns.indices(entry.shape[1]) == (0, entry.shape[1], 1):
            return self._pread(file, start, (last - first) * row), (last - first, *entry.shape[1:])
        left, right, _ = columns.indices(entry.shape[1])
        lines = [
            self._pread(file, start + line * row + left * size, (right - left) * size) for line in range(last - first)
        ]
        return b"".join(lines), (last - first, right - left)

    def _pread(self, file: Path, start: int, count: int) -> bytes:
        parts = []
        os.posix_fadvise(self._descriptors[file], start, count, os.POSIX_FADV_WILLNEED)
        while count:  # Linux gives at most 2 GiB a call
            try:
                part = os.pread(self._descriptors[file], count, start)
            except OSError as problem:
                raise OSError(problem.errno, problem.strerror, str(file)) from None
            if not part:
                raise ValueError(f"{file}: ended at byte {start}; it was cut while it was read")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _finite(raw: bytes, dtype: str) -> bool:
    if dtype in _NAN:  # no infinities, and few codes for NaN; finding a byte runs at the memory's speed
        return not any(code in raw for code in _NAN[dtype])
    bits, exponent = _EXPONENT[dtype]
    return not np.any((np.frombuffer(raw, bits) & exponent) == exponent)


def resolved(path: Path) -> Path:
    """A path without `..`, `.` and links, except that its last part stays as it is: it may be a link or be missing."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def refuse_existing(target: Path, source: Path | None = None) -> None:
    """ValueError when there is something under that name already, be it a link to nothing, or it lies in `source`."""
    place = resolved(target)
    if place.is_symlink() and not place.exists():
        raise ValueError(f"{target}: is a link to {os.readlink(place)}, which is not there; choose a new folder")
    if os.path.lexists(place):
        raise ValueError(f"{target}: exists already; choose a new folder or remove it")
    if source is not None and Path(os.path.realpath(source)) in place.parents:
        raise ValueError(f"{target}: lies within {source}, which it would be made from; choose a folder outside")
    for parent in place.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"{target}: {parent} is a file; choose a folder to make within another folder")
            break


def system_error(problem: Exception, where: Path) -> Exception:
    """What the system refused, where a library says it as another exception (a full disk as a ValueError), as OSError.

    Args:
        problem: of a library that writes; what is no refusal of the system comes back as it is.
        where: what was written.
    """
    if isinstance(problem, OSError):
        code = problem.errno
    else:
        said = re.search(r"(?:os_error_code='?|OS error )(\d+)", str(problem))
        code = int(said[1]) if said else errno.ENOSPC if "RESOURCE_EXHAUSTED" in str(problem) else None
    return problem if code is None else OSError(code, os.strerror(code), str(where))


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Around a library's writes: `system_error` of what it raises."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as problem:
        raise system_error(problem, where) from None


@contextlib.contextmanager
def new_folder(target: Path, *, resume: str | None = None) -> Iterator[Path]:
    """A folder that appears under its name only when whole.

    Yields a temporary neighbour to write into; it is renamed at the end, or removed after a ValueError. The target may
    be named in any way, by `..` and links too.

    Args:
        target: the folder to make.
        resume: what is being written, in a few words. What an earlier writer of the same left behind is then given
            back to go on with, and kept for the next one after anything but a ValueError. None starts afresh.

    Raises:
        ValueError: the target exists already, or another process is writing it; nothing is overwritten.
        OSError: the disk is full, or the system refuses to write for another reason; in one line, with what is kept.
    """
    target = resolved(target)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.mkdir(exist_ok=True)
    with _locked(partial, target):
        note = partial / "written-from"
        try:
            if resume is None or not note.is_file() or note.read_text(encoding="utf-8") != resume:
                for leftover in partial.iterdir():
                    remove(leftover)
                write_whole(note, (resume or "").encode())
            yield partial
            note.unlink()
            sync(partial)
            partial.rename(target)
        except BaseException as problem:
            if resume is None or isinstance(problem, ValueError):
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(problem, OSError) and problem.errno is not None:
                raise _stopped(problem, target, partial if resume is not None else None) from problem
            raise


def _stopped(problem: OSError, target: Path, kept: Path | None) -> OSError:
    """A refusal of the system in words: what, where, and what to do."""
    reason = {
        errno.ENOSPC: "no space left on its disk",
        errno.EDQUOT: "no space left in the disk quota",
        errno.EROFS: "its file system is read-only",
    }.get(problem.errno, os.strerror(problem.errno).lower())
    advice = "nothing of it is left; mend that and give the command again"
    if kept is not None:
        advice = f"what is written is kept in {kept}; mend that, and the same command goes on from there"
    place = f" (at {problem.filename})" if problem.filename else ""
    stopped = OSError(f"{target}: {reason}{place}; {advice}")
    stopped.errno = problem.errno
    return stopped


@contextlib.contextmanager
def shared_folder(target: Path, *, resume: str | None = None) -> Iterator[Path]:
    """As `new_folder`, for all processes of a program that write into it: a failure in one is a failure in all.

    The main process makes, locks, renames and removes it, while none of the others is inside.

    Args:
        target, resume: as for `new_folder`; the file system has to be shared.

    Raises:
        ValueError, OSError, RuntimeError: in all processes, what one of them raised.
    """
    target = resolved(target)
    with contextlib.ExitStack() as folder:
        with distributed.together():
            if distributed.is_main():
                folder.enter_context(new_folder(target, resume=resume))
        with distributed.together():
            yield _partial(target)
        with distributed.together():
            folder.close()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """One writer of a folder at a time; the system drops the lock of a process that dies."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refuse_existing(target)
        yield
    except BlockingIOError:
        raise ValueError(f"{target}: another process is writing it; wait for it or choose another folder") from None
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, str(path)) from None
        finally:
            os.close(descriptor)
