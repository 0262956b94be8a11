"""The TPU kernel of grouped products with packed matrices, run as plain JAX, beside its twin of the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.experts import tiled_matmul
from deepseek_jax.ops.kernels.packed_matmul import fits, packed_matmul
from deepseek_jax.ops.packed import Packing
from tests.ops.test_packed import drawn, in_float64


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_the_kernel_is_its_twin(scheme, dtype):
    """Groups without rows, and one over several tiles; rows past the last group may be NaN. Of float32 both are the
    product of codes and scales within the rounding of sums; of bfloat16 the kernel still is, whose twin rounds the
    matrix."""
    sizes = (0, 150, 0, 3, 40)
    packed = Packing(scheme=scheme).pack(drawn(5, 384, 256))
    x = drawn(200, 384, seed=1).at[sum(sizes) :].set(jnp.nan).astype(dtype)
    given = jnp.asarray(sizes, jnp.int32)
    got = packed_matmul(x, packed, given, jnp.float32, interpret=True)[: sum(sizes)]
    x64 = np.asarray(x[: sum(sizes)].astype(jnp.float32), np.float64)
    each = in_float64(packed)[np.repeat(np.arange(5), sizes)]
    size = np.einsum("wk,wkn->wn", np.abs(x64), np.abs(each))
    wanted = np.einsum("wk,wkn->wn", x64, each)
    assert np.all(np.abs(got - wanted) <= 384 * 2.0**-24 * size)
    twin = tiled_matmul(x, packed, given, None, jnp.float32)[: sum(sizes)]
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0
    assert np.all(np.abs(twin - wanted) <= (384 * 2.0**-24 + rounding) * size)


def test_what_it_takes():
    """Scales that change within a step, or columns that fill no lane, go another way."""
    takes = lambda scheme, *shape, **of: fits(Packing(scheme=scheme, **of).like(shape))
    assert takes("fp8", 4, 7168, 2048) and takes("int4", 4, 2048, 7168) and takes("int8", 2, 384, 128)
    assert not takes("fp8", 4, 7168, 576) and not takes("int4", 4, 576, 1536)
    assert not takes("fp8", 4, 256, 256, block=(64, 128))
