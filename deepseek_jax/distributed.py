"""Several processes of one program, one a host or GPU: how they start, agree, and end together.

Process 0 is the main one: it alone prints and writes what is written once. All run the same program on the same
arguments, and call what is here in the same order. In one process every function here does nothing, or answers at once.

Source: jax.distributed and jax.experimental.multihost_utils (jax-ml/jax).
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Exit statuses, beside 0, 1 for an error of our own, 2 for arguments that do not parse, and 130 for Ctrl-C.
PREEMPTED = 128 + signal.SIGTERM
PEER_ENDED = 75  # sysexits.h: a failure that passes; try again

# How long a machine may be silent before it counts as dead. A process that dies on a living machine is known at once.
HEARTBEAT_SECONDS = 60
START_SECONDS = 300
# What a process has, after another one ended, to say what is wrong with itself.
GRACE_SECONDS = 1.0
_NO_LIMIT = 7 * 24 * 3600 * 1000  # milliseconds; whoever waits for the dead is ended by the watch

_NUMBER = struct.Struct("!I")  # of a process, on the wire
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")

T = TypeVar("T")
_numbers = itertools.count()  # of the meetings; all processes hold the same ones


def count() -> int:
    """Processes of this program. Starts no backend, unlike `jax.process_count`."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process prints, and writes what is written once."""
    return index() == 0


# --- start and end -------------------------------------------------------------------------------


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
    found = _environment(os.environ)
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


def say(text: str, *, kind: Literal["error", "warning"] = "error") -> None:
    """An error or a warning on standard error, with the number of the process where there are several."""
    where = f"process {index()}: " if count() > 1 else ""
    print(printable(f"{kind}: {where}{text}"), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with its control characters spelled out, all but line ends and tabs: a terminal would obey them.

    Names of files and tensors and values of configurations come from others. So do marks of writing direction, which
    make a line read as another, and halves of surrogate pairs, which cannot be printed.

    >>> print(printable(chr(27) + "[31mred, ü and 漢"))
    \\x1b[31mred, ü and 漢
    """
    return "".join(of if of in _OF_TEXT or of.isprintable() or _is_space(of) else repr(of)[1:-1] for of in text)


_OF_TEXT = "\n\t\u200c\u200d"  # joiners: Persian is spelled with the one, families of emoji are made by the other


def _is_space(of: str) -> bool:
    return unicodedata.category(of) == "Zs"


def leave(status: int) -> NoReturn:
    """End at once, without jax.distributed's own end, which would wait for processes that wait for this one."""
    _watch.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`, none where it finds them itself; None for a single process."""
    given = [name for name in _EXPLICIT if name in variables]
    if given:
        return _explicit(variables)
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 and "OMPI_MCA_orte_hnp_uri" in variables:
        return {}
    # sbatch sets the number of tasks for its own script too, which is one process; srun alone says where its step runs
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        missing = [name for name in _SLURM if name not in variables]
        if missing:
            raise ValueError(
                f"{missing[0]}: not set, though SLURM_NTASKS is {variables['SLURM_NTASKS']}; start by srun"
            )
        return {}
    return {} if _several_tpu_hosts(variables) else None


def _explicit(variables: Mapping[str, str]) -> dict[str, Any] | None:
    missing = [name for name in _EXPLICIT if not variables.get(name)]
    if missing:
        raise ValueError(f"{missing[0]}: not set, wanted {', '.join(_EXPLICIT)} together; set all three, or none")
    address, *numbers = (variables[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS: got {address!r}, wanted HOST:PORT of process 0")
    for name, text in zip(_EXPLICIT[1:], numbers, strict=True):
        if not text.isdecimal():
            raise ValueError(f"{name}: got {text!r}, wanted a whole number")
    processes, number = map(int, numbers)
    if not number < processes:
        raise ValueError(f"JAX_PROCESS_ID: got {number}, wanted less than JAX_NUM_PROCESSES, which is {processes}")
    if processes == 1:
        return None
    return {"coordinator_address": address, "num_processes": processes, "process_id": number}


def _several_tpu_hosts(variables: Mapping[str, str]) -> bool:
    """Whether this is one of several hosts of a TPU pod; only a TPU host asks anyone (Google's metadata server)."""
    platforms = variables.get("JAX_PLATFORMS", "")
    if find_spec("libtpu") is None or (platforms and "tpu" not in platforms):
        return False
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    found = next((kind for kind in (GkeTpuCluster, GceTpuCluster) if kind.is_env_present()), None)
    return found is not None and found.get_process_count() > 1


# --- knowing that another process ended ----------------------------------------------------------


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
            with _listener() as listener:
                client.key_value_set("deepseek_jax/watch", str(listener.getsockname()[1]))
                listener.settimeout(START_SECONDS)
                while len(self._lines) < count() - 1:
                    self._take(listener.accept()[0])
        else:
            port = int(client.blocking_key_value_get("deepseek_jax/watch", START_SECONDS * 1000))
            host = distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
            self._lines[0] = socket.create_connection((host, port), START_SECONDS)
            self._lines[0].sendall(_NUMBER.pack(index()))
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
        self._notice(index())
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while len(self._gone) < len(self._lines) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _take(self, line: socket.socket) -> None:
        line.settimeout(START_SECONDS)
        said = _received(line, _NUMBER.size)
        number = _NUMBER.unpack(said)[0] if said else 0
        if number in range(1, count()):  # a port scanner says nothing, or anything
            self._lines[number] = line

    def _listen(self, number: int, line: socket.socket) -> None:
        try:
            said = _received(line, _NUMBER.size)
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


def _listener() -> socket.socket:
    """On a free port, of either kind of address where the system has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _received(line: socket.socket, size: int) -> bytes:
    """So many bytes, or none when the connection ends before."""
    parts = b""
    while len(parts) < size:
        part = line.recv(size - len(parts))
        if not part:
            return b""
        parts += part
    return parts


_watch = _Watch()


# --- meeting and agreeing ------------------------------------------------------------------------


def barrier() -> None:
    """Wait until every process is here."""
    if count() > 1:
        distributed.global_state.client.wait_at_barrier(f"deepseek_jax/meeting/{next(_numbers)}", _NO_LIMIT)


def exchange(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process. A value is anything that JSON holds."""
    if count() == 1:
        return [value]
    client, place = distributed.global_state.client, f"deepseek_jax/exchange/{next(_numbers)}"
    client.key_value_set(f"{place}/{index()}", json.dumps(value))
    barrier()
    found = [
        json.loads(client.blocking_key_value_get(f"{place}/{number}", START_SECONDS * 1000))
        for number in range(count())
    ]
    barrier()  # before the values go, which would else be kept to the end of the run
    client.key_value_delete(f"{place}/{index()}")
    return found


def replicated(value: np.ndarray | jax.Array) -> jax.Array:
    """A value that every process holds, as one array on all devices of all processes."""
    place = NamedSharding(Mesh(np.asarray(jax.devices()), ("devices",)), PartitionSpec())
    held = np.array(value)
    return jax.make_array_from_callback(held.shape, place, lambda index: held[index])


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A piece of work that fails in all processes if it fails in one.

    All wait for each other at its end. What one raises is then raised there, and in the others as a ValueError,
    OSError or RuntimeError with the number of the process.
    """
    problem = None
    try:
        yield
    except Exception as found:
        problem = found
    # `exchange` sends JSON: of an exception its kind and its words
    told = exchange(None if problem is None else [_kind(problem).__name__, str(problem)])
    if problem is not None:
        raise problem
    for number, said in enumerate(told):
        if said is not None:
            kind = {"ValueError": ValueError, "OSError": OSError}.get(said[0], RuntimeError)
            raise kind(f"process {number}: {said[1]}")


def _kind(problem: Exception) -> type[Exception]:
    return next((kind for kind in (ValueError, OSError) if isinstance(problem, kind)), RuntimeError)


def on_main(call: Callable[[], T]) -> T:
    """What `call` returns in the main process, in every process; the others do not call it.

    For what may differ from process to process (a grader with a time limit) or is to happen once (writing a file).
    The value goes through JSON where there are several: tuples become lists. What it raises is raised in all.
    """
    if count() == 1:
        return call()
    client, place = distributed.global_state.client, f"deepseek_jax/main/{next(_numbers)}"
    with together():
        if is_main():
            client.key_value_set(place, json.dumps(call()))
    value = json.loads(client.blocking_key_value_get(place, START_SECONDS * 1000))
    barrier()  # before the value goes, which would else be kept to the end of the run
    if is_main():
        client.key_value_delete(place)
    return value


# --- preemption ----------------------------------------------------------------------------------


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM, and yield a function that says whether one has come to any of the processes.

    All processes ask alike, at the end of a step; the answer is the same in all. Its cost is one gathered byte a
    process. Whoever gets True ends the program with status `PREEMPTED`. The handler before is put back at the end; a
    SIGTERM that came after the last question is then sent again. Outside the main thread, SIGTERM stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: _any(False)
        return
    came: list[int] = []
    answered = False

    def asked() -> bool:
        nonlocal answered
        answered = _any(bool(came))
        return answered

    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if came and not answered:
        signal.raise_signal(signal.SIGTERM)


def _any(flag: bool) -> bool:
    if count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))
