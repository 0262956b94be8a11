"""The keeper: enters new namespaces, builds the program's private root, forks the program and waits for its end."""

from __future__ import annotations

import os
import struct

from . import kernel
from .kernel import ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, MS_NODEV, MS_NOSUID, mount, restrict
from .program import become_program, failure, write_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOBODY = 65534


def keep(
    request: dict[str, Any], cell: dict[str, Any], pipes: dict[str, int], ask: int, told: int, launcher: int
) -> NoReturn:
    """The keeper's life; `ask` and `told` are its ends of the pipes by which the launcher gives it its one user."""
    report = pipes["report"]
    try:
        os.setsid()
        if request["sandboxed"]:
            switch = _can_be_nobody()
            kernel.unshare()
            os.write(ask, b"u")
            if os.read(told, 1) != b"m":
                os._exit(1)
            sources = _open_sources(request, switch)
        os.close(ask)
        os.close(told)
        kernel.die_with_parent()
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
            become_program(request, cell, pipes, knot)
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
        os.write(report, failure(error))
    os._exit(0)


def _can_be_nobody() -> bool:
    """Whether the program can run as another user than ours: root can, where its namespace has that user."""
    return os.geteuid() == 0 and all(_maps_nobody(f"/proc/self/{kind}_map") for kind in ("uid", "gid"))


def _maps_nobody(path: str) -> bool:
    with open(path) as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def map_ids(keeper: int) -> None:
    """Gives a keeper's new namespace, from outside, the one user that it knows."""
    switch = _can_be_nobody()
    if not switch:
        _write(f"/proc/{keeper}/setgroups", "deny")
    _write(f"/proc/{keeper}/gid_map", f"{NOBODY} {NOBODY if switch else os.getegid()} 1")
    _write(f"/proc/{keeper}/uid_map", f"{NOBODY} {NOBODY if switch else os.geteuid()} 1")


def _write(path: str, text: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(text.encode())


def _open_sources(request: dict[str, Any], switch: bool) -> list[tuple[str, str, int]]:
    """What the new root shows, as (place, kind, descriptor); then becomes nobody.

    Opened first: the new root may cover them, and only our own user, not nobody, may be able to reach them.
    """
    mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    wanted = [(path, path, kind) for path, kind in request["binds"]]
    wanted += [(path, place, "folder") for path, place in (*request["packages"], *request["folders"])]
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
    mount("root", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=256k,nr_inodes=1024,mode=755")
    for path, kind, fd in sources:
        _make_target(base + path, kind)
        mount(f"/proc/self/fd/{fd}", base + path, None, kernel.MS_BIND | kernel.MS_REC)
        os.close(fd)
        attributes = ATTR_RDONLY | ATTR_NOSUID | (ATTR_NOEXEC if kind == "device" else ATTR_NODEV)
        restrict(base + path, attributes, below=True)
    _show_descriptors(base, program)
    for path, target in request["links"]:
        _make_target(os.path.dirname(base + path), "folder")
        os.symlink(target, base + path)
    for path in request["hidden"]:
        flags = kernel.MS_RDONLY | MS_NOSUID | MS_NODEV
        mount("hidden", base + path, "tmpfs", flags, "size=4k,nr_inodes=2,mode=755")
    size = cell["limits"]["file_bytes"] + sum(len(content) + 4096 for content in cell["files"].values())
    _make_target(base + "/tmp", "folder")
    mount("tmp", base + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=700")
    write_files(base + "/tmp", cell["files"])
    os.chdir(base)
    kernel.pivot_root()
    os.chdir("/")
    restrict("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    kernel.sethostname(b"sandbox")


def _show_descriptors(base: str, program: int) -> None:
    """/dev/stdin and its like: the program's own descriptors, and of /proc nothing else."""
    source = f"/proc/{program}/fd"
    if not os.path.isdir(source):
        return
    _make_target(base + "/dev/fd", "folder")
    mount(source, base + "/dev/fd", None, kernel.MS_BIND)
    restrict(base + "/dev/fd", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/dev/fd/{number}", f"{base}/dev/{name}")


def _make_target(path: str, kind: str) -> None:
    folder = path if kind == "folder" else os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    if kind != "folder":
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
