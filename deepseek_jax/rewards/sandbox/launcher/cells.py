"""Watches running programs: moves what they read and write, holds their limits, and records how each ended."""

from __future__ import annotations

import os
import select
import struct
import time

from .kernel import SIGKILL, SIGXCPU
from .program import cpu_seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SETUP_SECONDS = 60.0
"""How long a program may take to start, on a machine however busy, before the launcher gives up."""

MOST_STARVED_SECONDS = 60.0
"""How long a program may wait for a processor, beside four times its own limit, before nothing can be said of it."""


class Cell:
    """A running program: its pipes, what it has written and how it ended."""

    def __init__(
        self, keeper: int, pipes: dict[str, int], stdin: bytes, limits: dict[str, Any], sandboxed: bool
    ) -> None:
        self.keeper = keeper
        self.sandboxed = sandboxed
        self.pipes = pipes
        self.stdin = memoryview(stdin)
        self.limits = limits
        self.report = bytearray()
        self.written = {"stdout": bytearray(), "stderr": bytearray()}
        self.start: float | None = None
        self.seconds = 0.0
        self.reason = ""
        self.starved = 0.0
        self.deadline = 0.0
        self.kind = ""
        self.code = 0

    @property
    def failure(self) -> str:
        before, _, text = bytes(self.report).partition(b"!")
        told = "" if b"x" in before else text.decode(errors="replace").partition("\n")[0]
        return self.reason or told

    def close(self, name: str) -> None:
        os.close(self.pipes.pop(name))


def watch(cells: list[Cell]) -> None:
    """Moves bytes and watches limits until the first cell has ended."""
    setup_deadline = time.monotonic() + SETUP_SECONDS
    while not cells[0].kind:
        now = time.monotonic()
        for cell in cells:
            if cell.start is None and now > setup_deadline:
                cell.reason = "the program did not start within a minute"
            if cell.start is not None and now >= cell.deadline and not cell.kind:
                _judge_time(cell, cells, now)
            if cell.failure:
                cells[0].reason = cell.failure
                end(cells[0], "unavailable")
                end(cell, "unavailable")
        alive = [cell for cell in cells if not cell.kind]
        deadlines = [cell.deadline if cell.start else setup_deadline for cell in alive]
        if deadlines:
            _move(cells, max(min(deadlines) - now, 0.0))


def _judge_time(cell: Cell, cells: list[Cell], now: float) -> None:
    """Ends a cell whose time is over. Time that it, or the cell that it talks to, has waited for a processor that
    others used is not its own, as long as it has not used its seconds of processor time. Of two cells the longer wait
    counts: they may have waited at the same time."""
    assert cell.start is not None
    limit = cell.limits["seconds"]
    cell.starved = max(map(_waited, cells))
    left = limit - (now - cell.start - cell.starved)
    if left <= 0 or sum(map(_used, _programs(cell))) >= limit:
        end(cell, "timeout")
    elif cell.starved > MOST_STARVED_SECONDS + 4 * limit:
        cell.reason = f"this machine is too busy: a program waited {cell.starved:.0f} s for a processor"
    cell.deadline = now + max(left, 0.001)


def _programs(cell: Cell) -> list[int]:
    """The cell's processes, the program itself first."""
    found = children(cell.keeper)
    for pid in found:
        found += children(pid)
    return found


def children(pid: int) -> list[int]:
    """Child processes of a process's first thread; none where it has ended or nobody counts them."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _waited(cell: Cell) -> float:
    """Seconds that the program's busiest thread was ready to run and did not."""
    waited = 0
    for pid in _programs(cell)[:1]:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                    waited = max(waited, int(file.read().split()[1]))
        except OSError:  # ended, or a kernel that does not count
            pass
    return waited / 1e9


def _used(pid: int) -> float:
    """Seconds of processor time of a process and of its children that have ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _move(cells: list[Cell], timeout: float) -> None:
    poll = select.poll()
    owners: dict[int, tuple[Cell, str]] = {}
    for cell in cells:
        for name, fd in cell.pipes.items():
            if not cell.kind:
                poll.register(fd, select.POLLOUT if name == "stdin" else select.POLLIN)
                owners[fd] = (cell, name)
    # Nothing to wait for on our own output, but poll reports when its reader, the trainer, is gone.
    poll.register(1, 0)
    for fd, event in poll.poll(int(timeout * 1000) + 1):
        if fd == 1:
            if event & (select.POLLERR | select.POLLHUP):
                for cell in cells:
                    end(cell, "stopped")
            continue
        cell, name = owners[fd]
        if name == "stdin":
            _feed(cell)
        elif not cell.kind:
            _read(cell, name)


def _feed(cell: Cell) -> None:
    try:
        cell.stdin = cell.stdin[os.write(cell.pipes["stdin"], cell.stdin[:65536]) :] if cell.stdin else cell.stdin
    except BrokenPipeError:
        cell.stdin = cell.stdin[:0]
    if not cell.stdin:
        cell.close("stdin")


def _read(cell: Cell, name: str) -> None:
    data = os.read(cell.pipes[name], 65536)
    if not data:
        cell.close(name)
        if name == "report":
            if cell.start is None and not cell.failure:
                cell.report[:] = b"!the program or its keeper died before it started"
            end(cell, "unavailable" if cell.failure else "killed")
    elif name == "report":
        cell.report += data
        _read_report(cell)
    elif _wrote_too_much(cell, name, data):
        end(cell, "output")


def _wrote_too_much(cell: Cell, name: str, data: bytes) -> bool:
    """Takes what a cell has written; whether that is more than its limit, beyond which it is cut off."""
    cell.written[name] += data
    limit = cell.limits["output_bytes"]
    if sum(map(len, cell.written.values())) <= limit:
        return False
    for kept in cell.written.values():
        del kept[limit:]
    return True


def _read_report(cell: Cell) -> None:
    if cell.start is None and cell.report.startswith(b"s"):
        cell.start = time.monotonic()
        cell.deadline = cell.start + cell.limits["seconds"]
    if cell.report.startswith(b"sx") and len(cell.report) >= 14:
        status, used = struct.unpack("<id", cell.report[2:14])
        cell.code = os.waitstatus_to_exitcode(status)
        end(cell, _kind(cell, used))


def _kind(cell: Cell, used: float) -> str:
    """How a program ended by itself. SIGKILL comes from the kernel: at the limit of processor time, else for memory."""
    if cell.code in (-SIGXCPU, -SIGKILL) and used >= cpu_seconds(cell.limits) - 1:
        return "timeout"
    if cell.code == -SIGKILL and cell.sandboxed:
        cell.reason = "the kernel killed a program, as it does when the machine has no memory left"
        return "unavailable"
    return "ok" if cell.code == 0 else "killed" if cell.code < 0 else "error"


def end(cell: Cell, kind: str) -> None:
    """Records how a cell ended, and kills what is left of it. The first cause stands."""
    if cell.kind:
        return
    cell.kind = kind
    if cell.start is not None:
        cell.seconds = time.monotonic() - cell.start - cell.starved
    # The keeper is our own child and not yet waited for, so the number is its own; it leads a group, which
    # without a sandbox holds the program too.
    if cell.start is None:
        os.kill(cell.keeper, SIGKILL)
    else:
        os.killpg(cell.keeper, SIGKILL)


def read_rest(cell: Cell) -> None:
    """What was written before the end and not yet read; all writers are dead."""
    for name in ("stdout", "stderr"):
        while name in cell.pipes and cell.kind != "output":
            data = os.read(cell.pipes[name], 65536)
            if not data:
                break
            if _wrote_too_much(cell, name, data):
                cell.kind = "output"
