"""The one thread that owns an engine: orders come by a queue between its steps, updates go to the event loop."""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from deepseek_jax.generation.engine import Engine, Update
from deepseek_jax.generation.live import StepFailedError
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.streams import Box
from deepseek_jax.serve.structured import Grammar

RETRY_SECONDS = 5.0


class Wanted(NamedTuple):
    """One completion; a grammar is its own alone."""

    tokens: Sequence[int]
    sampling: SamplingConfig
    seed: int
    salt: str = ""
    grammar: Grammar | None = None


class EngineThread:
    """Runs an engine for an event loop.

    Args:
        engine: nobody else uses it.
        max_waiting: completions that may wait for a slot; more are refused.
        on_death: called once, in the engine's thread, with what ended it.

    Attributes:
        most: completions that may wait and run.
        ready: everything is compiled.
        compiled: programs that the warm-up compiled.
        problem: what ended the thread, if anything did.
    """

    def __init__(self, engine: Engine, *, max_waiting: int, on_death: Callable[[BaseException], None]):
        self.engine, self._on_death = engine, on_death
        self.most = engine.scheduler.config.max_num_seqs + max_waiting
        self.ready, self.compiled = False, 0
        self.warmed: tuple[int, int] = (0, 0)
        self.problem: BaseException | None = None
        self._boxes: dict[Box, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ids: dict[int, tuple[Box, int]] = {}  # by the engine's number; of its thread
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- in the event loop's thread -----------------------------------------------------------------

    def start(self) -> None:
        """Begin, with the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def live(self) -> int:
        """Completions that wait or run."""
        return sum(self._boxes.values())

    def submit(self, wanted: Sequence[Wanted]) -> Box:
        """Queue the completions of one call; its box.

        Raises:
            ApiError: the engine is not ready, has ended, or has too many waiting.
        """
        if self.problem is not None:
            raise ApiError(503, "the engine has ended; the server does so too")
        if not self.ready:
            done, count = self.warmed
            raise ApiError(503, f"the server is compiling, {done} of {count} programs are done", retry_after=10)
        if self.live + len(wanted) > self.most:
            raise ApiError(
                503,
                f"the server has {self.live} completions waiting and running, at most {self.most} can; try later",
                code="overloaded",
                retry_after=RETRY_SECONDS,
            )
        box = Box(len(wanted))
        self._boxes[box] = len(wanted)
        self._inbox.put(partial(self._add, box, wanted))
        return box

    def release(self, box: Box) -> None:
        """A call ends; what still runs of it is cancelled before the next step."""
        if self._boxes.pop(box, None) is not None and box.left:
            self._inbox.put(partial(self._cancel, box))

    def give_up(self, problem: BaseException) -> None:
        """End every call with an error."""
        for box in list(self._boxes):
            box.fail(problem)

    def close(self) -> None:
        """End the thread after its step, and wait for that, but for no compilation."""
        self._ends = True
        self._inbox.put(lambda: None)
        self._thread.join(timeout=10 if self.ready else 0.1)

    @property
    def runs(self) -> bool:
        """The thread has not ended."""
        return self._thread.is_alive()

    def _hand_out(self, updates: Sequence[tuple[Box, int, Update]]) -> None:
        for box, number, update in updates:
            box.put(number, update)

    # --- in the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for warmed in self.engine.warm_up():
                self.warmed = warmed
                if self._ends:
                    return
            self.compiled, self.ready = self.engine.runner.compiled, True
            while not self._ends:
                self._take()
                if self.engine.has_work:
                    self._tell(self.engine.step())
        except BaseException as problem:  # whatever it is, nobody may wait for an answer that cannot come
            self.problem, self.ready = problem, False
            self._on_death(problem)
            self._later(self.give_up, problem)

    def _take(self) -> None:
        """Do what was ordered; without work, wait for an order."""
        waits = not self.engine.has_work
        while True:
            try:
                order = self._inbox.get(block=waits)
            except queue.Empty:
                return
            waits = False
            order()

    def _add(self, box: Box, wanted: Sequence[Wanted]) -> None:
        added: list[int] = []
        try:
            for number, each in enumerate(wanted):
                more = {"salt": each.salt, "constraint": each.grammar}
                id = self.engine.add(each.tokens, each.sampling, seed=each.seed, **more)
                added.append(id)
                self._ids[id] = box, number
        except ValueError as problem:
            for id in added:
                self._forget(id)
            self._later(box.fail, problem)
        else:
            self._later(box.accept)

    def _cancel(self, box: Box) -> None:
        for id in [id for id, (of, _) in self._ids.items() if of is box]:
            self._forget(id)

    def _forget(self, id: int) -> None:
        self._ids.pop(id, None)
        self.engine.cancel(id)

    def _tell(self, updates: Sequence[Update]) -> None:
        told = [(*self._ids[update.id], update) for update in updates if update.id in self._ids]
        for update in updates:
            if update.finished:
                self._ids.pop(update.id, None)
        if told:
            self._later(self._hand_out, told)

    def _later(self, call: Callable, *given: object) -> None:
        """In the event loop; one that has closed has no readers left."""
        try:
            self._loop.call_soon_threadsafe(call, *given)
        except RuntimeError:
            self._ends = True


def status_of(problem: BaseException) -> ApiError:
    """What a client is told whose completion failed."""
    if isinstance(problem, ApiError):
        return problem
    if isinstance(problem, StepFailedError):
        return ApiError(500, "a step of the engine failed on the device; try again", retry_after=RETRY_SECONDS)
    if isinstance(problem, ValueError):  # of the completion itself: its grammar, its logits
        return ApiError(500, f"the completion failed: {problem}")
    return ApiError(500, "the engine failed; the server's log says why")
