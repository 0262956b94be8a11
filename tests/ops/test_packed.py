"""Packed matrices: codes, their errors, and products with them beside NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.ops.experts import grouped_matmul
from deepseek_jax.ops.low_rank import LowRank, einsum, product, whole
from deepseek_jax.ops.packed import Packed, Packing, dense, nbytes

SCHEMES = ["fp8", "int8", "int4"]
SHAPES = [(256, 384), (320, 192), (96, 40), (130, 1)]  # whole blocks, ragged both ways, less than one


def drawn(*shape, seed=0, dtype=jnp.float32) -> jax.Array:
    """Rows and columns of very different size, so that a scale of another block would show."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.normal(size=shape[-2:-1] + (1,))) * np.exp(random.normal(size=shape[-1:]))
    return jnp.asarray(random.normal(size=shape) * sizes, dtype)


def in_float64(packed: Packed) -> np.ndarray:
    """Codes times scales, element by element."""
    codes = np.asarray(packed.codes.astype(jnp.float32), np.float64)
    scale = np.asarray(packed.scale.astype(jnp.float32), np.float64)
    rows, columns = (np.arange(size) // side for size, side in zip(codes.shape[-2:], packed.block, strict=True))
    return codes * scale[..., rows[:, None], columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_number_is_further_than_half_a_step(scheme, shape):
    """e4m3 has 4 bits with the leading one: half a step is 2^-4 of the number, or half the smallest step, 2^-10, of
    the scale. Half a step of int8 is scale / 2; of int4 as well, but that its scale is rounded to bfloat16, by 2^-8 of
    the 7.5 steps that the largest has."""
    x = np.asarray(drawn(*shape), np.float64)
    packed = Packing(scheme=scheme).pack(drawn(*shape))
    found, like = in_float64(packed), Packing(scheme=scheme).like(shape)
    assert (packed.codes.dtype, packed.scale.dtype) == (like.codes.dtype, like.scale.dtype)
    assert (packed.codes.shape, packed.scale.shape) == (like.codes.shape, like.scale.shape)
    step = in_float64(Packed(codes=jnp.ones(shape), scale=packed.scale, block=packed.block))
    bound = {"fp8": np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10), "int8": step / 2}.get(
        scheme, step * (0.5 + 7.5 * 2.0**-8)
    )
    assert np.all(np.abs(found - x) <= bound * (1 + 1e-4))
    assert np.abs(found - x).max() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_is_that_of_codes_and_scales(scheme):
    """In float32, within the rounding of n products and their sum; in bfloat16 the matrix is rounded once before."""
    packed = Packing(scheme=scheme).pack(drawn(320, 192))
    x = drawn(5, 320, seed=1)
    w64, x64 = in_float64(packed), np.asarray(x, np.float64)
    size = np.abs(x64) @ np.abs(w64)
    assert np.all(np.abs(product(x, packed) - x64 @ w64) <= 320 * 2.0**-24 * size)
    rounded = np.asarray(jnp.asarray(w64.astype(np.float32)).astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    got = product(x.astype(jnp.bfloat16), packed)
    x64 = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    wanted = x64 @ rounded
    assert got.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(got.astype(jnp.float32)) - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-5 * size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_have_packed_matrices_each_its_own(scheme):
    """Of a stack of two layers, of which the second has rows."""
    w = drawn(2, 4, 160, 24)
    packed = Packing(scheme=scheme).pack(w)
    x, sizes = drawn(10, 160, seed=1), (0, 0, 0, 0, 3, 0, 5, 2)
    got = jax.jit(grouped_matmul)(x, packed, jnp.asarray(sizes, jnp.int32))
    each = in_float64(packed).reshape(8, 160, 24)[np.repeat(np.arange(8), sizes)]
    x64 = np.asarray(x, np.float64)
    size = np.einsum("wk,wkn->wn", np.abs(x64), np.abs(each))
    assert np.all(np.abs(got - np.einsum("wk,wkn->wn", x64, each)) <= 160 * 2.0**-24 * size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_low_rank_lies_beside_what_is_packed(scheme):
    """Products, groups and einsum are those with the matrix made whole, bit for bit."""
    packed = Packing(scheme=scheme).pack(drawn(3, 64, 24))
    a, b, x = drawn(3, 64, 2, seed=1), drawn(3, 2, 24, seed=2), drawn(6, 64, seed=3)
    beside = LowRank(w=packed, a=a, b=b, scale=0.5)
    plain = LowRank(w=dense(packed, jnp.float32), a=a, b=b, scale=0.5)
    of = lambda weight, group: jax.tree.map(lambda part: part[group], weight)
    np.testing.assert_array_equal(product(x, of(beside, 1)), product(x, of(plain, 1)))
    np.testing.assert_array_equal(einsum("bi,io->bo", x, of(beside, 1)), einsum("bi,io->bo", x, of(plain, 1)))
    sizes = jnp.asarray([1, 0, 5], jnp.int32)
    np.testing.assert_array_equal(grouped_matmul(x, beside, sizes), grouped_matmul(x, plain, sizes))
    assert whole(beside, jnp.bfloat16).w.dtype == jnp.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_packed_again_has_the_same_codes(scheme):
    """Under jit and without; and a block of zeros has codes and a scale that are no NaN."""
    packing = Packing(scheme=scheme)
    x = drawn(256, 192).at[:128, :128].set(0)
    first, jitted = packing.pack(x), jax.jit(packing.pack)(x)
    for got, wanted in zip(jax.tree.leaves(jitted), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))
    np.testing.assert_array_equal(dense(first, jnp.float32)[:128, :128], 0)
    assert np.all(np.isfinite(dense(first, jnp.float32)))
    if scheme == "fp8":  # the largest magnitude lies on the largest code, not half a step beyond it
        again = packing.pack(dense(first, jnp.float32))
        np.testing.assert_array_equal(again.codes.astype(jnp.float32), first.codes.astype(jnp.float32))


@pytest.mark.parametrize(("scheme", "bits"), [("fp8", 8), ("int8", 8), ("int4", 4)])
def test_bytes_are_those_that_a_program_is_given(scheme, bits):
    packed = Packing(scheme=scheme).pack(drawn(256, 384))
    compiled = jax.jit(partial(dense, dtype=jnp.float32)).lower(packed).compile()
    assert packed.nbytes == compiled.memory_analysis().argument_size_in_bytes
    assert nbytes(packed.codes) == 256 * 384 * bits // 8
    assert packed.nbytes == Packing(scheme=scheme).like((256, 384)).nbytes


def test_fp8_is_the_files_format_turned():
    """Blocks, too, lie the other way round."""
    from deepseek_jax.ops import fp8

    x = drawn(200, 300)
    codes, scale = fp8.quantize(x.T, (64, 128), "ue8m0")
    packed = Packing(scheme="fp8", block=(128, 64), scale_fmt="ue8m0").pack(x)
    assert np.asarray(packed.codes.T).view(np.uint8).tolist() == np.asarray(codes).view(np.uint8).tolist()
    np.testing.assert_array_equal(packed.scale.T, scale)
    assert packed.codes.dtype == ml_dtypes.float8_e4m3fn
