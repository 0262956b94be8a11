"""The forked process that becomes the program: it gives everything up, then runs the interpreter."""

from __future__ import annotations

import os
import resource

from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def become_program(request: dict[str, Any], cell: dict[str, Any], pipes: dict[str, int], knot: int) -> NoReturn:
    """Never returns; `knot` is a pipe that only works while the keeper lives."""
    report = pipes["report"]
    try:
        if request["sandboxed"]:
            # Out of the keeper's process group: a group reaches across process namespaces.
            os.setsid()
            os.chdir("/tmp")
        else:
            os.chdir(cell["folder"])
            write_files(".", cell["files"])
        for target, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(pipes[name], target)
        _set_limits(cell["limits"], request["sandboxed"])
        if request["sandboxed"]:
            kernel.drop_capabilities()
        kernel.die_with_parent()
        os.write(knot, b"k")
        os.close(knot)
        os.closerange(3, report)
        os.closerange(report + 1, 65536)
        os.set_inheritable(report, False)
        kernel.gain_nothing()
        if cell["filter"]:
            kernel.filter_calls(cell["filter"])
        os.write(report, b"s")
        python = request["python"]
        variables = request["variables"]
        if not request["sandboxed"] and "PYTHONPATH" in variables:
            folders = dict.fromkeys(os.path.dirname(path) for path, _ in request["packages"])
            variables = {**variables, "PYTHONPATH": os.pathsep.join(folders)}
        os.execve(python, [python, "-s", "-B", "-X", "utf8", "main.py"], variables)
    except BaseException as error:  # a forked process must not run on in its parent's code
        os.write(report, failure(error))
    os._exit(1)


def _set_limits(limits: dict[str, Any], sandboxed: bool) -> None:
    # A second line behind the wall clock, which a program of many threads must meet first.
    wanted = [
        (resource.RLIMIT_CPU, cpu_seconds(limits)),
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


def cpu_seconds(limits: dict[str, Any]) -> int:
    """The kernel's limit of processor time, for each process."""
    return (int(limits["seconds"]) + 2) * (os.cpu_count() or 1)


def write_files(folder: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with open(f"{folder}/{name}", "wb") as file:
            file.write(content)


def failure(error: BaseException) -> bytes:
    """What a report says where no program came to run."""
    return b"!" + str(error).encode(errors="replace")[:500] + b"\n"
