"""The indexer against NumPy twins in float64, and attention over chosen keys against attention under their mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.ops import indexer
from deepseek_jax.ops.attention import (
    absorb,
    attend_absorbed,
    attend_expanded,
    causal_mask,
    project_values,
)
from deepseek_jax.ops.indexer import choose_paged, choose_whole, chosen_mask, index_scores, select_keys
from deepseek_jax.ops.paged_attention import chosen_paged
from deepseek_jax.ops.pool import LatentCache

SCALE = 0.37
sizes = st.sampled_from([1, 2, 5])
scored = jax.jit(index_scores)
selected = jax.jit(chosen_mask, static_argnums=2)


@jax.jit
def among(chosen, visible):
    """The mask of chosen keys' numbers."""
    rows, queries = jnp.arange(len(chosen))[:, None, None], jnp.arange(chosen.shape[1])[:, None]
    return visible & jnp.zeros(visible.shape, bool).at[rows, queries, chosen].set(True)


def scores_twin(q, k, weights):
    """One query, one key and one head at a time."""
    J, Z = q.shape[2:]
    scores = np.zeros((*q.shape[:2], k.shape[1]))
    for b, t, s in np.ndindex(scores.shape):
        for j in range(J):
            scores[b, t, s] += weights[b, t, j] / np.sqrt(J) * max(q[b, t, j] @ k[b, s] / np.sqrt(Z), 0)
    return scores


def selection_twin(scores, visible, count):
    """Sets of keys: visible ones by falling score, then by rising index."""
    found = np.zeros(visible.shape, bool)
    for b, t in np.ndindex(visible.shape[:2]):
        candidates = np.flatnonzero(visible[b, t])
        best = sorted(candidates, key=lambda s: (-scores[b, t, s], s))[:count]
        found[b, t, best] = True
    return found


def inputs(seed, B, T, S, J, Z, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, J, Z), (B, S, Z), (B, T, J))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(arrays):
    return [np.asarray(a, np.float64) for a in arrays]


# --- scores --------------------------------------------------------------------------------------


@settings(max_examples=12)  # nearly each compiles
@given(B=sizes, T=sizes, S=sizes, J=sizes, Z=sizes, seed=st.integers(0, 2**31))
def test_scores_equal_the_formula(B, T, S, J, Z, seed):
    arrays = inputs(seed, B, T, S, J, Z)
    np.testing.assert_allclose(scored(*arrays), scores_twin(*exact(arrays)), rtol=1e-5, atol=1e-5)


def test_scores_of_bfloat16_are_summed_in_float32():
    """Products of bfloat16 numbers are exact in float32: the result is off by its sums alone, not by 2^-9."""
    arrays = inputs(0, 2, 7, 9, 16, 24, jnp.bfloat16)
    got = scored(*arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scores_twin(*exact(arrays)), rtol=1e-5, atol=1e-5)


def test_a_hadamard_rotation_changes_no_score():
    """Why DeepSeek's rotation before its FP8 product is not here."""
    q, k, weights = inputs(0, 2, 5, 6, 3, 8)
    two = np.array([[1, 1], [1, -1]])
    rotation = jnp.asarray(np.kron(np.kron(two, two), two) / np.sqrt(8), jnp.float32)
    assert np.abs(q @ rotation - q).max() > 1
    np.testing.assert_allclose(
        index_scores(q @ rotation, k @ rotation, weights), index_scores(q, k, weights), atol=1e-5
    )


def test_no_gradient_flows_through_the_scores():
    arrays = inputs(0, 2, 3, 4, 5, 6)
    for gradient in jax.grad(lambda *a: jnp.sum(index_scores(*a)), argnums=(0, 1, 2))(*arrays):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# --- selection -----------------------------------------------------------------------------------


# Few different scores, so that ties are everywhere; relu makes exact zeros, and a negative weight makes them -0.0.
@given(
    T=st.sampled_from([1, 5]),
    keys=st.sampled_from([(1, 1), (6, 1), (6, 4), (6, 6), (12, 5)]),
    share=st.sampled_from([0.2, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_selection_equals_sorting(T, keys, share, seed):
    S, count = keys
    rng = np.random.default_rng(seed)
    scores = rng.choice([-1.5, -0.0, 0.0, 0.5, 2.0], size=(2, T, S)).astype(np.float32)
    visible = rng.random((2, T, S)) < share
    of = jnp.asarray(scores), jnp.asarray(visible)
    wanted = selection_twin(scores, visible, count)
    np.testing.assert_array_equal(selected(*of, count), wanted)
    np.testing.assert_array_equal(among(ranked(*of, count), visible), wanted)


ranked = jax.jit(select_keys, static_argnums=2)


def test_a_query_gets_count_keys_or_all_that_it_sees():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 12)), jnp.float32)
    visible = causal_mask(jnp.tile(jnp.arange(9), (2, 1)), jnp.tile(jnp.arange(12), (2, 1)))
    got = selected(scores, visible, 4)
    assert not np.any(got & ~visible)
    np.testing.assert_array_equal(got.sum(axis=-1), np.tile(np.minimum(np.arange(9) + 1, 4), (2, 1)))


# --- attention over the chosen keys --------------------------------------------------------------


def attention_inputs(S=40, T=5, U=6):
    """Latent attention's arguments, the chosen keys, and what is visible: ragged positions, some rows below U keys."""
    B, N, K, R, H, C = 2, 4, 6, 4, 5, 7
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, K), (B, T, N, R), (B, S, C), (B, S, R), (C, N, K), (C, N, H))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    positions = jnp.asarray([[2], [S - T]]) + jnp.arange(T)
    visible = causal_mask(positions, jnp.tile(jnp.arange(S), (B, 1)))
    scores = jnp.asarray(rng.normal(size=(B, T, S)), jnp.float32)
    return arrays, select_keys(scores, visible, U), visible


def over_chosen(q_nope, q_rope, c, k_rope, w_k, w_v, chosen, visible):
    """Chosen keys between the projections of absorbed attention; each row's cache is a block."""
    table, seen = jnp.arange(c.shape[0])[:, None], visible.sum(axis=-1)
    q = jnp.concatenate([absorb(q_nope, w_k), q_rope], axis=-1)
    return project_values(chosen_paged(q, LatentCache(c, k_rope, None), chosen, table, seen, SCALE), w_v)


@pytest.mark.parametrize("masked", [attend_expanded, attend_absorbed])
def test_gathering_equals_masking(masked):
    arrays, chosen, visible = attention_inputs()
    got = jax.jit(over_chosen)(*arrays, chosen, visible)
    np.testing.assert_allclose(got, masked(*arrays, among(chosen, visible), SCALE), rtol=1e-4, atol=1e-5)


def test_keys_are_chosen_over_blocks_as_over_a_whole_cache(monkeypatch):
    """Whatever the blocks, and whatever lies in those that nobody sees."""
    rng = np.random.default_rng(3)
    B, T, J, Z, S, size = 2, 3, 4, 6, 40, 4
    q, k, weights = (jnp.asarray(rng.normal(size=of), jnp.float32) for of in ((B, T, J, Z), (B, S, Z), (B, T, J)))
    seen = jnp.asarray([[7, 8, 9], [38, 39, 40]])
    table = 1 + rng.permutation(B * S // size).reshape(B, -1)
    pool = jnp.full((1 + table.size, size, Z), 1e6, jnp.float32)
    pool = pool.at[table].set(k.reshape(B, -1, size, Z)).at[table[0, 3:]].set(1e6)
    got = jax.jit(choose_paged, static_argnums=5)(q, weights, pool, table, seen, 6)
    wanted = select_keys(index_scores(q, k, weights), jnp.arange(S) < seen[..., None], 6)
    np.testing.assert_array_equal(got, wanted)
    monkeypatch.setattr(indexer, "_SCORES_AT_ONCE", B * S)  # a query at a time
    apart = jax.jit(lambda *of: choose_paged(*of, 6))(q, weights, pool, table, seen)
    np.testing.assert_array_equal(apart, wanted)


@pytest.mark.parametrize("at_once", [4, 7, 100])
def test_keys_of_whole_sequences_are_chosen_a_few_at_a_time(at_once, monkeypatch):
    """Whatever lies behind the last key that a query sees: it is not scored."""
    monkeypatch.setattr(indexer, "_KEYS_SCORED", at_once)
    q, k, weights = inputs(5, 2, 3, 30, 4, 8)
    visible = causal_mask(jnp.asarray([[2, 9, 11], [0, 4, 17]]), jnp.tile(jnp.arange(30), (2, 1)))
    visible = visible.at[0, 2, :5].set(False)
    got = jax.jit(lambda *of: choose_whole(*of, 5))(q, weights, k.at[:, 28:].set(jnp.nan), visible)
    np.testing.assert_array_equal(got, selection_twin(scores_twin(*exact((q, k, weights))), np.asarray(visible), 5))


def test_keys_that_were_not_chosen_are_not_read():
    """Behind a mask a NaN would show, for it takes part in the sum with weight 0."""
    arrays, chosen, visible = attention_inputs()
    rows = np.arange(2)[:, None, None]
    read = np.zeros(arrays[2].shape[:2], bool)
    read[rows, np.asarray(chosen)] = True
    assert 0 < read.sum() < read.size
    spoiled = list(arrays)
    spoiled[2], spoiled[3] = (jnp.where(read[..., None], a, jnp.nan) for a in arrays[2:4])
    clean, got = (over_chosen(*a, chosen, visible) for a in (arrays, spoiled))
    assert np.all(np.isfinite(clean))
    np.testing.assert_array_equal(got, clean)


def test_the_cost_of_attention_over_chosen_keys_does_not_grow_with_the_cache():
    def flops(S):
        arrays, chosen, visible = attention_inputs(S=S)
        run = jax.jit(lambda a: over_chosen(*a, chosen, visible))
        return run.lower(arrays).compile().cost_analysis()["flops"]

    assert flops(2000) == flops(100)
