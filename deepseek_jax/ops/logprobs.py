"""Log-probabilities of given tokens without ever holding the logits of a whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LOGITS_AT_ONCE = 2**25


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(token) and the entropy of p, where p = softmax(hidden @ head / temperature).

    The T positions are taken `chunk` at a time and recomputed for the gradient, so at most B x chunk x V
    logits exist at once.

    Args:
        hidden: state that predicts `tokens` at the same index, after the final norm.
        head: output projection.
        tokens: int32 targets.
        temperature: the sampler's; log-probs of a sample mean nothing at another one.
        chunk: positions at a time; None takes as many as keep the logits at once within 128 MiB.

    Returns:
        Log-probs and entropies, float32 [B, T], in nats.
    """
    of_chunk = lambda part, targets: logprobs_of_logits((part @ head).astype(jnp.float32) / temperature, targets)
    return in_chunks(of_chunk, hidden, tokens, chunk or positions_at_once(hidden.shape[0] * head.shape[1]))


def positions_at_once(logits_a_position: int) -> int:
    """How many positions keep the logits at once within 128 MiB of float32."""
    return max(1, _LOGITS_AT_ONCE // logits_a_position)


def in_chunks(
    of_chunk: Callable[[Float[Array, "B t D"], Int[Array, "B t"]], tuple[Float[Array, "B t"], Float[Array, "B t"]]],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`of_chunk` over the positions, `chunk` at a time and recomputed for the gradient."""
    B, T, D = hidden.shape
    size = min(T, chunk)
    padded = -(-T // size) * size
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - T), (0, 0))).reshape(B, -1, size, D).swapaxes(0, 1)
    targets = jnp.pad(tokens, ((0, 0), (0, padded - T))).reshape(B, -1, size).swapaxes(0, 1)

    of_chunk = jax.checkpoint(of_chunk)
    if padded == size:  # a map of one step would still cost a loop
        logp, entropy = of_chunk(hidden[0], targets[0])
        return logp[:, :T], entropy[:, :T]
    logp, entropy = jax.lax.map(lambda args: of_chunk(*args), (hidden, targets))
    join = lambda x: x.swapaxes(0, 1).reshape(B, padded)[:, :T]
    return join(logp), join(entropy)


def logprobs_of_logits(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """log softmax(logits)[token] and the entropy, in nats."""
    # Everything is taken from the best logit: beside a large one, what a sure token lacks of 1 would be rounded away.
    best = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - best - total
    every = logits - best - total
    return chosen[..., 0], -jnp.sum(jnp.exp(every) * every, axis=-1)
