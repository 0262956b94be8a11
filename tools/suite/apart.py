"""A generator's work in a process of its own: all its memory, of host and device, is given back at the end."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class ProcessDied(ChildProcessError):
    """It ended without an answer."""


def apart(function: Callable[..., Iterator[Any]], *given: Any) -> Iterator[Any]:
    """What function(*given) yields, run in a new process that shares nothing with this one.

    Args:
        function: of a module, so that the other process finds it by name.

    Raises:
        ProcessDied: the process was ended from outside, as where memory is short, or by itself.
        Exception: what the function raises, its traceback as a note.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, *given), daemon=True)
    process.start()
    there.close()  # else the end of the other process would not be the end of what can be read
    try:
        yield from _received(here)
        process.join()
        if process.exitcode:
            raise ProcessDied(_why(process.exitcode))
    finally:
        process.kill()
        process.join()


def _received(connection: Connection) -> Iterator[Any]:
    while True:
        try:
            failed, sent = connection.recv()
        except EOFError:
            return
        if failed:
            raise sent
        yield sent


def _send(connection: Connection, function: Callable[..., Iterator[Any]], *given: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says that it was interrupted
    try:
        for found in function(*given):
            connection.send((False, found))
    except Exception as problem:
        problem.add_note(traceback.format_exc())
        connection.send((True, problem))


def _why(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
