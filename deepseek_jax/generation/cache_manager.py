"""Slots and blocks of running requests, over all shards: where a request goes, what it holds, when it gives back."""

from bisect import insort
from collections import deque
from typing import NamedTuple

from deepseek_jax.generation.blocks import BlockPool
from deepseek_jax.generation.requests import Request


class Place(NamedTuple):
    """Where a request could go. The largest is the best: most room left after it, then most slots."""

    room: int
    slots: int
    preference: int
    shard: int
    hits: list[int]


class CacheManager:
    """Slots and block pools, each shard with its own.

    Args:
        num_shards: how many.
        max_num_seqs: slots over all shards, split evenly, in order.
        num_blocks: of each pool, the null block counted.
        block_size: tokens a block.
        caching: reuse blocks whose tokens are the same.
        mtp: the cache has entries of an MTP module, each of which depends on the token after its own.
    """

    def __init__(
        self, *, num_shards: int, max_num_seqs: int, num_blocks: int, block_size: int, caching: bool, mtp: bool
    ) -> None:
        self.block_size = block_size
        shards, each = range(num_shards), max_num_seqs // num_shards
        self.pools = [BlockPool(num_blocks, block_size, caching, lookahead=int(mtp)) for _ in shards]
        self._slots = [list(range(shard * each, (shard + 1) * each)) for shard in shards]
        self._leaving: list[Request] = []  # without a slot, but with blocks that a dispatched plan names
        self._computing: list[dict[bytes, Request]] = [{} for _ in shards]  # by key, who computes a block right now
        self._promised: dict[int, deque[tuple[int, bytes]]] = {}  # by priority, the blocks a request will publish

    @property
    def has_slot(self) -> bool:
        """Any shard has a free slot."""
        return any(self._slots)

    def blocks_of(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def place(self, request: Request, tokens: int) -> Place | None:
        """The shard where most is left once a request has blocks for so many tokens; None where it fits nowhere."""
        places = []
        for shard, (pool, slots) in enumerate(zip(self.pools, self._slots, strict=True)):
            if not slots:
                continue
            hits = pool.match(request.tokens, request.salt) if request.reuse else []
            idle = sum(pool.references(block) == 0 for block in hits)
            room = pool.available - idle - (self.blocks_of(tokens) - len(hits))
            if room >= 0:
                places.append(Place(room, len(slots), -shard, shard, hits))
        return max(places, default=None)

    def must_await(self, request: Request, place: Place) -> bool:
        """Whether a running request is about to publish the next block that a waiting one could hit; it notes which."""
        request.awaits = None
        computing, index = self._computing[place.shard], len(place.hits)
        if request.reuse and computing and index < (len(request.tokens) - 1) // self.block_size:
            request.awaits = place.shard, self._keys(request)[index]
        return self.still_awaits(request)

    def still_awaits(self, request: Request) -> bool:
        """Whether the block that a waiting request noted is still on its way."""
        if request.awaits is None:
            return False
        shard, key = request.awaits
        return key in self._computing[shard]

    def admit(self, request: Request, place: Place, tokens: int) -> None:
        """Give a request a slot, what it hits, and fresh blocks up to so many tokens."""
        pool = self.pools[place.shard]
        pool.acquire(place.hits)
        fresh = pool.allocate(self.blocks_of(tokens) - len(place.hits))
        assert fresh is not None, "a place has room"
        request.shard, request.slot = place.shard, self._slots[place.shard].pop(0)
        request.blocks = [*place.hits, *fresh]
        request.computed = request.dispatched = len(place.hits) * self.block_size
        promised = list(enumerate(self._keys(request)))[len(place.hits) :]
        self._promised[request.priority] = deque(promised)
        for _, key in promised:
            self._computing[place.shard].setdefault(key, request)

    def missing(self, request: Request, tokens: int) -> int:
        """Blocks that a running request needs beside its own to hold so many tokens."""
        return max(0, self.blocks_of(tokens) - len(request.blocks))

    def is_coming(self, shard: int, count: int) -> bool:
        """So many blocks are there, or may be once all dispatched plans have retired."""
        leaving = sum(len(request.blocks) for request in self._leaving if request.shard == shard)
        return self.pools[shard].available + leaving >= count

    def grow(self, request: Request, count: int) -> list[int] | None:
        """Fresh blocks for a running request, or None where there are not so many yet."""
        blocks = self.pools[request.shard].allocate(count)
        request.blocks += blocks or []
        return blocks

    def publish(self, request: Request) -> None:
        """Let others hit what a running request has computed."""
        self.pools[request.shard].publish(
            request.tokens, request.blocks, request.computed, request.salt, request.payload
        )
        self._end_promises(request, self.pools[request.shard].publishable(request.computed))

    def leave(self, request: Request) -> None:
        """Take a running request's slot; its blocks too, as soon as no dispatched plan names it."""
        insort(self._slots[request.shard], request.slot)
        request.slot = None
        self._end_promises(request, len(request.blocks))
        self._leaving.append(request)
        self.release_retired(request)

    def release_retired(self, request: Request) -> None:
        """Give back the blocks of one that left, if no dispatched plan names it any more."""
        if request.slot is None and request.plans == 0 and request in self._leaving:
            self._leaving.remove(request)
            self.pools[request.shard].release(request.blocks)
            request.blocks = []

    def reset_prefix_cache(self) -> None:
        """Forget all published blocks; running requests publish none of theirs either."""
        for pool, computing in zip(self.pools, self._computing, strict=True):
            pool.reset()
            computing.clear()

    def _keys(self, request: Request) -> list[bytes]:
        pool = self.pools[0]  # keys are the same in every shard
        if len(request.keys) < pool.publishable(len(request.tokens)):
            request.keys = pool.keys(request.tokens, request.salt)
        return request.keys

    def _end_promises(self, request: Request, stop: int) -> None:
        """Nobody has to wait any longer for this request to compute its blocks before `stop`."""
        promised, computing = self._promised.get(request.priority, deque()), self._computing[request.shard]
        while promised and promised[0][0] < stop:
            _, key = promised.popleft()
            if computing.get(key) is request:
                del computing[key]
        if not promised:
            self._promised.pop(request.priority, None)
