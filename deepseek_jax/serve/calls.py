"""A call on the engine from a route: queued, followed, and always ended."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from deepseek_jax.generation.engine import Update
from deepseek_jax.generation.live import Live
from deepseek_jax.serve.engine_thread import EngineThread, Wanted, status_of
from deepseek_jax.serve.errors import ApiError, of_field
from deepseek_jax.serve.log import Log
from deepseek_jax.serve.metrics import Metrics
from deepseek_jax.serve.prompts import Prompts
from deepseek_jax.serve.sampling import NAMES
from deepseek_jax.serve.settings import ServeConfig
from deepseek_jax.serve.streams import Box, Part


class Served:
    """What the routes share.

    Args:
        engine: the engine's thread.
        prompts: of its model's tokenizer.
        settings: of the server.
        metrics: counts and times.
        log: what is said of calls.

    Attributes:
        drains: no call is taken any more.
        created: when the server began, in seconds since 1970.
    """

    def __init__(self, engine: EngineThread, prompts: Prompts, settings: ServeConfig, metrics: Metrics, log: Log):
        self.engine, self.prompts, self.settings, self.metrics, self.log = engine, prompts, settings, metrics, log
        self.drains = False
        self.created = int(time.time())

    @property
    def context(self) -> int:
        """Most tokens of a prompt with its completion."""
        return self.engine.engine.scheduler.config.max_model_len

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.prompts.tokenizer.eos_ids

    def name(self, asked: str | None) -> str:
        """The model's name for an answer.

        Raises:
            ApiError: another model is asked for.
        """
        if asked is None or asked in self.settings.names:
            return asked or self.settings.names[0]
        names = ", ".join(self.settings.names)
        raise ApiError(404, f"model: got {asked!r:.80}, wanted one of {names}", param="model", code="model_not_found")

    async def begin(self, wanted: Sequence[Wanted], scope: Mapping[str, Any]) -> "Call":
        """A call whose prompts the engine has taken.

        Args:
            wanted: its completions.
            scope: of the request: its salt, and its notes, to which what becomes of the call is added.

        Raises:
            ApiError: the engine refuses it, or has no room.
        """
        if self.drains:
            raise ApiError(503, "the server is shutting down; ask another one", retry_after=5)
        salted = [each._replace(salt=scope["salt"]) for each in wanted]
        call = Call(self, self.engine.submit(salted), wanted, scope["notes"])
        try:
            await call.box.accepted
        except BaseException as problem:  # a cancelled wait too: nothing of the call stays in the engine
            self.engine.release(call.box)
            if isinstance(problem, ValueError):
                raise of_field(problem, NAMES) from None
            if isinstance(problem, Exception):
                raise status_of(problem) from None
            raise
        return call


class Drawn(Protocol):
    """A completion as a route has read it: its tokens, and the engine's record, None before the first of them."""

    tokens: list[int]
    live: Live | None


class Call:
    """Completions that run."""

    def __init__(self, served: Served, box: Box, wanted: Sequence[Wanted], notes: dict[str, Any]):
        self.served, self.box, self.notes = served, box, notes
        self._watch = served.metrics.call()
        box.on_update = self._note
        prompts = {id(each.tokens): len(each.tokens) for each in wanted}
        self.prompt_tokens = sum(prompts.values())
        self.completion_tokens = 0
        notes["prompt_tokens"] = self.prompt_tokens

    def _note(self, number: int, update: Update) -> None:
        self.completion_tokens += len(update.tokens)
        self.notes["completion_tokens"] = self.completion_tokens
        if update.finished:
            reason = "error" if update.live.error else "stop" if update.live.stopped else "length"
            self.notes.setdefault("finish", []).append(reason)
            self._watch.finished(reason)
        self._watch.drew(number, len(update.tokens), update.live.request.prompt_length)

    async def parts(self, idle: float | None = None) -> AsyncIterator[list[Part]]:
        """As `Box.parts`.

        Raises:
            ApiError: a completion failed.
        """
        try:
            async for parts in self.box.parts(idle):
                yield parts
        except Exception as problem:  # whatever it is, the client gets a status
            raise status_of(problem) from problem

    def usage(self, completions: Sequence[Drawn], **details: int) -> dict[str, Any]:
        """In OpenAI's form; `details` of the completions' tokens stand beside how many drafts were right and wrong."""
        drawn = sum(len(of.tokens) for of in completions)
        lives = [of.live for of in completions if of.live is not None]
        accepted, offered = (sum(getattr(live, name) for live in lives) for name in ("accepted", "offered"))
        drafts = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": offered - accepted}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "completion_tokens_details": details | drafts,
        }

    def end(self) -> None:
        """What still runs of it is cancelled. A call may be ended several times."""
        if self.box.left:
            self._watch.cancelled()
        self.served.engine.release(self.box)


def new_id(kind: str) -> str:
    """Of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def first_seed(asked: int | None) -> int:
    """The seed of a call's first completion; the others have the numbers after it."""
    return secrets.randbits(32) if asked is None else asked & 0xFFFFFFFF
