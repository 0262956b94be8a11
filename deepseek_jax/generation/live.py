"""What the host keeps of a request that runs: its settings, and by token what came of it."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import jax
import numpy as np

from deepseek_jax.generation.constraint import Constraint, ConstraintError
from deepseek_jax.generation.programs import Decoded, Extended
from deepseek_jax.generation.requests import Drawn, Request, Span
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.text.stream import TextStream


class NonFiniteLogitsError(ValueError):
    """A model's logits are no finite numbers, so that nothing can be drawn from them."""


class StepFailedError(RuntimeError):
    """A step of an engine failed on the device, and with it what its requests were at."""


@dataclass(kw_only=True, eq=False)
class Live:
    """What the host keeps of a request: its settings, and by token what came of it.

    opened: the prompt ended in `<think>`. text: the completion's so far, before any stop text; stream makes it, told is
    how much of it updates have had. routes: of the tokens that were fed, prompt and completion. prompt_logprobs: of the
    prompt's tokens but the first; allowed: what the constraint lets come next, allowed_changed: the device does not
    know it yet. prompt_likeliest: of the likeliest token in the place of each of these. offered: drafts of it that were
    verified, accepted: those that were right.
    """

    request: Request
    sampling: SamplingConfig
    seed: int
    opened: bool
    stream: TextStream | None
    text: str = ""
    told: int = 0
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    support: list[np.ndarray] = field(default_factory=list)
    penalised: list[np.ndarray] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_likeliest: list[float] = field(default_factory=list)
    offered: int = 0
    accepted: int = 0
    error: NonFiniteLogitsError | StepFailedError | ConstraintError | None = None
    constraint: Constraint | None = None
    allowed: np.ndarray | None = None
    allowed_changed: bool = False

    @property
    def stopped(self) -> bool:
        """Ended by a stop of its own; a stop text may be complete only with what was held back to the end."""
        return self.request.stopped or (self.stream is not None and self.stream.stopped is not None)

    def note_span(self, span: Span, row: int, found: Extended) -> Drawn:
        """Keep what came of a span of the prompt, or of an earlier life."""
        if found.routes_RTLA is not None:
            self.routes.append(found.routes_RTLA[row, : span.count].copy())
        if self.sampling.prompt_logprobs:
            end = min(span.start + span.count, self.request.prompt_length - 1)
            values = found.logprobs_RT[row, : max(0, end - span.start)]
            self.prompt_logprobs[span.start : end] = values.tolist()  # in the place of those of an earlier life
            self.prompt_likeliest[span.start : end] = found.best_RT[row, : values.size].tolist()
        return self._note(jax.tree.map(lambda a: a[row][None], found.drawn)) if span.last else Drawn(())

    def note_row(self, row: int, found: Decoded) -> Drawn:
        """Keep what a decode loop drew."""
        count = found.count_R[row]
        self.offered += int(found.offered_R[row])
        self.accepted += int(found.accepted_R[row])
        drawn = self._note(jax.tree.map(lambda a: a[row, :count], found.drawn))
        if found.routes_RNLA is not None:
            self.routes.append(found.routes_RNLA[row, : len(drawn.tokens)].copy())
        return drawn

    def _note(self, drawn: Any) -> Drawn:
        """Keep draws, [count, ...] in every part; those after a stop text are none. Copies, or all rows' would stay."""
        if not np.all(np.isfinite(drawn.logprob_R)):
            self.error = NonFiniteLogitsError(
                f"request {self.request.id}: the model's logits are no finite numbers; its weights are damaged, or too "
                "large to compute with"
            )
            return Drawn((), stopped=True)
        tokens, stopped = drawn.token_R.tolist(), bool(drawn.stopped_R.any())
        if self.stream is not None:
            before = self.stream.tokens
            self.text += self.stream.feed(tokens)
            if self.stream.stopped is not None:
                stopped, count = True, self.stream.tokens - before
                tokens, drawn = tokens[:count], jax.tree.map(lambda a: a[:count], drawn)
        self.logprobs += drawn.logprob_R.tolist()
        stopped |= self._constrained([t for t, of in zip(tokens, drawn.constrained_R, strict=True) if of], stopped)
        if wanted := self.sampling.top_logprobs:
            best = drawn.top_ids_RK[:, :wanted].copy(), drawn.top_logprobs_RK[:, :wanted].copy()
            self.top += zip(*best, strict=True)
        if drawn.support_RW is not None:
            self.support.append(drawn.support_RW.copy())
            if self.sampling.repetition_penalty != 1:
                self.penalised.append(drawn.penalised_RW.copy())
        return Drawn(tokens, stopped)

    def _constrained(self, tokens: list[int], stopped: bool) -> bool:
        """Go on in the grammar; whether that ends the request, with an error."""
        if not tokens or stopped:
            return False
        self.request.stepwise = True
        try:
            self.constraint.accept(tokens)
            self.allowed, self.allowed_changed = self.constraint.mask(), True
        except ConstraintError as problem:
            self.error = problem
        return self.error is not None

    def new_text(self, *, finished: bool) -> str:
        """What there is of the text since the last time; at its end all of it."""
        if finished and self.stream is not None:
            self.text += self.stream.finish()
        new, self.told = self.text[self.told :], len(self.text)
        return new

    def routes_of(self, start: int, end: int) -> np.ndarray:
        """Of the tokens from `start` to `end`."""
        ends = list(accumulate(map(len, self.routes)))
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        before = ends[first - 1] if first else 0
        return np.concatenate(self.routes[first : last + 1])[start - before : end - before]
