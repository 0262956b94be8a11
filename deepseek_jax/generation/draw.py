"""One token of every sequence, drawn from its logits: what is carried, what is asked for, and the drawing itself."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.cache import Cache
from deepseek_jax.ops import sampling as ops
from deepseek_jax.ops.logprobs import logprobs_of_logits, to_bits, within


@dataclass(frozen=True, kw_only=True)
class Record:
    """What generation keeps beside tokens and log-probs, for a trainer to replay.

    Source: DeepSeek-V3.2, arXiv 2512.02556 section 3.1, "Keep Routing" and "Keep Sampling Mask".

    Args:
        routes: the experts that every token went to, 2 x L x A bytes a token on the device.
        support: the tokens among which each one was drawn, V / 8 bytes a token; as many again for those that a
            repetition penalty was laid on, where there is one.
    """

    routes: bool = False
    support: bool = False


class Knobs(NamedTuple):
    """Sampling numbers as arrays, so that changing one recompiles nothing."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    stop_ids: jax.Array


class Modes(NamedTuple):
    """Which parts of sampling are compiled in at all."""

    greedy: bool
    filtered: bool
    penalised: bool
    record: Record


class Recorded(NamedTuple):
    """Of the tokens drawn: the experts that each went to when it was fed, and the bits of those it was drawn from.

    And of those that the penalty was on. None where not recorded.
    """

    routes_BNLA: jax.Array | None = None
    support_BNW: jax.Array | None = None
    penalised_BNW: jax.Array | None = None


class State(NamedTuple):
    """What decoding carries from token to token."""

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    count: jax.Array
    record: Recorded


@jax.named_scope("sampling")
def draw(state: State, logits_BV, seeds_B, limits_B, knobs: Knobs, modes: Modes) -> State:
    """Choose the token of `position_B`, note it and its log-prob, and step on."""
    B = seeds_B.shape[0]
    every = lambda value: jnp.broadcast_to(value, (B,))
    plain = logits_BV if modes.greedy else logits_BV / knobs.temperature
    chosen_from = logits_BV
    if modes.penalised:
        chosen_from = ops.penalise_repeats(chosen_from, state.seen_BV, every(knobs.penalty))
    if modes.greedy:
        token_B = jnp.argmax(chosen_from, axis=-1).astype(jnp.int32)
    else:
        chosen_from = chosen_from / knobs.temperature
        plain = chosen_from if modes.record.support else plain
        if modes.filtered:
            chosen_from = ops.keep_top_k(chosen_from, every(knobs.top_k))
            chosen_from = ops.keep_top_p(chosen_from, every(knobs.top_p))
            chosen_from = ops.keep_min_p(chosen_from, every(knobs.min_p))
        token_B = ops.sample(chosen_from, ops.uniform_noise(seeds_B, state.position_B))
    record = state.record
    if modes.record.support:
        kept_BV = chosen_from > -jnp.inf
        plain = within(plain, kept_BV)
        record = record._replace(support_BNW=record.support_BNW.at[:, state.count].set(to_bits(kept_BV)))
        if modes.penalised:
            bits = record.penalised_BNW.at[:, state.count].set(to_bits(state.seen_BV))
            record = record._replace(penalised_BNW=bits)
    logprob_B, _ = logprobs_of_logits(plain, token_B)
    seen = state.seen_BV
    if modes.penalised:
        seen = seen.at[jnp.arange(B), token_B].set(True)
    stopped = jnp.any(token_B[:, None] == knobs.stop_ids, axis=-1) | (state.count + 1 >= limits_B)
    return State(
        cache=state.cache,
        token_B=token_B,
        position_B=state.position_B + 1,
        done_B=state.done_B | stopped,
        seen_BV=seen,
        tokens_BN=state.tokens_BN.at[:, state.count].set(token_B),
        logprobs_BN=state.logprobs_BN.at[:, state.count].set(logprob_B),
        count=state.count + 1,
        record=record,
    )
