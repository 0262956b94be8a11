"""Waits that may last only so long, thousands of them a second, with one timer for all of a call's."""

import asyncio
from collections.abc import Callable


class Patience:
    """Calls back where a wait lasts too long.

    A timer for each wait costs an event loop more than what is waited for. Here a timer that goes off looks how long
    the wait of that moment has lasted, and is set again for the rest of it.

    Args:
        seconds: that a wait may last.
        out: called when one has lasted so long, and again after each further time.
    """

    def __init__(self, seconds: float, out: Callable[[], None]):
        self._seconds, self._out = seconds, out
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)

    def __exit__(self, *of: object) -> None:
        self._since = None

    def close(self) -> None:
        """No wait begins any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return  # the next wait sets a timer
        left = self._since + self._seconds - self._loop.time()
        if left <= 0:
            self._since, left = self._loop.time(), self._seconds
            self._out()
        self._timer = self._loop.call_later(left, self._look)
