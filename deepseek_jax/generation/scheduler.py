"""What runs in the next engine step: every request's computed tokens catch up with its known ones, under one budget.

Plain Python without clock or randomness: processes that call alike schedule alike.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek_jax.generation.cache_manager import CacheManager
from deepseek_jax.generation.requests import Admitted, Drawn, Grown, Plan, Progress, Request, Row, Span


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How many run, on what memory.

    Args:
        max_num_seqs: slots of the device's state, over all shards.
        max_num_batched_tokens: budget of a step in tokens; a decode row costs 1 + draft_tokens.
        chunk: most prompt tokens of one request a step.
        num_blocks: of each shard's pool, the null block counted.
        block_size: tokens a block.
        max_model_len: most tokens of a request, prompt included.
        num_shards: pools; slots are split among them evenly, in order.
        prefix_caching: reuse blocks whose tokens are the same.
        admission: "reserve" admits a request once there is room for its last token, so that none is ever preempted;
            "preempt" once there is room for its known tokens, and takes the youngest one's blocks when they run out.
        decode_steps: most steps of one decode loop.
        draft_tokens: drafts that a decode step verifies beside each row's latest token.
        mtp: the cache has entries of an MTP module, each of which depends on the token after its own; so a block is
            hit only where the token after it is the same too.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    chunk: int
    num_blocks: int
    block_size: int
    max_model_len: int
    num_shards: int = 1
    prefix_caching: bool = True
    admission: Literal["reserve", "preempt"] = "reserve"
    decode_steps: int = 1
    draft_tokens: int = 0
    mtp: bool = False

    def __post_init__(self) -> None:
        seqs, shards, row = self.max_num_seqs, self.num_shards, 1 + self.draft_tokens
        checks = {
            "draft_tokens": (self.draft_tokens >= 0, "0 (none) or more"),
            "num_shards": (shards >= 1, "at least 1"),
            "max_num_seqs": (shards >= 1 and seqs >= 1 and seqs % shards == 0, f"a multiple of num_shards, {shards}"),
            "max_num_batched_tokens": (
                self.max_num_batched_tokens >= seqs * row,
                f"at least {seqs * row}, {row} for each of {seqs} decode rows",
            ),
            "chunk": (self.chunk >= 1, "at least 1"),
            "num_blocks": (self.num_blocks >= 2, "2 or more; block 0 is never given"),
            "block_size": (self.block_size >= 1, "at least 1"),
            "max_model_len": (self.max_model_len >= 1, "at least 1"),
            "admission": (self.admission in ("reserve", "preempt"), '"reserve" or "preempt"'),
            "decode_steps": (self.decode_steps >= 1, "at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")


class Scheduler:
    """Waiting and running requests, and the blocks they hold.

    An engine step is schedule, run, retire. With overlap a plan is made and dispatched before the one ahead of it
    retires: what is in flight is then counted at its most, and results say what it was. Plans retire in order.

    Source: vLLM v1, vllm/v1/core/sched/scheduler.py.

    Args:
        config: how many run, on what memory.
        smaller_bucket: how many live rows let a decode loop of so many rows end early, for the next one to run with
            fewer; by default it goes on until none lives.
    """

    def __init__(self, config: SchedulerConfig, smaller_bucket: Callable[[int], int] = lambda rows: 0) -> None:
        self.config, self.smaller_bucket = config, smaller_bucket
        self.cache = CacheManager(
            num_shards=config.num_shards,
            max_num_seqs=config.max_num_seqs,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            caching=config.prefix_caching,
            mtp=config.mtp,
        )
        self.waiting: list[Request] = []  # both in order of arrival
        self.running: list[Request] = []
        self._live: dict[int, Request] = {}
        self._plans: deque[Plan] = deque()
        self._arrived = 0

    @property
    def has_work(self) -> bool:
        """Any request lives, or any plan has still to retire."""
        return bool(self._live or self._plans)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it has no token, its id lives, or it could never fit.
        """
        config = self.config
        if request.id in self._live:
            raise ValueError(f"request {request.id}: got an id that another request has, wanted a new one")
        if not request.tokens:
            raise ValueError(f"request {request.id}: got no token, wanted at least one")
        if request.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {request.max_new_tokens}, wanted 0 (compute the prompt) or more")
        if request.limit > config.max_model_len:
            raise ValueError(
                f"request {request.id}: got {request.prompt_length} + {request.max_new_tokens} new tokens, wanted at "
                f"most {config.max_model_len} (max_model_len); shorten the prompt or lower max_new_tokens"
            )
        blocks = self.cache.blocks_of(request.limit + config.draft_tokens)
        if blocks > config.num_blocks - 1:
            raise ValueError(
                f"request {request.id}: got {request.limit} tokens, {blocks} blocks, wanted at most "
                f"{config.num_blocks - 1} blocks; raise num_blocks or lower max_new_tokens"
            )
        request.priority, self._arrived = self._arrived, self._arrived + 1
        self._live[request.id] = request
        self.waiting.append(request)

    def cancel(self, id: int) -> bool:
        """End a request; what is in flight for it is dropped. False where it does not live (any more)."""
        request = self._live.pop(id, None)
        if request is None:
            return False
        request.cancelled = True
        self._leave(request)
        return True

    def reset_prefix_cache(self) -> None:
        """Forget all published blocks, as when weights change."""
        self.cache.reset_prefix_cache()

    def schedule(self) -> Plan:
        """The next step. It counts as dispatched: run it, and `retire` it with what came of it."""
        config, grown, preempted, spans = self.config, [], [], []
        live = [request for request in self.running if request.decoding and request.known < request.limit]
        rows = [request for request in live if self._has_blocks(request, grown, preempted)]
        budget = config.max_num_batched_tokens - len(rows) * self._row
        for request in self.running:
            budget -= self._extend(request, budget, spans)
        admitted, awaiting = [], False
        if len(rows) == len(live) and not preempted:  # else there is no room
            admitted, awaiting = self._admit(budget, spans)
        steps = until = 0
        if rows:
            needed = max(request.limit - request.known for request in rows)
            one = spans or awaiting or any(request.stepwise for request in rows)
            steps = 1 if one else min(config.decode_steps, needed)
            until = len(rows) - 1 if self.waiting else self.smaller_bucket(len(rows))
        plan = Plan(
            spans=tuple(spans),
            rows=tuple(Row(request, steps * self._row) for request in rows),
            steps=steps,
            until=until,
            admitted=tuple(admitted),
            grown=tuple(grown),
            preempted=tuple(preempted),
        )
        self._dispatch(plan)
        return plan

    def retire(self, plan: Plan, results: Mapping[int, Drawn]) -> list[Progress]:
        """Take the results of the oldest dispatched plan; one that is empty needs not be retired.

        What was in flight for a request when it was preempted is kept: it was drawn from blocks that were there, and
        the request does not start anew before it is known. What was for one that ended meanwhile is dropped.

        Args:
            plan: as `schedule` gave it.
            results: by request id, what was drawn for each row and each last span.

        Returns:
            Every request that gained tokens or ended by this plan.
        """
        if plan.empty:
            return []
        oldest = self._plans.popleft()
        assert plan is oldest, "plans retire in the order in which they were made"
        progress = []
        for span in plan.spans:
            drawn = results.get(span.request.id) if span.last else Drawn(())
            progress += self._retire(span.request, int(span.last), drawn, span.start + span.count)
        for request, most in plan.rows:
            progress += self._retire(request, most, results.get(request.id), None)
        return progress

    @property
    def _row(self) -> int:
        return 1 + self.config.draft_tokens

    def _has_blocks(self, request: Request, grown: list[Grown], preempted: list[Request]) -> bool:
        """Blocks for all that a decode loop may write of a row, the youngest requests preempted for them if need be.

        The youngest itself waits with what it has: an older one can take that, and goes on in any case.
        """
        if request.slot is None:  # preempted for an older one just now
            return False
        config = self.config
        latest = min(request.known + (config.decode_steps - 1) * self._row, request.limit - 1)
        missing = self.cache.missing(request, latest + config.draft_tokens)
        if missing == 0:
            return True
        while not self.cache.is_coming(request.shard, missing):
            victim = next(of for of in reversed(self.running) if of.shard == request.shard)
            if victim is request:
                return False
            self._preempt(victim)
            preempted.append(victim)
        start = len(request.blocks)
        fresh = self.cache.grow(request, missing)
        if fresh is None:  # the victims' blocks are not there yet
            return False
        grown.append(Grown(request, start, tuple(fresh)))
        return True

    def _preempt(self, request: Request) -> None:
        """Its blocks go; its tokens, drawn ones too, stay known and are computed anew."""
        self.running.remove(request)
        self.cache.leave(request)
        request.computed = 0
        request.decoding = False
        request.preemptions += 1
        insort(self.waiting, request, key=lambda of: of.priority)

    def _extend(self, request: Request, budget: int, spans: list[Span]) -> int:
        """Compute what the budget allows of a request's known tokens; how many that is."""
        count = min(self.config.chunk, budget, len(request.tokens) - request.dispatched)
        if request.decoding or count <= 0:
            return 0
        ends = request.dispatched + count == len(request.tokens)
        spans.append(Span(request, request.dispatched, count, last=ends and request.known < request.limit))
        return count

    def _admit(self, budget: int, spans: list[Span]) -> tuple[list[Admitted], bool]:
        """Start waiting requests in order of arrival; and whether one awaits a block that another one computes."""
        admitted, awaiting, index = [], False, 0
        while budget > 0 and index < len(self.waiting) and self.cache.has_slot:
            request = self.waiting[index]
            if not self.cache.still_awaits(request):
                reserved = request.limit + self.config.draft_tokens
                tokens = reserved if self.config.admission == "reserve" else len(request.tokens)
                place = self.cache.place(request, tokens)
                if place is None or request.plans:  # those behind it would take what it waits for
                    break
                if not self.cache.must_await(request, place):
                    self.cache.admit(request, place, tokens)
                    self.running.append(self.waiting.pop(index))
                    hits = request.dispatched
                    admitted.append(Admitted(request, request.slot, request.shard, tuple(request.blocks), hits))
                    budget -= self._extend(request, budget, spans)
                    continue
            awaiting, index = True, index + 1
        self.running.sort(key=lambda of: of.priority)
        return admitted, awaiting

    def _dispatch(self, plan: Plan) -> None:
        if plan.empty:
            return
        self._plans.append(plan)
        for span in plan.spans:
            span.request.plans += 1
            span.request.dispatched += span.count
            span.request.decoding = span.last
            span.request.in_flight += span.last
        for request, most in plan.rows:
            request.plans += 1
            request.in_flight += most

    def _retire(self, request: Request, most: int, drawn: Drawn | None, computed: int | None) -> list[Progress]:
        """Step a request from its most to its true tokens."""
        request.plans -= 1
        request.in_flight -= most
        progress = []
        if not request.cancelled and not request.finished:
            assert drawn is not None, f"request {request.id} has no result"
            request.tokens.extend(drawn.tokens)
            assert len(drawn.tokens) <= most and len(request.tokens) <= request.limit, "more was drawn than planned"
            request.stopped = drawn.stopped
            if request.slot is not None:  # else its blocks went
                # nothing was computed for the latest token, nor for drafts that were not drawn
                request.computed = len(request.tokens) - 1 if computed is None else computed
                self.cache.publish(request)
            drew_all = request.max_new_tokens > 0 or request.computed == request.prompt_length
            request.finished = drawn.stopped or (len(request.tokens) >= request.limit and drew_all)
            if request.finished:
                del self._live[request.id]
                self._leave(request)
            if drawn.tokens or request.finished:
                progress = [Progress(request, drawn.tokens)]
        self.cache.release_retired(request)
        return progress

    def _leave(self, request: Request) -> None:
        """Out of the queue it is in."""
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.cache.leave(request)
