"""How processes start together, and how the end of one ends them all."""

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax
from jax._src import distributed

from deepseek_jax.distributed.agreement import barrier
from deepseek_jax.distributed.environment import initialize_arguments
from deepseek_jax.distributed.identity import START_SECONDS, is_main, main_host, process_count, process_index, say
from deepseek_jax.distributed.wire import connected, listener, received

# Exit statuses, beside 0, 1 for an error of our own, 2 for arguments that do not parse, and 130 for Ctrl-C.
PREEMPTED = 128 + signal.SIGTERM
PEER_ENDED = 75  # sysexits.h: a failure that passes; try again

# How long a machine may be silent before it counts as dead. A process that dies on a living machine is known at once.
HEARTBEAT_SECONDS = 60
# What a process has, after another one ended, to say what is wrong with itself.
GRACE_SECONDS = 1.0

_NUMBER = struct.Struct("!I")  # of a process, on the wire


def start() -> bool:
    """Join the other processes, if the environment speaks of any; before anything else touches a device.

    The environment is that of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, of a Slurm step, of Open
    MPI's mpirun, or of a TPU pod (TPU VM, GKE). In all processes but the main one standard output is silenced. From
    here on, the end of any process ends the others with one line and status `PEER_ENDED`, until `finish`.
    Where the others do not come within `START_SECONDS`, JAX aborts the process with a message of its own, status 134.

    Returns:
        Whether there are several processes.

    Raises:
        ValueError: variables that are half set or make no sense.
    """
    found = initialize_arguments(os.environ)
    if found is None:
        return False
    # jax's own service would hold SIGTERM for the rest of the program; `preemption` holds it where it is of use
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **found,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    _watch.start()
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # libraries in C++ print as well
    return True


def finish() -> None:
    """Wait for the others to come to their ends as well, and part from them."""
    barrier()
    _watch.stop()
    jax.distributed.shutdown()


def fail(problem: BaseException, *, plain: bool) -> NoReturn:
    """End a process among several: say why, with its number, and leave without waiting for the others.

    Args:
        problem: what happened. It may be the consequence of another process's end, and is then said to be.
        plain: whether its message is enough, in one line; else its traceback is printed before.
    """
    ended = _watch.wait(GRACE_SECONDS)
    if not plain and ended is None:
        traceback.print_exception(problem)
    text = " ".join(str(problem).split()) or type(problem).__name__
    say(text if ended is None else f"process {ended} ended, so this one does too (at: {text:.160})")
    leave(1 if ended is None else PEER_ENDED)


def leave(status: int) -> NoReturn:
    """End at once, without jax.distributed's own end, which would wait for processes that wait for this one."""
    _watch.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Watch:
    """A connection of every process to process 0 that nothing is sent on: it breaks when its process ends.

    jax.distributed notices a dead process by its silence, for which it has to wait; a broken connection is known at
    once, whatever the main thread is waiting for. The machine that is cut off is left to jax.distributed. So is the
    sudden death of process 0, at which jax.distributed aborts the others with a message of its own, status 134.
    """

    def __init__(self) -> None:
        self._lines: dict[int, socket.socket] = {}
        self._gone: set[int] = set()
        self._ended: int | None = None
        self._lock = threading.Lock()
        self._noticed = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        client = distributed.global_state.client
        if is_main():
            with listener() as port:
                client.key_value_set("deepseek_jax/watch", str(port.getsockname()[1]))
                port.settimeout(START_SECONDS)
                while len(self._lines) < process_count() - 1:
                    self._take(port.accept()[0])
        else:
            port = int(client.blocking_key_value_get("deepseek_jax/watch", START_SECONDS * 1000))
            self._lines[0] = connected(main_host(), port, START_SECONDS)
            self._lines[0].sendall(_NUMBER.pack(process_index()))
        for number, line in self._lines.items():
            line.settimeout(None)
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()

    def wait(self, seconds: float) -> int | None:
        """The number of a process that ended, if one does within this time."""
        return self._ended if self._noticed.wait(seconds) else None

    def stop(self) -> None:
        """After a meeting of all: from here on every process may end."""
        self._stopped.set()

    def dismiss(self) -> None:
        """The main process, before it ends: let the others end first, for jax.distributed would abort them."""
        if not is_main() or self._stopped.is_set():
            return
        self._notice(process_index())
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while len(self._gone) < len(self._lines) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _take(self, line: socket.socket) -> None:
        line.settimeout(START_SECONDS)
        said = received(line, _NUMBER.size)
        number = _NUMBER.unpack(said)[0] if said else 0
        if number in range(1, process_count()):  # a port scanner says nothing, or anything
            self._lines[number] = line

    def _listen(self, number: int, line: socket.socket) -> None:
        try:
            said = received(line, _NUMBER.size)
        except OSError:
            said = b""
        if not said:
            self._gone.add(number)
        if self._stopped.is_set() or not self._notice(_NUMBER.unpack(said)[0] if said else number):
            return
        if not self._stopped.wait(GRACE_SECONDS):
            say(f"process {self._ended} ended, so this one does too; its own output says why")
            leave(PEER_ENDED)

    def _notice(self, ended: int) -> bool:
        """Remember the first end of a process, and let the main process tell the others; whether it was the first."""
        with self._lock:
            if self._ended is not None:
                return False
            self._ended = ended
        self._noticed.set()
        for number, line in self._lines.items() if is_main() else ():
            if number != ended:
                with contextlib.suppress(OSError):  # it ended as well
                    line.sendall(_NUMBER.pack(ended))
        return True


_watch = _Watch()
