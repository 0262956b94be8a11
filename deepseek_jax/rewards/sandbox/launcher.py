"""Starts programs in namespaces of their own and watches them to their end.

Run by path in a clean interpreter (`python -I -S launcher.py`), never imported by the programs that it runs and
importing nothing but the standard library. It reads one request from standard input and writes one answer to
standard output; the package's `__init__` is its only caller and describes both.

For each program (a cell) there are two processes: a keeper, which enters the new namespaces and builds the private
root, and the program, which is process 1 of its process namespace, so that whatever it leaves behind dies with it.
Killing a keeper kills its program (PR_SET_PDEATHSIG), and so does the launcher's death.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys
import time

# Not imported: typing, and signal for its numbers. They would be a third of the launcher's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOBODY = 65534
SETUP_SECONDS = 60.0
"""How long a program may take to start, on a machine however busy, before the launcher gives up."""

MOST_STARVED_SECONDS = 60.0
"""How long a program may wait for a processor, beside four times its own limit, before nothing can be said of it."""

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _AT_RECURSIVE = 2, 0x8000
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
_LAST_CAPABILITY = 63
_SIGKILL, _SIGXCPU = 9, 24
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


class _Cell:
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


def main() -> None:
    request = marshal.loads(sys.stdin.buffer.read())
    if request["sandboxed"] or sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")
    cells = _start_all(request)
    _watch(cells, request)
    for cell in cells:
        _end(cell, "stopped")
    _reap()
    for cell in cells:
        _read_rest(cell)
    _answer(cells)


def _start_all(request: dict[str, Any]) -> list[_Cell]:
    """Starts the cells; two that are linked read each other's standard output."""
    if not request["linked"]:
        return [_start(request, cell, None, None) for cell in request["cells"]]
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    ends = [(read_a, write_a), (read_b, write_b)]
    cells = [_start(request, cell, *pair) for cell, pair in zip(request["cells"], ends, strict=True)]
    for fd in (read_a, write_a, read_b, write_b):
        os.close(fd)
    return cells


def _start(request: dict[str, Any], cell: dict[str, Any], stdin: int | None, stdout: int | None) -> _Cell:
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
        _keep(request, cell, theirs, ask, told, launcher)
    for name, fd in theirs.items():
        if name in ours:
            os.close(fd)
    os.close(ask)
    os.close(told)
    if os.read(asked, 1):
        _map_ids(keeper)
        os.write(tell, b"m")
    os.close(asked)
    os.close(tell)
    for fd in ours.values():
        os.set_blocking(fd, False)
    return _Cell(keeper, ours, cell["stdin"], cell["limits"], request["sandboxed"])


def _can_be_nobody() -> bool:
    """Whether the program can run as another user than ours: root can, where its namespace has that user."""
    return os.geteuid() == 0 and all(_maps_nobody(f"/proc/self/{kind}_map") for kind in ("uid", "gid"))


def _maps_nobody(path: str) -> bool:
    with open(path) as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def _map_ids(keeper: int) -> None:
    switch = _can_be_nobody()
    if not switch:
        _write(f"/proc/{keeper}/setgroups", "deny")
    _write(f"/proc/{keeper}/gid_map", f"{NOBODY} {NOBODY if switch else os.getegid()} 1")
    _write(f"/proc/{keeper}/uid_map", f"{NOBODY} {NOBODY if switch else os.geteuid()} 1")


def _keep(
    request: dict[str, Any], cell: dict[str, Any], pipes: dict[str, int], ask: int, told: int, launcher: int
) -> NoReturn:
    """The keeper: enters the namespaces, builds the root, forks the program, waits for it."""
    report = pipes["report"]
    try:
        os.setsid()
        if request["sandboxed"]:
            switch = _can_be_nobody()
            _check(_libc.unshare(_NEW_NAMESPACES), "unshare")
            os.write(ask, b"u")
            if os.read(told, 1) != b"m":
                os._exit(1)
            sources = _open_sources(request, switch)
        os.close(ask)
        os.close(told)
        _die_with_parent()
        if os.getppid() != launcher:
            os._exit(1)
        # The program proves, by writing to it, that the keeper lived when it asked to die with it.
        tie, knot = os.pipe()
        wait, go = os.pipe()
        program = os.fork()
        if program == 0:
            os.close(tie)
            os.close(go)
            if os.read(wait, 1) != b"g":
                os._exit(1)
            _become_program(request, cell, pipes, knot)
        if request["sandboxed"]:
            _build_root(request, cell, sources, program)
        os.write(go, b"g")
        # Every copy of a pipe's end, or its reader would wait for us.
        low, high = sorted((tie, report))
        for first, end in ((3, low), (low + 1, high), (high + 1, 65536)):
            os.closerange(first, end)
        _, status, used = os.wait4(program, 0)
        os.write(report, b"x" + struct.pack("<id", status, used.ru_utime + used.ru_stime))
    except BaseException as error:  # a forked process must not run on in its parent's code
        os.write(report, _failure(error))
    os._exit(0)


def _open_sources(request: dict[str, Any], switch: bool) -> list[tuple[str, str, int]]:
    """What the new root shows, as (place, kind, descriptor); then becomes nobody.

    Opened first: the new root may cover them, and only our own user, not nobody, may be able to reach them.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    wanted = [(path, path, kind) for path, kind in request["binds"]]
    wanted += [(path, place, "folder") for path, place in request["packages"]]
    sources = [(place, kind, os.open(path, os.O_PATH)) for path, place, kind in wanted]
    if switch:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    return sources


def _build_root(
    request: dict[str, Any], cell: dict[str, Any], sources: list[tuple[str, str, int]], program: int
) -> None:
    """A root of a few read-only mounts and one small writable folder, /tmp; leaves the old root behind, and takes the
    program, which waits, along."""
    base = request["base"]
    _mount("root", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=256k,nr_inodes=1024,mode=755")
    for path, kind, fd in sources:
        _make_target(base + path, kind)
        _mount(f"/proc/self/fd/{fd}", base + path, None, _MS_BIND | _MS_REC)
        os.close(fd)
        attributes = _ATTR_RDONLY | _ATTR_NOSUID | (_ATTR_NOEXEC if kind == "device" else _ATTR_NODEV)
        _restrict(base + path, attributes, _AT_RECURSIVE)
    _show_descriptors(base, program)
    for path, target in request["links"]:
        _make_target(os.path.dirname(base + path), "folder")
        os.symlink(target, base + path)
    for path in request["hidden"]:
        _mount("hidden", base + path, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k,nr_inodes=2,mode=755")
    size = cell["limits"]["file_bytes"] + sum(len(content) + 4096 for content in cell["files"].values())
    _make_target(base + "/tmp", "folder")
    _mount("tmp", base + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=4096,mode=700")
    _write_files(base + "/tmp", cell["files"])
    os.chdir(base)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")
    _restrict("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)
    _check(_libc.sethostname(b"sandbox", 7), "sethostname")


def _show_descriptors(base: str, program: int) -> None:
    """/dev/stdin and its like: the program's own descriptors, and of /proc nothing else."""
    source = f"/proc/{program}/fd"
    if not os.path.isdir(source):
        return
    _make_target(base + "/dev/fd", "folder")
    _mount(source, base + "/dev/fd", None, _MS_BIND)
    _restrict(base + "/dev/fd", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC, 0)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/dev/fd/{number}", f"{base}/dev/{name}")


def _become_program(request: dict[str, Any], cell: dict[str, Any], pipes: dict[str, int], knot: int) -> NoReturn:
    """Gives everything up, then runs the interpreter."""
    report = pipes["report"]
    try:
        if request["sandboxed"]:
            # Out of the keeper's process group: a group reaches across process namespaces.
            os.setsid()
            os.chdir("/tmp")
        else:
            os.chdir(cell["folder"])
            _write_files(".", cell["files"])
        for target, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(pipes[name], target)
        _set_limits(cell["limits"], request["sandboxed"])
        if request["sandboxed"]:
            _drop_capabilities()
        _die_with_parent()
        os.write(knot, b"k")
        os.close(knot)
        os.closerange(3, report)
        os.closerange(report + 1, 65536)
        os.set_inheritable(report, False)
        if sys.platform == "linux":
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
        if cell["filter"]:
            code = cell["filter"]
            _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Filter(len(code) // 8, code)), 0, 0), "seccomp")
        os.write(report, b"s")
        python = request["python"]
        variables = request["variables"]
        if not request["sandboxed"] and "PYTHONPATH" in variables:
            folders = dict.fromkeys(os.path.dirname(path) for path, _ in request["packages"])
            variables = {**variables, "PYTHONPATH": os.pathsep.join(folders)}
        os.execve(python, [python, "-s", "-B", "-X", "utf8", "main.py"], variables)
    except BaseException as error:  # a forked process must not run on in its parent's code
        os.write(report, _failure(error))
    os._exit(1)


def _set_limits(limits: dict[str, Any], sandboxed: bool) -> None:
    # A second line behind the wall clock, which a program of many threads must meet first.
    wanted = [
        (resource.RLIMIT_CPU, _cpu_seconds(limits)),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        # Not 0: a pipe to a crash collector ignores every limit but 1, at which the kernel writes no core at all.
        (resource.RLIMIT_CORE, 1),
        (resource.RLIMIT_MEMLOCK, 0),
    ]
    if sandboxed:
        # The keeper counts as one. Without a namespace all of the user's processes would count.
        wanted.append((resource.RLIMIT_NPROC, 1 + limits["processes"] + limits["threads"]))
    for kind, value in wanted:
        resource.setrlimit(kind, (value, value))


def _cpu_seconds(limits: dict[str, Any]) -> int:
    return (int(limits["seconds"]) + 2) * (os.cpu_count() or 1)


def _drop_capabilities() -> None:
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl(PR_CAP_AMBIENT)")
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def _watch(cells: list[_Cell], request: dict[str, Any]) -> None:
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
                _end(cells[0], "unavailable")
                _end(cell, "unavailable")
        alive = [cell for cell in cells if not cell.kind]
        deadlines = [cell.deadline if cell.start else setup_deadline for cell in alive]
        if deadlines:
            _move(cells, max(min(deadlines) - now, 0.0))


def _judge_time(cell: _Cell, cells: list[_Cell], now: float) -> None:
    """Ends a cell whose time is over. Time that it, or the cell that it talks to, has waited for a processor that
    others used is not its own, as long as it has not used its seconds of processor time. Of two cells the longer wait
    counts: they may have waited at the same time."""
    assert cell.start is not None
    limit = cell.limits["seconds"]
    cell.starved = max(map(_waited, cells))
    left = limit - (now - cell.start - cell.starved)
    if left <= 0 or sum(map(_used, _programs(cell))) >= limit:
        _end(cell, "timeout")
    elif cell.starved > MOST_STARVED_SECONDS + 4 * limit:
        cell.reason = f"this machine is too busy: a program waited {cell.starved:.0f} s for a processor"
    cell.deadline = now + max(left, 0.001)


def _programs(cell: _Cell) -> list[int]:
    """The cell's processes, the program itself first."""
    found = _children(cell.keeper)
    for pid in found:
        found += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _waited(cell: _Cell) -> float:
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


def _move(cells: list[_Cell], timeout: float) -> None:
    poll = select.poll()
    owners: dict[int, tuple[_Cell, str]] = {}
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
                    _end(cell, "stopped")
            continue
        cell, name = owners[fd]
        if name == "stdin":
            _feed(cell)
        elif not cell.kind:
            _read(cell, name)


def _feed(cell: _Cell) -> None:
    try:
        cell.stdin = cell.stdin[os.write(cell.pipes["stdin"], cell.stdin[:65536]) :] if cell.stdin else cell.stdin
    except BrokenPipeError:
        cell.stdin = cell.stdin[:0]
    if not cell.stdin:
        cell.close("stdin")


def _read(cell: _Cell, name: str) -> None:
    data = os.read(cell.pipes[name], 65536)
    if not data:
        cell.close(name)
        if name == "report":
            if cell.start is None and not cell.failure:
                cell.report[:] = b"!the program or its keeper died before it started"
            _end(cell, "unavailable" if cell.failure else "killed")
    elif name == "report":
        cell.report += data
        _read_report(cell)
    else:
        cell.written[name] += data
        _check_output(cell)


def _check_output(cell: _Cell) -> None:
    limit = cell.limits["output_bytes"]
    if sum(map(len, cell.written.values())) > limit:
        for data in cell.written.values():
            del data[limit:]
        _end(cell, "output")


def _read_report(cell: _Cell) -> None:
    if cell.start is None and cell.report.startswith(b"s"):
        cell.start = time.monotonic()
        cell.deadline = cell.start + cell.limits["seconds"]
    if cell.report.startswith(b"sx") and len(cell.report) >= 14:
        status, used = struct.unpack("<id", cell.report[2:14])
        cell.code = os.waitstatus_to_exitcode(status)
        _end(cell, _kind(cell, used))


def _kind(cell: _Cell, used: float) -> str:
    """How a program ended by itself. SIGKILL comes from the kernel: at the limit of processor time, else for memory."""
    if cell.code in (-_SIGXCPU, -_SIGKILL) and used >= _cpu_seconds(cell.limits) - 1:
        return "timeout"
    if cell.code == -_SIGKILL and cell.sandboxed:
        cell.reason = "the kernel killed a program, as it does when the machine has no memory left"
        return "unavailable"
    return "ok" if cell.code == 0 else "killed" if cell.code < 0 else "error"


def _end(cell: _Cell, kind: str) -> None:
    """Records how a cell ended, and kills what is left of it. The first cause stands."""
    if cell.kind:
        return
    cell.kind = kind
    if cell.start is not None:
        cell.seconds = time.monotonic() - cell.start - cell.starved
    # The keeper is our own child and not yet waited for, so the number is its own; it leads a group, which
    # without a sandbox holds the program too.
    if cell.start is None:
        os.kill(cell.keeper, _SIGKILL)
    else:
        os.killpg(cell.keeper, _SIGKILL)


def _reap() -> None:
    """Waits until nothing of ours is left: a namespace's first process is gone only after all its others."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            _kill_children()
            time.sleep(0.0005)


def _kill_children() -> None:
    """Kills what was orphaned to us; without a process namespace a daemon ends here."""
    path = f"/proc/self/task/{os.getpid()}/children"
    if not os.path.exists(path):
        return
    with open(path) as file:
        for child in file.read().split():
            os.kill(int(child), _SIGKILL)


def _read_rest(cell: _Cell) -> None:
    """What was written before the end and not yet read; all writers are dead."""
    for name in ("stdout", "stderr"):
        while name in cell.pipes and cell.kind != "output":
            data = os.read(cell.pipes[name], 65536)
            if not data:
                break
            cell.written[name] += data
            limit = cell.limits["output_bytes"]
            if sum(map(len, cell.written.values())) > limit:
                cell.kind = "output"
                for kept in cell.written.values():
                    del kept[limit:]


def _answer(cells: list[_Cell]) -> None:
    parts = []
    for cell in cells:
        out, err = cell.written["stdout"], cell.written["stderr"]
        if cell.kind == "unavailable":
            err = bytearray(cell.failure.encode())
        parts += [f"{cell.kind} {cell.code} {cell.seconds:.6f} {len(out)} {len(err)}\n".encode(), out, err]
    sys.stdout.buffer.write(b"".join(parts))
    sys.stdout.buffer.flush()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def _make_target(path: str, kind: str) -> None:
    folder = path if kind == "folder" else os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    if kind != "folder":
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _write_files(folder: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with open(f"{folder}/{name}", "wb") as file:
            file.write(content)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _failure(error: BaseException) -> bytes:
    return b"!" + str(error).encode(errors="replace")[:500] + b"\n"


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    what = f"mount of {kind or source or 'private'} on {target}"
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), what)


def _restrict(path: str, attributes: int, flags: int) -> None:
    """mount_setattr: unlike a remount it reaches every mount below, and keeps the flags that it does not name."""
    change = struct.pack("=QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, -100, os.fsencode(path), flags, change, ctypes.c_size_t(len(change)))
    _check(result, f"mount_setattr of {path} (Linux 5.12 or newer)")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


if __name__ == "__main__":
    main()
