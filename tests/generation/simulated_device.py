"""A device that keeps token ids where a model keeps keys and values, and checks every read and write of a plan."""

import random
from collections import Counter, deque

import numpy as np

from deepseek_jax.generation.requests import Admitted, Drawn, Plan, Request
from deepseek_jax.generation.scheduler import Scheduler

EMPTY, REJECTED = -1, -2


def true_token(request: Request, position: int) -> int:
    """What is drawn for a request at a position, whatever runs beside it."""
    return (request.id * 7919 + position * 104729) % 97 + 3


class Slot:
    """The device's state of one slot."""

    def __init__(self, admitted: Admitted, block_size: int, version: int) -> None:
        self.request, self.shard, self.block_size, self.version = admitted.request, admitted.shard, block_size, version
        self.table = np.zeros(0, np.int64)
        self.grow(admitted.blocks)
        self.tokens = list(admitted.request.tokens[: admitted.hits])  # those in the cache, then the latest one too
        self.done = False

    def grow(self, blocks: tuple[int, ...]) -> None:
        """The table goes on; it holds a flat place for every position."""
        places = np.asarray(blocks)[:, None] * self.block_size + np.arange(self.block_size)
        self.table = np.append(self.table, places)

    def places(self, start: int, stop: int) -> np.ndarray:
        """Of positions, all of which the table has."""
        assert 0 <= start <= stop <= len(self.table), "a position lies outside of the table"
        return self.table[start:stop]


class SimulatedDevice:
    """Runs plans in the order of dispatch, with state of its own by slot.

    Args:
        scheduler: whose blocks are written.
        lengths: by request id, the tokens after which it stops by itself.
        chance: draws how many drafts are accepted.
    """

    def __init__(self, scheduler: Scheduler, lengths: dict[int, int], chance: random.Random) -> None:
        self.config, self.pools = scheduler.config, scheduler.cache.pools
        self.lengths, self.chance = lengths, chance
        shape = self.config.num_shards, self.config.num_blocks * self.config.block_size
        self.cache, self.next_cache = np.full(shape, EMPTY), np.full(shape, EMPTY)
        self.written_by = np.zeros(shape, np.int64)
        self.slots: dict[int, Slot] = {}
        self.version = 0
        self.computed: Counter[int] = Counter()  # tokens, by request id
        self.drawn: Counter[int] = Counter()  # likewise
        self.hits: dict[int, int] = {}  # of the latest life
        self.steps = 0

    def run(self, plan: Plan) -> dict[int, Drawn]:
        """What a plan draws, by request id."""
        for one in plan.admitted:
            slot = self.slots[one.slot] = Slot(one, self.config.block_size, self.version)
            self.hits[one.request.id] = one.hits
            self.check_hits(slot, one.request.tokens)
        for one in plan.grown:
            slot = self.slots[one.request.slot]
            assert slot.request is one.request and len(slot.table) == one.start * self.config.block_size
            slot.grow(one.blocks)
        results = {}
        for span in plan.spans:
            slot = self.slots[span.request.slot]
            drawn = self.extend(slot, span.start, span.count, span.last)
            if span.last:
                results[span.request.id] = drawn
        return results | self.decode(plan)

    def check_hits(self, slot: Slot, tokens: list[int]) -> None:
        hits = len(slot.tokens)
        if hits:
            places = slot.places(0, hits)
            assert self.cache[slot.shard, places].tolist() == tokens[:hits]
            assert (self.written_by[slot.shard, places] == self.version).all(), "a block of old weights was hit"
            if self.config.mtp:
                assert self.next_cache[slot.shard, places].tolist() == tokens[1 : hits + 1]

    def write(self, slot: Slot, start: int, tokens: list[int]) -> None:
        places = slot.places(start, start + len(tokens))
        assert (places >= self.config.block_size).all(), "the null block was written"
        for block in {int(place) // self.config.block_size for place in places}:
            assert self.pools[slot.shard].references(block) == 1, "a block was written that others hold, or none"
            assert block in slot.request.blocks
        self.cache[slot.shard, places] = tokens
        self.written_by[slot.shard, places] = slot.version

    def check_reads(self, slot: Slot, count: int) -> None:
        found = self.cache[slot.shard, slot.places(0, count)]
        assert found.tolist() == slot.tokens[:count], f"request {slot.request.id} reads what is not its own"

    def note_next(self, slot: Slot, start: int) -> None:
        """The entries of an MTP module, each of which depends on the token after its own."""
        after = slot.tokens[start + 1 :]
        self.next_cache[slot.shard, slot.places(start, start + len(after))] = after

    def extend(self, slot: Slot, start: int, count: int, last: bool) -> Drawn | None:
        request = slot.request
        assert count >= 1 and len(slot.tokens) == start, "a span does not go on where the one before ended"
        self.check_reads(slot, start)
        fed = request.tokens[start : start + count]
        assert len(fed) == count, "a span has tokens that are not known"
        self.write(slot, start, fed)
        self.computed[request.id] += count
        slot.tokens += fed
        following = request.tokens[start + count : start + count + 1]
        if last:
            assert not following
            following = [self.draw(slot)]
            self.note_next(slot, start)
            slot.done = self.ends(slot)
            return Drawn(tuple(following), self.stops(slot))
        slot.tokens += following
        self.note_next(slot, start)
        slot.tokens = slot.tokens[: start + count]
        return None

    def draw(self, slot: Slot) -> int:
        slot.tokens.append(true_token(slot.request, len(slot.tokens)))
        self.drawn[slot.request.id] += 1
        return slot.tokens[-1]

    def stops(self, slot: Slot) -> bool:
        return len(slot.tokens) - slot.request.prompt_length == self.lengths.get(slot.request.id)

    def ends(self, slot: Slot) -> bool:
        return self.stops(slot) or len(slot.tokens) == slot.request.limit

    def decode(self, plan: Plan) -> dict[int, Drawn]:
        slots = [self.slots[row.request.slot] for row in plan.rows]
        before = [len(slot.tokens) for slot in slots]
        for slot, row in zip(slots, plan.rows, strict=True):
            assert slot.request is row.request
            self.check_reads(slot, len(slot.tokens) - 1)
        for _ in range(plan.steps):
            live = [slot for slot in slots if not slot.done]
            if not live:
                break
            self.steps += 1
            for slot in live:
                self.decode_one(slot)
            if sum(not slot.done for slot in slots) <= plan.until:
                break
        return {
            slot.request.id: Drawn(tuple(slot.tokens[count:]), len(slot.tokens) > count and self.stops(slot))
            for slot, count in zip(slots, before, strict=True)
        }

    def decode_one(self, slot: Slot) -> None:
        drafts = self.config.draft_tokens
        accepted = self.chance.randint(0, drafts)
        start = len(slot.tokens) - 1
        fed = [slot.tokens[-1]]
        self.write(slot, start, fed + [REJECTED] * drafts)
        for number in range(accepted + 1):
            if number:  # a draft that was accepted is in the cache as it is
                self.write(slot, start + number, slot.tokens[-1:])
            self.computed[slot.request.id] += 1
            self.draw(slot)
            if self.ends(slot):
                slot.done = True
                break
        self.note_next(slot, start)


class Driver:
    """The engine's loop around a scheduler, on a simulated device.

    Args:
        scheduler: to be driven.
        lengths: by request id, the tokens after which it stops by itself.
        lag: plans that are dispatched before one retires; 0 is synchronous, 1 overlapped.
        seed: of the drafts' acceptance.
    """

    def __init__(self, scheduler: Scheduler, lengths: dict[int, int], lag: int, seed: int = 0) -> None:
        self.scheduler, self.lag = scheduler, lag
        self.device = SimulatedDevice(scheduler, lengths, random.Random(seed))
        self.flying: deque[tuple[Plan, dict[int, Drawn], set[tuple[int, int]]]] = deque()
        self.gained: dict[int, list[int]] = {}
        self.plans = 0

    def step(self) -> Plan:
        """Schedule, run, retire what is `lag` behind; everything in flight where there is nothing to run."""
        plan = self.scheduler.schedule()
        if plan.empty:
            assert self.flying or not self.scheduler.has_work, "a deadlock"
        else:
            self.check(plan)
            held = {(of.shard, block) for of in requests_of(plan) for block in of.blocks}
            self.flying.append((plan, self.device.run(plan), held))
            self.plans += 1
        while self.flying and (plan.empty or len(self.flying) > self.lag):
            self.retire()
        self.check_counts()
        return plan

    def retire(self) -> None:
        plan, results, _ = self.flying.popleft()
        for request, tokens in self.scheduler.retire(plan, results):
            assert not request.cancelled
            self.gained.setdefault(request.id, []).extend(tokens)

    def drain(self) -> None:
        """Until there is no work."""
        while self.scheduler.has_work:
            self.step()

    def check(self, plan: Plan) -> None:
        """What holds of every plan."""
        config = self.scheduler.config
        requests = requests_of(plan)
        slots = [request.slot for request in requests]
        assert len(set(slots)) == len(slots) <= config.max_num_seqs
        each = config.max_num_seqs // config.num_shards
        assert all(request.slot // each == request.shard for request in requests)
        cost = sum(span.count for span in plan.spans) + len(plan.rows) * (1 + config.draft_tokens)
        assert cost <= config.max_num_batched_tokens
        assert all(1 <= span.count <= config.chunk for span in plan.spans)
        assert not plan.rows or 1 <= plan.steps <= config.decode_steps
        assert plan.until < max(1, len(plan.rows))
        assert not (plan.preempted and plan.admitted), "blocks that were short went to a new request"
        assert config.admission == "preempt" or not (plan.preempted or plan.grown), "what was reserved was too little"
        for queue in (self.scheduler.waiting, self.scheduler.running):
            arrivals = [request.priority for request in queue[:50]]
            assert arrivals == sorted(arrivals)
        fresh = {(one.shard, block) for one in plan.admitted for block in one.blocks[one.hits // config.block_size :]}
        fresh |= {(one.request.shard, block) for one in plan.grown for block in one.blocks}
        for _, _, held in self.flying:
            assert not fresh & held, "a block was given to another while a plan in flight names it"

    def check_counts(self) -> None:
        for pool in self.scheduler.cache.pools:
            assert pool.free + pool.cached + pool.used == pool.num_blocks - 1


def requests_of(plan: Plan) -> list[Request]:
    """Of spans and rows."""
    return [span.request for span in plan.spans] + [row.request for row in plan.rows]
