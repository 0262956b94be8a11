"""Starts several processes of one program on this machine, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.flags import environment

ROOT = Path(__file__).resolve().parents[2]
CODE = "from deepseek_jax.cli import run; from tests.distributed import laws; run(laws.{law})"


class Ended(NamedTuple):
    """How a process ended. A status below 0 is the signal that killed it."""

    status: int
    out: str
    err: str


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def started(law: Callable[[Path], None], folder: Path, *, processes: int, devices: int) -> list[subprocess.Popen]:
    """Processes that run a law of `laws` on the folder, as `cli.run` runs a tool.

    Args:
        law: called in all of them.
        folder: its argument, shared by all.
        processes: how many; one alone is told nothing of others.
        devices: of each process.
    """
    port, found = free_port(), []
    for number in range(processes):
        own = {"TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ | environment(devices) | {"PYTHONPATH": str(ROOT)}
        if processes > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(number)}
            own |= {"JAX_NUM_PROCESSES": str(processes), "JAX_ENABLE_COMPILATION_CACHE": "0"}  # as commands do
        command = [sys.executable, "-c", CODE.format(law=law.__name__), str(folder)]
        pipe = subprocess.PIPE
        found.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
    return found


def ended(children: list[subprocess.Popen], *, seconds: float = 300) -> list[Ended]:
    """How each ended; those that did not within this time are killed, and their statuses say so."""
    try:
        outputs = [child.communicate(timeout=seconds) for child in children]
    except subprocess.TimeoutExpired:
        for child in children:
            child.kill()
        outputs = [child.communicate() for child in children]
    return [Ended(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


def launch(law: Callable[[Path], None], folder: Path, *, processes: int = 2, devices: int = 4) -> list[Ended]:
    """How all processes of a law ended; AssertionError with their words if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    found = ended(started(law, folder, processes=processes, devices=devices))
    for number, child in enumerate(found):
        assert child.status == 0, f"process {number}: status {child.status}\n{child.err}"
    return found
