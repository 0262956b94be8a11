"""Batch generation: one jitted prefill, one jitted decode loop on the device, the cache donated between them.

Prompts are padded on the right into power-of-two buckets, so that a handful of compilations serve all lengths.
The noise of a token depends on its sequence's seed and its position alone: neither the batch around it, nor its
padding, nor the device count changes what is drawn.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.draw import Knobs, Modes, Record, Recorded, State, draw
from deepseek_jax.generation.sampling_config import SamplingConfig, refuse_unknown
from deepseek_jax.model.cache import Cache, abstract_cache, cache_axis, contiguous_table, empty_cache
from deepseek_jax.model.decoder import Hidden, experts_of
from deepseek_jax.model.lora import decoder_of
from deepseek_jax.ops.logprobs import project
from deepseek_jax.sharding import module_layout

NO_RECORD = Record()
_BLOCK = 64  # tokens of a block of the cache
_KNOWN = "max_new_tokens temperature top_p top_k min_p repetition_penalty stop_ids".split()


class Completion(NamedTuple):
    """One sample of C tokens (a stop token included), log-probs in nats, and whether it stopped by itself.

    The log-probs are those of softmax(logits / temperature) before top-k, top-p and penalty, the distribution that
    a trainer scores (temperature 0: of the unscaled logits). Where the support is recorded they are those of the
    distribution within it, after the penalty, which is then the one that a trainer scores.

    routes: int16 (int32 from 32,769 experts on) [tokens of the prompt + C - 1, L, A], the experts of each of L MoE
    layers that every token went to which was an input; all but the last were. support: uint32 [C, V / 32 rounded up],
    the tokens among which each one was drawn, as `ops.logprobs` has their bits; penalised: the same of those
    that the penalty was on. None where not recorded. text: the tokens decoded, special ones left out; None from the
    engine, which knows no tokenizer (`generation.text.complete` fills it in).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    routes: np.ndarray | None = None
    support: np.ndarray | None = None
    penalised: np.ndarray | None = None
    text: str | None = None


class _Begun(NamedTuple):
    """Completions with a token each: the arguments of decoding after the weights, and what belongs to the prompts."""

    of_decode: tuple[State, np.ndarray, np.ndarray, Knobs]
    modes: Modes
    limits: np.ndarray
    routes_PTLA: jax.Array | None


class Generator:
    """Generation for one architecture; weights are an argument of every call.

    Args:
        config: the model's.
        graphdef: static part of the module, from `model.decoder.split`.
        dtype: of the cache; None takes that of the weights, as their activations have it.

    Attributes:
        layout: the one that the module was made with.
    """

    def __init__(self, config: ModelConfig, graphdef: nnx.GraphDef, *, dtype: jnp.dtype | None = None):
        self.config, self.graphdef, self.dtype, self.layout = config, graphdef, dtype, module_layout(graphdef)
        self.prefill = jax.jit(self._prefill, static_argnames=("samples", "slots", "modes", "room"))
        self.decode = jax.jit(self._decode, static_argnames=("modes", "steps"), donate_argnames="state")

    def __call__(
        self,
        weights: nnx.State,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int],
        samples: int = 1,
        record: Record = NO_RECORD,
    ) -> list[Completion]:
        """Complete every prompt `samples` times.

        Args:
            weights: of the model, plain or beside an adapter (`model.lora.with_adapter`).
            prompts: token ids, each at least one and shorter than the context.
            sampling: how to draw. A completion also ends where the context does.
            seeds: one a completion, P x samples of them, prompt by prompt.
            samples: completions a prompt; a prompt is prefilled once for all of them.
            record: what to keep for a trainer.

        Returns:
            P x samples completions, prompt by prompt.

        Raises:
            ValueError: no or empty prompts, a prompt that fills the context, a wrong number of seeds, or a record that
                the model or the sampling has nothing for.
        """
        begun = self._begin(weights, prompts, sampling, seeds, samples, record)
        state = self.decode(weights, *begun.of_decode, modes=begun.modes)
        found = _completions(state, begun.limits, sampling.stop_ids)
        if begun.routes_PTLA is None:
            return found
        return _with_routes(found, prompts, samples, _on_host(begun.routes_PTLA), _on_host(state.record.routes_BNLA))

    def stream(
        self, weights: nnx.State, prompt: Sequence[int], sampling: SamplingConfig, *, seed: int, steps: int = 8
    ) -> Iterator[Completion]:
        """Complete one prompt, and give what there is of it after every few tokens.

        Args:
            weights, prompt, sampling, seed: as for a call with one prompt and one sample.
            steps: tokens between two looks at it.

        Yields:
            The completion so far; the last is the whole one, that of a call.
        """
        begun = self._begin(weights, [prompt], sampling, [seed], 1, NO_RECORD)
        state, limit = begun.of_decode[0], int(begun.limits[0])
        while True:
            drawn = int(state.count)
            (found,) = _completions(state, np.minimum(begun.limits, drawn), sampling.stop_ids)
            yield found
            if found.finished or drawn >= limit:
                return
            state = self.decode(weights, state, *begun.of_decode[1:], modes=begun.modes, steps=steps)

    def _begin(self, weights, prompts, sampling, seeds, samples, record) -> "_Begun":
        """Prompts padded and prefilled, and the first token of each completion drawn."""
        self.check(prompts, seeds, samples)
        refuse_unknown(sampling, _KNOWN)
        self._check_record(record, sampling)
        longest = max(map(len, prompts))
        context = self.config.max_position_embeddings
        limits = np.repeat([min(sampling.max_new_tokens, context - len(p)) for p in prompts], samples)
        room = int(limits.max())
        width = bucket(longest, least=max(16, self.layout.parts("tokens")))
        tokens, lengths = pad_right(prompts, width, rows=self._rows(len(prompts)))
        knobs, modes = self.settings(sampling, record)
        # Rows that only fill the bucket reuse the first seed and stop at once.
        padded_seeds = np.full(tokens.shape[0] * samples, seeds[0] & 0xFFFFFFFF, np.uint32)
        padded_seeds[: len(seeds)] = np.asarray(seeds, np.int64) & 0xFFFFFFFF
        padded_limits = np.zeros(padded_seeds.size, np.int32)
        padded_limits[: len(seeds)] = limits
        state, routes_PTLA = self.prefill(
            weights,
            tokens,
            lengths,
            padded_seeds,
            padded_limits,
            knobs,
            samples=samples,
            slots=bucket(min(longest + room, context)),
            modes=modes,
            room=bucket(room),
        )
        return _Begun((state, padded_seeds, padded_limits, knobs), modes, limits, routes_PTLA)

    def settings(self, sampling: SamplingConfig, record: Record = NO_RECORD) -> tuple[Knobs, Modes]:
        """How to draw, as arrays for the compiled calls and as what is compiled in."""
        stops = sampling.stop_ids or (-1,)
        stops = stops + (stops[-1],) * (bucket(len(stops), least=4) - len(stops))
        knobs = Knobs(
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
            top_k=jnp.int32(sampling.top_k),
            min_p=jnp.float32(sampling.min_p),
            penalty=jnp.float32(sampling.repetition_penalty),
            stop_ids=jnp.asarray(stops, jnp.int32),
        )
        modes = Modes(
            greedy=sampling.temperature == 0,
            filtered=sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0,
            penalised=sampling.repetition_penalty != 1,
            record=record,
        )
        return knobs, modes

    def _rows(self, prompts: int) -> int:
        """Rows for the prompts: a power of two, or more where the mesh does not divide it."""
        whole = self.layout.parts("cache_batch")
        return -(-bucket(prompts, least=1) // whole) * whole

    def check(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], samples: int) -> None:
        """Refuse arguments of a call that the model cannot work with; ValueError says why."""
        if not prompts:
            raise ValueError("prompts: got none, wanted at least one")
        if len(seeds) != len(prompts) * samples:
            raise ValueError(f"seeds: got {len(seeds)}, wanted {len(prompts) * samples}, one a completion")
        context = self.config.max_position_embeddings
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {number}: got {len(prompt)} tokens, wanted 1 to {context - 1}, "
                    f"fewer than the model's context of {context}; shorten it"
                )

    def _check_record(self, record: Record, sampling: SamplingConfig) -> None:
        if record.routes and self.config.moe is None:
            raise ValueError("record: got routes for a model without experts, wanted none; it chooses none")
        if record.support and sampling.temperature == 0:
            raise ValueError("record: got support beside temperature 0, wanted more than 0; the best token is no draw")

    def _prefill(self, weights, tokens_PT, length_P, seeds_B, limits_B, knobs, *, samples, slots, modes, room):
        """Prompts into the cache, the cache repeated for every sample, and the first token drawn; and their routes."""
        model = decoder_of(self.graphdef, weights)
        P, T = tokens_PT.shape
        size = min(slots, _BLOCK)
        cache = empty_cache(self.config, P * slots // size, size, self.dtype or model.embed.dtype, self.layout)
        at = jnp.broadcast_to(jnp.arange(T), (P, T))
        valid = at < length_P[:, None]
        hidden, cache = model.extend(tokens_PT, at, valid, cache, self._table(P, cache), phase="prefill")
        last_P1D = jnp.take_along_axis(hidden.x_BTD, (length_P - 1)[:, None, None], axis=1)
        logits_PV = self.layout.constrain(model.logits(last_P1D)[:, 0], "batch", None)
        each = partial(jnp.repeat, repeats=samples, axis=0)
        B = seeds_B.shape[0]
        seen = None
        if modes.penalised:
            inside = jnp.arange(tokens_PT.shape[1]) < length_P[:, None]
            rows = jnp.arange(tokens_PT.shape[0])[:, None]
            seen_PV = jnp.zeros(logits_PV.shape, bool).at[rows, tokens_PT].max(inside)
            seen = each(seen_PV)
        state = self.first_state(B, room)._replace(
            cache=self._repeated(cache, P, samples),
            position_B=each(length_P),
            done_B=limits_B == 0,
            seen_BV=seen,
            record=self._empty_record(B, room, modes),
        )
        logits_BV = self.layout.constrain(each(logits_PV), "cache_batch", None)
        state = self._laid(draw(state, logits_BV, seeds_B, limits_B, knobs, modes))
        return state, self._routes(hidden) if modes.record.routes else None

    @staticmethod
    def first_state(rows: int, room: int) -> State:
        """Of sequences without a token, before their cache is there."""
        return State(
            cache=(),
            token_B=jnp.zeros(rows, jnp.int32),
            position_B=jnp.zeros(rows, jnp.int32),
            done_B=jnp.zeros(rows, bool),
            seen_BV=None,
            tokens_BN=jnp.zeros((rows, room), jnp.int32),
            logprobs_BN=jnp.zeros((rows, room), jnp.float32),
            count=jnp.int32(0),
            record=Recorded(),
        )

    def _empty_record(self, rows: int, room: int, modes: Modes) -> Recorded:
        routes = support = penalised = None
        if modes.record.routes:
            layers = sum(self.config.is_moe_layer(layer) for layer in range(self.config.num_hidden_layers))
            routes = jnp.zeros((rows, room, layers, self.config.moe.num_experts_per_tok), self._routes_dtype)
        if modes.record.support:
            support = jnp.zeros((rows, room, -(-self.config.vocab_size // 32)), jnp.uint32)
            penalised = jnp.zeros_like(support) if modes.penalised else None
        return Recorded(routes, support, penalised)

    def _routes(self, hidden: Hidden) -> jax.Array:
        """[B, T, L, A] of the tokens just fed."""
        return experts_of(hidden.stats).astype(self._routes_dtype)

    @property
    def _routes_dtype(self) -> jnp.dtype:
        return jnp.int16 if self.config.moe.n_routed_experts <= 2**15 else jnp.int32

    @property
    def _block_axis(self) -> int:
        return int(self.layout.scan_layers)

    def _table(self, rows: int, cache: Cache) -> jax.Array:
        """Of a cache in which every sequence has the same number of blocks, one after another."""
        blocks = jax.tree.leaves(cache)[0].shape[self._block_axis]
        return contiguous_table(rows, blocks // rows, self.layout.parts(cache_axis(self.config)))

    def _repeated(self, cache: Cache, rows: int, samples: int) -> Cache:
        """A cache of `rows` sequences with each of them `samples` times."""
        axis = self._block_axis

        def repeat(pool):
            by_row = pool.reshape(*pool.shape[:axis], rows, -1, *pool.shape[axis + 1 :])
            return jnp.repeat(by_row, samples, axis=axis).reshape(*pool.shape[:axis], -1, *pool.shape[axis + 1 :])

        return jax.tree.map(repeat, cache)

    def _laid(self, state: State) -> State:
        """A state with what the host reads on every device, and cache and record cut as decoding reads the cache."""
        if self.layout.mesh is None:
            return state
        one = jax.tree.leaves(state.cache)[0]
        like = abstract_cache(self.config, one.shape[self._block_axis], one.shape[-2], one.dtype, self.layout)
        cache = jax.tree.map(lambda a, of: jax.lax.with_sharding_constraint(a, of.sharding), state.cache, like)
        by_sequence = lambda a: self.layout.constrain(a, "cache_batch", *(None,) * (a.ndim - 1))
        seen, record = jax.tree.map(by_sequence, (state.seen_BV, state.record))
        everywhere = lambda a: self.layout.constrain(a, *(None,) * a.ndim)
        small = jax.tree.map(everywhere, state._replace(cache=(), seen_BV=None, record=Recorded()))
        return small._replace(cache=cache, seen_BV=seen, record=record)

    def _decode(self, weights, state, seeds_B, limits_B, knobs, *, modes, steps=None):
        """Feed the last token, draw the next, until every sequence stopped or reached its limit, or for some steps."""
        model = decoder_of(self.graphdef, weights)
        table = self._table(seeds_B.shape[0], state.cache)
        head_DV = model.head_DV()  # out of the loop: tied embeddings are transposed once, not every step

        def body(state: State) -> State:
            # the token that was drawn last lies one before the position that comes next
            at, live = state.position_B[:, None] - 1, ~state.done_B[:, None]
            hidden, cache = model.extend(state.token_B[:, None], at, live, state.cache, table, phase="decode")
            logits_BV = project(hidden.x_BTD[:, 0], head_DV)
            # each chip its part of the vocabulary for its group, then the whole vocabulary of its own sequences
            logits_BV = self.layout.constrain(logits_BV, "batch", "vocab")
            logits_BV = self.layout.constrain(logits_BV, "cache_batch", None)
            record = state.record
            if modes.record.routes:  # those of the token drawn last
                routes = record.routes_BNLA.at[:, state.count - 1].set(self._routes(hidden)[:, 0])
                record = record._replace(routes_BNLA=routes)
            state = state._replace(cache=cache, record=record)
            return self._laid(draw(state, logits_BV, seeds_B, limits_B, knobs, modes))

        last = None if steps is None else state.count + steps
        goes_on = lambda s: ~jnp.all(s.done_B) if last is None else ~jnp.all(s.done_B) & (s.count < last)
        return self._laid(jax.lax.while_loop(goes_on, body, state))


class NonFiniteLogitsError(ValueError):
    """A model's logits are no finite numbers, so that nothing can be drawn from them."""


def _completions(state: State, limits: np.ndarray, stop_ids: tuple[int, ...]) -> list[Completion]:
    tokens, logprobs = np.asarray(state.tokens_BN), np.asarray(state.logprobs_BN)
    bits = state.record.support_BNW, state.record.penalised_BNW
    bits = [None if of is None else _on_host(of) for of in bits]
    found = []
    for row, limit in enumerate(limits.tolist()):
        stops = np.flatnonzero(np.isin(tokens[row, :limit], stop_ids))
        length = int(stops[0]) + 1 if stops.size else limit
        if not np.all(np.isfinite(logprobs[row, :length])):
            raise NonFiniteLogitsError(
                f"completion {row}: the model's logits are no finite numbers; its weights are damaged, or too large to "
                "compute with"
            )
        kept, penalised = (None if of is None else of[row, :length] for of in bits)
        of_row = tokens[row, :length], logprobs[row, :length], bool(stops.size)
        found.append(Completion(*of_row, support=kept, penalised=penalised))
    return found


def _with_routes(
    completions: list[Completion],
    prompts: Sequence[Sequence[int]],
    samples: int,
    of_prompts_PTLA: np.ndarray,
    of_drawn_BNLA: np.ndarray,
) -> list[Completion]:
    found = []
    for row, completion in enumerate(completions):
        number, fed = row // samples, len(completion.tokens) - 1  # nothing was computed for the last token
        parts = of_prompts_PTLA[number, : len(prompts[number])], of_drawn_BNLA[row, :fed]
        found.append(completion._replace(routes=np.concatenate(parts)))
    return found


def _on_host(array: jax.Array) -> np.ndarray:
    """Whole, also where its parts lie with several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def bucket(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def pad_right(sequences: Sequence[Sequence[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [rows, width] with zeros after each sequence, and the lengths (1 for rows that only fill)."""
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    return tokens, lengths
