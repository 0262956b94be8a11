"""A pool of worker processes that can be killed, for functions of text that may hang, crash or eat memory.

A worker is a fresh interpreter that imports one module and nothing of the caller's: no JAX, no threads, no main script.
Tasks and results cross a pipe as JSON lines, so that nothing a worker says is unpickled. One task at a time is with a
worker, and its clock starts there when the worker takes it; a task that waits for a free worker is never late.
"""

import contextlib
import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, TextIO

Kind = Literal["done", "timeout", "memory", "died", "error"]

_BOOT = """
import json, sys
target, cpu_seconds, memory_bytes, sys.path[:] = json.loads(sys.argv[1])
from deepseek_jax.rewards.pool import serve
serve(target, cpu_seconds, memory_bytes)
"""
_MAX_REASON_CHARS = 200
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Size and limits of a pool.

    Args:
      workers: processes; each takes one core while it works.
      cpu_seconds: processor time for a task, counted in the worker from when it takes the task. Processor time, not
        time on the wall, so that a verdict does not depend on what else the machine does.
      wall_seconds: time on the wall for a task, for one that sleeps or is stopped.
      start_seconds: time on the wall for a worker to import its module.
      memory_bytes: address space of a worker.
    """

    workers: int = 2
    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    start_seconds: float = 120.0
    memory_bytes: int = 2 * 2**30

    def __post_init__(self):
        for name, number in vars(self).items():
            if not number > 0:
                raise ValueError(f"PoolConfig: {name}: got {number!r}, wanted more than 0; correct it")


class Outcome(NamedTuple):
    """What became of a task.

    Attributes:
      kind: "done"; "timeout", the worker was killed for one of its time limits; "memory", it reached its memory limit;
        "died", its process ended by itself or was killed from outside, twice; "error", the function raised.
      value: the function's result where done, else a short reason.
    """

    kind: Kind
    value: Any


class WorkerPool:
    """Runs a function of JSON values on worker processes; use it as a context manager.

    Workers start with the first task. One that hangs, dies or runs out of memory is replaced while the others go on.
    A task whose worker died is given to another one, once: the death may be the machine's doing.
    No process outlives the pool: closing it, an interrupted call and the interpreter's exit kill them, and should this
    process be killed itself, an idle worker ends with its pipe and a busy one by its processor time.

    Calls from several threads take turns.

    Args:
      target: "module:function", importable by a fresh interpreter with this one's `sys.path`.
      config: size and limits.

    Raises:
      ValueError: the target is not of that form.
    """

    def __init__(self, target: str, config: PoolConfig | None = None):
        if target.count(":") != 1:
            raise ValueError(f"WorkerPool: target: got {target!r}, wanted 'module:function'; name it so")
        self._target = target
        self.config = config or PoolConfig()
        self.restarts = 0
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers, after a call in another thread has ended; the pool cannot be used again."""
        with self._lock:
            self._closed = True
            self._finalizer()

    def process_ids(self) -> list[int]:
        """Process ids of the workers there are now."""
        return [worker.process.pid for worker in self._workers]

    def map(self, tasks: Sequence[Any]) -> list[Outcome]:
        """Runs the function on every task, on all workers at once.

        Args:
          tasks: JSON values.

        Returns:
          One outcome a task, in order.

        Raises:
          ValueError: the pool is closed.
          RuntimeError: a worker cannot start, for example because the module cannot be imported.
        """
        with self._lock:
            if self._closed:
                raise ValueError("WorkerPool.map: got a closed pool, wanted an open one; call it inside the `with`")
            try:
                return self._map(tasks)
            except BaseException:
                # A reply to a task of this call must not be taken for one to a task of the next.
                self._drop([worker for worker in self._workers if worker.task is not None or not worker.ready])
                raise

    def _map(self, tasks: Sequence[Any]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        died: set[int] = set()
        waiting = deque(range(len(tasks)))
        while len(outcomes) < len(tasks):
            self._replace_the_dead()
            self._start(min(self.config.workers, len(tasks) - len(outcomes)))
            for worker in self._workers:
                if waiting and worker.ready and worker.task is None:
                    worker.take(waiting[0], tasks[waiting[0]], self.config.wall_seconds)
                    waiting.popleft()
            for worker in _wait(self._workers):
                task = worker.task
                outcome = worker.outcome()
                if outcome is not None and task is not None:
                    if outcome.kind == "died" and task not in died:
                        died.add(task)
                        waiting.appendleft(task)
                    else:
                        outcomes[task] = outcome
                if worker.ended:
                    self._drop([worker])
                    self.restarts += 1
        return [outcomes[task] for task in range(len(tasks))]

    def _start(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._target, self.config))

    def _replace_the_dead(self) -> None:
        """A worker that was killed while idle costs no task its verdict."""
        dead = [
            worker
            for worker in self._workers
            if worker.ready and worker.task is None and worker.process.poll() is not None
        ]
        self._drop(dead)
        self.restarts += len(dead)

    def _drop(self, workers: list["_Worker"]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)


class _Worker:
    """The parent's end of one process."""

    def __init__(self, target: str, config: PoolConfig):
        self.ready = False
        self.ended = False
        self.task: int | None = None
        self._deadline = time.monotonic() + config.start_seconds
        self._received = bytearray()
        arguments = json.dumps([target, config.cpu_seconds, config.memory_bytes, sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Not in the terminal's process group: Ctrl-C is for this process, which then kills its workers.
            process_group=0,
            # SymPy's order of terms, and with it its time, follows the hash seed.
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )

    def take(self, task: int, payload: Any, wall_seconds: float) -> None:
        self.task = task
        self._deadline = time.monotonic() + wall_seconds
        line = memoryview(json.dumps(payload).encode() + b"\n")
        # A worker that died idle shows at the next read, as the end of its pipe.
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[self.process.stdin.write(line) :]

    def seconds_left(self) -> float:
        return self._deadline - time.monotonic() if self.task is not None or not self.ready else float("inf")

    def outcome(self) -> Outcome | None:
        """Reads what has come, without waiting; the outcome of the worker's task once it is known."""
        # In this order: an answer that is there counts, however long this process was stopped before it looked.
        if self.seconds_left() <= 0 and not self._heard():
            return self._late()
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            return self._gone()
        self._received += chunk
        if not self._received.endswith(b"\n"):
            return None
        kind, value = json.loads(self._received)
        self._received.clear()
        if kind == "ready":
            self.ready = True
            return None
        if kind == "failed":
            raise RuntimeError(f"a reward worker did not start: {value}")
        self.task = None
        self.ended = kind == "memory"
        return Outcome(kind, value)

    def _heard(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return bool(selector.select(0))

    def _late(self) -> Outcome:
        if not self.ready:
            raise RuntimeError("a reward worker did not start in time: raise PoolConfig.start_seconds")
        self.ended = True
        return Outcome("timeout", "time on the wall")

    def _gone(self) -> Outcome:
        code = self.process.wait()
        if not self.ready:
            raise RuntimeError(f"a reward worker did not start: it ended with exit code {code}")
        self.ended = True
        if code == -signal.SIGPROF:
            return Outcome("timeout", "processor time")
        return Outcome("died", f"exit code {code}")

    def kill(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(_CLOSE_SECONDS)


def _wait(workers: list[_Worker]) -> list[_Worker]:
    """Waits until a worker has something to say or is late."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        patience = max(0.0, min(worker.seconds_left() for worker in workers))
        heard = [key.data for key, _ in selector.select(patience if patience < float("inf") else None)]
    return heard + [worker for worker in workers if worker not in heard and worker.seconds_left() <= 0]


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def serve(target: str, cpu_seconds: float, memory_bytes: int) -> None:
    """A worker's life: imports its function, then answers tasks until its input ends. Only workers call it."""
    # The replies get a descriptor of their own: what the function prints must not be taken for one.
    replies = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    try:
        module, name = target.split(":")
        function = vars(importlib.import_module(module))[name]
    except Exception as error:
        _send(replies, "failed", _reason(error))
        return
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(replies, "ready", None)
    for line in sys.stdin.buffer:
        kind, value = _run(function, json.loads(line), cpu_seconds)
        _send(replies, kind, value)
        if kind == "memory":
            return


def _run(function: Callable[[Any], Any], task: Any, cpu_seconds: float) -> tuple[Kind, Any]:
    # The signal is not handled, so that the kernel ends a worker that is deep in C code and hears nothing.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return "done", function(task)
    except MemoryError:
        return "memory", "memory limit"
    except Exception as error:
        return "error", _reason(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]


def _send(replies: TextIO, kind: str, value: Any) -> None:
    replies.write(json.dumps([kind, value]) + "\n")
    replies.flush()
