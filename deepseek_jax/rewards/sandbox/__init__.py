"""Runs a model's programs where they can do no harm: Linux namespaces, limits and a system call filter.

What a program finds inside: a root of read-only mounts (the interpreter, its standard library, the system's shared
libraries, four device nodes, the packages that it was given, its own open files under /dev/fd) and one writable folder
of limited size, /tmp, where it starts; no /proc, /sys, /etc or /home, no other installed package, no network interface
that is up, an environment of a few variables. It is process 1 and user nobody of its own namespaces, has no capability
and can gain none, and only file descriptors 0, 1 and 2.

What is bounded: wall time, counted from the program's first instruction and enforced from outside; processor time,
address space (of each process), processes and threads, bytes written to files, to standard output and to standard
error. Whatever it leaves running dies with it.

Programs cannot talk to each other either, though they see the same libraries: `seccomp` lists what it closes. What is
left are side channels (timing, contention, what timing tells of the page cache), bugs of the kernel, the bits that a
program can read from the machine (clock, processor type, kernel version, free space of the libraries' file system),
and reading the system's shared libraries and the interpreter.
"""

import functools
import glob
import importlib.util
import marshal
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek_jax.rewards.sandbox.seccomp import filter_program

Kind = Literal["ok", "error", "timeout", "memory", "output", "killed"]

# The folder of the package `launcher`, after the standard library's own.
_LAUNCH = "import sys; sys.path.append(sys.argv[1]); import launcher; launcher.main()"
_GRACE_SECONDS = 150.0  # above the launcher's own patience, `cells.SETUP_SECONDS` and `MOST_STARVED_SECONDS`
_MIN_MEMORY_BYTES = 64 << 20
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class SandboxUnavailable(RuntimeError):
    """Programs cannot be isolated here, or a sandbox could not be built; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Args:
      seconds: wall time from its first instruction, start of the interpreter included. Time in which it was ready and
        had no processor, because the machine is busy, does not count before it has used as much processor time. Each
        of its processes is limited to about as much processor time on every processor.
      memory_bytes: address space of each of its processes, 64 MiB at least; each thread's stack takes 8 MiB of it.
      processes: how many at once. At 1 it can start no other.
      threads: how many at once, beside each process's first; all processes share them.
      file_bytes: of all that it writes to its folder.
      output_bytes: of standard output and standard error together.

    Raises:
      ValueError: a number is not positive and finite, or memory_bytes is too small to start an interpreter.
    """

    seconds: float = 6.0
    memory_bytes: int = 1 << 30
    processes: int = 1
    threads: int = 64
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, int) or (name == "seconds" and isinstance(value, float))):
                raise ValueError(f"Limits: {name}: got {value!r}, wanted a whole number; correct it")
            if not (math.isfinite(value) and 0 < value < 1 << 53):
                raise ValueError(f"Limits: {name}: got {value!r}, wanted a positive finite number; correct it")
        if self.memory_bytes < _MIN_MEMORY_BYTES:
            raise ValueError(
                f"Limits: memory_bytes: got {self.memory_bytes}, wanted {_MIN_MEMORY_BYTES} or more, or the"
                " interpreter does not start; raise it"
            )


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program to run.

    Args:
      source: Python, run as the main script /tmp/main.py. Anything at all: what does not compile ends as "error".
      stdin: what it reads from standard input, which then ends.
      files: further contents of its folder, by plain name.
      limits: what it may use; `files` and `source` do not count as written.
      packages: installed packages that it may import, as far as they are installed here.
      folders: further folders of this machine that it sees, read-only, under their own names: compilers, say. Whatever
        nobody may read there it cannot read either.

    Raises:
      ValueError: a file's name is not a plain name, or is the script's own.
    """

    source: str | bytes
    stdin: str | bytes = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    limits: Limits = Limits()
    packages: Sequence[str] = ()
    folders: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.files:
            if name in ("", ".", "..", "main.py") or "/" in name or "\0" in name:
                raise ValueError(f"Program: files: got {name!r}, wanted a plain name other than main.py; rename it")


@dataclass(frozen=True, kw_only=True)
class CompletedProgram:
    """How a program ended.

    Args:
      kind: "ok" (status 0), "error" (another status), "memory" (an error, its last words a MemoryError), "timeout",
        "output" (it wrote more than allowed), "killed" (by a signal, a crash among them).
      code: exit status, minus the signal's number where there was one; 0 where it was stopped.
      seconds: wall time from its first instruction to its end; building the sandbox does not count, nor,
        where that decided, waiting for a processor.
      stdout: bytes that it wrote, cut at the limit.
      stderr: likewise.
    """

    kind: Kind
    code: int
    seconds: float
    stdout: bytes
    stderr: bytes


def run_program(program: Program, *, allow_unsandboxed: bool = False) -> CompletedProgram:
    """Runs one program in a sandbox of its own and waits for its end; any thread may call it.

    Args:
      program: what to run.
      allow_unsandboxed: where no sandbox can be had, run the program as an ordinary process of this user, in a
        temporary folder, with the limits on time, memory, file size and output and, on Linux, the system call filter.
        It can then read and write whatever this user can. Where a sandbox can be had, it is used.

    Returns:
      How it ended.

    Raises:
      SandboxUnavailable: no sandbox can be had and `allow_unsandboxed` is False, or one could not be built.
    """
    return _launch([program], sandboxed=_choose_sandboxed(allow_unsandboxed))[0]


def run_linked(first: Program, second: Program, *, allow_unsandboxed: bool = False) -> CompletedProgram:
    """Runs two programs at once, in two sandboxes; each reads what the other writes to standard output.

    Args:
      first: the one whose end is waited for; `stdin` is not used.
      second: the other; it is stopped when the first has ended.
      allow_unsandboxed: as in `run_program`.

    Returns:
      How the first ended; its `stdout` is empty, having gone to the second.

    Raises:
      SandboxUnavailable: as in `run_program`.
    """
    return _launch([first, second], sandboxed=_choose_sandboxed(allow_unsandboxed))[0]


@functools.cache
def available() -> str | None:
    """Tries the sandbox on a trivial program, once a process.

    Returns:
      None where it works, else one line that says what is missing.
    """
    if sys.platform != "linux":
        return f"sandboxed programs need Linux namespaces, and this is {sys.platform}; run the rewards on Linux"
    if filter_program(os.uname().machine, fork=False) is None:
        warnings.warn(
            f"sandbox: no system call filter for {os.uname().machine}; namespaces and limits alone hold programs",
            stacklevel=2,
        )
    probe = Program(source="print(6 * 7)", limits=Limits(seconds=30.0))
    try:
        ran = _launch([probe], sandboxed=True)[0]
    except SandboxUnavailable as error:
        return str(error)
    if ran.stdout != b"42\n":
        return f"the interpreter does not run inside: {ran.kind}, {ran.stderr[-200:].decode(errors='replace')!r}"
    return None


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _choose_sandboxed(allow_unsandboxed: bool) -> bool:
    reason = available()
    if reason is not None and not allow_unsandboxed:
        raise SandboxUnavailable(f"{reason}; or pass allow_unsandboxed=True to run programs as this user, unprotected")
    return reason is None


def _launch(programs: Sequence[Program], *, sandboxed: bool) -> list[CompletedProgram]:
    if sandboxed:
        return _ask(programs, [""] * len(programs), sandboxed)
    with tempfile.TemporaryDirectory(prefix="unsandboxed-") as parent:
        folders = [os.path.join(parent, str(index)) for index in range(len(programs))]
        for folder in folders:
            os.mkdir(folder)
        return _ask(programs, folders, sandboxed)


def _ask(programs: Sequence[Program], folders: Sequence[str], sandboxed: bool) -> list[CompletedProgram]:
    """Runs the launcher: a clean interpreter, since this process has threads and must not be forked.

    marshal carries the request because it costs the launcher no import; both ends are ours. The answer holds what
    hostile programs wrote, and is plain lines and counted bytes.
    """
    packages = tuple(dict.fromkeys(name for program in programs for name in program.packages))
    shown = dict.fromkeys(os.path.abspath(path) for program in programs for path in program.folders)
    request = {
        "sandboxed": sandboxed,
        "linked": len(programs) > 1,
        "base": os.path.realpath(tempfile.gettempdir()),
        "python": _interpreter(),
        "variables": _variables(bool(packages)),
        **_visible(),
        "packages": [place for name in packages for place in _places(name)],
        "folders": [(os.path.realpath(path), path) for path in shown if os.path.isdir(path)],
        "cells": [_cell(*pair) for pair in zip(programs, folders, strict=True)],
    }
    command = [_interpreter(), "-I", "-S", "-c", _LAUNCH, os.path.dirname(os.path.abspath(__file__))]
    pipe = subprocess.PIPE
    try:
        started = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", start_new_session=True
        )
    except OSError as error:
        raise SandboxUnavailable(f"no sandbox: {command[0]} does not start ({error}); mend the installation") from None
    with started as launcher:
        try:
            limit = 5 * max(program.limits.seconds for program in programs) + _GRACE_SECONDS
            answer, complaint = launcher.communicate(marshal.dumps(request), timeout=limit)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise SandboxUnavailable(f"no sandbox: its launcher did not answer within {limit:.0f} s") from None
        except BaseException:
            launcher.kill()
            raise
    if launcher.returncode != 0:
        lines = complaint.decode(errors="replace").strip().splitlines() or [f"exit status {launcher.returncode}"]
        raise SandboxUnavailable(_explain(lines[-1]))
    return _parse(answer, len(programs))


def _cell(program: Program, folder: str) -> dict[str, Any]:
    limits = program.limits
    return {
        "files": {name: _bytes(content) for name, content in {**program.files, "main.py": program.source}.items()},
        "stdin": _bytes(program.stdin),
        "limits": vars(limits),
        "filter": _filter(limits.processes > 1),
        "folder": folder,
    }


def _parse(answer: bytes, count: int) -> list[CompletedProgram]:
    results = []
    for _ in range(count):
        line, _, answer = answer.partition(b"\n")
        kind, code, seconds, out_length, err_length = line.decode().split()
        cut = int(out_length)
        end = cut + int(err_length)
        out, err, answer = answer[:cut], answer[cut:end], answer[end:]
        if kind == "unavailable":
            raise SandboxUnavailable(_explain(err.decode(errors="replace")))
        if kind == "error" and err.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
            kind = "memory"
        results.append(CompletedProgram(kind=kind, code=int(code), seconds=float(seconds), stdout=out, stderr=err))
    return results


def _explain(failure: str) -> str:
    return (
        f"no sandbox: {failure}; it needs Linux 5.12 or newer with unprivileged user namespaces (in a container also a"
        " seccomp profile that allows unshare and mount; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)"
    )


def _bytes(text: str | bytes) -> bytes:
    # A model's text may hold lone surrogates; inside they make an honest error of the program's.
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")


@functools.cache
def _filter(fork: bool) -> bytes | None:
    return filter_program(os.uname().machine, fork=fork) if sys.platform == "linux" else None


@functools.cache
def _interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it: inside there are no installed packages."""
    return os.path.realpath(sys._base_executable)


_PACKAGES = "/packages"


def _variables(packages: bool) -> dict[str, str]:
    """The program's environment.

    Sets come in one order on every run, or a resumed training run would see other rewards. One arena, for each further
    one reserves 64 MiB of the address space that is limited, when threads happen to meet.
    """
    variables = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    return variables | ({"PYTHONPATH": _PACKAGES, "OPENBLAS_NUM_THREADS": "1"} if packages else {})


@functools.cache
def _places(package: str) -> list[tuple[str, str]]:
    """Where an installed package and its shared libraries are, and where they stand inside."""
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    wanted = [path for folder in folders[:1] for path in (folder, f"{folder}.libs") if os.path.isdir(path)]
    return [(os.path.realpath(path), f"{_PACKAGES}/{os.path.basename(path)}") for path in wanted]


@functools.cache
def _visible() -> dict[str, Any]:
    """What programs see of this machine: mounts as (path, kind), symbolic links, and folders covered by empty ones."""
    prefix = os.path.realpath(sys.base_prefix)
    wanted = [f"{prefix}/lib", f"{prefix}/lib64", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    links = [(path, os.readlink(path)) for path in dict.fromkeys(wanted) if os.path.islink(path)]
    folders: list[str] = []
    for path in sorted(path for path in set(wanted) if os.path.isdir(path) and not os.path.islink(path)):
        if not any(path.startswith(folder + "/") for folder in folders):
            folders.append(path)
    files = [path for path in (_interpreter(), "/etc/ld.so.cache") if os.path.exists(path)]
    devices = [path for path in _DEVICES if os.path.exists(path)]
    kinds = (("folder", folders), ("file", files), ("device", devices))
    hidden = [
        path
        for folder in folders
        for name in ("site-packages", "dist-packages")
        for path in glob.glob(f"{folder}/python*/{name}")
    ]
    return {"binds": [(path, kind) for kind, paths in kinds for path in paths], "links": links, "hidden": hidden}
