"""Operations of `text.worker` in a process of their own, which is made when it is first needed and again when it dies.

One process serves all tokenizers and templates of this one. Calls from several threads take turns, but for threads with
a process of their own (`own_process`).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from deepseek_jax.text.worker import Reply

SECONDS = 5.0
"""Processor time of an operation, whatever its size: hundreds of times what a published template or tokenizer takes.
Processor time, not time on the wall, so that nothing is refused because the machine is busy."""
_SECONDS_PER_BYTE = 4e-6  # encoding a million characters takes about one second


class _Worker:
    """A process, if there is one, and whose turn it is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # what was not written yet
                continue
        process.wait()


_shared = _Worker()
_owned: list[_Worker] = []
_thread = threading.local()


def own_process() -> None:
    """From here on, calls of this thread have a process of their own: slow ones of others do not hold them up."""
    _thread.worker = _Worker()
    _owned.append(_thread.worker)


def ask(operation: str, *arguments: Any, seconds: float | None = None) -> Any:
    """Runs one operation of `text.worker`.

    Args:
      operation: the function's name.
      *arguments: JSON values.
      seconds: processor time it may take; None gives `SECONDS` and 4 s for each MB of the arguments.

    Returns:
      Its result.

    Raises:
      Reply: there is no result; "refused" has a reason in its value, limits included.
      RuntimeError: the process does not start.
    """
    try:
        body = json.dumps(arguments, default=_not_plain)[1:-1]
    except (TypeError, ValueError, RecursionError) as error:
        raise Reply("refused", f"got variables that are not plain data ({str(error)[:100]})") from None
    limit = SECONDS + _SECONDS_PER_BYTE * len(body) if seconds is None else seconds
    worker: _Worker = getattr(_thread, "worker", _shared)
    with worker.lock:
        try:
            kind, value = _exchange(worker, f'["{operation}", {limit}, {body}]\n'.encode(), limit)
        except BaseException:  # An answer that comes later must not be taken for the next one's.
            worker.end()
            raise
    if kind == "done":
        return value
    raise Reply(kind, value)


def _not_plain(value: Any) -> None:
    raise TypeError(f"got a {type(value).__name__}, wanted plain data")


def _exchange(worker: _Worker, request: bytes, limit: float) -> tuple[str, Any]:
    process = _running(worker)
    try:
        process.stdin.write(request)
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = b""
    if reply.endswith(b"\n"):
        kind, value, sound = json.loads(reply)
        if not sound:
            worker.end()
        return kind, value
    code = process.wait()
    worker.end()
    if code == -signal.SIGPROF:
        return "refused", f"it takes more than {limit:.0f} s of processor time"
    if code > 0:
        raise RuntimeError(f"the process for tokenizers and templates ended with status {code}; its stderr says why")
    return "refused", f"its process died (signal {-code}), of too much memory or a fault in the library"


def _running(worker: _Worker) -> subprocess.Popen:
    if worker.process is not None and worker.process.poll() is not None:
        worker.end()
    if worker.process is None:
        worker.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for this process, which may still have something to encode afterwards.
            process_group=0,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "TOKENIZERS_PARALLELISM": "false",
                "RUST_BACKTRACE": "0",
            },
        )
    return worker.process


def end() -> None:
    """Ends the processes; the next operation makes another one."""
    for worker in (_shared, *_owned):
        worker.end()


def _forget() -> None:
    """A forked child leaves its parent's processes alone."""
    global _shared, _owned, _thread
    _shared, _owned, _thread = _Worker(), [], threading.local()


atexit.register(end)
os.register_at_fork(after_in_child=_forget)
