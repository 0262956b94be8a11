"""The engine: continuous batching over a paged cache, in steps of schedule, run and retire.

Requests come and go at any time. A step computes prompts in chunks and draws tokens for all that run, whatever each of
them asked for, and the device never waits for the host: with overlap a step is planned and dispatched before the one
ahead of it has come back. A token is a function of its sequence, its seed and its position alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.engine_config import EngineConfig, row_buckets, span_buckets
from deepseek_jax.generation.programs import Admission, Decoded, Extended, Programs, Spans
from deepseek_jax.generation.requests import Drawn, Plan, Request, Row, Span
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.scheduler import Scheduler
from deepseek_jax.generation.slots import empty_params, empty_state, params_of, state_of
from deepseek_jax.generation.thinking import NO_TAGS, think_tags
from deepseek_jax.sharding import module_layout
from deepseek_jax.text.stream import TextStream
from deepseek_jax.text.think import opens_thought
from deepseek_jax.text.tokenizer import Tokenizer

_programs = lru_cache(maxsize=8)(Programs)  # what is compiled serves the next engine
CLOSING = "\n"
"""What a thought ends with, before `</think>`, that is out of budget."""
_SETTINGS, _NO_RECORD = EngineConfig(), Record()


class NonFiniteLogitsError(ValueError):
    """A model's logits are no finite numbers, so that nothing can be drawn from them."""


@dataclass(kw_only=True, eq=False)
class Live:
    """What the host keeps of a request: its settings, and by token what came of it.

    opened: the prompt ended in `<think>`. text: the completion's so far, before any stop text; stream makes it, told is
    how much of it updates have had. routes: of the tokens that were fed, prompt and completion. prompt_logprobs: of the
    prompt's tokens but the first.
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


class Update(NamedTuple):
    """What a step gave a request: further tokens and text, and whether they are the last."""

    id: int
    tokens: list[int]
    text: str
    finished: bool
    sequence: Live


class _Call(NamedTuple):
    """A dispatched program: whose rows they are, and what it will have given."""

    rows: list[Span | Row | None]
    found: Extended | Decoded


class _Flight(NamedTuple):
    """A dispatched step."""

    plan: Plan
    calls: list[_Call]


class Engine:
    """Generation for one model, request by request.

    Args:
        config: the model's.
        graphdef: static part of the module, from `model.decoder.split`.
        weights: of the model, plain or beside an adapter (`model.lora.with_adapter`).
        settings: how it runs.
        dtype: of the cache; None takes that of the weights.
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
        dtype: jnp.dtype | None = None,
        record: Record = _NO_RECORD,
        tokenizer: Tokenizer | None = None,
        closing: str = CLOSING,
    ):
        self.config, self.settings, self.weights, self.tokenizer = config, settings, weights, tokenizer
        self.tags, self._closing = NO_TAGS, closing
        self.layout = module_layout(graphdef)
        dtype = dtype or jax.tree.leaves(weights)[0].dtype
        of_host = settings.of_scheduler(config, self.layout, dtype)
        self.scheduler = Scheduler(of_host, self._smaller_bucket)
        self.shards, slots = of_host.num_shards, of_host.max_num_seqs
        table = -(-(of_host.max_model_len + of_host.draft_tokens) // of_host.block_size)
        self.programs = _programs(
            config,
            graphdef,
            slots=slots,
            table=table,
            steps=of_host.decode_steps,
            length=of_host.max_model_len,
            drafts=settings.drafts,
            draft_tokens=of_host.draft_tokens,
            record=record,
        )
        self.record = record
        self._row_buckets = row_buckets(slots // self.shards, settings.batch_sizes)
        least = max(16, self.layout.parts("tokens"))
        tokens = of_host.max_num_batched_tokens // self.shards
        rows = slots // self.shards, least, settings.batch_sizes
        self._span_buckets = span_buckets(of_host.chunk, tokens, *rows)
        self._table = np.zeros((slots, table), np.int32)
        self.state = self.programs.first_state(self.shards * of_host.num_blocks, of_host.block_size, dtype)
        self._sequences: dict[int, Live] = {}
        self._flights: list[_Flight] = []
        self._next = 0
        self.steps = 0

    # --- requests ---------------------------------------------------------------------------------

    def add(self, tokens: Sequence[int], sampling: SamplingConfig, *, seed: int, salt: str = "") -> int:
        """Queue a request; its number.

        Args:
            tokens: of the prompt, one at least.
            sampling: how to draw. A completion also ends where the context does.
            seed: of its noise.
            salt: requests of different salts share no blocks.

        Raises:
            ValueError: a prompt that leaves no room in the context, tokens or settings that the model does not have, or
                more than the cache can ever hold.
        """
        context = self.scheduler.config.max_model_len
        limit = sampling.limit(len(tokens), context)
        wrong = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise ValueError(f"prompt: got token {wrong[0]}, wanted 0 to {self.config.vocab_size - 1}")
        for name in ("stop", "thinking_budget"):
            if self.tokenizer is None and getattr(sampling, name) not in ((), None):
                raise ValueError(f"{name}: got it for an engine without a tokenizer, wanted one with the model's")
        params_of(sampling, seed=seed, limit=limit, vocab_size=self.config.vocab_size)
        request = Request(id=self._next, tokens=list(tokens), max_new_tokens=limit, salt=salt)
        request.reuse = not sampling.prompt_logprobs
        opened, stream = False, None
        if sampling.thinking_budget is not None:
            self.tags = think_tags(self.tokenizer, self._closing) if self.tags is NO_TAGS else self.tags
            opened = opens_thought(self.tokenizer.decode(list(tokens[-16:]), skip_special=False))
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, stop=sampling.stop, least=sampling.min_new_tokens)
        sequence = Live(request=request, sampling=sampling, seed=seed, opened=opened, stream=stream)
        if self.record.routes:
            request.payload = lambda block: self._routes_of_block(sequence, block)
        self.scheduler.add(request)
        self._sequences[request.id] = sequence
        self._next += 1
        return request.id

    def cancel(self, id: int) -> bool:
        """End a request; False where it does not live any more."""
        self._sequences.pop(id, None)
        return self.scheduler.cancel(id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def load(self, weights: nnx.State) -> None:
        """Draw from other weights from now on; nothing that the old ones computed is reused."""
        self.weights = weights
        self.scheduler.reset_prefix_cache()

    def run(self) -> Iterator[Update]:
        """Steps until no request is left."""
        while self.has_work:
            yield from self.step()

    # --- a step -----------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Schedule, run, retire."""
        plan = self.scheduler.schedule()
        if not plan.empty:
            self._flights.append(self._run(plan))
            self.steps += 1
        lag = 1 if self.settings.overlap and not plan.empty else 0
        return [update for _ in range(len(self._flights) - lag) for update in self._retire(self._flights.pop(0))]

    def _run(self, plan: Plan) -> _Flight:
        """Dispatch the programs of a step."""
        self._admit(plan)
        calls = [self._extend(width, rows) for width, rows in self._grouped(plan.spans)]
        if plan.rows:
            calls.append(self._decode(plan))
        for call in calls:
            jax.tree.map(lambda a: a.copy_to_host_async(), call.found)
        return _Flight(plan, calls)

    def _admit(self, plan: Plan) -> None:
        admitted = plan.admitted
        for at in admitted:
            self._table[at.slot] = 0
            self._table[at.slot, : len(at.blocks)] = at.blocks
        for at in plan.grown:
            if at.request.slot is not None:
                self._table[at.request.slot, at.start : at.start + len(at.blocks)] = at.blocks
        if admitted:
            self.state = self.programs.admit(self.state, self._admission([(at.slot, at.request) for at in admitted]))
        changed = sorted({at.request.slot for at in plan.grown if at.request.slot is not None})
        if changed:
            slots = np.full(self.programs.slots, self.programs.slots, np.int32)
            slots[: len(changed)] = changed
            self.state = self.programs.retable(self.state, slots, self._table[np.minimum(slots, len(slots) - 1)])

    def _admission(self, new: list[tuple[int, Request]]) -> Admission:
        S, V = self.programs.slots, self.config.vocab_size
        size = next(n for n in self._admission_buckets if n >= len(new))
        rows = []
        for slot, request in new:
            of = self._sequences[request.id]
            self._reuse_routes(of)
            drawn = request.tokens[request.prompt_length :]
            drawing = state_of(
                request.tokens[: request.prompt_length],
                drawn,
                opened=of.opened,
                budget=of.sampling.thinking_budget,
                vocab_size=V,
                tags=self.tags,
            )
            params = params_of(of.sampling, seed=of.seed, limit=request.max_new_tokens, vocab_size=V)
            history = np.zeros(self.programs.history, np.int32)
            history[: len(request.tokens)] = request.tokens[: history.size]
            rows.append(Admission(np.int32(slot), self._table[slot], history, params, drawing))
        blank = rows[0]._replace(slots_R=np.int32(S))
        rows += [blank] * (size - len(rows))
        return jax.tree.map(lambda *parts: np.stack(parts), *rows)

    @property
    def _admission_buckets(self) -> list[int]:
        return sorted({1, min(8, self.programs.slots), self.programs.slots})

    def _grouped(self, spans: Sequence[Span]) -> Iterator[tuple[int, list[Span | None]]]:
        """Spans of about one length together, each in a row of its shard, as many as a compiled shape has."""
        widths = sorted({width for _, width in self._span_buckets})
        for width, shorter in zip(widths, [0, *widths], strict=False):
            sizes = [size for size, of in self._span_buckets if of == width]
            left = [
                [s for s in spans if s.request.shard == shard and shorter < s.count <= width]
                for shard in range(self.shards)
            ]
            while any(left):
                size = next((n for n in sizes if n >= max(map(len, left))), sizes[-1])
                yield width, [row for of in left for row in _filled(of[:size], size)]
                left = [of[size:] for of in left]

    def _extend(self, width: int, rows: list[Span | None]) -> _Call:
        R, S = len(rows), self.programs.slots
        slots, start, count, follows = (np.full(R, value, np.int32) for value in (S, 0, 0, 0))
        tokens, wanted = np.zeros((R, width), np.int32), False
        for row, span in enumerate(rows):
            if span is not None:
                known, end = span.request.tokens, span.start + span.count
                slots[row], start[row], count[row] = span.request.slot, span.start, span.count
                tokens[row, : span.count] = known[span.start : end]
                follows[row] = -1 if span.last else known[end]
                wanted |= self._sequences[span.request.id].sampling.prompt_logprobs
        spans = Spans(slots, tokens, start, count, follows)
        self.state, found = self.programs.extend(self.weights, self.state, spans, self.tags, np.bool_(wanted))
        return _Call(rows, found)

    def _decode(self, plan: Plan) -> _Call:
        by_shard = [[row for row in plan.rows if row.request.shard == shard] for shard in range(self.shards)]
        size = self._bucket(max(map(len, by_shard)))
        rows = [row for of in by_shard for row in _filled(of, size)]
        slots = np.array([self.programs.slots if row is None else row.request.slot for row in rows], np.int32)
        counts = np.int32(plan.steps), np.int32(plan.until)
        self.state, found = self.programs.decode_loop(self.weights, self.state, slots, *counts, self.tags)
        return _Call(rows, found)

    def _bucket(self, rows: int) -> int:
        return next(n for n in self._row_buckets if n >= rows)

    def _smaller_bucket(self, rows: int) -> int:
        """How many live rows, over all shards, let a loop of so many end for one with fewer."""
        return max((n for n in self._row_buckets if n * self.shards < rows), default=0)

    def _retire(self, flight: _Flight) -> list[Update]:
        """Wait for a step, and tell what came of it."""
        results: dict[int, Drawn] = {}
        for call in flight.calls:
            found = jax.tree.map(_on_host, call.found)
            note = self._note_span if isinstance(found, Extended) else self._note_row
            for row, of in enumerate(call.rows):
                if of is not None:
                    sequence = self._sequences.get(of.request.id)
                    results[of.request.id] = note(sequence, of, row, found)
        updates = []
        for request, tokens in self.scheduler.retire(flight.plan, results):
            sequence = self._sequences[request.id]
            if request.finished:
                del self._sequences[request.id]
                sequence.text += sequence.stream.finish() if sequence.stream is not None else ""
            new, sequence.told = sequence.text[sequence.told :], len(sequence.text)
            updates.append(Update(request.id, list(tokens), new, request.finished, sequence))
        return updates

    def _note_span(self, sequence: Live | None, span: Span, row: int, found: Extended) -> Drawn:
        if sequence is None:  # cancelled, or ended, while this was in flight
            return Drawn((), False)
        if self.record.routes:
            sequence.routes.append(found.routes_RTLA[row, : span.count])
        if sequence.sampling.prompt_logprobs:
            inside = sequence.request.prompt_length - 1 - span.start
            sequence.prompt_logprobs += found.logprobs_RT[row, : max(0, min(span.count, inside))].tolist()
        if not span.last:
            return Drawn((), False)
        return self._note(sequence, jax.tree.map(lambda a: a[row][None], found.drawn))

    def _note_row(self, sequence: Live | None, of: Row, row: int, found: Decoded) -> Drawn:
        if sequence is None:
            return Drawn((), False)
        count = found.count_R[row]
        if self.record.routes:
            sequence.routes.append(found.routes_RNLA[row, :count])
        return self._note(sequence, jax.tree.map(lambda a: a[row, :count], found.drawn))

    def _note(self, sequence: Live, drawn: Any) -> Drawn:
        """Keep what was drawn for a sequence, [count, ...] in every part."""
        logprobs = drawn.logprob_R
        if not np.all(np.isfinite(logprobs)):
            raise NonFiniteLogitsError(
                f"request {sequence.request.id}: the model's logits are no finite numbers; its weights are damaged, or "
                "too large to compute with"
            )
        tokens, stopped = drawn.token_R.tolist(), bool(drawn.stopped_R.any())
        if sequence.stream is not None:
            before = sequence.stream.tokens
            sequence.text += sequence.stream.feed(tokens)
            if sequence.stream.stopped is not None:
                stopped, count = True, sequence.stream.tokens - before
                tokens, drawn = tokens[:count], jax.tree.map(lambda a: a[:count], drawn)
        sequence.logprobs += drawn.logprob_R.tolist()
        if wanted := sequence.sampling.top_logprobs:
            best = zip(drawn.top_ids_RK[:, :wanted], drawn.top_logprobs_RK[:, :wanted], strict=True)
            sequence.top += best
        if self.record.support:
            sequence.support.append(drawn.support_RW)
            sequence.penalised.append(drawn.penalised_RW)
        return Drawn(tokens, stopped)

    # --- routes of blocks that are reused ---------------------------------------------------------

    def _routes_of_block(self, sequence: Live, block: int) -> np.ndarray:
        size = self.scheduler.config.block_size
        return np.concatenate(sequence.routes)[block * size : (block + 1) * size]

    def _reuse_routes(self, sequence: Live) -> None:
        """Of the tokens that an admitted request need not compute."""
        request = sequence.request
        if self.record.routes:
            pool = self.scheduler.cache.pools[request.shard]
            hits = request.blocks[: request.dispatched // self.scheduler.config.block_size]
            sequence.routes = [pool.payload(block) for block in hits]

    # --- warming up -------------------------------------------------------------------------------

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile every shape that can come, before any request; yields (done, of how many)."""
        S, M = self.programs.slots, self._table.shape[1]
        spans = [(rows * self.shards, width) for rows, width in self._span_buckets]
        rows = [size * self.shards for size in self._row_buckets]
        of_all = len(spans) + len(rows) + len(self._admission_buckets) + 1
        nobody = lambda size: np.full(size, S, np.int32)
        done = 0
        for size in self._admission_buckets:
            params = jax.tree.map(np.asarray, empty_params(size, self.config.vocab_size))
            drawing = jax.tree.map(np.asarray, empty_state(size, self.config.vocab_size))
            zeros = lambda width, size=size: np.zeros((size, width), np.int32)
            blank = Admission(nobody(size), zeros(M), zeros(self.programs.history), params, drawing)
            self.state = self.programs.admit(self.state, blank)
            yield (done := done + 1), of_all
        self.state = self.programs.retable(self.state, nobody(S), np.zeros((S, M), np.int32))
        yield (done := done + 1), of_all
        for size, width in spans:
            zero = np.zeros(size, np.int32)
            blank = Spans(nobody(size), np.zeros((size, width), np.int32), zero, zero, zero)
            self.state, _ = self.programs.extend(self.weights, self.state, blank, self.tags, np.bool_(False))
            yield (done := done + 1), of_all
        for size in rows:
            none = np.int32(1), np.int32(0)
            self.state, _ = self.programs.decode_loop(self.weights, self.state, nobody(size), *none, self.tags)
            yield (done := done + 1), of_all

    @property
    def compiled(self) -> int:
        """Programs compiled so far, each for its shapes; after a warm-up it stays what it is."""
        of = self.programs
        return sum(f._cache_size() for f in (of.admit, of.retable, of.extend, of.decode_loop))


def _filled(rows: list, size: int) -> list:
    return [*rows, *[None] * (size - len(rows))]


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array)
