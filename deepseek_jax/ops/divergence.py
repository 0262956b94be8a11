"""KL divergences of a student's next-token distribution and its teachers', over the whole vocabulary."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.logprobs import in_chunks, positions_at_once, project, scores_of_logits

Direction = Literal["forward", "reverse"]


class Divergence(NamedTuple):
    """Which divergence.

    direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher). temperature: logits of both are
    divided by it, and the divergence is multiplied by its square, which keeps the size of its gradient. weights: of
    the teachers.

    Source: Hinton et al., arXiv 1503.02531 section 2 (temperature and its square); Gu et al., arXiv 2306.08543, and
    Agarwal et al., arXiv 2306.13649 (reverse KL at contexts that the student sampled).
    """

    direction: Direction
    temperature: float = 1.0
    weights: tuple[float, ...] = (1.0,)


class OverVocabulary(NamedTuple):
    """Sums and maxima over the vocabulary, [..., V] to [...]: where it is cut over devices, of all parts."""

    summed: Callable[[jax.Array], jax.Array]
    largest: Callable[[jax.Array], jax.Array]


WHOLE = OverVocabulary(lambda x: jnp.sum(x, axis=-1), lambda x: jnp.max(x, axis=-1))


def token_divergences(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    teachers: Sequence[tuple[Float[Array, "B T _"], Float[Array, "_ V"]]],
    tokens: Int[Array, "B T"],
    divergence: Divergence,
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """The divergence at every position, and the student's `ops.logprobs.scores_of_logits` of given tokens.

    The T positions are taken `chunk` at a time and recomputed for the gradient, so that logits of B x chunk positions
    exist at once, and never those of all.

    Args:
        hidden: the student's states, after the final norm.
        head: its output projection.
        teachers: of each its states at the same positions, and its head. No gradient reaches them.
        tokens: int32, what follows each position.
        divergence: which.
        chunk: positions at a time; None takes those of `positions_at_once`.

    Returns:
        float32 [B, T]: divergences in nats, temperature squared times; log-probs of the tokens at temperature 1,
        entropies, and the likeliest tokens' log-probs.
    """

    def of_chunk(part, given):
        targets, states = given
        logits = project(part, head)
        theirs = [project(state, theirs) for state, (_, theirs) in zip(states, teachers, strict=True)]
        return divergence_of_logits(logits, theirs, divergence), *scores_of_logits(logits, targets)

    given = tokens, tuple(states for states, _ in teachers)
    at_once = positions_at_once(hidden.shape[0] * (1 + len(teachers)), head.shape)
    return in_chunks(of_chunk, hidden, given, chunk or at_once)


def divergence_of_logits(
    student: Float[Array, "*B V"],
    teachers: Sequence[Float[Array, "*B V"]],
    divergence: Divergence,
    over: OverVocabulary = WHOLE,
) -> Float[Array, "*B"]:
    """The divergence of given logits, in nats, times the temperature's square.

    Its gradient is written out: where student and teacher are the same, it is 0 and not what rounding leaves of it.

    Args:
        student: float32.
        teachers: float32, one of each.
        divergence: which.
        over: how to sum over the vocabulary.
    """
    t = divergence.temperature
    log_q, value, slope = _log_softmax(student / t, over), 0.0, 0.0
    q = jnp.exp(log_q)
    for weight, teacher in zip(divergence.weights, teachers, strict=True):
        log_p = _log_softmax(teacher / t, over)
        p, apart = jnp.exp(log_p), log_q - log_p
        kl = over.summed(-p * apart if divergence.direction == "forward" else q * apart)
        value += weight * kl
        slope += weight * (q - p if divergence.direction == "forward" else q * (apart - kl[..., None]))
    return _with_slope(t * t * value, t * slope, student, over)


def _log_softmax(logits: Float[Array, "*B V"], over: OverVocabulary) -> Float[Array, "*B V"]:
    from_best = logits - over.largest(jax.lax.stop_gradient(logits))[..., None]
    return from_best - jnp.log(over.summed(jnp.exp(from_best)))[..., None]


def _with_slope(
    value: Float[Array, "*B"], slope: Float[Array, "*B V"], logits: Float[Array, "*B V"], over: OverVocabulary
) -> Float[Array, "*B"]:
    """The value, with this gradient in the logits and no other."""
    fixed = jax.lax.stop_gradient
    return fixed(value) + over.summed(fixed(slope) * (logits - fixed(logits)))
