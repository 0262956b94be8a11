"""Plans run on the device: an engine's state there, its tables, and the arrays that its programs are given."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.engine_config import EngineConfig, row_buckets, rows_at_once, span_buckets
from deepseek_jax.generation.live import Live
from deepseek_jax.generation.programs import Admission, Decoded, Extended, Programs, Spans
from deepseek_jax.generation.requests import Admitted, Plan, Row, Span
from deepseek_jax.generation.scheduler import SchedulerConfig
from deepseek_jax.generation.slots import empty_params, empty_state, params_of, state_of
from deepseek_jax.generation.thinking import ThinkTags
from deepseek_jax.sharding import module_layout

_programs = lru_cache(maxsize=8)(Programs)  # what is compiled serves the next engine


class Call(NamedTuple):
    """A dispatched program: whose rows they are, and what it will have given."""

    rows: list[Span | Row | None]
    found: Extended | Decoded


class Runner:
    """Runs plans.

    Args:
        config: the model's.
        graphdef: static part of the module.
        settings: of the engine.
        of_host: what the scheduler goes by.
        dtype: of the cache.
        record: what to keep for a trainer.
        bound: where the weights lie, if they are bound to one device. They bind what programs give: a state that was
            not bound before would let the first programs after a warm-up be compiled once more.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        settings: EngineConfig,
        of_host: SchedulerConfig,
        dtype: jnp.dtype,
        record: Record,
        bound: SingleDeviceSharding | None = None,
    ):
        self.config, self.shards = config, of_host.num_shards
        slots = of_host.max_num_seqs
        table = -(-(of_host.max_model_len + of_host.draft_tokens) // of_host.block_size)
        self.programs = _programs(
            config,
            graphdef,
            slots=slots,
            table=table,
            steps=of_host.decode_steps,
            length=of_host.max_model_len,
            dtype=dtype,
            drafts=settings.drafts,
            draft_tokens=of_host.draft_tokens,
            record=record,
        )
        self._row_buckets = row_buckets(slots // self.shards, settings.batch_sizes)
        parts = module_layout(graphdef).parts("tokens")
        least = -(-16 // parts) * parts
        tokens = of_host.max_num_batched_tokens // self.shards
        rows = slots // self.shards, least, settings.batch_sizes
        self._span_buckets = span_buckets(of_host.chunk, tokens, *rows)
        self._table = np.zeros((slots, table), np.int32)
        self._of_state = self.shards * of_host.num_blocks, of_host.block_size
        self._bound = bound
        self.renew()

    def renew(self) -> None:
        """The state in which nobody has a slot, in the place of one that a failed program may have taken with it."""
        self.state = None  # before there is another
        state = self.programs.first_state(*self._of_state)
        self.state = state if self._bound is None else jax.device_put(state, self._bound)

    def run(self, weights: nnx.State, plan: Plan, lives: Mapping[int, Live], tags: ThinkTags) -> list[Call]:
        """Dispatch the programs of a step.

        Args:
            weights: of the model.
            plan: of the step.
            lives: every request that runs, by its number.
            tags: of thoughts.
        """
        self._place(plan, lives, tags)
        calls = [self._extend(weights, width, rows, lives, tags) for width, rows in self._grouped(plan.spans)]
        if plan.rows:
            calls.append(self._decode(weights, plan, tags))
        for call in calls:
            jax.tree.map(lambda a: a.copy_to_host_async(), call.found)
        return calls

    def _place(self, plan: Plan, lives: Mapping[int, Live], tags: ThinkTags) -> None:
        """New requests into their slots, and further blocks into tables."""
        for at in plan.admitted:
            self._table[at.slot] = 0
            self._table[at.slot, : len(at.blocks)] = at.blocks
        grown = [at for at in plan.grown if at.request.slot is not None]
        for at in grown:
            self._table[at.request.slot, at.start : at.start + len(at.blocks)] = at.blocks
        if plan.admitted:
            self.state = self.programs.admit(self.state, self._admission(plan.admitted, lives, tags))
        if grown:
            slots = np.full(self.programs.slots, self.programs.slots, np.int32)
            slots[: len(grown)] = [at.request.slot for at in grown]
            tables = self._table[np.minimum(slots, self.programs.slots - 1)]
            self.state = self.programs.retable(self.state, slots, tables)
        self._constrain([lives[row.request.id] for row in plan.rows if row.request.id in lives])

    def _constrain(self, running: Sequence[Live]) -> None:
        """What the grammars of rows let come next, where that has changed."""
        changed = [live for live in running if live.allowed_changed]
        for at in range(0, len(changed), self.programs.slots):
            rows = changed[at : at + self.programs.slots]
            size = next(n for n in self._admission_buckets if n >= len(rows))
            slots = np.full(size, self.programs.slots, np.int32)
            slots[: len(rows)] = [live.request.slot for live in rows]
            allowed = np.zeros((size, rows[0].allowed.size), np.uint32)
            allowed[: len(rows)] = [live.allowed for live in rows]
            self.state = self.programs.constrain(self.state, slots, allowed)
        for live in changed:
            live.allowed_changed = False

    def _admission(self, admitted: Sequence[Admitted], lives: Mapping[int, Live], tags: ThinkTags) -> Admission:
        rows = [self._admitted(at, lives[at.request.id], tags) for at in admitted]
        size = next(n for n in self._admission_buckets if n >= len(rows))
        blank = rows[0]._replace(slots_R=np.int32(self.programs.slots))
        return jax.tree.map(lambda *parts: np.stack(parts), *rows, *[blank] * (size - len(rows)))

    def _admitted(self, at: Admitted, live: Live, tags: ThinkTags) -> Admission:
        request, V = at.request, self.config.vocab_size
        prompt, drawn = request.tokens[: request.prompt_length], request.tokens[request.prompt_length :]
        of_thought = {"opened": live.opened, "budget": live.sampling.thinking_budget, "tags": tags}
        history = np.zeros(self.programs.history, np.int32)
        history[: len(request.tokens)] = request.tokens[: history.size]
        limits = {"limit": request.max_new_tokens, "constrained": live.constraint is not None}
        params = params_of(live.sampling, seed=live.seed, vocab_size=V, **limits)
        drawing = state_of(prompt, drawn, vocab_size=V, allowed=live.allowed, **of_thought)
        live.allowed_changed = False
        return Admission(np.int32(at.slot), self._table[at.slot], history, params, drawing)

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
                size = rows_at_once(sizes, max(map(len, left)), width)
                yield width, [row for of in left for row in _filled(of[:size], size)]
                left = [of[size:] for of in left]

    def _extend(self, weights, width: int, rows: list[Span | None], lives: Mapping[int, Live], tags) -> Call:
        R, S = len(rows), self.programs.slots
        slots, start, count, follows = (np.full(R, value, np.int32) for value in (S, 0, 0, 0))
        tokens, wanted = np.zeros((R, width), np.int32), False
        for row, span in enumerate(rows):
            if span is not None:
                known, end = span.request.tokens, span.start + span.count
                slots[row], start[row], count[row] = span.request.slot, span.start, span.count
                tokens[row, : span.count] = known[span.start : end]
                follows[row] = -1 if span.last else known[end]
                wanted |= lives[span.request.id].sampling.prompt_logprobs
        spans = Spans(slots, tokens, start, count, follows)
        self.state, found = self.programs.extend(weights, self.state, spans, tags, np.bool_(wanted))
        return Call(rows, found)

    def _decode(self, weights, plan: Plan, tags) -> Call:
        by_shard = [[row for row in plan.rows if row.request.shard == shard] for shard in range(self.shards)]
        size = self._bucket(max(map(len, by_shard)))
        rows = [row for of in by_shard for row in _filled(of, size)]
        slots = np.array([self.programs.slots if row is None else row.request.slot for row in rows], np.int32)
        counts = np.int32(plan.steps), np.int32(plan.until)
        self.state, found = self.programs.decode_loop(weights, self.state, slots, *counts, tags)
        return Call(rows, found)

    def _bucket(self, rows: int) -> int:
        return next(n for n in self._row_buckets if n >= rows)

    def smaller_bucket(self, rows: int) -> int:
        """How many live rows, over all shards, let a loop of so many end for one with fewer."""
        return max((n for n in self._row_buckets if n * self.shards < rows), default=0)

    def warm_up(self, weights: nnx.State, tags: ThinkTags) -> Iterator[tuple[int, int]]:
        """Compile every shape that can come, before any request; yields (done, of how many)."""
        S, M = self.programs.slots, self._table.shape[1]
        spans = [(rows * self.shards, width) for rows, width in self._span_buckets]
        rows = [size * self.shards for size in self._row_buckets]
        of_all = len(spans) + len(rows) + 2 * len(self._admission_buckets) + 1
        nobody = lambda size: np.full(size, S, np.int32)
        done = 0
        for size in self._admission_buckets:
            params = jax.tree.map(np.asarray, empty_params(size, self.config.vocab_size))
            drawing = jax.tree.map(np.asarray, empty_state(size, self.config.vocab_size))
            zeros = lambda width, size=size: np.zeros((size, width), np.int32)
            blank = Admission(nobody(size), zeros(M), zeros(self.programs.history), params, drawing)
            self.state = self.programs.admit(self.state, blank)
            yield (done := done + 1), of_all
            self.state = self.programs.constrain(self.state, nobody(size), drawing.allowed)
            yield (done := done + 1), of_all
        self.state = self.programs.retable(self.state, nobody(S), np.zeros((S, M), np.int32))
        yield (done := done + 1), of_all
        for size, width in spans:
            zero = np.zeros(size, np.int32)
            blank = Spans(nobody(size), np.zeros((size, width), np.int32), zero, zero, zero)
            self.state, _ = self.programs.extend(weights, self.state, blank, tags, np.bool_(False))
            yield (done := done + 1), of_all
        for size in rows:
            none = np.int32(1), np.int32(0)
            self.state, _ = self.programs.decode_loop(weights, self.state, nobody(size), *none, tags)
            yield (done := done + 1), of_all

    @property
    def compiled(self) -> int:
        """Programs compiled so far, each for its shapes; after a warm-up it stays what it is."""
        of = self.programs
        every = of.admit, of.retable, of.constrain, of.extend, of.decode_loop
        return sum(program._cache_size() for program in every)


def _filled(rows: list, size: int) -> list:
    return [*rows, *[None] * (size - len(rows))]
