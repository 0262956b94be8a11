"""Blocks of a cache: what is given, held, published, hit and evicted, beside a twin that remembers whole sequences."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.generation import blocks as subject
from deepseek_jax.generation.blocks import BlockPool


def held(pool: BlockPool, tokens: list[int], computed: int | None = None, **kwargs) -> list[int]:
    """Blocks of a new sequence, published as far as they are computed (by default: all tokens)."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_size))
    pool.publish(tokens, blocks, len(tokens) if computed is None else computed, **kwargs)
    return blocks


def test_all_blocks_but_the_null_block_are_given_all_or_nothing():
    pool = BlockPool(5, 2)
    assert pool.allocate(5) is None and pool.used == 0
    assert pool.allocate(4) == [1, 2, 3, 4]
    assert pool.allocate(0) == [] and pool.allocate(1) is None
    pool.release([3, 1])
    assert (pool.free, pool.cached, pool.used) == (2, 0, 2)
    assert pool.allocate(2) == [1, 3], "the one released first comes first, and the last of a list is released first"


def test_a_block_is_free_when_all_have_released_it_and_no_sooner():
    pool = BlockPool(4, 2, caching=False)
    blocks = pool.allocate(2)
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.used == 2
    pool.release(blocks)
    assert pool.used == 0 and pool.free == 3
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


@pytest.mark.parametrize(("length", "hits"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (40, 3)])
def test_a_hit_leaves_at_least_one_token_to_compute(length: int, hits: int):
    pool = BlockPool(20, 4)
    blocks = held(pool, list(range(12)))
    assert pool.match(list(range(length))) == blocks[:hits]


def test_only_full_and_computed_blocks_are_hit():
    pool = BlockPool(20, 4)
    tokens = list(range(11))
    blocks = held(pool, tokens, computed=7)
    assert pool.match(tokens) == blocks[:1]
    pool.publish(tokens, blocks, 8)
    assert pool.match(tokens) == blocks[:2]
    pool.publish(tokens, blocks, 11)
    assert pool.match(tokens + [11, 12]) == blocks[:2]


def test_without_caching_nothing_is_hit():
    pool = BlockPool(9, 2, caching=False)
    pool.release(held(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3, 4, 5]) == [] and pool.keys([1, 2, 3]) == [] and pool.cached == 0


def test_what_came_before_and_the_salt_belong_to_a_block():
    pool = BlockPool(9, 2)
    blocks = held(pool, [1, 2, 3, 4], salt="a")
    assert pool.match([1, 2, 3, 4, 5], "a") == blocks
    assert pool.match([1, 2, 3, 4, 5]) == pool.match([1, 2, 3, 4, 5], "b") == []
    assert pool.match([9, 9, 3, 4, 5], "a") == pool.match([3, 4, 5], "a") == []


def test_a_copy_of_a_published_block_stays_unpublished_and_is_free_again_at_once():
    pool = BlockPool(9, 2)
    first, second = held(pool, [1, 2, 3, 4]), held(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pool.release(second)
    assert (pool.free, pool.cached, pool.used) == (5, 1, 2)
    pool.release(first)
    assert pool.allocate(6) is not None, "five free ones, and the least recently used of three cached ones"
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == first


def test_free_blocks_go_first_then_the_least_recently_used_and_the_ends_before_the_beginnings():
    pool = BlockPool(7, 2)
    old, new = held(pool, [1, 2, 3, 4]), held(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(2) == [5, 6] and pool.cached == 4
    assert pool.allocate(1) == old[1:]
    pool.acquire(pool.match([1, 2, 9]))  # used again, so no longer the least recently used
    pool.release(old[:1])
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.match([1, 2, 9]) == old[:1] and pool.match([5, 6, 7]) == []


def test_a_block_that_someone_holds_is_never_evicted():
    pool = BlockPool(4, 2)
    blocks = held(pool, [1, 2, 3, 4])
    pool.release(blocks)
    pool.acquire(pool.match([1, 2, 3]))
    assert pool.allocate(3) is None
    assert sorted(pool.allocate(2)) == sorted([blocks[1], 3])


def test_publishing_again_changes_nothing_and_asks_for_no_payload():
    pool, asked = BlockPool(9, 2), []
    payload = lambda index: asked.append(index) or f"routes {index}"
    tokens = [1, 2, 3, 4, 5, 6]
    blocks = held(pool, tokens, computed=4, payload=payload)
    for computed in (4, 4, 6, 6):
        pool.publish(tokens, blocks, computed, payload=payload)
    assert asked == [0, 1, 2]
    pool.release(blocks)
    assert [pool.payload(block) for block in pool.match(tokens)] == ["routes 0", "routes 1"]
    assert pool.payload(8) is None and pool.payload(0) is None


def test_a_collision_of_hashes_is_no_hit(monkeypatch):
    monkeypatch.setattr(subject, "chained_hash", lambda parent, tokens: b"always the same")
    pool = BlockPool(9, 2)
    blocks = held(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 5]) == blocks[:1]
    assert pool.match([7, 8, 5]) == []
    assert pool.match([1, 2, 1, 2, 5]) == blocks[:1], "same tokens, another parent"
    other = held(pool, [7, 8])
    assert pool.match([7, 8, 5]) == []
    pool.release(other)
    pool.release(blocks)
    assert (pool.free, pool.cached) == (7, 1)


def test_after_a_reset_nothing_old_is_hit_and_blocks_in_use_stay():
    pool = BlockPool(9, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    used, idle = held(pool, tokens, computed=4), held(pool, [7, 8])
    pool.release(idle)
    pool.reset()
    assert (pool.free, pool.cached, pool.used) == (5, 0, 3)
    pool.publish(tokens, used, 6)
    assert pool.match(tokens) == pool.match([7, 8, 9]) == [], "one that was begun with old weights stays unpublished"
    pool.release(used)
    assert pool.free == 8
    again = pool.allocate(8)
    pool.publish(list(range(16)), again, 16)
    assert pool.match(list(range(17))) == again


def test_a_block_whose_contents_depend_on_the_token_after_it_is_hit_only_with_that():
    """As beside an MTP module: here blocks of three sequences that agree up to a block's end, and no further."""
    pool = BlockPool(20, 2, lookahead=1)
    first = held(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 5]) == first[:2]
    assert pool.match([1, 2, 3, 4, 9]) == first[:1]
    assert pool.match([1, 2, 3, 4]) == first[:1]
    second = held(pool, [1, 2, 3, 4, 9, 9, 9], computed=6)
    assert pool.match([1, 2, 3, 4, 9, 9, 9]) == [first[0], second[1]], "its own second block, not the first one's"
    assert pool.publishable(4) == 1 and pool.publishable(0) == 0


def test_keys_are_the_same_in_every_process():
    """Golden: blake2b of 32 bytes over the parent's key and struct.pack("<2q", *tokens); the root's is of the salt."""
    keys = BlockPool(3, 2).keys([1, 2, 3, 4, 5], "salt")
    assert [key.hex()[:16] for key in keys] == ["42f0863dcded53b1", "284278715837c25d"]


@pytest.mark.parametrize(
    ("arguments", "message"), [((1, 4), "num_blocks: got 1, wanted 2"), ((4, 0), "block_size: got 0")]
)
def test_a_pool_too_small_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockPool(*arguments)


class Twin:
    """What may be hit, remembered as whole beginnings of sequences."""

    def __init__(self) -> None:
        self.known: dict[tuple, int] = {}

    def match(self, tokens: list[int], salt: str, size: int, lookahead: int) -> list[int]:
        found = []
        for stop in range(size, len(tokens) - max(1, lookahead) + 1, size):
            block = self.known.get((salt, *tokens[: stop + lookahead]))
            if block is None:
                break
            found.append(block)
        return found


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(3, 14), lookahead=st.integers(0, 1))
def test_random_use_hits_what_whole_sequences_say(seed: int, num_blocks: int, lookahead: int):
    chance, pool, twin = random.Random(seed), BlockPool(num_blocks, 2, lookahead=lookahead), Twin()
    live: list[tuple[list[int], str, list[int]]] = []
    hits = 0
    for _ in range(150):
        tokens, salt = [chance.randint(0, 1) for _ in range(chance.randint(1, 9))], chance.choice("ab")
        matched = pool.match(tokens, salt)
        assert matched == twin.match(tokens, salt, 2, lookahead)
        hits += len(matched)
        pool.acquire(matched)
        fresh = pool.allocate(-(-len(tokens) // 2) - len(matched))
        if fresh is None:
            pool.release(matched)
        else:
            twin.known = {key: block for key, block in twin.known.items() if block not in fresh}
            live.append((tokens, salt, matched + fresh))
            computed = chance.randint(0, len(tokens))
            pool.publish(tokens, live[-1][2], computed, salt)
            for index in range(max(0, computed - lookahead) // 2):
                twin.known.setdefault((salt, *tokens[: (index + 1) * 2 + lookahead]), live[-1][2][index])
        while live and (fresh is None or chance.random() < 0.4):
            pool.release(live.pop(chance.randrange(len(live)))[2])
            fresh = []
        if chance.random() < 0.02:
            pool.reset()
            twin.known.clear()
            pool.release([block for *_, blocks in live for block in blocks])
            live.clear()
        assert pool.free + pool.cached + pool.used == num_blocks - 1
        assert pool.used == len({block for *_, blocks in live for block in blocks})
    assert hits or num_blocks < 8
