"""The grouped expert computation against a plain loop over tokens, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.ops.experts import Tiles, expert_mlp, grouped_matmul, tiled_matmul

D, M = 6, 5


def silu(x):
    return x / (1 + np.exp(-x))


def looped(x, weights, experts, gate, up, down):
    """expert_mlp, one token and one expert at a time, in float64."""
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        for choice, e in enumerate(experts[row]):
            hidden = silu(x[row] @ gate[e]) * (x[row] @ up[e])
            out[row] += weights[row, choice] * (hidden @ down[e])
    return out


def looped_gradient(x, weights, experts, gate, up, down, seed):
    """Gradient of sum(seed * expert_mlp) in x, weights, gate, up and down, one token and one expert at a time."""
    grads = [np.zeros_like(a) for a in (x, weights, gate, up, down)]
    d_x, d_weights, d_gate, d_up, d_down = grads
    for row in range(x.shape[0]):
        for choice, e in enumerate(experts[row]):
            g, u = x[row] @ gate[e], x[row] @ up[e]
            sigmoid = 1 / (1 + np.exp(-g))
            hidden, w = silu(g) * u, weights[row, choice]
            d_weights[row, choice] = seed[row] @ (hidden @ down[e])
            d_down[e] += w * np.outer(hidden, seed[row])
            d_hidden = w * (down[e] @ seed[row])
            d_g = d_hidden * u * (sigmoid + g * sigmoid * (1 - sigmoid))
            d_u = d_hidden * silu(g)
            d_gate[e] += np.outer(x[row], d_g)
            d_up[e] += np.outer(x[row], d_u)
            d_x[row] += gate[e] @ d_g + up[e] @ d_u
    return grads


def inputs(W, A, E, seed, experts=None):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    if experts is None:
        experts = np.array([rng.permutation(E)[:A] for _ in range(W)])
    return [normal(W, D), normal(W, A), experts, normal(E, D, M), normal(E, D, M), normal(E, M, D)], normal(W, D)


def single(arrays):
    return [jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in arrays]


@jax.jit
def value_and_gradient(arrays, seed):
    loss = lambda *arrays: jnp.sum(seed * expert_mlp(*arrays))
    return expert_mlp(*arrays), jax.grad(loss, argnums=(0, 1, 3, 4, 5))(*arrays)


def assert_equals_loop(arrays, seed):
    out, gradient = value_and_gradient(single(arrays), jnp.asarray(seed, jnp.float32))
    np.testing.assert_allclose(out, looped(*arrays), rtol=1e-4, atol=1e-4)
    for name, got, wanted in zip(
        ("x", "weights", "gate", "up", "down"), gradient, looped_gradient(*arrays, seed), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=f"gradient of {name}")


# W = 1, fewer rows than experts, and a W*A that no power of two divides.
@settings(max_examples=12)
@given(
    shape=st.sampled_from([(1, 3, 3), (5, 2, 8), (37, 2, 4), (37, 3, 8)]),
    seed=st.integers(0, 2**31),
)
def test_experts_equal_a_loop_over_tokens_forward_and_gradient(shape, seed):
    assert_equals_loop(*inputs(*shape, seed))


@pytest.mark.parametrize("favourite", [0, 2, 3])
def test_one_expert_may_get_every_row(favourite):
    assert_equals_loop(*inputs(37, 2, 4, 0, experts=np.full((37, 2), favourite)))


@pytest.mark.parametrize("used", [(0, 1), (2, 3), (0, 3)])
def test_experts_without_rows_get_a_zero_gradient(used):
    arrays, seed = inputs(37, 2, 4, 1, experts=np.tile(used, (37, 1)))
    assert_equals_loop(arrays, seed)
    _, gradient = value_and_gradient(single(arrays), jnp.asarray(seed, jnp.float32))
    for d in gradient[2:]:
        idle = np.delete(np.asarray(d), used, axis=0)
        np.testing.assert_array_equal(idle, np.zeros_like(idle))


def test_the_order_of_rows_does_not_matter():
    arrays, seed = inputs(37, 3, 8, 2)
    order = np.random.default_rng(3).permutation(37)
    shuffled = [a[order] if i < 3 else a for i, a in enumerate(arrays)]
    out, gradient = value_and_gradient(single(arrays), jnp.asarray(seed, jnp.float32))
    out2, gradient2 = value_and_gradient(single(shuffled), jnp.asarray(seed[order], jnp.float32))
    np.testing.assert_allclose(out2, out[order], rtol=1e-5, atol=1e-5)
    for i, (first, second) in enumerate(zip(gradient, gradient2, strict=True)):
        np.testing.assert_allclose(second, first[order] if i < 2 else first, rtol=1e-4, atol=1e-4)


def test_the_order_of_a_rows_experts_does_not_matter():
    arrays, seed = inputs(5, 2, 8, 4)
    swapped = [a[:, ::-1] if i in (1, 2) else a for i, a in enumerate(arrays)]
    first, second = (value_and_gradient(single(a), jnp.asarray(seed, jnp.float32))[0] for a in (arrays, swapped))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


@st.composite
def group_sizes(draw):
    """Sizes of 4 groups that sum to 40: some empty, some long, in any place."""
    cuts = sorted(draw(st.lists(st.integers(0, 40), min_size=3, max_size=3)))
    return np.diff([0, *cuts, 40])


@jax.jit
def both_matmuls(lhs, rhs, sizes, seed):
    def run(matmul):
        out, pull = jax.vjp(lambda lhs, rhs: matmul(lhs, rhs, sizes), lhs, rhs)
        return out, *pull(seed)

    return run(tiled_matmul), run(jax.lax.ragged_dot)


@given(sizes=group_sizes(), seed=st.integers(0, 2**31))
def test_tiles_equal_ragged_dot_forward_and_gradient(sizes, seed):
    rng = np.random.default_rng(seed)
    lhs, rhs, d_out = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((40, D), (4, D, M), (40, M)))
    tiled, ragged = both_matmuls(lhs, rhs, jnp.asarray(sizes, jnp.int32), d_out)
    for name, got, wanted in zip(("out", "d_lhs", "d_rhs"), tiled, ragged, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    # ragged_dot is an oracle of the same library; this is not
    group = np.repeat(np.arange(4), sizes)
    wanted = np.einsum("wk,wkn->wn", np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)[group])
    np.testing.assert_allclose(tiled[0], wanted, rtol=1e-5, atol=1e-5)


def test_nan_past_the_last_group_reaches_no_gradient():
    """Of tiles that reach past it, in the rows or in the gradient of the result."""
    sizes = jnp.asarray([2, 1])
    normal = lambda *shape: jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    x, matrices, d = normal(8, 4), normal(2, 4, 4), normal(8, 4)
    gradients = lambda x, d: jax.vjp(lambda x, w: tiled_matmul(x, w, sizes, Tiles(4, 2)), x, matrices)[1](d)
    wanted, got = gradients(x[:3], d[:3]), gradients(x.at[3:].set(jnp.nan), d.at[3:].set(jnp.nan))
    np.testing.assert_array_equal(got[0][:3], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def test_tiles_of_the_largest_size():
    """Long groups take many tiles of 128 rows; the last tile of each reaches past its end."""
    rng = np.random.default_rng(0)
    sizes = np.array([259, 0, 130, 1])
    lhs, rhs, d_out = (rng.normal(size=s) for s in ((390, D), (4, D, M), (390, M)))
    tiled, _ = both_matmuls(*(jnp.asarray(a, jnp.float32) for a in (lhs, rhs)), jnp.asarray(sizes), d_out)
    group = np.repeat(np.arange(4), sizes)
    np.testing.assert_allclose(tiled[0], np.einsum("wk,wkn->wn", lhs, rhs[group]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tiled[1], np.einsum("wn,wkn->wk", d_out, rhs[group]), rtol=1e-4, atol=1e-5)
    wanted = np.stack([lhs[group == g].T @ d_out[group == g] for g in range(4)])
    np.testing.assert_allclose(tiled[2], wanted, rtol=1e-4, atol=1e-4)


def test_gradient_inside_jit_scan_and_checkpoint():
    """Layers of a model run like this; values are those of the same products written out in float64."""
    rng = np.random.default_rng(0)
    lhs, stack, sizes = rng.normal(size=(13, D)), rng.normal(size=(3, 4, D, D)) / 3, np.array([6, 0, 7, 0])

    @jax.jit
    def gradient(lhs, stack):
        @jax.checkpoint
        def layer(rows, rhs):
            return jnp.tanh(grouped_matmul(rows, rhs, jnp.asarray(sizes))), None

        return jax.value_and_grad(lambda *a: jnp.sum(jax.lax.scan(layer, *a)[0]), argnums=(0, 1))(lhs, stack)

    group = np.repeat(np.arange(4), sizes)
    rows = [lhs]
    for rhs in stack:
        rows.append(np.tanh(np.einsum("wk,wkn->wn", rows[-1], rhs[group])))
    d_rows, d_stack = np.ones_like(rows[-1]), np.zeros_like(stack)
    for layer in (2, 1, 0):
        d = d_rows * (1 - rows[layer + 1] ** 2)
        np.add.at(d_stack[layer], group, np.einsum("wk,wn->wkn", rows[layer], d))
        d_rows = np.einsum("wn,wkn->wk", d, stack[layer][group])

    value, (got_lhs, got_stack) = gradient(jnp.asarray(lhs, jnp.float32), jnp.asarray(stack, jnp.float32))
    np.testing.assert_allclose(value, rows[-1].sum(), rtol=1e-5)
    np.testing.assert_allclose(got_lhs, d_rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_stack, d_stack, rtol=1e-4, atol=1e-5)
