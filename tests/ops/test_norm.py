"""RMSNorm and LayerNorm against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.norm import layer_norm, rms_norm

rng = np.random.default_rng(0)
X, WEIGHT = rng.normal(size=(2, 3, 8)) * 4, rng.normal(size=8)
SHIFT = np.random.default_rng(1).normal(size=8)


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


# --- layer norm ----------------------------------------------------------------------------------


def layer_twin(x, weight, shift, eps):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weight + shift


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_layer_norm_equals_the_formula(eps):
    x = X + 30  # far from zero, where the mean must go first
    got = layer_norm(*(jnp.asarray(a, jnp.float32) for a in (x, WEIGHT, SHIFT)), eps)
    np.testing.assert_allclose(got, layer_twin(x, WEIGHT, SHIFT, eps), rtol=1e-4, atol=1e-5)


def test_layer_norm_in_bfloat16_rounds_once_at_the_end():
    x, weight, shift = (jnp.asarray(a, jnp.bfloat16) for a in (X, WEIGHT, SHIFT))
    got = layer_norm(x, weight, shift, 1e-6)
    assert got.dtype == jnp.bfloat16
    wanted = layer_twin(*(np.asarray(a, np.float64) for a in (x, weight, shift)), 1e-6)
    np.testing.assert_array_equal(got, jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))


def test_layer_norm_of_equal_numbers_is_the_shift():
    shift = jnp.asarray(SHIFT, jnp.float32)
    np.testing.assert_array_equal(layer_norm(jnp.full((2, 8), 7.0), jnp.ones(8), shift, 1e-6), jnp.stack([shift] * 2))
