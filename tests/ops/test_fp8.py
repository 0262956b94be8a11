"""Block-scaled FP8 against NumPy and ml_dtypes, one block or one element at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.ops.fp8 import blocks, dequantize, quantize

E4M3 = ml_dtypes.float8_e4m3fn
CODES = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]).view(E4M3)  # all but the NaNs
VALUES = np.unique(CODES.astype(np.float64))
# Shapes that 128 does not divide (R1's kv_a has 576 rows), a single row and column, stacks, and blocks that are
# no squares.
CASES = st.sampled_from(
    [
        ((576, 200), (128, 128)),
        ((1, 300), (128, 128)),
        ((130, 1), (128, 128)),
        ((3, 129, 128), (128, 128)),
        ((8, 8), (4, 4)),
        ((2, 3, 7, 10), (3, 4)),
        ((5, 11), (1, 6)),
        ((11, 5), (6, 1)),
    ]
)
SEEDS = st.integers(0, 2**32 - 1)
FORMATS = st.sampled_from([None, "ue8m0"])
jitted = {
    False: (dequantize, quantize),
    True: (jax.jit(dequantize, static_argnums=(2, 3)), jax.jit(quantize, static_argnums=(1, 2))),
}


def stored(shape, block, seed):
    """Random codes, and scales from 2**-40 to 2**40."""
    rng = np.random.default_rng(seed)
    counts = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return rng.choice(CODES, shape), np.exp2(rng.uniform(-40, 40, counts)).astype(np.float32)


def tiles(shape, block):
    """The index of every block's scale, and of its elements."""
    for r, c in np.ndindex(-(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
        rows, columns = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
        for stack in np.ndindex(shape[:-2]):
            yield (*stack, r, c), (*stack, rows, columns)


def weights(shape, block, seed):
    """Normal weights, each block of a magnitude of its own, the last of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    for _, tile in tiles(shape, block):
        x[tile] *= np.exp2(rng.uniform(-40, 40)).astype(np.float32)
    x[tile] = 0
    return x


def bits(codes):
    return np.asarray(codes).view(np.uint8)


# Both factors are float32 numbers without rounding, and IEEE arithmetic rounds their exact product once: there is
# one right answer. float64 holds that product (4 + 24 significant bits), so that NumPy finds it by another way.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@settings(max_examples=18)
@given(case=CASES, seed=SEEDS, jit=st.booleans())
def test_dequantize_is_the_rounded_product_with_the_scale_of_the_block(dtype, case, seed, jit):
    (shape, block), (codes, scale) = case, stored(*case, seed)
    wanted = np.empty(shape, np.float32)
    for index in np.ndindex(shape):
        *stack, i, j = index
        wanted[index] = float(codes[index]) * float(scale[(*stack, i // block[0], j // block[1])])
    got = jitted[jit][0](jnp.asarray(codes), jnp.asarray(scale), block, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wanted.astype(dtype))


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 1 / 3, 0.1, 6.02e23])
def test_dequantize_of_every_code(scale):
    scale = np.float32(scale)
    wanted = (CODES.astype(np.float64) * np.float64(scale)).astype(np.float32)
    got = dequantize(jnp.asarray(CODES[None]), jnp.full((1, 2), scale))
    np.testing.assert_array_equal(got[0], wanted)
    assert len(CODES) == 254 and np.abs(wanted).max() == np.float32(448 * np.float64(scale))


@settings(max_examples=8)
@given(case=CASES, seed=SEEDS)
def test_transposing_weight_scale_and_block_transposes_the_result(case, seed):
    block, (codes, scale) = case[1], map(jnp.asarray, stored(*case, seed))
    across = dequantize(codes.swapaxes(-1, -2), scale.swapaxes(-1, -2), block[::-1])
    np.testing.assert_array_equal(across.swapaxes(-1, -2), dequantize(codes, scale, block))


@settings(max_examples=18)
@given(case=CASES, seed=SEEDS, scale_fmt=FORMATS, jit=st.booleans())
def test_quantize_equals_a_loop_over_blocks_bit_for_bit(case, seed, scale_fmt, jit):
    (shape, block), x = case, weights(*case, seed)
    codes, scale = jitted[jit][1](jnp.asarray(x), block, scale_fmt)
    assert codes.dtype == E4M3 and scale.dtype == jnp.float32 and scale.shape == blocks(shape, block)
    for where, tile in tiles(shape, block):
        wanted = np.float32(np.abs(x[tile]).max()) / np.float32(448)
        if scale_fmt == "ue8m0" and wanted > 0:
            wanted = np.float32(2.0 ** np.ceil(np.log2(np.float64(wanted))))
        wanted = max(wanted, np.float32(2.0**-126))
        assert scale[where] == wanted
        np.testing.assert_array_equal(bits(codes[tile]), bits((x[tile] * (1 / wanted)).astype(E4M3)))


# Measured against the exact quotient; 2**-22 of it is left for the two float32 roundings of quotient and reciprocal.
@given(case=CASES, seed=SEEDS, scale_fmt=FORMATS)
def test_a_code_is_within_half_a_step_of_the_weight(case, seed, scale_fmt):
    (shape, block), x = case, weights(*case, seed)
    codes, scale = quantize(jnp.asarray(x), block, scale_fmt)
    for where, tile in tiles(shape, block):
        exact = x[tile].astype(np.float64) / np.float64(scale[where])
        step = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-6))) - 3)
        error = np.abs(np.asarray(codes[tile]).astype(np.float64) - exact)
        assert np.all(error <= step / 2 + np.abs(exact) * 2.0**-22)
        assert np.abs(exact).max() <= 448 * (1 + 2.0**-23)


@given(case=CASES, seed=SEEDS, scale_fmt=FORMATS, jit=st.booleans())
def test_what_was_quantized_once_stays_as_it_is(case, seed, scale_fmt, jit):
    block, x = case[1], weights(*case, seed)
    restore, store = jitted[jit]
    once = restore(*store(jnp.asarray(x), block, scale_fmt), block)
    np.testing.assert_array_equal(restore(*store(once, block, scale_fmt), block), once)
    assert jnp.all(jnp.isfinite(once))


@given(case=CASES, seed=SEEDS)
def test_ue8m0_scales_are_the_next_powers_of_two(case, seed):
    block, x = case[1], jnp.asarray(weights(*case, seed))
    plain, rounded = (np.asarray(quantize(x, block, scale_fmt)[1]) for scale_fmt in (None, "ue8m0"))
    assert np.all(np.frexp(rounded)[0] == 0.5)
    assert np.all((plain <= rounded) & (rounded < 2 * plain))


def test_a_scale_that_is_a_power_of_two_already_stays():
    x = jnp.asarray([[448.0, 7.0, np.nextafter(np.float32(448), np.float32(449))]])
    np.testing.assert_array_equal(quantize(x, (1, 1), "ue8m0")[1], [[1.0, 2.0**-6, 2.0]])


# The largest number is 448, so that the scale is 1 and the numbers are rounded as they stand.
def test_ties_go_to_even_and_their_neighbours_to_the_nearer():
    middle = ((VALUES[1:] + VALUES[:-1]) / 2).astype(np.float32)  # exact: one bit more than the format has
    x = np.concatenate([[448], middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    codes, scale = quantize(jnp.asarray(x[None], jnp.float32), (1, x.size), None)
    assert scale == 1
    np.testing.assert_array_equal(bits(codes)[0], bits(x.astype(np.float32).astype(E4M3)))
    assert np.all(bits(codes)[0, 1 : 1 + middle.size] % 2 == 0)


# 3.2e38 and not the very largest, which ue8m0 rounds to 2**128.
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-126, 1e-36, 3.2e38])
def test_zeros_and_the_ends_of_float32_are_finite(value, scale_fmt):
    x = jnp.full((3, 5), value, jnp.float32).at[0, 0].set(0)
    codes, scale = quantize(x, (2, 2), scale_fmt)
    restored = dequantize(codes, scale, (2, 2))
    assert jnp.all(jnp.isfinite(scale)) and jnp.all(scale > 0) and jnp.all(jnp.isfinite(restored))
    assert restored[0, 0] == 0
    if value == 0:
        assert not np.any(bits(codes))


def test_quantize_takes_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 9)), jnp.bfloat16)
    for got, wanted in zip(quantize(x, (4, 4), None), quantize(x.astype(jnp.float32), (4, 4), None), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(576, 7168), (4, 300, 300)])
def test_dequantize_makes_nothing_beside_its_result(shape):
    arguments = jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(blocks(shape, (128, 128)), jnp.float32)
    compiled = jax.jit(partial(dequantize, dtype=jnp.bfloat16)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1000


@pytest.mark.parametrize("shape", [(4, 2), (5, 1), (2, 5, 2), (5,), ()])
def test_a_scale_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"wanted \[5, 2\] for a weight of shape \[576, 192\]"):
        dequantize(jnp.zeros((576, 192), E4M3), jnp.ones(shape))


def test_an_unknown_format_of_scales_is_refused():
    with pytest.raises(ValueError, match="scale_fmt: got 'e5m3'"):
        quantize(jnp.ones((2, 2)), (2, 2), "e5m3")
