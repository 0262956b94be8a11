"""RMSNorm against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.norm import rms_norm

rng = np.random.default_rng(0)
X, WEIGHT = rng.normal(size=(2, 3, 8)) * 4, rng.normal(size=8)


def twin(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_equals_the_formula(eps):
    got = rms_norm(jnp.asarray(X, jnp.float32), jnp.asarray(WEIGHT, jnp.float32), eps)
    np.testing.assert_allclose(got, twin(X, WEIGHT, eps), rtol=1e-5, atol=1e-6)


def test_gradient_equals_the_formula():
    d_out = rng.normal(size=X.shape)
    loss = lambda x, w: jnp.sum(d_out * rms_norm(x, w, 1e-6))
    d_x, d_w = jax.grad(loss, argnums=(0, 1))(jnp.asarray(X, jnp.float32), jnp.asarray(WEIGHT, jnp.float32))
    inverse = 1 / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + 1e-6)
    through = d_out * WEIGHT
    wanted = inverse * through - X * inverse**3 * np.mean(through * X, axis=-1, keepdims=True)
    np.testing.assert_allclose(d_x, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_w, np.sum(d_out * X * inverse, axis=(0, 1)), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_normalised_in_float32_and_rounded_before_the_weight():
    x = jnp.asarray(X * 1e-3 + 300, jnp.bfloat16)  # the square of a bfloat16 sum would lose the small part
    weight = jnp.asarray(WEIGHT, jnp.bfloat16)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == jnp.bfloat16
    normed = twin(np.asarray(x, np.float64), 1.0, 1e-6)
    wanted = jnp.asarray(normed, jnp.float32).astype(jnp.bfloat16) * weight
    np.testing.assert_array_equal(got, wanted)


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6), np.zeros((2, 8)))
