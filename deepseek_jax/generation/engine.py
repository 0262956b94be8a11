"""The engine: continuous batching over a paged cache, in steps of schedule, run and retire.

Requests come and go at any time. A step computes prompts in chunks and draws tokens for all that run, whatever each of
them asked for, and the device never waits for the host: with overlap a step is planned and dispatched before the one
ahead of it has come back. A token is a function of its sequence, its seed and its position alone.
"""

import numbers
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from deepseek_jax.config import ModelConfig
from deepseek_jax.distributed import process_count
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.constraint import Constraint
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.live import Live, StepFailedError
from deepseek_jax.generation.programs import Decoded, Extended
from deepseek_jax.generation.requests import Drawn, Plan, Request, Row, Span
from deepseek_jax.generation.runner import Call, Runner
from deepseek_jax.generation.sampling_config import SamplingConfig, refuse_unreplayable
from deepseek_jax.generation.scheduler import Scheduler
from deepseek_jax.generation.slots import params_of
from deepseek_jax.generation.thinking import NO_TAGS, think_tags
from deepseek_jax.model.arranged import arranged_weights
from deepseek_jax.model.packing import Quantization, packed_weights
from deepseek_jax.sharding import module_layout
from deepseek_jax.text.stream import TextStream
from deepseek_jax.text.think import opens_thought
from deepseek_jax.text.tokenizer import Tokenizer

CLOSING = "\n"
"""What a thought ends with, before `</think>`, that is out of budget."""
_SETTINGS, _NO_RECORD = EngineConfig(), Record()


class Update(NamedTuple):
    """What a step gave a request: further tokens and text, and whether they are the last."""

    id: int
    tokens: list[int]
    text: str
    finished: bool
    live: Live


@dataclass
class Metrics:
    """Counts since the engine began.

    Args:
        steps: passes over the model that decoding took, of all rows together.
        rows: passes of single rows.
        drawn: tokens that those drew.
        offered: drafts that were verified.
        accepted: drafts that were right.
        prompted: tokens of requests that got a slot.
        reused: those of them that were in the prefix cache.
    """

    steps: int = 0
    rows: int = 0
    drawn: int = 0
    offered: int = 0
    accepted: int = 0
    prompted: int = 0
    reused: int = 0

    def note(self, found: Decoded) -> None:
        """Add what a decode loop did."""
        drawn, accepted = int(found.count_R.sum()), int(found.accepted_R.sum())
        self.steps += int(found.steps)
        self.rows += drawn - accepted
        self.drawn += drawn
        self.offered += int(found.offered_R.sum())
        self.accepted += accepted

    def note_admitted(self, plan: Plan) -> None:
        """Add what requests found in the prefix cache."""
        self.prompted += sum(len(at.request.tokens) for at in plan.admitted)
        self.reused += sum(at.hits for at in plan.admitted)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were right."""
        return self.accepted / max(1, self.offered)

    @property
    def accept_length(self) -> float:
        """Tokens that a pass of a row drew, the one after the last right draft counted."""
        return self.drawn / max(1, self.rows)

    @property
    def saved(self) -> float:
        """Share of a row's passes that drafts saved; without them there is one a token."""
        return self.accepted / max(1, self.drawn)


class _Flight(NamedTuple):
    """A dispatched step."""

    plan: Plan
    calls: list[Call]


class Engine:
    """Generation for one model, request by request.

    One thread steps; requests may be added and cancelled, and weights loaded, from any other meanwhile.

    Args:
        config: the model's.
        graphdef: static part of the module, from `model.decoder.split`.
        weights: of the model, plain, packed (`model.packing`) or beside an adapter (`model.lora.with_adapter`).
        settings: how it runs.
        record: what to keep for a trainer.
        tokenizer: the model's, for text, stop texts and budgets of thinking; None gives tokens alone.
        closing: what a thought ends with that is out of budget.

    Raises:
        ValueError: settings that the model, the mesh or the memory cannot do.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        weights: nnx.State,
        settings: EngineConfig = _SETTINGS,
        *,
        record: Record = _NO_RECORD,
        tokenizer: Tokenizer | None = None,
        closing: str = CLOSING,
    ):
        if record.routes and config.moe is None:
            raise ValueError("record: got routes for a model without experts, wanted none; it chooses none")
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self._take(weights)
        self.record, self.tags, self._closing = record, NO_TAGS, closing
        dtype = jax.tree.leaves(weights["embed"])[0].dtype
        self._layout = module_layout(graphdef)
        of_host = settings.of_scheduler(config, self._layout, dtype)
        given = settings.dtype_of_cache(dtype), record, _bound(weights)
        self.runner = Runner(config, graphdef, settings, of_host, *given)
        self.scheduler = Scheduler(of_host, self.runner.smaller_bucket)
        self._closed: StepFailedError | None = None
        self.metrics = Metrics()
        self._lives: dict[int, Live] = {}
        self._flights: list[_Flight] = []
        self._next = 0
        self._lock = threading.Lock()  # of all the above; not held while the device is waited for

    # --- requests ---------------------------------------------------------------------------------

    def add(
        self,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        salt: str = "",
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a request; its number.

        Args:
            tokens: of the prompt, one at least.
            sampling: how to draw. A completion also ends where the context does.
            seed: of its noise.
            salt: requests of different salts share no blocks.
            constraint: a grammar that the completion keeps to, after the thought that its prompt opens. A step then
                takes one token of every row that runs, so that others wait for the host too.

        Raises:
            ValueError: a prompt that leaves no room in the context, tokens or settings that the model does not have, or
                more than the cache can ever hold.
            StepFailedError: a step failed, and the engine could not begin anew.
        """
        if self._closed is not None:
            raise self._closed
        self._check(tokens, sampling)
        if constraint is not None:
            self._check_constrained(sampling)
        tokens = list(map(int, tokens))
        limit = sampling.limit(len(tokens), self.scheduler.config.max_model_len)
        params_of(sampling, seed=seed, limit=limit, vocab_size=self.config.vocab_size)
        opened, stream = False, None
        allowed, tags = None if constraint is None else constraint.mask(), self.tags
        if sampling.thinking_budget is not None or constraint is not None:
            tags = think_tags(self.tokenizer, self._closing) if tags is NO_TAGS else tags
            opened = opens_thought(self.tokenizer.decode(tokens[-16:], skip_special=False))
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, stop=sampling.stop, least=sampling.min_new_tokens)
        with self._lock:
            request = Request(id=self._next, tokens=tokens, max_new_tokens=limit, salt=salt)
            request.reuse = not sampling.prompt_logprobs
            request.stepwise = constraint is not None and not opened
            if self.record.routes:
                request.payload = partial(_routes_of_block, self._lives, request.id, self.settings.block_size)
            self.scheduler.add(request)
            self.tags = tags  # a request that is refused leaves nothing, or processes would not run the same
            live = Live(request=request, sampling=sampling, seed=seed, opened=opened, stream=stream)
            live.constraint, live.allowed = constraint, allowed
            self._lives[request.id] = live
            self._next += 1
        return request.id

    def _check(self, tokens: Sequence[int], sampling: SamplingConfig) -> None:
        V = self.config.vocab_size
        wrong = [of for of in tokens if not (isinstance(of, numbers.Integral) and 0 <= of < V)]
        if wrong:
            raise ValueError(f"prompt: got token {wrong[0]!r:.60}, wanted whole numbers from 0 to {V - 1}")
        for name in ("stop", "thinking_budget"):
            if self.tokenizer is None and getattr(sampling, name) not in ((), None):
                raise ValueError(f"{name}: got it for an engine without a tokenizer, wanted one with the model's")
        if self.record.support:
            refuse_unreplayable(sampling)

    def _check_constrained(self, sampling: SamplingConfig) -> None:
        if self.tokenizer is None:
            raise ValueError("constraint: got one for an engine without a tokenizer, wanted one with the model's")
        if self.record.support:
            raise ValueError("record: got support beside a constraint, wanted none; a trainer does not know it")
        if sampling.min_new_tokens:
            raise ValueError("min_new_tokens: got some beside a constraint, wanted 0; a grammar says when it may end")

    def cancel(self, id: int) -> bool:
        """End a request, of which no update comes any more; False where it does not live."""
        with self._lock:
            self._lives.pop(id, None)
            return self.scheduler.cancel(id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def load(self, weights: nnx.State, *, quantization: Quantization = "none") -> None:
        """Draw from other weights from now on; what the old ones computed, only those requests go on from that run.

        Args:
            weights: of the model.
            quantization: to pack them in; "none" takes them as they are.

        Raises:
            ValueError: an unknown quantization, or weights that are packed in another way.
        """
        weights = packed_weights(self.config, weights, quantization, self._layout)
        with self._lock:
            self._take(weights)
            self.scheduler.reset_prefix_cache()

    def _take(self, weights: nnx.State) -> None:
        """`weights` are as given, for others to read; programs multiply with `_arranged`."""
        self.weights, self._arranged = weights, arranged_weights(weights)

    def run(self) -> Iterator[Update]:
        """Steps until no request is left."""
        while self.has_work:
            yield from self.step()

    # --- a step -----------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Schedule, run, retire.

        Where the device fails at it, every request ends with the error (`Live.error`), and the engine begins anew.
        """
        with self._lock:
            plan = self.scheduler.schedule()
            self.metrics.note_admitted(plan)
            self._reuse_routes(plan)
            if not plan.empty:
                try:
                    calls = self.runner.run(self._arranged, plan, self._lives, self.tags)
                except jax.errors.JaxRuntimeError as problem:
                    return self._failed(problem)
                self._flights.append(_Flight(plan, calls))
            lag = 1 if self.settings.overlap and not plan.empty else 0
            due = [self._flights.pop(0) for _ in range(len(self._flights) - lag)]
        updates = []
        for flight in due:
            try:
                found = _fetched(flight.calls)
            except jax.errors.JaxRuntimeError as problem:
                with self._lock:
                    return updates + self._failed(problem)
            with self._lock:
                updates += self._retire(flight, found)
        return updates

    def _failed(self, problem: jax.errors.JaxRuntimeError) -> list[Update]:
        """End all requests, and begin anew; an engine that cannot is closed.

        Raises:
            JaxRuntimeError: in one of several processes, since the others are in the middle of the step.
        """
        if process_count() > 1:
            raise problem
        said = " ".join(str(problem).split())[:300]
        error = StepFailedError(
            f"a step of the engine failed on the device: {said}; if that is for want of memory, lower max_num_seqs, "
            "num_blocks or max_num_batched_tokens"
        )
        error.__cause__ = problem
        lives, self._lives, self._flights = list(self._lives.values()), {}, []
        self.scheduler = Scheduler(self.scheduler.config, self.runner.smaller_bucket)
        try:
            self.runner.renew()
        except jax.errors.JaxRuntimeError:
            self._closed = error
        for live in lives:
            live.error = error
        return [Update(of.request.id, [], of.new_text(finished=True), True, of) for of in lives]

    def _retire(self, flight: _Flight, founds: Sequence[Extended | Decoded]) -> list[Update]:
        """Tell what came of a step."""
        results: dict[int, Drawn] = {}
        for call, found in zip(flight.calls, founds, strict=True):
            for number, row in enumerate(call.rows):
                if row is not None:
                    results[row.request.id] = self._noted(row, number, found)
            if isinstance(found, Decoded):
                self.metrics.note(found)
        updates = []
        for request, tokens in self.scheduler.retire(flight.plan, results):
            live = self._lives[request.id]
            if request.finished:
                del self._lives[request.id]
            text = live.new_text(finished=request.finished)
            updates.append(Update(request.id, list(tokens), text, request.finished, live))
        return updates

    def _noted(self, row: Span | Row, number: int, found: Extended | Decoded) -> Drawn:
        live = self._lives.get(row.request.id)
        if live is None:  # cancelled, or ended, while this was in flight
            return Drawn(())
        return live.note_span(row, number, found) if isinstance(row, Span) else live.note_row(number, found)

    def _reuse_routes(self, plan: Plan) -> None:
        """Of the tokens that new requests need not compute."""
        for at in plan.admitted if self.record.routes else ():
            pool, hits = self.scheduler.cache.pools[at.shard], at.hits // self.scheduler.config.block_size
            self._lives[at.request.id].routes = [pool.payload(block) for block in at.blocks[:hits]]

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile every shape that can come, before any request; yields (done, of how many)."""
        yield from self.runner.warm_up(self._arranged, self.tags)


def _bound(weights: nnx.State) -> SingleDeviceSharding | None:
    """Where weights lie that are bound to one device, as loaded ones are."""
    leaf = jax.tree.leaves(weights)[0]
    one = isinstance(leaf, jax.Array) and leaf.committed and isinstance(leaf.sharding, SingleDeviceSharding)
    return leaf.sharding if one else None


def _fetched(calls: Sequence[Call]) -> list[Extended | Decoded]:
    """What programs gave, on the host."""
    return [jax.tree.map(np.asarray, call.found) for call in calls]


def _routes_of_block(lives: Mapping[int, Live], id: int, size: int, block: int) -> np.ndarray:
    """What a block of a request carries when it is published. The request itself is not held: that were a cycle."""
    return lives[id].routes_of(block * size, (block + 1) * size)
