"""What an engine runs on the device: `extend`, new tokens of a few requests, and `decode_loop`, several tokens of many.

The state of every request that runs lies in a slot of the device's arrays; a program is told which slots its rows are,
draws inside, and gives the state back in the memory that it came in. Nothing that a request asks for changes a shape.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.drafts import by_mtp, lookup
from deepseek_jax.generation.slot_draw import Drawn, draw
from deepseek_jax.generation.slots import (
    DrawState,
    SlotParams,
    empty_params,
    empty_state,
    put_rows,
    take_rows,
    waits_for_grammar,
)
from deepseek_jax.generation.thinking import NO_TAGS, ThinkTags
from deepseek_jax.model.cache import Cache, abstract_cache, cache_axis, empty_cache
from deepseek_jax.model.decoder import Decoder, Hidden, experts_of
from deepseek_jax.model.lora import decoder_of
from deepseek_jax.model.scoring import logprobs_of
from deepseek_jax.ops.pool import KVCache, LatentCache
from deepseek_jax.parallel.attention import laid_pool
from deepseek_jax.sharding import module_layout


class DeviceState(NamedTuple):
    """Of S slots.

    cache: pools of blocks. table_SM: the blocks of each slot. token_S: the latest token of a slot, which nothing was
    computed for yet; position_S: its position. done_S: stopped, or never begun. drafts_SD: what an MTP module guesses
    to follow the latest token. history_SL: all tokens, to look guesses up in. Either is empty where it is not wanted.
    params, drawing: of `generation.slots`.
    """

    cache: Cache
    table_SM: jax.Array
    token_S: jax.Array
    position_S: jax.Array
    done_S: jax.Array
    drafts_SD: jax.Array
    history_SL: jax.Array
    params: SlotParams
    drawing: DrawState


class Admission(NamedTuple):
    """Slots that new requests take, R of them; a slot out of range takes none. All as in `DeviceState`."""

    slots_R: Any
    table_RM: Any
    history_RL: Any
    params: SlotParams
    drawing: DrawState


class Spans(NamedTuple):
    """Tokens of requests to compute, R rows of up to T; all int32.

    start_R: position of the first one; count_R: how many, 0 in rows of padding; next_R: the token after them, -1 where
    it is not known yet and one is to be drawn.
    """

    slots_R: Any
    tokens_RT: Any
    start_R: Any
    count_R: Any
    next_R: Any


class Extended(NamedTuple):
    """What came of spans: the draw of each row, routes [R, T, L, A], and log-probs [R, T] of each next token and of the
    likeliest one there."""

    drawn: Drawn
    routes_RTLA: jax.Array | None
    logprobs_RT: jax.Array
    best_RT: jax.Array


class Decoded(NamedTuple):
    """What a loop drew, with an axis of up to N draws a row in every part of `drawn`.

    count_R: how many there are. steps: that the loop took. offered_R: drafts that were verified; accepted_R: those of
    them that were right. routes_RNLA: of the tokens that were fed, the latest one of before and all drawn but the last.
    """

    drawn: Drawn
    count_R: jax.Array
    steps: jax.Array
    offered_R: jax.Array
    accepted_R: jax.Array
    routes_RNLA: jax.Array | None


class Programs:
    """The compiled functions of an engine.

    Args:
        config: the model's.
        graphdef: static part of the module.
        slots: requests that run at a time.
        table: blocks of a request at most.
        steps: of a decode loop at most.
        length: tokens of a request at most.
        dtype: of the cache.
        drafts: who guesses, as in `EngineConfig`.
        draft_tokens: how many are guessed, and verified with the latest one.
        record: what to keep for a trainer.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        *,
        slots: int,
        table: int,
        steps: int,
        length: int,
        dtype: jnp.dtype,
        drafts: Literal["mtp", "lookup"] | None,
        draft_tokens: int,
        record: Record,
    ):
        self.config, self.graphdef, self.layout = config, graphdef, module_layout(graphdef)
        self.slots, self.table, self.steps, self.record = slots, table, steps, record
        self.dtype, self.drafts, self.draft_tokens = jnp.dtype(dtype), drafts, draft_tokens
        self.history = length if drafts == "lookup" else 0
        lies = self._state_shardings()
        self._first = jax.jit(self._first_state, static_argnames=("blocks", "block_size"), out_shardings=lies)
        self.admit = jax.jit(self._admit, donate_argnums=0, out_shardings=lies)
        self.retable = jax.jit(self._retable, donate_argnums=0, out_shardings=lies)
        self.constrain = jax.jit(self._constrain, donate_argnums=0, out_shardings=lies)
        self.extend = jax.jit(self._extend, donate_argnames="state", out_shardings=(lies, None))
        self.decode_loop = jax.jit(self._decode_loop, donate_argnames="state", out_shardings=(lies, None))

    def _state_shardings(self) -> DeviceState | None:
        """Every program gives the state back with the same ones, to the letter, or the next is compiled once more."""
        if self.layout.mesh is None:
            return None
        like = self.abstract_state(self.layout.parts(cache_axis(self.config)), 1)
        return jax.tree.map(lambda a: a.sharding, like)

    def first_state(self, blocks: int, block_size: int) -> DeviceState:
        """Of slots that nobody has taken.

        Args:
            blocks: of each pool, over all parts of the mesh.
            block_size: tokens of a block.
        """
        return self._first(blocks=blocks, block_size=block_size)

    def _first_state(self, blocks: int, block_size: int) -> DeviceState:
        S, V = self.slots, self.config.vocab_size
        pools = self.config, blocks, block_size, self.dtype, self.layout
        every = lambda *shape: jnp.zeros((S, *shape), jnp.int32)
        return self._laid(
            DeviceState(
                cache=empty_cache(*pools, drafts=self.drafts == "mtp"),
                table_SM=every(self.table),
                token_S=every(),
                position_S=every(),
                done_S=jnp.ones(S, bool),
                drafts_SD=every(self.draft_tokens if self.drafts == "mtp" else 0),
                history_SL=every(self.history),
                params=jax.tree.map(jnp.asarray, empty_params(S, V)),
                drawing=empty_state(S, V),
            )
        )

    def abstract_state(self, blocks: int, block_size: int) -> DeviceState:
        """Its shapes, and how they lie on the layout's mesh."""
        state = jax.eval_shape(lambda: self._first_state(blocks, block_size))
        if self.layout.mesh is None:
            return state
        place = lambda a, *axes: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.layout.sharding(*axes))
        small = jax.tree.map(lambda a: place(a, *(None,) * a.ndim), state._replace(cache=()))
        pools = self.config, blocks, block_size, self.dtype, self.layout
        cache = abstract_cache(*pools, drafts=self.drafts == "mtp")
        counts = place(state.drawing.counts, None, "vocab")
        return small._replace(cache=cache, drawing=small.drawing._replace(counts=counts))

    def _admit(self, state: DeviceState, new: Admission) -> DeviceState:
        """Requests in their slots; nothing of them is computed yet."""
        put = lambda old, rows: old.at[new.slots_R].set(rows, mode="drop")
        return self._laid(
            state._replace(
                table_SM=put(state.table_SM, new.table_RM),
                done_S=put(state.done_S, True),
                history_SL=put(state.history_SL, new.history_RL),
                params=put_rows(state.params, new.slots_R, new.params),
                drawing=put_rows(state.drawing, new.slots_R, new.drawing),
            )
        )

    def _retable(self, state: DeviceState, slots_R: jax.Array, table_RM: jax.Array) -> DeviceState:
        """Longer tables of requests that got further blocks."""
        return self._laid(state._replace(table_SM=state.table_SM.at[slots_R].set(table_RM, mode="drop")))

    def _constrain(self, state: DeviceState, slots_R: jax.Array, allowed_RW: jax.Array) -> DeviceState:
        """What grammars let come next."""
        put = lambda old, rows: old.at[slots_R].set(rows, mode="drop")
        drawing = state.drawing
        drawing = drawing._replace(allowed=put(drawing.allowed, allowed_RW), ready=put(drawing.ready, True))
        return self._laid(state._replace(drawing=drawing))

    def _extend(
        self, weights: nnx.State, state: DeviceState, spans: Spans, tags: ThinkTags, want_logprobs: jax.Array
    ) -> tuple[DeviceState, Extended]:
        """Compute spans, and draw a token after each whose next one is not known."""
        model = decoder_of(self.graphdef, weights)
        T = spans.tokens_RT.shape[1]
        table = take_rows(state.table_SM, spans.slots_R)
        column = jnp.arange(T)
        at, valid = spans.start_R[:, None] + column, column < spans.count_R[:, None]
        hidden, cache = model.extend(spans.tokens_RT, at, valid, state.cache, table, phase="prefill")
        last_R1D = jnp.take_along_axis(hidden.x_BTD, jnp.maximum(spans.count_R - 1, 0)[:, None, None], axis=1)
        logits_RV = self.layout.constrain(model.logits(last_R1D)[:, 0], "batch", None)
        draws = (spans.count_R > 0) & (spans.next_R < 0)
        position_R = spans.start_R + spans.count_R
        drawing, drawn = self._draw(logits_RV, state, spans.slots_R, position_R, draws, tags)
        follows = jnp.where(draws, drawn.token_R, spans.next_R)
        next_RT = jnp.concatenate([spans.tokens_RT[:, 1:], spans.tokens_RT[:, :1]], axis=1)
        next_RT = jnp.where(column == spans.count_R[:, None] - 1, follows[:, None], next_RT)
        none_RT = jnp.zeros(next_RT.shape, jnp.float32)
        logprobs_RT, _, best_RT = jax.lax.cond(
            want_logprobs,
            lambda: logprobs_of(model, hidden.x_BTD, next_RT),  # never the logits of all at once
            lambda: (none_RT, none_RT, none_RT),
        )
        state = self._stepped(state._replace(cache=cache), drawing, drawn, spans.slots_R, position_R, draws)
        if self.drafts == "mtp":
            of_new = hidden.x_BTD, next_RT, at, spans.count_R
            state = self._draft(model, state, *of_new, spans.slots_R, draws, tags, phase="prefill")
        return self._laid(state), self._told(Extended(drawn, self._routes(hidden), logprobs_RT, best_RT))

    def _decode_loop(
        self,
        weights: nnx.State,
        state: DeviceState,
        rows_R: jax.Array,
        steps: jax.Array,
        until: jax.Array,
        tags: ThinkTags,
    ) -> tuple[DeviceState, Decoded]:
        """Feed the latest token of each row, draw the next, and so on.

        Args:
            weights: of the model.
            state: of the slots.
            rows_R: int32, the slots that run; out of range for rows of padding.
            steps: int32, at most so many; `self.steps` is the bound. A row that waits for its grammar draws none.
            until: int32, or until no more than so many rows live.
            tags: of thoughts.
        """
        model = decoder_of(self.graphdef, weights)
        idle_S = lambda state: state.done_S | waits_for_grammar(state.params, state.drawing)
        lives = lambda state: ~jnp.take(idle_S(state), rows_R, mode="fill", fill_value=True)

        def goes_on(carried):
            state, found = carried
            live = jnp.sum(lives(state))
            return (found.steps < steps) & (live > 0) & ((live > until) | (found.steps == 0))

        def body(carried):
            return self._decode_step(model, *carried, rows_R, lives(carried[0]), tags)

        first = self._laid(state), self._nothing_drawn(rows_R.shape[0])
        state, found = jax.lax.while_loop(goes_on, body, first)
        return state, self._told(found)

    def _decode_step(self, model: Decoder, state: DeviceState, found: Decoded, rows_R, live_R, tags):
        """One pass over the model for every live row."""
        of_row = partial(take_rows, slots_R=rows_R)
        token_R, position_R = of_row(state.token_S), of_row(state.position_S)
        guesses_RD = of_row(state.drafts_SD)
        if self.drafts == "lookup":
            guesses_RD = lookup(of_row(state.history_SL), position_R, self.draft_tokens)
        fed_RT = jnp.concatenate([token_R[:, None], jnp.maximum(guesses_RD, 0)], axis=1)
        at = position_R[:, None] + jnp.arange(fed_RT.shape[1])
        real = jnp.broadcast_to(live_R[:, None], at.shape)
        hidden, cache = model.extend(fed_RT, at, real, state.cache, of_row(state.table_SM), phase="decode")
        logits_RTV = model.logits(hidden.x_BTD)
        # each chip its part of the vocabulary for its group, then the whole vocabulary of its own sequences
        logits_RTV = self.layout.constrain(logits_RTV, "batch", None, "vocab")
        logits_RTV = self.layout.constrain(logits_RTV, "cache_batch", None, None)
        state, before, alive_R, drawn_RT = state._replace(cache=cache), found.count_R, live_R, []
        for t in range(fed_RT.shape[1]):
            drawing, drawn = self._draw(logits_RTV[:, t], state, rows_R, position_R + 1 + t, alive_R, tags)
            state = self._stepped(state, drawing, drawn, rows_R, position_R + 1 + t, alive_R)
            found = self._noted(found, drawn, alive_R, self._routes(hidden), t)
            drawn_RT.append(drawn.token_R)
            if t < self.draft_tokens:
                goes_on_R = ~drawn.done_R & ~of_row(waits_for_grammar(state.params, state.drawing))
                alive_R = alive_R & goes_on_R & (guesses_RD[:, t] == drawn.token_R)
        count_R = found.count_R - before
        if self.drafts == "mtp":
            of_new = hidden.x_BTD, jnp.stack(drawn_RT, axis=1), at, count_R
            state = self._draft(model, state, *of_new, rows_R, live_R, tags, phase="decode")
        offered_R = found.offered_R + jnp.sum(live_R[:, None] & (guesses_RD >= 0), axis=1)
        accepted_R = found.accepted_R + jnp.maximum(count_R - 1, 0)
        return self._laid(state), found._replace(steps=found.steps + 1, offered_R=offered_R, accepted_R=accepted_R)

    def _stepped(self, state: DeviceState, drawing: DrawState, drawn: Drawn, rows_R, position_R, alive_R):
        """With the draw of some rows as their latest tokens."""
        put = lambda old, rows: old.at[jnp.where(alive_R, rows_R, self.slots)].set(rows, mode="drop")
        return state._replace(
            token_S=put(state.token_S, drawn.token_R),
            position_S=put(state.position_S, position_R),
            done_S=put(state.done_S, drawn.done_R),
            history_SL=_remember(state.history_SL, rows_R, position_R, drawn.token_R, alive_R),
            drawing=drawing,
        )

    def _draft(self, model, state: DeviceState, hidden_RTD, next_RT, at, count_R, rows_R, live_R, tags, *, phase):
        """With the MTP module's entries of new tokens, and its guesses for rows that live."""

        def choose(logits_RV, position_R):
            return self._draw(logits_RV, state, rows_R, position_R, live_R, tags)[1].token_R

        of_new = hidden_RTD, next_RT, at, count_R, state.cache, take_rows(state.table_SM, rows_R)
        guesses, cache = by_mtp(model, *of_new, count=self.draft_tokens, phase=phase, choose=choose)
        rows = jnp.where(live_R, rows_R, self.slots)
        return state._replace(cache=cache, drafts_SD=state.drafts_SD.at[rows].set(guesses, mode="drop"))

    def _noted(self, found: Decoded, drawn: Drawn, live_R, routes_RTLA, t: int) -> Decoded:
        """With one more draw of the live rows, which fed token t led to."""
        N = found.drawn.token_R.shape[1]
        at = jnp.arange(live_R.size), jnp.where(live_R, found.count_R, N)
        note = lambda old, new: old.at[at].set(new, mode="drop")
        routes = None if routes_RTLA is None else note(found.routes_RNLA, routes_RTLA[:, t])
        return found._replace(
            drawn=jax.tree.map(note, found.drawn, drawn),
            count_R=found.count_R + live_R,
            routes_RNLA=routes,
        )

    def _nothing_drawn(self, rows: int) -> Decoded:
        N, V = self.steps * (1 + self.draft_tokens), self.config.vocab_size
        nobody = jnp.zeros(rows, jnp.int32)
        slots = empty_params(1, V), empty_state(1, V)
        run = partial(draw, record_support=self.record.support)
        one = jax.eval_shape(run, jnp.zeros((rows, V)), *slots, nobody, nobody, nobody > 0, NO_TAGS)[1]
        drawn = jax.tree.map(lambda a: jnp.zeros((rows, N, *a.shape[1:]), a.dtype), one)
        routes = None
        if self.record.routes:
            routes = jnp.zeros((rows, N, *self._routes_of_token), self._routes_dtype)
        return Decoded(drawn, nobody, jnp.int32(0), nobody, nobody, routes)

    def _draw(self, logits_RV, state: DeviceState, rows_R, position_R, live_R, tags) -> tuple[DrawState, Drawn]:
        given = logits_RV, state.params, state.drawing, rows_R, position_R, live_R, tags
        return draw(*given, record_support=self.record.support)

    def _routes(self, hidden: Hidden) -> jax.Array | None:
        """[R, T, L, A] of the tokens just fed."""
        return experts_of(hidden.stats).astype(self._routes_dtype) if self.record.routes else None

    @property
    def _routes_of_token(self) -> tuple[int, int]:
        layers = sum(self.config.is_moe_layer(layer) for layer in range(self.config.num_hidden_layers))
        return layers, self.config.moe.num_experts_per_tok

    @property
    def _routes_dtype(self) -> jnp.dtype:
        return jnp.int16 if self.config.moe.n_routed_experts <= 2**15 else jnp.int32

    def _told(self, found: Extended | Decoded):
        """What the host reads, on every device."""
        return jax.tree.map(lambda a: self.layout.constrain(a, *(None,) * a.ndim), found)

    def _laid(self, state: DeviceState) -> DeviceState:
        """The cache where its blocks lie, the counts of drawn tokens cut by vocabulary, all else on every device."""
        if self.layout.mesh is None:
            return state
        everywhere = lambda a: self.layout.constrain(a, *(None,) * a.ndim)
        small = jax.tree.map(everywhere, state._replace(cache=(), drawing=state.drawing._replace(counts=())))
        counts = self.layout.constrain(state.drawing.counts, None, "vocab")
        is_pool = lambda of: isinstance(of, LatentCache | KVCache)
        cache = jax.tree.map(lambda pool: laid_pool(pool, self.layout), state.cache, is_leaf=is_pool)
        return small._replace(cache=cache, drawing=small.drawing._replace(counts=counts))


def _remember(history_SL: jax.Array, rows_R, position_R, token_R, live_R) -> jax.Array:
    """The tokens of live rows at their positions; nothing where there is no history."""
    rows = jnp.where(live_R, rows_R, history_SL.shape[0])
    return history_SL.at[rows, position_R].set(token_R, mode="drop")
