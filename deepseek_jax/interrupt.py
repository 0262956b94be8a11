"""Ctrl-C in one line and with status 130, whatever the program is doing; imports next to nothing.

A program that imports for seconds begins with `end_at_once`; `cli.run` then calls `raise_from_here`, so that what is
under way is put in order before the end.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, Self

STATUS = 130


def end_at_once() -> None:
    """For programs, at their start: from here on, Ctrl-C ends the process as it stands.

    Where the signal is ignored, as under nohup, it stays so. The first process of a container, which the kernel spares
    every signal that it has no handler for, gets one for SIGTERM.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *of: os._exit(128 + signal.SIGTERM))


def raise_from_here() -> bool:
    """From here on, Ctrl-C raises KeyboardInterrupt; whether the process is a program that began with `end_at_once`."""
    program = signal.getsignal(signal.SIGINT) is _end
    if program:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = _unraisable
    return program


def end(*, program: bool) -> NoReturn:
    """After a KeyboardInterrupt, with everything closed: say so in one line, and end with status 130.

    Args:
        program: what `raise_from_here` gave. Such a process ends at once: the interpreter's own end would wait for
            threads, and could crash on arrays that devices still work on.
    """
    sys.stdout.flush()
    if program:
        _end()
    print("interrupted", file=sys.stderr)
    raise SystemExit(STATUS)


class Notice:
    """Ctrl-C as a fact to look at: within, it raises nothing, so that what is under way is not broken in the middle.

    A second one, before anyone forgot the first, raises KeyboardInterrupt all the same. Where the signal is ignored, it
    stays so.

    Attributes:
        came: whether one came since `forget`.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        self._held = self._before != signal.SIG_IGN
        if self._held:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            signal.signal(signal.SIGINT, self._before)

    def forget(self) -> None:
        self.came = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within, every one raises KeyboardInterrupt, as usual."""
        if self._held:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            if self._held:
                signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def _end(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(STATUS)


def _unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """A KeyboardInterrupt that a destructor or a callback was about to lose."""
    if problem.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(problem)
