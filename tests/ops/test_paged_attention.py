"""Paged attention in plain JAX against one query at a time in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.attention import attend
from deepseek_jax.ops.paged_attention import (
    attend_partial,
    finish,
    grouped_paged,
    join,
    latent_paged,
)
from deepseek_jax.ops.pool import Pool
from tests.ops.paged_cases import CODES, Case, apart, make_case, oracle, pool_of, scores_apart, seen_by, spelled

SCALE = 0.3
S, M = 4, 5  # tokens a block, blocks a row
LENGTHS = [0, 1, 3, 4, 8, 17, 18]  # idle, one key, multiples of the block, up to the last slot for three queries
latent_jit = jax.jit(functools.partial(latent_paged, scale=SCALE, keys_at_once=8))
grouped_jit = jax.jit(functools.partial(grouped_paged, scale=SCALE, keys_at_once=8))


def arrays(case: Case, dtype=jnp.float32, pool: Pool | None = None) -> list:
    """Queries and pool in a dtype, then table and lengths."""
    pool = pool_of(case, dtype) if pool is None else pool
    return [*(jnp.asarray(q, dtype) for q in case.queries), pool, jnp.asarray(case.table_BM), jnp.asarray(case.seen_BT)]


def latent_case(seed, seen, **options) -> Case:
    return make_case(seed, seen, s=S, M=M, N=4, widths=(16, 8), **options)


def grouped_case(seed, seen, **options) -> Case:
    """The queries of the values' pool are not needed."""
    case = make_case(seed, seen, s=S, M=M, N=6, widths=(8, 8), heads=(2,), **options)
    return case._replace(queries=case.queries[:1])


def latent_oracle(case: Case) -> np.ndarray:
    c, r = (pool[:, None] for pool in case.pools)
    return oracle(case.queries, [c, r], c, case.table_BM, case.seen_BT, SCALE)


def grouped_oracle(case: Case) -> np.ndarray:
    k, v = case.pools
    return oracle(case.queries, [k], v, case.table_BM, case.seen_BT, SCALE)


KINDS = [(latent_case, latent_oracle, latent_jit), (grouped_case, grouped_oracle, grouped_jit)]
BOTH = pytest.mark.parametrize(("make", "exact", "paged"), KINDS, ids=["latent", "grouped"])


@BOTH
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_one_query_at_a_time(make, exact, paged, T, shared):
    case = make(T, seen_by(LENGTHS, T), shared=shared)
    got = paged(*arrays(case))
    np.testing.assert_allclose(got, exact(case), rtol=0, atol=2e-6)
    assert not np.any(got[0])  # the idle row


@BOTH
@given(st.lists(st.lists(st.integers(0, S * M), min_size=2, max_size=2), min_size=3, max_size=3), st.integers(0, 99))
def test_whatever_each_query_sees(make, exact, paged, seen, seed):
    case = make(seed, np.array(seen, np.int32))
    np.testing.assert_allclose(paged(*arrays(case)), exact(case), rtol=0, atol=2e-6)


@BOTH
def test_bfloat16_rounds_the_weights_and_the_result_only(make, exact, paged):
    """Each rounds by 2^-9 of at most the largest value."""
    case = make(3, seen_by(LENGTHS, 3))
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    exactly = exact(case._replace(queries=[*map(rounded, case.queries)], pools=[*map(rounded, case.pools)]))
    got = paged(*arrays(case, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    largest = np.nanmax(np.abs(case.pools[-1] if make is grouped_case else case.pools[0]))
    np.testing.assert_allclose(np.asarray(got, np.float64), exactly, rtol=0, atol=2**-8 * largest)


@BOTH
@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_what_they_mean(make, exact, paged, dtype):
    """Exactly; and as near to the numbers that they stand for as the errors of scores and values allow."""
    case = make(11, seen_by(LENGTHS, 3), shared=True)
    pool = pool_of(case, dtype, lanes=8)
    got, coded = paged(*arrays(case, pool=pool)), spelled(pool, case)
    np.testing.assert_allclose(got, exact(coded), rtol=0, atol=2e-6)
    assert not np.any(got[0])
    bound = apart(case, coded, scores_apart(case, coded, SCALE))
    assert 0 < np.abs(got - exact(case)).max() < bound


@BOTH
@pytest.mark.parametrize("keys_at_once", [1, 12, 64])
def test_how_many_keys_at_once_changes_nothing(make, exact, paged, keys_at_once):
    """Fewer than a block, a width that does not divide the table, more than the table."""
    case = make(5, seen_by(LENGTHS, 1))
    plain = latent_paged if make is latent_case else grouped_paged
    got = jax.jit(functools.partial(plain, scale=SCALE, keys_at_once=keys_at_once))(*arrays(case))
    np.testing.assert_allclose(got, exact(case), rtol=0, atol=2e-6)


@BOTH
def test_large_scores_do_not_overflow(make, exact, paged):
    """Scores of up to a thousand: the maximum moves from block to block."""
    case = make(6, seen_by(LENGTHS, 3))
    case = case._replace(queries=[300 * q for q in case.queries])
    np.testing.assert_allclose(paged(*arrays(case)), exact(case), rtol=0, atol=5e-4)


@BOTH
@pytest.mark.parametrize(("lengths", "trips"), [([0, 0], 0), ([1, 8], 1), ([0, 9], 2), ([20, 3], 3), ([99, 0], 3)])
def test_the_trips_follow_the_row_that_sees_most(make, exact, paged, lengths, trips, monkeypatch):
    """Of eight keys; however long the table, without a live row there is none."""
    found = []
    monkeypatch.setattr(jax.lax, "fori_loop", lambda start, end, add, first: found.append(end - start) or first)
    case = make(7, np.minimum(seen_by(lengths, 1), S * M))._replace(seen_BT=seen_by(lengths, 1))
    paged.__wrapped__(*arrays(case))
    assert [int(trip) for trip in found] == [trips]


def test_a_chunk_joins_what_lies_in_the_cache():
    """Attention within a chunk of new tokens, joined to that over the blocks before it, is attention over both."""
    rng = np.random.default_rng(8)
    before, chunk, heads = np.array([7, 0, 12], np.int32), 5, 2
    case = grouped_case(8, np.repeat(before[:, None], chunk, axis=1))
    q, (k, v, _), table, seen = arrays(case)
    new_k, new_v = (jnp.asarray(rng.normal(size=(3, heads, chunk, 8)), jnp.float32) for _ in range(2))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((chunk, chunk), bool)), (3, chunk, chunk))

    old = jnp.arange(S * M) < seen[:, :, None]
    in_order = lambda pool: jnp.moveaxis(pool[table], 1, 2).reshape(3, heads, S * M, 8)

    @jax.jit
    def in_parts():
        of_cache = attend_partial(q, in_order(k), in_order(v), old, SCALE)
        return finish(join(of_cache, attend_partial(q, new_k, new_v, causal, SCALE)), jnp.float32)

    @jax.jit
    def in_one():
        clean = [jnp.where(old[:, None, 0, :, None], in_order(pool), 0) for pool in (k, v)]
        both = [jnp.concatenate(pair, axis=2) for pair in zip(clean, (new_k, new_v), strict=True)]
        return attend(q, *both, jnp.concatenate([old, causal], axis=-1), SCALE)

    np.testing.assert_allclose(in_parts(), in_one(), rtol=0, atol=2e-6)


def test_parts_are_joined_in_any_order():
    """Keys split in two: a part that no query sees changes nothing, not even with NaN in it."""
    case = latent_case(9, seen_by([0, 9, 12], 1))
    *queries, (c, r, _), table, seen = arrays(case)
    q, in_order = jnp.concatenate(queries, axis=-1), lambda pool: pool[table].reshape(len(table), 1, -1, pool.shape[-1])

    @jax.jit
    def partial(blocks, seen):
        k = jnp.concatenate([in_order(c), in_order(r)], axis=-1)[:, :, blocks]
        mask = jnp.arange(k.shape[2]) < seen[..., None]
        return attend_partial(q, k, in_order(c)[:, :, blocks], mask, SCALE)

    keys = jnp.arange(S * M)
    first, second = partial(keys, jnp.minimum(seen, 8)), partial(keys[8:], jnp.maximum(seen - 8, 0))
    for parts in ((first, second), (second, first)):
        np.testing.assert_allclose(finish(join(*parts), jnp.float32), latent_oracle(case), rtol=0, atol=2e-6)
    nothing = partial(keys, jnp.zeros_like(seen))
    np.testing.assert_array_equal(finish(join(nothing, first), jnp.float32), finish(first, jnp.float32))
