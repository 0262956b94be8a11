"""Products with matrices of low rank beside a frozen one: values and gradients against NumPy in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.experts import grouped_matmul, ragged_matmul, tiled_matmul
from deepseek_jax.ops.low_rank import LowRank, apart, columns, einsum, product, together

SCALE = 0.7
# spec, shapes of x, w, a and b
USES = {
    "rows": ("btd,df->btf", (2, 5, 12), (12, 8), (12, 3), (3, 8)),
    "spelled out": ("bsc,cnk->bnsk", (2, 5, 12), (12, 4, 6), (12, 3), (3, 4, 6)),
    "absorbed": ("btnk,cnk->btnc", (2, 5, 4, 6), (12, 4, 6), (12, 3), (3, 4, 6)),
    "values": ("btnc,cnh->btnh", (2, 5, 4, 12), (12, 4, 6), (12, 3), (3, 4, 6)),
}


def drawn(shapes, dtype=jnp.float32) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def low_rank(w, a, b) -> LowRank:
    return LowRank(w=w, a=a, b=b, scale=SCALE)


def in_float64(*arrays) -> list[np.ndarray]:
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]


@pytest.mark.parametrize("use", USES)
def test_a_product_is_that_with_the_sum(use):
    """And so are its gradients in x, A and B, given the gradient of what comes out."""
    spec, *shapes = USES[use]
    x, w, a, b = drawn(shapes)
    of = lambda x, a, b: einsum(spec, x, low_rank(w, a, b))
    got, back = jax.vjp(of, x, a, b)
    assert got.dtype == x.dtype
    d = drawn([got.shape])[0]
    x64, w64, a64, b64, d64 = in_float64(x, w, a, b, d)
    summed = w64 + SCALE * np.tensordot(a64, b64, 1)
    np.testing.assert_allclose(got, np.einsum(spec, x64, summed), rtol=0, atol=2e-5)
    of_x, of_w, out = spec.replace("->", ",").split(",")
    d_w = np.einsum(f"{of_x},{out}->{of_w}", x64, d64)
    rest = list(range(1, b.ndim))
    wanted = {
        "x": np.einsum(f"{out},{of_w}->{of_x}", d64, summed),
        "a": SCALE * np.tensordot(d_w, b64, (rest, rest)),
        "b": SCALE * np.tensordot(a64, d_w, (0, 0)),
    }
    for (name, value), found in zip(wanted.items(), back(d), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 3, 5)])
def test_gradients_of_a_plain_product(rows, dtype, tolerance):
    x, w, d = drawn(((*rows, 12), (12, 8), (*rows, 8)), jnp.dtype(dtype))
    got, back = jax.vjp(product, x, w)
    x64, w64, d64 = in_float64(x, w, d)
    wanted = x64 @ w64, d64 @ w64.T, x64.reshape(-1, 12).T @ d64.reshape(-1, 8)
    for found, value in zip((got, *back(d)), wanted, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(*in_float64(found), value, rtol=tolerance, atol=tolerance * abs(value).max())


def test_a_weights_gradient_makes_no_transposed_copy_on_a_cpu():
    of = lambda x, w: jnp.sum(jnp.sin(product(x, w)))
    shapes = jax.ShapeDtypeStruct((4, 64, 96), jnp.float32), jax.ShapeDtypeStruct((96, 160), jnp.float32)
    compiled = jax.jit(jax.grad(of, argnums=1)).lower(*shapes).compile().as_text()
    assert not re.findall(r" (?:copy|transpose)\(", compiled)


def test_rows_of_any_number_of_axes_and_plain_matrices():
    x, w, a, b = drawn([(2, 3, 5, 12), (12, 8), (12, 3), (3, 8)])
    for leading in ((), (30,), (2, 3, 5)):
        rows = x[0, 0, 0] if not leading else x.reshape(*leading, 12)
        wanted = np.asarray(rows, np.float64) @ (np.asarray(w, np.float64) + SCALE * (np.asarray(a) @ np.asarray(b)))
        np.testing.assert_allclose(product(rows, low_rank(w, a, b)), wanted, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(product(rows, w), rows @ w)


@pytest.mark.parametrize("use", USES)
def test_bfloat16_terms_are_added_in_float32_and_rounded_once(use):
    """Half a unit in the last place of the whole, and nothing of a small second term vanishes on the way."""
    spec, *shapes = USES[use]
    x, w, a, b = drawn(shapes, jnp.bfloat16)
    got = einsum(spec, x, low_rank(w, a, b))
    x64, w64, a64, b64 = in_float64(x, w, a, b)
    wanted = np.einsum(spec, x64, w64 + SCALE * np.tensordot(a64, b64, 1))
    low = np.einsum(spec, np.abs(x64), SCALE * np.tensordot(np.abs(a64), np.abs(b64), 1))
    assert got.dtype == jnp.bfloat16
    # what goes between the two of low rank is rounded as well, by 2^-8 of each number
    assert np.all(np.abs(in_float64(got)[0] - wanted) <= 2.0**-8 * (np.abs(wanted) + 1.01 * low) + 1e-5)


def of_groups(x, weight):
    return grouped_matmul(x, weight, jnp.asarray([9_000, 0, 8_000, 3_000], jnp.int32))


@pytest.mark.parametrize("multiply", [product, of_groups])
def test_a_term_below_the_last_bit_moves_the_mean(multiply):
    """x W in bfloat16 plus 2^-13 of it: rounded apart it would vanish in every number, and in their mean."""
    groups = () if multiply is product else (4,)
    x, w = (of.astype(jnp.bfloat16) for of in drawn([(20_000, 64), (*groups, 64, 64)]))
    eye = jnp.broadcast_to(jnp.eye(64, dtype=jnp.bfloat16), w.shape)
    moved = multiply(x, LowRank(w=w, a=w, b=eye, scale=2.0**-13))
    whole, small = in_float64(multiply(x, LowRank(w=w, a=w, b=eye, scale=0.0)), moved)
    slope = np.sum((small - whole) * whole) / np.sum(whole * whole)
    assert slope == pytest.approx(2.0**-13, rel=0.05)
    plain = multiply(x, w)
    apart = plain + (2.0**-13 * plain).astype(jnp.bfloat16)
    np.testing.assert_array_equal(*in_float64(apart, plain))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 0, 5, 2), (0, 10, 0, 0), (1, 2, 3, 1)])
def test_groups_have_low_rank_each_its_own(sizes, dtype):
    """Values and gradients; rows past the last group have none, and may be NaN in the rows given."""
    filled = sum(sizes)
    x, w, a, b, d = drawn([(10, 12), (4, 12, 8), (4, 12, 3), (4, 3, 8), (10, 8)], dtype)
    group = np.repeat(np.arange(4), sizes)
    of = lambda x, a, b: grouped_matmul(x, low_rank(w, a, b), jnp.asarray(sizes, jnp.int32))[:filled]
    got, back = jax.vjp(of, x, a, b)
    assert got.dtype == dtype
    x64, w64, a64, b64, d64 = in_float64(x[:filled], w, a, b, d[:filled])
    summed = w64 + SCALE * a64 @ b64
    close = partial(
        np.testing.assert_allclose,
        **({"rtol": 2e-2, "atol": 0.3} if dtype != jnp.float32 else {"rtol": 1e-5, "atol": 5e-5}),
    )
    close(in_float64(got)[0], np.einsum("wd,wdf->wf", x64, summed[group]))
    d_w = np.stack([x64[group == e].T @ d64[group == e] for e in range(4)])
    d_x, d_a, d_b = in_float64(*back(d[:filled]))
    close(d_x[:filled], np.einsum("wf,wdf->wd", d64, summed[group]))
    close(d_a, SCALE * d_w @ b64.swapaxes(1, 2))
    close(d_b, SCALE * a64.swapaxes(1, 2) @ d_w)


@pytest.mark.parametrize("matmul", [tiled_matmul, ragged_matmul])
def test_groups_in_float32_of_bfloat16_numbers(matmul):
    """The result has not been rounded to bfloat16 on its way."""
    x, w = drawn([(10, 64), (2, 64, 8)], jnp.bfloat16)
    got = matmul(x, w, jnp.asarray([4, 6], jnp.int32), dtype=jnp.float32)
    x64, w64 = in_float64(x, w)
    np.testing.assert_allclose(got, np.einsum("wd,wdf->wf", x64, w64[[0] * 4 + [1] * 6]), rtol=0, atol=1e-4)
    assert got.dtype == jnp.float32
    rounded = np.asarray(got.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.abs(rounded - np.asarray(got)).max() > 1e-3


def test_columns_and_taking_apart():
    w, a, b = drawn([(4, 6), (4, 2), (2, 6)])
    of = columns(low_rank(w, a, b), lambda m: m.reshape(m.shape[0], 2, 3)[:, 1])
    np.testing.assert_array_equal(of.w, w[:, 3:])
    np.testing.assert_array_equal(of.b, b[:, 3:])
    assert of.a is a and of.scale == SCALE
    tree = (w, [low_rank(w, a, b), None])
    frozen, rest = apart(tree)
    assert [leaf is w for leaf in jax.tree.leaves(frozen)] == [True]
    assert len(jax.tree.leaves(rest)) == 3
    assert jax.tree.structure(together(frozen, rest)) == jax.tree.structure(tree)
    assert all(x is y for x, y in zip(jax.tree.leaves(together(frozen, rest)), jax.tree.leaves(tree), strict=True))
