"""Routing against NumPy twins written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import MoEConfig
from deepseek_jax.ops.routing import (
    expert_load,
    packed_balance,
    scores_of,
    select_experts,
    sequence_balance,
    updated_bias,
)

W, E, A, X, KEPT = 23, 12, 3, 4, 2

select = jax.jit(select_experts, static_argnames="moe")
balance = jax.jit(sequence_balance, static_argnames="moe")
load_of = jax.jit(expert_load, static_argnames="n_experts")


def moe(method: str, **changes) -> MoEConfig:
    numbers = dict(
        n_routed_experts=E,
        n_shared_experts=1,
        num_experts_per_tok=A,
        moe_intermediate_size=4,
        first_k_dense_replace=0,
        topk_method=method,
        n_group=1 if method == "greedy" else X,
        topk_group=1 if method == "greedy" else KEPT,
        norm_topk_prob=method == "noaux_tc",
        routed_scaling_factor=2.5,
    )
    return MoEConfig(**{**numbers, **changes})


def twin(logits, bias, method):
    """Weights and experts of each row, by the formulas, in float64: one row at a time, sorting everything."""
    size = E // X
    weights, experts = [], []
    for row in logits:
        if method == "noaux_tc":
            p = 1 / (1 + np.exp(-row))
            choice = p + bias
        else:
            p = np.exp(row - row.max())
            p /= p.sum()
            choice = p.copy()
        if method != "greedy":
            best = 2 if method == "noaux_tc" else 1
            group_scores = [np.sort(choice[g * size : (g + 1) * size])[-best:].sum() for g in range(X)]
            kept = np.argsort(group_scores)[-KEPT:]
            for g in range(X):
                if g not in kept:
                    choice[g * size : (g + 1) * size] = -np.inf
        chosen = np.argsort(-choice)[:A]
        w = p[chosen]
        if method == "noaux_tc":
            w = w / (w.sum() + 1e-20)
        weights.append(w * 2.5)
        experts.append(chosen)
    return np.array(weights), np.array(experts)


def biases(method, kind, rng):
    if method != "noaux_tc":
        return None
    low, high = {"negative": (-2, -1.5), "mixed": (-0.5, 0.5), "zero": (0, 0)}[kind]
    return rng.uniform(low, high, E)


# With a bias below -1 every selection score is negative: a group mask of 0 instead of -inf would choose wrongly.
@given(
    method=st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"]),
    kind=st.sampled_from(["negative", "mixed", "zero"]),
    seed=st.integers(0, 2**31),
)
def test_selection_equals_the_formulas(method, kind, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(W, E)) * 2
    bias = biases(method, kind, rng)
    config = moe(method)
    scores = scores_of(jnp.asarray(logits, jnp.float32), config)
    got = select(scores, None if bias is None else jnp.asarray(bias, jnp.float32), config)
    weights, experts = twin(logits, bias, method)
    np.testing.assert_array_equal(got[1], experts)
    np.testing.assert_allclose(got[0], weights, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["negative", "mixed"]))
def test_bias_selects_and_never_weighs(seed, kind):
    """Weights are a function of the scores of the chosen experts, whatever bias chose them."""
    rng = np.random.default_rng(seed)
    config = moe("noaux_tc")
    scores = jnp.asarray(rng.uniform(0.05, 0.95, (W, E)), jnp.float32)
    bias = jnp.asarray(biases("noaux_tc", kind, rng), jnp.float32)
    weights, experts = select(scores, bias, config)
    chosen = np.take_along_axis(np.asarray(scores, np.float64), np.asarray(experts), axis=1)
    np.testing.assert_allclose(weights, 2.5 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)
    # and the gradient of the weights does not reach the bias
    d_bias = jax.grad(lambda b: jnp.sum(select(scores, b, config)[0] ** 2))(bias)
    np.testing.assert_array_equal(d_bias, np.zeros(E))


def test_a_shift_of_the_whole_bias_changes_nothing():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.uniform(0.05, 0.95, (W, E)), jnp.float32)
    bias = jnp.asarray(rng.uniform(-0.5, 0.5, E), jnp.float32)
    first, second = (select(scores, bias + shift, moe("noaux_tc")) for shift in (0.0, -8.0))
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("method", ["noaux_tc", "greedy", "group_limited_greedy"])
def test_exactly_k_experts_from_at_most_topk_groups(method):
    rng = np.random.default_rng(1)
    config = moe(method)
    bias = biases(method, "negative", rng)
    scores = scores_of(jnp.asarray(rng.normal(size=(500, E)) * 3, jnp.float32), config)
    weights, experts = select(scores, None if bias is None else jnp.asarray(bias, jnp.float32), config)
    assert experts.shape == weights.shape == (500, A)
    assert all(len(set(row)) == A for row in experts.tolist())
    if method != "greedy":
        assert max(len({e // (E // X) for e in row}) for row in experts.tolist()) == KEPT


def test_load_counts_every_choice_of_real_tokens():
    rng = np.random.default_rng(2)
    experts, mask = rng.integers(0, E, (3, 7, A)), rng.random((3, 7)) < 0.6
    load = load_of(jnp.asarray(experts, jnp.int32), jnp.asarray(mask), E)
    wanted = [np.bincount(experts[b][mask[b]].ravel(), minlength=E) for b in range(3)]
    np.testing.assert_array_equal(load, wanted)
    assert load.sum() == A * mask.sum()


@given(seed=st.integers(0, 2**31), lengths=st.tuples(*[st.integers(0, 6)] * 3))
def test_balance_equals_the_formula_and_padding_does_not_count(seed, lengths):
    rng = np.random.default_rng(seed)
    config = moe("noaux_tc")
    scores = rng.uniform(0.01, 1, (3, 6, E))
    experts = rng.integers(0, E, (3, 6, A))
    mask = np.arange(6) < np.array(lengths)[:, None]
    wanted = []
    for b, length in enumerate(lengths):
        p = scores[b, :length] / scores[b, :length].sum(axis=1, keepdims=True)
        count = np.bincount(experts[b, :length].ravel(), minlength=E)
        wanted.append(float(np.sum(E / (A * length) * count * p.mean(axis=0))) if length else 0.0)
    load = load_of(jnp.asarray(experts, jnp.int32), jnp.asarray(mask), E)
    got = balance(jnp.asarray(scores, jnp.float32), load, jnp.asarray(mask), config)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_packed_balance_is_the_sum_over_samples_in_value_and_gradient():
    """A prompt's tokens are of several samples, padding is of none, and a sample may have no tokens."""
    rng = np.random.default_rng(0)
    config, scores = moe("noaux_tc"), jnp.asarray(rng.uniform(0.01, 1, (2, 6, E)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, E, (2, 6, A)), jnp.int32)
    samples = jnp.asarray(rng.random((2, 6, 4)) < 0.5).at[:, -1].set(False).at[..., -1].set(False)
    of_masks = lambda scores: sum(
        sequence_balance(scores, expert_load(experts, mask, E), mask, config) for mask in jnp.moveaxis(samples, 2, 0)
    )
    packed = lambda scores: packed_balance(scores, experts, samples, config)
    assert (samples.sum(axis=2) > 1).any()
    np.testing.assert_allclose(packed(scores), of_masks(scores), rtol=1e-5)
    of = lambda balance: jax.grad(lambda scores: balance(scores) @ jnp.asarray([1.0, 2.0]))(scores)
    np.testing.assert_allclose(of(packed), of(of_masks), rtol=1e-4, atol=1e-6)


def test_balance_is_one_when_perfect_and_more_when_all_go_one_way():
    config = moe("noaux_tc", num_experts_per_tok=2)
    experts = jnp.arange(12, dtype=jnp.int32).reshape(1, 6, 2)  # every expert once
    mask = jnp.ones((1, 6), bool)
    even = balance(jnp.full((1, 6, E), 0.5), load_of(experts, mask, E), mask, config)
    np.testing.assert_allclose(even, [1.0], rtol=1e-6)
    scores = jnp.full((1, 6, E), 1e-3).at[..., :2].set(1.0)
    crowded = balance(scores, load_of(jnp.tile(jnp.arange(2), (1, 6, 1)), mask, E), mask, config)
    assert crowded[0] > 5


def test_balance_has_a_gradient_towards_balance():
    """Where one expert takes most, the loss falls when its score falls."""
    config = moe("noaux_tc", num_experts_per_tok=1)
    experts, mask = jnp.zeros((1, 6, 1), jnp.int32), jnp.ones((1, 6), bool)
    loss = lambda scores: jnp.sum(balance(scores, load_of(experts, mask, E), mask, config))
    gradient = jax.grad(loss)(jnp.full((1, 6, E), 0.5))
    assert (gradient[..., 0] > 0).all() and (gradient[..., 1:] < 0).all()


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    load = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    bias = jnp.asarray([[0.0, -1.0, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4]])
    moved = updated_bias(bias, load, 0.001)
    np.testing.assert_allclose(moved, [[-0.001, -0.999, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4]], atol=1e-7)
    np.testing.assert_array_equal(updated_bias(bias, load, 0.0), bias)
