"""Folders that a run writes into its own folder when it ends, and may write anew when it has gone on."""

import ctypes
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from deepseek_jax import distributed
from deepseek_jax.checkpoint import files

_MARK = ".written-by.json"
_AT_CWD, _EXCHANGE = -100, 2  # of Linux's renameat2


def check_owned(folder: Path, run: str | None) -> None:
    """Refuse a folder that is there and was not written by this run.

    Args:
        folder: that the run is going to write, or has written.
        run: the run's identity; None is a new run, which has written nothing.
    """
    if os.path.lexists(folder) and (run is None or _mark(folder).get("run") != run):
        raise ValueError(
            f"{folder}: exists already and was not written by this run, which could not write there; move it away, or "
            "choose another --output"
        )


def write_owned(folder: Path, *, run: str, steps: int, write: Callable[[Path], None]) -> None:
    """Write a folder, or replace the one of an earlier, shorter run: at every moment there is a whole one or none.

    All processes of a program call it alike. Nothing is done where the folder is already of these steps.

    Args:
        folder: to write; its neighbour `<folder>.new` is made and goes again.
        run: the run's identity.
        steps: that the run has done.
        write: makes the folder whose path it is given.

    Raises:
        ValueError: the folder is not of this run.
        OSError: it cannot be written; what was there before stays.
    """
    mark = {"run": run, "steps": steps}
    distributed.on_main(lambda: check_owned(folder, run))
    if distributed.on_main(lambda: _mark(folder) == mark):
        return
    draft = folder.with_name(f"{folder.name}.new")
    distributed.on_main(lambda: files.remove(draft))
    try:
        write(draft)
    except OSError:  # a half on a full disk is in the way of going on
        if distributed.is_main():
            files.remove(draft)
        raise
    distributed.on_main(lambda: _publish(draft, folder, mark))


def _publish(draft: Path, folder: Path, mark: dict) -> None:
    files.write_whole(draft / _MARK, json.dumps(mark).encode())
    if folder.exists():
        _exchange(draft, folder)
        files.remove(draft)
    else:
        draft.rename(folder)


def _mark(folder: Path) -> dict:
    path = folder / _MARK
    return files.read_json(path) if path.is_file() else {}


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, where the system can; else there is no folder for an instant."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE)
        if not failed:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(other))
    aside = other.with_name(f"{other.name}.old")
    files.remove(aside)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
