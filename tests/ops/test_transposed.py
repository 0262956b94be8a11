"""Products with matrices that lie transposed, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.low_rank import product, products
from deepseek_jax.ops.transposed import Joined, Transposed, times_transposed


@pytest.mark.parametrize("leading", [(1,), (3, 1), (2, 5), (64,), (65,)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_product_is_that_of_the_matrix(leading, compiled):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*leading, 48)), rng.normal(size=(48, 40))
    of = jax.jit(product) if compiled else product
    got = of(jnp.asarray(x, jnp.float32), Transposed(jnp.asarray(w.T, jnp.float32)))
    assert got.dtype == jnp.float32
    bound = 48 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w))
    assert np.all(np.abs(np.asarray(got, np.float64) - x @ w) <= bound)


def test_bfloat16_is_added_up_in_the_dtype_asked_for():
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, 256), (256, 32)))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    got = times_transposed(x, Transposed(w.T), jnp.float32)
    assert got.dtype == jnp.float32
    bound = 256 * np.finfo(np.float32).eps * (np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64)))
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= bound)
    assert times_transposed(x, Transposed(w.T)).dtype == jnp.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_joined_matrices_give_the_product_of_each(transposed):
    rng = np.random.default_rng(2)
    x, apart = rng.normal(size=(2, 3, 16)), [rng.normal(size=(16, width)) for width in (8, 2, 2)]
    whole = jnp.asarray(np.concatenate(apart, axis=1), jnp.float32)
    joined = Joined(Transposed(whole.T) if transposed else whole, (8, 2, 2))
    found = products(jnp.asarray(x, jnp.float32), joined, Joined(None, ()), Joined(None, ()))
    assert len(found) == 3
    for got, w in zip(found, apart, strict=True):
        np.testing.assert_allclose(got, x @ w, rtol=0, atol=2e-5)
    plain = products(jnp.asarray(x, jnp.float32), *(jnp.asarray(w, jnp.float32) for w in apart))
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5), found, plain)
