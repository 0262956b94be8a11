"""Blocks of a paged cache on the host: who holds each one, which are published for reuse, which one is given next."""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class _Published(NamedTuple):
    """What a block that may be hit holds: the tokens themselves, so that a collision of hashes is no hit."""

    block: int
    parent: bytes
    tokens: bytes
    payload: object


def chained_hash(parent: bytes, tokens: bytes) -> bytes:
    """The key of a block: of its own tokens and, through its parent's key, of all before them."""
    return hashlib.blake2b(parent + tokens, digest_size=32).digest()


def _root(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=32).digest()


class BlockPool:
    """Reference-counted blocks of one shard's cache; full ones can be found again by the tokens that led to them.

    A block is free (nothing of value in it), cached (published, without a reference) or used (with one). Fresh blocks
    come from the free ones, least recently used first, then from the cached ones likewise. Block 0 is the null block,
    with which tables are padded; it is never given.

    Source: vLLM v1, vllm/v1/core/block_pool.py; nano-vllm, nanovllm/engine/block_manager.py; keys that look ahead are
    SGLang's bigrams, sglang/srt/mem_cache/radix_cache.py.

    Args:
        num_blocks: the null block counts.
        block_size: tokens a block.
        caching: publish blocks at all.
        lookahead: tokens after a block that its contents depend on; they belong to its key. 1 beside an MTP module,
            whose entry of a position depends on the token after it.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True, lookahead: int = 0) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: got {num_blocks}, wanted 2 or more; block 0 is never given")
        if block_size < 1:
            raise ValueError(f"block_size: got {block_size}, wanted at least 1 token")
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.lookahead = lookahead
        self.used = 0
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._published: dict[bytes, _Published] = {}
        self._keys: dict[int, bytes] = {}  # of blocks that are published, or hold the same as a published one
        self._stale: set[int] = set()  # in use since before a reset

    @property
    def free(self) -> int:
        """Blocks that hold nothing of value."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Published blocks that nobody holds."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give at most."""
        return len(self._free) + len(self._cached)

    def references(self, block: int) -> int:
        """How many hold a block."""
        return self._references[block]

    def payload(self, block: int) -> object:
        """What a published block was given to carry; None of any other."""
        found = self._entry(block)
        return None if found is None else found.payload

    def publishable(self, computed: int) -> int:
        """How many blocks of a sequence can be published once so many of its tokens are in the cache for good."""
        return max(0, computed - self.lookahead) // self.block_size

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[bytes]:
        """Keys of the blocks of a sequence that could be published, first to last; none without caching."""
        stop = self.publishable(len(tokens)) if self.caching else 0
        return [key for _, _, key in self._chain(tokens, stop, _root(salt))]

    def match(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The longest chain of published blocks that begins a sequence, and leaves at least one token to compute.

        Nothing is acquired; do so before the next `allocate`.
        """
        blocks = []
        most = (len(tokens) - max(1, self.lookahead)) // self.block_size if self.caching else 0
        for parent, own, key in self._chain(tokens, most, _root(salt)):
            found = self._published.get(key)
            if found is None or (found.parent, found.tokens) != (parent, own):
                break
            blocks.append(found.block)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Fresh blocks with one reference each, or None where fewer are left."""
        if count > self.available:
            return None
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.used += count
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """Hold blocks that were matched."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
                self.used += 1
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each. The last of a sequence are evicted first: the first serve more others."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was released more often than it was held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self.used -= 1
                self._stale.discard(block)
                if self._entry(block) is not None:
                    self._cached[block] = None
                else:
                    self._keys.pop(block, None)
                    self._free.append(block)

    def publish(
        self,
        tokens: Sequence[int],
        blocks: Sequence[int],
        computed: int,
        salt: str = "",
        payload: Callable[[int], object] | None = None,
    ) -> None:
        """Let a sequence's full, computed blocks be hit. Those that were published before cost nothing.

        Args:
            tokens: the sequence's, at least those computed.
            blocks: its blocks, held by the caller.
            computed: how many tokens, from the first, are in the cache for good; drafts are not.
            salt: sequences of different salts share nothing.
            payload: what the block of an index among `blocks` shall carry, asked once when it is published.
        """
        if not self.caching:
            return
        stop = self.publishable(computed)
        start = stop
        while start and blocks[start - 1] not in self._keys:
            start -= 1
        root = self._keys[blocks[start - 1]] if start else _root(salt)
        chain = self._chain(tokens, stop, root, start)
        for index, (parent, own, key) in enumerate(chain, start):
            block = blocks[index]
            assert self._references[block] > 0, f"block {block} is published by one who does not hold it"
            if block in self._stale:
                return
            found = self._published.get(key)
            if found is None:
                carried = payload(index) if payload is not None else None
                self._published[key] = _Published(block, parent, own, carried)
            elif (found.parent, found.tokens) != (parent, own):
                return  # two blocks of one hash: the other one keeps it, and nothing after this one can be found
            self._keys[block] = key

    def reset(self) -> None:
        """Forget all that is published, as when weights change; blocks in use stay with their owners, unpublished."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._published.clear()
        self._keys.clear()
        self._stale = {block for block, count in enumerate(self._references) if count}

    def _chain(
        self, tokens: Sequence[int], stop: int, parent: bytes, start: int = 0
    ) -> Iterator[tuple[bytes, bytes, bytes]]:
        """(parent's key, tokens, key) of a sequence's blocks from `start` to `stop`."""
        size = self.block_size
        for index in range(start, stop):
            own = array("q", tokens[index * size : (index + 1) * size + self.lookahead]).tobytes()
            key = chained_hash(parent, own)
            yield parent, own, key
            parent = key

    def _entry(self, block: int) -> _Published | None:
        """Under which others find this block; None where they find another of the same tokens, or none."""
        found = self._published.get(self._keys.get(block, b""))
        return found if found is not None and found.block == block else None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._published[self._keys.pop(block)]
        return block
