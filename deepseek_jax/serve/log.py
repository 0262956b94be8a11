"""What the server says on standard error while it serves, by a thread of its own.

A pipe that nobody reads, or a disk that is full, holds no answer up, and costs lines.
"""

import json
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from deepseek_jax.distributed import printable

_MOST_TEXT = 200  # of a value


class Log:
    """Lines for standard error.

    Args:
        most: lines that may wait to be written; further ones are lost.

    Attributes:
        lost: lines that there was no room for, or that could not be written.
    """

    def __init__(self, most: int = 10_000):
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(most)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self.lost = 0

    def note(self, about: Mapping[str, Any]) -> None:
        """A line of JSON: when, what, how long, how many tokens. Never a prompt or an answer."""
        told = {
            name: printable(value)[:_MOST_TEXT] if isinstance(value, str) else value for name, value in about.items()
        }
        self._add(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **told}))

    def failure(self) -> None:
        """The traceback of the exception that is being handled: a mistake of ours."""
        self._add(traceback.format_exc().rstrip())

    def flush(self, seconds: float) -> None:
        """Wait for what was said so far to be written, at most so long."""
        written = threading.Event()
        if self._add(written):
            written.wait(seconds)

    def _add(self, line: str | threading.Event) -> bool:
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost += 1
            return False
        return True

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # no room on its disk, no reader, or closed: there is nowhere to say so
                self.lost += 1
