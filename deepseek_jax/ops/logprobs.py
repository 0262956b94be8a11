"""Log-probabilities of given tokens without ever holding the logits of a whole batch.

The support of a draw, the tokens that top-k and top-p left, is kept as bits: token v is bit v % 32 of word v // 32 of
uint32 [V / 32], rounded up. Bits past V mean nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from deepseek_jax.ops.sampling import penalise_repeats
from deepseek_jax.ops.transposed import Transposed

_LOGITS_AT_ONCE = 2**25
_OUTSIDE = -1e30  # instead of -inf, whose product with a probability of 0 is NaN


@jax.custom_vjp
def project(hidden: Float[Array, "*B D"], head: Float[Array, "D V"] | Transposed) -> Float[Array, "*B V"]:
    """Logits hidden @ head in float32, whatever their dtype.

    The products are added up in float32 and stay so. Rounded to bfloat16 first, a logit of 20 would be off by up to
    0.06, and so would the log-probs of sampler and trainer. The gradient is of products in the operands' own dtype, as
    everywhere else.
    """
    return _multiply(hidden, head, jnp.float32)


def _multiply(hidden, head, dtype=None):
    if isinstance(head, Transposed):
        return jnp.einsum("...d,vd->...v", hidden, head.w, preferred_element_type=dtype)
    return jnp.matmul(hidden, head, preferred_element_type=dtype)


def _project_forward(hidden, head):
    return project(hidden, head), (hidden, head)


def _project_backward(saved, d_logits):
    hidden, head = saved
    rows = lambda x: x.reshape(-1, x.shape[-1])  # over several axes XLA would copy the logits' gradient, transposed
    product, back = jax.vjp(_multiply, rows(hidden), head)
    d_hidden, d_head = back(rows(d_logits).astype(product.dtype))
    return d_hidden.reshape(hidden.shape), d_head


project.defvjp(_project_forward, _project_backward)


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"] | Transposed,
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    support: UInt32[Array, "B T words"] | None = None,
    penalised: UInt32[Array, "B T words"] | None = None,
    penalty: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(token), the entropy of p, and log p of the likeliest token.

    p = softmax(hidden @ head / temperature), within a support if given.

    The T positions are taken `chunk` at a time and, where that is not all of them, recomputed for the gradient, so at
    most B x chunk x V logits exist at once.

    Args:
        hidden: state that predicts `tokens` at the same index, after the final norm.
        head: output projection.
        tokens: int32 targets.
        temperature: the sampler's; log-probs of a sample mean nothing at another one.
        support: bits of the tokens that each draw was from: p is 0 for the others and 1 for these together. A target
            outside gets about -1e30. Source: DeepSeek-V3.2, arXiv 2512.02556 section 3.1, "Keep Sampling Mask".
        penalised: bits of the tokens that the sampler's repetition penalty was on at each draw.
        penalty: that penalty, laid on them before the temperature (`ops.sampling.penalise_repeats`).
        chunk: positions at a time; None takes as many as keep the logits at once within 128 MiB.

    Returns:
        Log-probs, entropies and the likeliest tokens' log-probs, float32 [B, T], in nats. A target is the likeliest
        token, or ties with it, where its log-prob equals the last exactly; the last has no gradient.
    """

    def of_chunk(part, given):
        targets, words = given
        logits = as_sampled(project(part, head), *words, temperature=temperature, penalty=penalty)
        return scores_of_logits(logits, targets)

    given = tokens, (support, penalised)
    return in_chunks(of_chunk, hidden, given, chunk or positions_at_once(hidden.shape[0] * head.shape[1]))


def as_sampled(
    logits: Float[Array, "*B V"],
    support: UInt32[Array, "*B words"] | None,
    penalised: UInt32[Array, "*B words"] | None,
    *,
    temperature: float,
    penalty: float,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "*B V"]:
    """What the sampler makes of logits before it draws.

    Args:
        logits: float32, of the whole vocabulary or of a part of it.
        support: bits of the tokens that may be drawn; None is all.
        penalised: bits of the tokens that are penalised for repeating; None is none.
        temperature: above 0.
        penalty: of `penalise_repeats`.
        first: the first token of the part.
    """
    if penalised is not None:
        logits = penalise_repeats(logits, has_bits(penalised, first, logits.shape[-1]), penalty)
    logits = logits / temperature
    return logits if support is None else within(logits, has_bits(support, first, logits.shape[-1]))


def positions_at_once(logits_a_position: int) -> int:
    """How many positions keep the logits at once within 128 MiB of float32."""
    return max(1, _LOGITS_AT_ONCE // logits_a_position)


def in_chunks(
    of_chunk: Callable[[Float[Array, "B t D"], Any], tuple[Float[Array, "B t"], ...]],
    hidden: Float[Array, "B T D"],
    given: Any,
    chunk: int,
) -> tuple[Float[Array, "B T"], ...]:
    """`of_chunk` over the positions, `chunk` at a time at most; several chunks are recomputed for the gradient.

    What one chunk keeps is there when the gradient begins with it, recomputed or not.

    Args:
        of_chunk: (states, a chunk of `given`) to its results.
        hidden: states.
        given: a tree of arrays [B, T, ...].
        chunk: positions at a time.
    """
    B, T, _ = hidden.shape
    count = -(-T // chunk)
    if count == 1:
        return of_chunk(hidden, given)
    size = -(-T // count)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, count, size, *x.shape[2:]).swapaxes(0, 1)

    of_chunk = jax.checkpoint(of_chunk)
    found = jax.lax.map(lambda args: of_chunk(*args), jax.tree.map(chunks, (hidden, given)))
    return tuple(x.swapaxes(0, 1).reshape(B, count * size)[:, :T] for x in found)


def logprobs_of_logits(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """log softmax(logits)[token] and the entropy, in nats."""
    return scores_of_logits(logits, tokens)[:2]


@jax.custom_vjp
def scores_of_logits(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """The same, and the log-prob of the likeliest token, which has no gradient.

    The gradient is written out: one pass over the logits, where JAX's own scatters and makes several.
    """
    return _scores_forward(logits, tokens)[0]


def _scores_forward(logits, tokens):
    # Everything is taken from the best logit: beside a large one, what a sure token lacks of 1 would be rounded away.
    best = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - best - total
    every = logits - best - total
    entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
    return (chosen[..., 0], entropy, -total[..., 0]), (logits, tokens, best, total, entropy)


def _scores_backward(saved, given):
    """d log p(token) = onehot - p, d entropy = -p (log p + entropy)."""
    (logits, tokens, best, total, entropy), (d_chosen, d_entropy, _) = saved, (x[..., None] for x in given)
    every = logits - best - total
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    less = d_chosen + d_entropy * (every + entropy[..., None])
    return jnp.where(is_token, d_chosen, 0) - jnp.exp(every) * less, None


scores_of_logits.defvjp(_scores_forward, _scores_backward)


def within(logits: Float[Array, "*B V"], support: Bool[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits whose softmax is 0 outside the support."""
    return jnp.where(support, logits, _OUTSIDE)


def to_bits(support: Bool[Array, "*B V"]) -> UInt32[Array, "*B words"]:
    """A support as bits."""
    V = support.shape[-1]
    padded = jnp.pad(support, ((0, 0),) * (support.ndim - 1) + ((0, -V % 32),))
    words = padded.reshape(*support.shape[:-1], -1, 32)
    return jnp.sum(words.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def has_bits(words: UInt32[Array, "*B words"], first: int | Int[Array, ""], count: int) -> Bool[Array, "*B V"]:
    """Which of the tokens first to first + count - 1 are in a support; V is `count`."""
    # by slices, not one look-up a token: a part of the vocabulary may begin inside a word
    padded = jnp.pad(words, ((0, 0),) * (words.ndim - 1) + ((0, 1),))
    part = jax.lax.dynamic_slice_in_dim(padded, first // 32, -(-count // 32) + 1, axis=-1)
    bits = (part[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    flat = bits.reshape(*words.shape[:-1], -1).astype(bool)
    return jax.lax.dynamic_slice_in_dim(flat, first % 32, count, axis=-1)
