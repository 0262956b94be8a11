"""What this machine can do at most: products and memory traffic as fast as any program of ours makes them go."""

import time
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp

_SIDES = {"cpu": 1024, "tpu": 8192, "gpu": 8192}
_READ = {"cpu": 1 << 28, "tpu": 1 << 32, "gpu": 1 << 32}  # bytes, far beyond any cache
_CHAIN = 4  # products one after another, so that starting a program does not count
_TRIES = 3  # of each form; the fastest is the ceiling


def flops_rate(dtype: str) -> float:
    """FLOP/s of large square matrix products of two operands of a dtype, the best of a few tries."""
    product, x = _products(dtype)
    side = x.shape[0]
    return max(2 * side**3 * _CHAIN / _seconds(lambda: product(x)) for _ in range(_TRIES))


def bandwidth(dtype: str = "float32") -> float:
    """Bytes/s read from memory, the best of a sum and of a matrix times a vector in either order."""
    held = _large(dtype)
    return max(held.nbytes / _seconds(lambda form=form: form(held)) for form in _reads() for _ in range(_TRIES))


CEILINGS: dict[str, Callable[[str], float]] = {"flops_rate": flops_rate, "bandwidth": bandwidth}


@cache
def _products(dtype: str) -> tuple[Callable, jax.Array]:
    side = _SIDES.get(jax.default_backend(), 4096)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype)) / side**0.5

    @jax.jit
    def chained(x):
        y = x
        for _ in range(_CHAIN):
            y = x @ y
        return y

    jax.block_until_ready(chained(x))
    return chained, x


@cache
def _large(dtype: str) -> jax.Array:
    """A matrix of many more rows than columns, as a layer's weights all in one."""
    columns = 1024
    rows = _READ.get(jax.default_backend(), 1 << 28) // (columns * jnp.dtype(dtype).itemsize)
    return jax.block_until_ready(jnp.ones((rows, columns), jnp.dtype(dtype)))


@cache
def _reads() -> tuple[Callable, ...]:
    total = jax.jit(partial(jnp.sum, axis=0, dtype=jnp.float32))
    by_columns = jax.jit(lambda x: x @ jnp.ones((x.shape[1],), x.dtype))
    by_rows = jax.jit(lambda x: jnp.ones((x.shape[0],), x.dtype) @ x)
    return total, by_columns, by_rows


def _seconds(call: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(call())  # compiled and touched
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
