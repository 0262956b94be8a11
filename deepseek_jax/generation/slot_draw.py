"""One token of every row of an engine's step, each drawn as its own request asked.

What only some requests ask for stands behind a `lax.cond` on whether any live row does, so that no mix of requests
recompiles and a step of greedy rows costs an argmax. A row's token is a function of its logits, settings, seed and
position alone: what the rows around it ask for changes no bit of it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.generation.sampling_config import MAX_TOP_LOGPROBS
from deepseek_jax.generation.slots import IN_PROMPT, DrawState, SlotParams, put_rows, take_rows
from deepseek_jax.generation.thinking import AFTER, ThinkTags, forced, thought_on
from deepseek_jax.ops import sampling as ops
from deepseek_jax.ops.logprobs import has_bits, scores_of_logits, to_bits, within


class Drawn(NamedTuple):
    """What came of a draw, by row; of rows that are not live it is 0, False and none.

    Args:
        token_R: int32.
        logprob_R: in nats, of softmax(logits / temperature), before bias, penalties and filters (temperature 0: of
            the unscaled logits). Where the support is recorded and the temperature is above 0, of the distribution
            within it, bias and penalties included.
        forced_R: the model did not choose the token, a budget of thinking did; its support is the vocabulary,
            as that of a best token is.
        constrained_R: a grammar said what it may be.
        stopped_R: it is a stop id, and as many tokens as were asked for stand before it.
        done_R: stopped, or the limit of new tokens is reached.
        top_ids_RK: int32 [R, 20], as many best tokens as the row asked for, then -1.
        top_logprobs_RK: theirs, as the token's own, then -inf.
        support_RW: uint32, bits of the tokens that it was drawn from (`ops.logprobs`); None where not recorded.
        penalised_RW: likewise of those that a repetition penalty was on.
    """

    token_R: jax.Array
    logprob_R: jax.Array
    forced_R: jax.Array
    constrained_R: jax.Array
    stopped_R: jax.Array
    done_R: jax.Array
    top_ids_RK: jax.Array
    top_logprobs_RK: jax.Array
    support_RW: jax.Array | None
    penalised_RW: jax.Array | None


@jax.named_scope("sampling")
def draw(
    logits_RV: jax.Array,
    params: SlotParams,
    state: DrawState,
    rows_R: jax.Array,
    position_R: jax.Array,
    live_R: jax.Array,
    tags: ThinkTags,
    *,
    record_support: bool = False,
) -> tuple[DrawState, Drawn]:
    """Draw the token of `position_R` in each live row, and note it.

    Args:
        logits_RV: float32.
        params: of all slots.
        state: of all slots.
        rows_R: int32, the slot of each row; out of range for rows of padding.
        position_R: int32, of the token that is drawn.
        live_R: bool; the other rows may hold anything, and leave the state as it is.
        tags: the engine's.
        record_support: keep what each token was drawn from.

    Returns:
        The state with the tokens noted, and what was drawn.
    """
    of_row = take_rows(params, rows_R)
    before = take_rows(state._replace(counts=(), allowed=()), rows_R)
    phase_R, thought_R, forced_R = forced(before.phase, before.thought, of_row.thinking_budget, tags)
    constrained_R = live_R & of_row.constrained & (phase_R == AFTER)
    shaped_RV = _shaped(logits_RV, of_row, state, rows_R, live_R, constrained_R)
    chosen_R, kept_RV = _choose(shaped_RV, of_row, before.drawn, position_R, live_R, record_support)
    is_forced_R = live_R & (forced_R >= 0)
    token_R = jnp.where(live_R, jnp.where(is_forced_R, forced_R, chosen_R), 0)

    scored_RV, support_RW, penalised_RW = logits_RV, None, None
    if record_support:
        scored_RV, support_RW = _within_support(logits_RV, shaped_RV, kept_RV, of_row, is_forced_R)
        penalised_RW = _penalised(of_row, state.counts, rows_R, live_R)
    logprob_R, _, best_R = scores_of_logits(scored_RV / _divisor(of_row), token_R)
    top_ids_RK, top_logprobs_RK = _top(scored_RV, of_row, live_R, best_R)

    may_stop_R = live_R & ~is_forced_R & (before.drawn >= of_row.min_new_tokens)
    stopped_R = may_stop_R & jnp.any(token_R[:, None] == of_row.stop_ids, axis=-1)
    found = Drawn(
        token_R=token_R,
        logprob_R=jnp.where(live_R, logprob_R, 0.0),
        forced_R=is_forced_R,
        constrained_R=constrained_R,
        stopped_R=stopped_R,
        done_R=stopped_R | (live_R & (before.drawn + 1 >= of_row.limit)),
        top_ids_RK=top_ids_RK,
        top_logprobs_RK=top_logprobs_RK,
        support_RW=support_RW,
        penalised_RW=penalised_RW,
    )
    before = before._replace(phase=phase_R, thought=thought_R, ready=before.ready & ~constrained_R)
    return _noted(state, before, jnp.where(live_R, rows_R, state.drawn.shape[0]), token_R, tags), found


def _noted(state: DrawState, before: DrawState, slots_R, token_R, tags: ThinkTags) -> DrawState:
    """The state of all slots with a token more in these, whose rows were `before`, without counts and `allowed`."""
    drawn_R = before.drawn + 1
    recent_RW = jnp.concatenate([before.recent[:, 1:], token_R[:, None]], axis=1)
    thought = thought_on(before.phase, before.thought, recent_RW, tags)
    rows = DrawState((), drawn_R, recent_RW, *thought, (), before.ready)
    noted = put_rows(state._replace(counts=(), allowed=()), slots_R, rows)
    return noted._replace(counts=state.counts.at[slots_R, token_R].add(1, mode="drop"), allowed=state.allowed)


def _allowed(allowed_SW: jax.Array, rows_R, constrained_R, logits_RV) -> jax.Array:
    """Logits of what the grammars of some rows let come."""
    kept_RV = has_bits(take_rows(allowed_SW, rows_R), 0, logits_RV.shape[-1])
    return jnp.where(kept_RV | ~constrained_R[:, None], logits_RV, -jnp.inf)


def _divisor(of_row: SlotParams) -> jax.Array:
    """[R, 1]; rows that take the best token stay as they are."""
    return jnp.where(of_row.temperature == 0, 1.0, of_row.temperature)[:, None]


def _where_any(wanted_R: jax.Array, change: Callable[[jax.Array], jax.Array], logits_RV: jax.Array) -> jax.Array:
    """Changed logits if any row wants it. The change leaves rows alone that do not."""
    return jax.lax.cond(jnp.any(wanted_R), change, lambda same: same, logits_RV)


def _shaped(logits_RV, of_row: SlotParams, state: DrawState, rows_R, live_R, constrained_R) -> jax.Array:
    """Logits with bias and penalties, of what grammars let come."""
    has_bias_R = live_R & (of_row.bias_ids[:, 0] < logits_RV.shape[-1])
    counted_R = (of_row.presence_penalty != 0) | (of_row.frequency_penalty != 0)
    penalised_R = live_R & ((of_row.repetition_penalty != 1) | counted_R)

    def penalise(logits_RV):
        counts_RV = take_rows(state.counts, rows_R)
        repeated_RV = ops.penalise_repeats(logits_RV, counts_RV > 0, of_row.repetition_penalty)
        generated_RV = counts_RV & (IN_PROMPT - 1)
        return ops.penalise_counts(repeated_RV, generated_RV, of_row.presence_penalty, of_row.frequency_penalty)

    def shape(logits_RV):
        bias = lambda logits_RV: ops.add_bias(logits_RV, of_row.bias_ids, of_row.bias_values)
        shaped_RV = _where_any(penalised_R, penalise, _where_any(has_bias_R, bias, logits_RV))
        return _where_any(constrained_R, partial(_allowed, state.allowed, rows_R, constrained_R), shaped_RV)

    return _where_any(has_bias_R | penalised_R | constrained_R, shape, logits_RV)


def _within_support(logits_RV, shaped_RV, kept_RV, of_row: SlotParams, is_forced_R) -> tuple[jax.Array, jax.Array]:
    """What a draw is scored by, and bits of the tokens that it was from."""
    greedy_R = of_row.temperature == 0  # no draw, and scored as it is without a record
    kept_RV |= (is_forced_R | greedy_R)[:, None]
    return within(jnp.where(greedy_R[:, None], logits_RV, shaped_RV), kept_RV), to_bits(kept_RV)


def _penalised(of_row: SlotParams, counts_SV, rows_R, live_R) -> jax.Array:
    """Bits of the tokens that a repetition penalty is on."""
    wanted_R = live_R & (of_row.repetition_penalty != 1)
    words = jax.eval_shape(to_bits, jax.ShapeDtypeStruct((rows_R.shape[0], counts_SV.shape[1]), bool))
    bits = lambda: to_bits((take_rows(counts_SV, rows_R) > 0) & wanted_R[:, None])
    return jax.lax.cond(jnp.any(wanted_R), bits, lambda: jnp.zeros(words.shape, words.dtype))


def _choose(shaped_RV, of_row: SlotParams, drawn_R, position_R, live_R, record: bool):
    """The token of each row, and, for the record, which it was drawn from."""
    V = shaped_RV.shape[-1]
    early_R = live_R & (drawn_R < of_row.min_new_tokens)
    stops = jnp.where(early_R[:, None] & (of_row.stop_ids >= 0), of_row.stop_ids, V)
    allowed_RV = _where_any(early_R, lambda logits_RV: ops.forbid(logits_RV, stops), shaped_RV)
    random_R = live_R & (of_row.temperature > 0)
    kept = lambda logits_RV: logits_RV > -jnp.inf if record else None
    best = lambda: jnp.argmax(allowed_RV, axis=-1).astype(jnp.int32)

    def at_random():
        filtered_RV = _filtered(allowed_RV / _divisor(of_row), of_row, random_R)
        drawn_R = ops.sample(filtered_RV, ops.uniform_noise(of_row.seed, position_R))
        return jnp.where(random_R, drawn_R, best()), kept(filtered_RV)

    return jax.lax.cond(jnp.any(random_R), at_random, lambda: (best(), kept(allowed_RV)))


def _filtered(shaped_RV, of_row: SlotParams, random_R) -> jax.Array:
    """Logits after top-k, top-p and min-p of the rows that draw at random."""
    top_k_R = jnp.where(random_R, of_row.top_k, 0)
    top_p_R = jnp.where(random_R, of_row.top_p, 1.0)
    min_p_R = jnp.where(random_R, of_row.min_p, 0.0)
    kept_RV = _where_any(top_k_R > 0, lambda logits_RV: ops.keep_top_k(logits_RV, top_k_R), shaped_RV)
    kept_RV = _where_any(top_p_R < 1, lambda logits_RV: ops.keep_top_p(logits_RV, top_p_R), kept_RV)
    return _where_any(min_p_R > 0, lambda logits_RV: ops.keep_min_p(logits_RV, min_p_R), kept_RV)


def _top(scored_RV, of_row: SlotParams, live_R, best_R) -> tuple[jax.Array, jax.Array]:
    """The best tokens of each row, as many as it wants, and their log-probs; the best one's is known."""
    R, V = scored_RV.shape
    K, wanted_R = min(MAX_TOP_LOGPROBS, V), jnp.where(live_R, of_row.top_logprobs, 0)

    def of_best():
        values_RK, ids_RK = ops.best_tokens(scored_RV, K)
        values_RK = values_RK / _divisor(of_row)
        asked_RK = jnp.arange(K) < wanted_R[:, None]
        logprobs_RK = values_RK - values_RK[:, :1] + best_R[:, None]
        return jnp.where(asked_RK, ids_RK, -1), jnp.where(asked_RK, logprobs_RK, -jnp.inf)

    nothing = lambda: (jnp.full((R, K), -1, jnp.int32), jnp.full((R, K), -jnp.inf, scored_RV.dtype))
    found = jax.lax.cond(jnp.any(wanted_R > 0), of_best, nothing)
    blank = ((0, 0), (0, MAX_TOP_LOGPROBS - K))
    return jnp.pad(found[0], blank, constant_values=-1), jnp.pad(found[1], blank, constant_values=-jnp.inf)
