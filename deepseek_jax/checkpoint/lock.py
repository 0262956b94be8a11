"""A folder that one program at a time writes into: a lock that ends with its holder, however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_FILE = ".lock"
# File systems without locks, such as some that are mounted over a network, say one of these.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: Path, *, advice: str) -> Iterator[None]:
    """Hold a folder; it is made when missing, as are those above it, and they go again if nothing is in them.

    The system drops the lock when this process dies. Processes that it forked do not hold it on.

    Args:
        folder: under any of its names.
        advice: what to do where another process holds it, the end of its message.

    Raises:
        ValueError: another process holds it; the message has its number and host. Or its name is a file's.
        OSError: the folder cannot be made or written into, or its file system has no locks.
    """
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    for file in (above for above in (folder, *folder.parents) if above.is_file()):
        raise ValueError(f"{folder}: {file} is a file; choose a folder, or a name for a new one")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    descriptor = _taken(path, folder, advice)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody waits for a file that is gone
        _held.discard(descriptor)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something was written
            for empty in made:
                empty.rmdir()


def _taken(path: Path, folder: Path, advice: str) -> int:
    """The lock file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(f"{folder}: in use by another process, {holder}; {advice}") from None
        except OSError as problem:
            os.close(descriptor)
            if problem.errno in _UNSUPPORTED:
                raise OSError(f"{folder}: its file system has no locks ({problem.strerror}); use another") from None
            raise
        os.close(descriptor)  # its holder removed it between our opening and locking it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _let_go() -> None:
    """In a forked process: the copies of the descriptors would hold the locks beyond their holder's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
