"""Starts programs in namespaces of their own and watches them to their end.

Run in a clean interpreter (`python -I -S`), never imported by the programs that it runs and importing nothing but the
standard library. It reads one request from standard input and writes one answer to standard output; the sandbox's
`__init__` is its only caller and describes both.

For each program (a cell) there are two processes: a keeper (`keeper`), which enters the new namespaces and builds the
private root, and the program (`program`), which is process 1 of its process namespace, so that whatever it leaves
behind dies with it. Killing a keeper kills its program (PR_SET_PDEATHSIG), and so does the launcher's death.
"""

from __future__ import annotations

import marshal
import os
import sys
import time

from .cells import Cell, children, end, read_rest, watch
from .keeper import keep, map_ids
from .kernel import SIGKILL, adopt_orphans

# Not imported: typing, and signal for its numbers. They would be a third of the launcher's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Answers the one request."""
    request = marshal.loads(sys.stdin.buffer.read())
    adopt_orphans()
    cells = _start_all(request)
    watch(cells)
    for cell in cells:
        end(cell, "stopped")
    _reap()
    for cell in cells:
        read_rest(cell)
    _answer(cells)


def _start_all(request: dict[str, Any]) -> list[Cell]:
    """Starts the cells; two that are linked read each other's standard output."""
    if not request["linked"]:
        return [_start(request, cell, None, None) for cell in request["cells"]]
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    ends = [(read_a, write_a), (read_b, write_b)]
    cells = [_start(request, cell, *pair) for cell, pair in zip(request["cells"], ends, strict=True)]
    for fd in (read_a, write_a, read_b, write_b):
        os.close(fd)
    return cells


def _start(request: dict[str, Any], cell: dict[str, Any], stdin: int | None, stdout: int | None) -> Cell:
    """Forks the keeper and, from outside, gives its namespace the one user that it knows."""
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for name, given in (("stdin", stdin), ("stdout", stdout), ("stderr", None), ("report", None)):
        if given is not None:
            theirs[name] = given
            continue
        read, write = os.pipe()
        # The program, another user than we, may open it anew as /dev/stdin; nobody else finds it.
        os.fchmod(read, 0o666)
        ours[name], theirs[name] = (write, read) if name == "stdin" else (read, write)
    asked, ask = os.pipe()
    told, tell = os.pipe()
    launcher = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(asked)
        os.close(tell)
        keep(request, cell, theirs, ask, told, launcher)
    for name, fd in theirs.items():
        if name in ours:
            os.close(fd)
    os.close(ask)
    os.close(told)
    if os.read(asked, 1):
        map_ids(keeper)
        os.write(tell, b"m")
    os.close(asked)
    os.close(tell)
    for fd in ours.values():
        os.set_blocking(fd, False)
    return Cell(keeper, ours, cell["stdin"], cell["limits"], request["sandboxed"])


def _reap() -> None:
    """Waits until nothing of ours is left: a namespace's first process is gone only after all its others."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            # What was orphaned to us: without a process namespace a daemon ends here.
            for child in children(os.getpid()):
                os.kill(child, SIGKILL)
            time.sleep(0.0005)


def _answer(cells: list[Cell]) -> None:
    parts = []
    for cell in cells:
        out, err = cell.written["stdout"], cell.written["stderr"]
        if cell.kind == "unavailable":
            err = bytearray(cell.failure.encode())
        parts += [f"{cell.kind} {cell.code} {cell.seconds:.6f} {len(out)} {len(err)}\n".encode(), out, err]
    sys.stdout.buffer.write(b"".join(parts))
    sys.stdout.buffer.flush()
