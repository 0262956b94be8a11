"""Attention against sums over queries and keys in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops import attention
from deepseek_jax.ops.attention import (
    attend,
    attend_absorbed,
    attend_causal,
    attend_expanded,
    causal_mask,
)

B, T, S, N, K, R, H, C = 2, 3, 5, 4, 6, 4, 5, 7
SCALE = 0.37
rng = np.random.default_rng(0)


def looped(q, k, v, mask):
    """One query at a time; head n reads key-value head n // (N / G)."""
    G = k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        g = n // (q.shape[2] // G)
        seen = np.flatnonzero(mask[b, t])
        scores = np.array([q[b, t, n] @ k[b, g, s] for s in seen]) * SCALE
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, g, seen]
    return out


def masks():
    return causal_mask(jnp.tile(jnp.arange(2, 2 + T), (B, 1)), jnp.tile(jnp.arange(S), (B, 1)))


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("G", [1, 2, 4])
def test_grouped_attention_equals_a_loop(G):
    q, k, v = rng.normal(size=(B, T, N, K)), rng.normal(size=(B, G, S, K)), rng.normal(size=(B, G, S, H))
    mask = np.asarray(masks())
    got = attend(*single(q, k, v), jnp.asarray(mask), SCALE)
    np.testing.assert_allclose(got, looped(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("T", "dtype", "tolerance"), [(1, "float32", 1e-5), (11, "float32", 1e-5), (8, "bfloat16", 3e-2)]
)
def test_runs_of_queries_attend_as_all_at_once_in_value_and_gradient(monkeypatch, T, dtype, tolerance):
    """Runs of four, the last one of three; two texts in the second row."""
    monkeypatch.setattr(attention, "_RUN", 4)
    given = single(rng.normal(size=(B, T, N, K)), rng.normal(size=(B, 2, T, K)), rng.normal(size=(B, 2, T, H)))
    narrow = [x.astype(dtype) for x in given]
    exact = [x.astype(jnp.float32) for x in narrow]
    later = np.arange(T) >= 5
    mask = jnp.asarray(np.tril(np.ones((T, T), bool)) & np.stack([np.ones((T, T), bool), later[:, None] == later]))
    seed = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    run = lambda f, of: jax.value_and_grad(lambda *a: jnp.sum(seed * f(*a, mask, SCALE)), argnums=(0, 1, 2))(*of)
    for got, wanted in zip(*map(jax.tree.leaves, (run(attend_causal, narrow), run(attend, exact))), strict=True):
        size = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance * size)
    assert attend_causal(*narrow, mask, SCALE).dtype == dtype


def latent_inputs():
    shapes = ((B, T, N, K), (B, T, N, R), (B, S, C), (B, S, R), (C, N, K), (C, N, H))
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("algorithm", [attend_expanded, attend_absorbed])
def test_latent_attention_equals_a_loop_over_spelled_out_heads(algorithm):
    q_nope, q_rope, c, k_rope, w_k, w_v = arrays = latent_inputs()
    mask = np.asarray(masks())
    q = np.concatenate([q_nope, q_rope], axis=-1)
    k = np.concatenate([np.einsum("bsc,cnk->bnsk", c, w_k), np.repeat(k_rope[:, None], N, axis=1)], axis=-1)
    v = np.einsum("bsc,cnh->bnsh", c, w_v)
    got = algorithm(*single(*arrays), jnp.asarray(mask), SCALE)
    np.testing.assert_allclose(got, looped(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_absorbed_equals_expanded_in_value_and_gradient():
    arrays, mask = single(*latent_inputs()), masks()
    seed = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(seed * f(*a, mask, SCALE)), argnums=range(6)))
    run = lambda f: loss(f)(*arrays)
    for first, second in zip(*map(jax.tree.leaves, (run(attend_expanded), run(attend_absorbed))), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_a_query_sees_keys_up_to_its_own_position():
    mask = causal_mask(jnp.asarray([[0, 3], [2, 9]]), jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3]]))
    wanted = [[[1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    np.testing.assert_array_equal(mask, np.array(wanted, bool))


@pytest.mark.parametrize("algorithm", [attend_expanded, attend_absorbed])
def test_what_lies_behind_the_mask_never_shows(algorithm):
    arrays, mask = single(*latent_inputs()), jnp.asarray(np.arange(S) < 3)
    mask = jnp.broadcast_to(mask, (B, T, S))
    changed = list(arrays)
    changed[2], changed[3] = arrays[2].at[:, 3:].set(1e6), arrays[3].at[:, 3:].set(-1e6)
    np.testing.assert_array_equal(algorithm(*changed, mask, SCALE), algorithm(*arrays, mask, SCALE))


def test_many_equal_keys_share_attention_evenly():
    q, k = jnp.ones((1, 1, 1, K)), jnp.ones((1, 1, S, K))
    v = jnp.arange(S, dtype=jnp.float32).reshape(1, 1, S, 1)
    out = attend(q, k, v, jnp.ones((1, 1, S), bool), SCALE)
    np.testing.assert_allclose(out.ravel(), [2.0], rtol=1e-6)
