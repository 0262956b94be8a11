"""Drawing the next token: bias, penalties, top-k, top-p, min-p, and noise keyed by seed and position."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_BLOCK = 256


def penalise_repeats(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: Float[Array, "*B"] | float
) -> Float[Array, "*B V"]:
    """Divide positive and multiply negative logits of tokens seen before. Source: arXiv 1909.05858 section 4.1."""
    factor = jnp.asarray(penalty)[..., None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def penalise_counts(
    logits: Float[Array, "B V"], counts: Int[Array, "B V"], presence: Float[Array, "B"], frequency: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Take `presence` from the logits of tokens generated before, and `frequency` once for each time.

    Source: OpenAI's API reference; vLLM, `apply_penalties` (tokens of the completion alone, after the repetition's).
    """
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def add_bias(
    logits: Float[Array, "B V"], ids: Int[Array, "B ids"], values: Float[Array, "B ids"]
) -> Float[Array, "B V"]:
    """Add to the logits of some tokens; ids from V on are padding."""
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].add(values, mode="drop")


def forbid(logits: Float[Array, "B V"], ids: Int[Array, "B ids"]) -> Float[Array, "B V"]:
    """-inf for some tokens; ids from V on are padding."""
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B V"]:
    """-inf for all but the k best (0 keeps all); ties with the k-th best stay."""
    enough = lambda kept: jnp.sum(kept, axis=-1) >= jnp.where(k > 0, k, logits.shape[-1])
    return _keep_above_threshold(logits, enough)


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """-inf outside the smallest set of best tokens whose probability reaches p; ties with its last member stay."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    enough = lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=-1) >= p
    return jnp.where(p[:, None] >= 1, logits, _keep_above_threshold(logits, enough))


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """-inf for tokens less probable than p times the most probable one (0 keeps all). Source: arXiv 2407.01082."""
    least = jnp.max(logits, axis=-1) + jnp.log(p)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def best_tokens(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B best"], Int[Array, "B best"]]:
    """The best logits in falling order, and their tokens; among equals the earlier token.

    They are in the blocks of the best maxima, as many of these; a CPU sorts all of V for `jax.lax.top_k`.
    """
    B, V = logits.shape
    logits = jnp.where(logits == 0, 0.0, logits)  # top_k ranks -0.0 below 0.0
    blocks = jnp.pad(logits, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf).reshape(B, -1, _BLOCK)
    maxima = jnp.max(blocks, axis=-1)
    chosen = jnp.sort(jax.lax.top_k(maxima, min(count, maxima.shape[1]))[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(B, -1)
    values, where = jax.lax.top_k(candidates, count)
    return values, jnp.take_along_axis(chosen, where // _BLOCK, axis=1) * _BLOCK + where % _BLOCK


def _keep_above_threshold(logits, enough):
    """The highest threshold whose kept set is enough, found bit by bit: 32 passes and no sort."""
    ordered = sortable(logits)
    return jnp.where(ordered >= highest_threshold(ordered, enough)[:, None], logits, -jnp.inf)


def highest_threshold(
    ordered: UInt32[Array, "*B V"], enough: Callable[[Bool[Array, "*B V"]], Bool[Array, "*B"]]
) -> UInt32[Array, "*B"]:
    """The highest number that leaves enough of those from it on; 0 where all are not enough."""

    def body(i, threshold):
        trial = threshold | (jnp.uint32(1) << jnp.uint32(31 - i))
        return jnp.where(enough(ordered >= trial[..., None]), trial, threshold)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(ordered.shape[:-1], jnp.uint32))


def sortable(x: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """float32 as unsigned integers of the same order; -0.0 counts as 0.0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def uniform_noise(seeds: UInt32[Array, "B"], positions: Int[Array, "B"]) -> Float[Array, "B"]:
    """One number in [0, 1) a sequence, a function of its seed and position alone, not of the batch around it."""
    draw = lambda seed, position: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))
    return jax.vmap(draw)(seeds, positions)


def sample(logits: Float[Array, "B V"], noise: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token at which the cumulative probability passes the noise.

    One random number a token instead of V Gumbel draws, which on a CPU would cost more than the model. The
    search goes by blocks, so that the running sums stay short and exact.
    """
    B, V = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    block_ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = block_ends[:, -1]
    target = jnp.minimum(noise * total, jnp.nextafter(total, jnp.zeros_like(total)))  # rounding must not reach total
    block = _first_above(block_ends, target)
    before = jnp.where(block > 0, jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _last_positive(inside, _first_above(jnp.cumsum(inside, axis=-1), target - before))


def _first_above(ends, target):
    return jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), ends.shape[-1] - 1).astype(jnp.int32)


def _last_positive(weights, index):
    """Rounding inside a block may stop the search on an impossible token; the nearest possible one is meant."""
    possible = (weights > 0) & (jnp.arange(weights.shape[-1]) <= index[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(jnp.any(possible, axis=-1), last, jnp.argmax(weights > 0, axis=-1)).astype(jnp.int32)
