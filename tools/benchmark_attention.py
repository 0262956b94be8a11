"""How long attention of whole sequences takes here, by tiles and with all pairs of queries and keys at once."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.cli import run
from deepseek_jax.ops.attention import attend, causal_mask
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.sharding import LOCAL


def main(
    *,
    tokens: int = 2048,
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
    heads: int = 9,
    groups: int = 3,
    width: int = 64,
    samples: tuple[int, ...] = (4, 16),
    rounds: int = 5,
) -> None:
    """Milliseconds, medians of interleaved rounds, float32, of value alone and with the gradients.

    Args:
        tokens: of all sequences together.
        lengths: of a sequence.
        samples: packed in one row of all tokens, whose tiles of two samples are hidden.
        heads, groups, width: SmolLM2's.
        rounds: timed, all forms in turn.
    """
    print("| sequences | tokens of each | value, all pairs | by tiles | with gradients, all pairs | by tiles |")
    print("|---" * 6 + "|")
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for length in lengths:
        count = max(1, tokens // length)
        keys = [normal(count, groups, length, width) for _ in range(2)]
        q, seed = (normal(count, length, heads, width) for _ in range(2))
        forms = [jax.jit(form) for of in (_all_pairs, _by_tiles) for form in (of, _with_gradients(of, seed))]
        for form in forms:
            form(q, *keys)
        found = [[_seconds(form, q, *keys) for form in forms] for _ in range(rounds)]
        pairs, pairs_back, tiles, tiles_back = (f"{1e3 * statistics.median(of):.1f}" for of in zip(*found, strict=True))
        print(f"| {count} | {length} | {pairs} | {tiles} | {pairs_back} | {tiles_back} |", flush=True)
    if samples:
        _print_packed(tokens, samples, (heads, groups, width), rounds)


def _print_packed(tokens: int, samples: tuple[int, ...], shape: tuple[int, int, int], rounds: int) -> None:
    """A row of packed samples by tiles, beside a row that is one sample."""
    print("\n| samples in a row | value | with gradients |")
    print("|---" * 3 + "|")
    rng = np.random.default_rng(0)
    heads, groups, width = shape
    of = (tokens, heads), (groups, tokens), (groups, tokens), (tokens, heads)
    *given, seed = (jnp.asarray(rng.normal(size=(1, *size, width)), jnp.float32) for size in of)
    counts = (1, *samples)
    ids = (jnp.arange(tokens)[None] * count // tokens for count in counts)
    forms = [partial(_by_tiles, segments=of.astype(jnp.int32)) for of in ids]
    compiled = [jax.jit(form) for of in forms for form in (of, _with_gradients(of, seed))]
    for form in compiled:
        form(*given)
    found = [[_seconds(form, *given) for form in compiled] for _ in range(rounds)]
    times = [f"{1e3 * statistics.median(of):.1f}" for of in zip(*found, strict=True)]
    for count, value, gradients in zip(counts, times[::2], times[1::2], strict=True):
        print(f"| {count} | {value} | {gradients} |", flush=True)


def _by_tiles(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    return causal_attention(q, k, v, segments, scale=q.shape[-1] ** -0.5, layout=LOCAL)[0]


def _all_pairs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return attend(q, k, v, causal_mask(positions, positions), q.shape[-1] ** -0.5)


def _with_gradients(form: Callable, seed: jax.Array) -> Callable:
    return jax.grad(lambda *of: jnp.sum(seed * form(*of)), argnums=(0, 1, 2))


def _seconds(form: Callable, *given: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(form(*given))
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
