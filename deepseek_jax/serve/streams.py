"""What the engine's thread tells a call, read in the event loop.

A call's box holds what came since it was read last, joined by completion: a reader that is slow loses nothing, holds
nobody up, and its box is no larger than its completions.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from deepseek_jax.generation.engine import Update
from deepseek_jax.generation.live import Live
from deepseek_jax.serve.patience import Patience


@dataclass(kw_only=True)
class Part:
    """What is new of one completion of a call.

    Args:
        number: of the completion in the call.
        tokens: further ones.
        text: further one.
        finished: these are the last.
        live: the engine's record of it; its log-probs are appended to while it runs.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    live: Live | None = None


class Box:
    """Of one call. All methods are of the event loop's thread.

    Args:
        count: completions of the call.

    Attributes:
        accepted: done once the call's requests are in the engine, with an error where it refuses them.
        left: completions that are not finished.
        on_update: told of every update as it comes, however slow the reader is.
    """

    def __init__(self, count: int):
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = count
        self.on_update: Callable[[int, Update], None] = lambda number, update: None
        self._parts: dict[int, Part] = {}
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def put(self, number: int, update: Update) -> None:
        """What a step gave one of the completions."""
        part = self._parts.setdefault(number, Part(number=number))
        part.tokens += update.tokens
        part.text += update.text
        part.live = update.live
        if update.finished:
            part.finished = True
            self.left -= 1
            if update.live.error is not None:
                self._error = update.live.error
        self.on_update(number, update)
        self._tell()

    def accept(self) -> None:
        """All of the call's requests are in the engine."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the call."""
        self._error = self._error or error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # looked at, also where nobody waits any more
        self._tell()

    def _tell(self) -> None:
        self._news = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def parts(self, idle: float | None = None) -> AsyncIterator[list[Part]]:
        """What is new, until all completions are finished; an empty list where nothing came for `idle` seconds.

        Raises:
            BaseException: what `fail` was told, or a completion's own error.
        """
        patience = None if idle is None else Patience(idle, self._wake)
        try:
            while True:
                if not self._news:
                    await self._wait(patience)
                if not self._news:
                    yield []
                    continue
                self._news = False
                if self._error is not None:
                    raise self._error
                parts, self._parts = list(self._parts.values()), {}
                last = self.left == 0
                if parts:
                    yield parts
                if last:
                    return
        finally:
            if patience is not None:
                patience.close()

    async def _wait(self, patience: Patience | None) -> None:
        """For news, or for patience to end."""
        self._waiter = asyncio.get_running_loop().create_future()
        with patience or nullcontext():
            await self._waiter
