"""What an engine knows of each of its slots for drawing tokens: what was asked for, and what was drawn.

Both are arrays by slot, the same for every mix of requests, so that none of them recompiles. A row is made on the host
in NumPy, and put into its slot on the device with others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.generation.sampling_config import MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingConfig
from deepseek_jax.generation.thinking import AFTER, BEFORE, NO_TAGS, WINDOW, ThinkTags, thought_of

IN_PROMPT = 1 << 30
"""Bit of a token's count that says that the prompt has it."""
Rows = TypeVar("Rows", bound=tuple)


class SlotParams(NamedTuple):
    """The settings of `SamplingConfig` as numbers: of one slot, or with an axis of slots before the others.

    stop_ids [64] is padded with -1, bias_ids [300] with V; limit is `max_new_tokens` or what the context leaves of it;
    thinking_budget is -1 where there is none. constrained: a grammar says what may come after the thought.
    """

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    stop_ids: Any
    min_new_tokens: Any
    limit: Any
    bias_ids: Any
    bias_values: Any
    thinking_budget: Any
    top_logprobs: Any
    constrained: Any


class DrawState(NamedTuple):
    """What drawing carries from token to token: of one slot, or with an axis of slots before the others.

    counts [V] is how often each token was drawn, with the bit `IN_PROMPT`; drawn is how many tokens were; recent
    [WINDOW] are the last of them, -1 before the first; phase and thought are where a thought stands
    (`generation.thinking`). All int32. allowed, uint32 [V / 32], rounded up, are bits of the tokens that a grammar lets
    come next; ready: they are of the next token, and not of one that was drawn.
    """

    counts: Any
    drawn: Any
    recent: Any
    phase: Any
    thought: Any
    allowed: Any
    ready: Any


def params_of(
    sampling: SamplingConfig, *, seed: int, limit: int, vocab_size: int, constrained: bool = False
) -> SlotParams:
    """A slot's row of NumPy numbers.

    Args:
        sampling: the request's settings.
        seed: of its noise; its lower 32 bits count.
        limit: of its new tokens, from `SamplingConfig.limit`.
        vocab_size: the model's.
        constrained: by a grammar.

    Raises:
        ValueError: a bias on a token outside the vocabulary.
    """
    outside = [token for token in sampling.logit_bias if token >= vocab_size]
    if outside:
        raise ValueError(f"logit_bias: got token {outside[0]}, wanted ids below the model's vocab_size {vocab_size}")
    pad = lambda values, width, blank, dtype: np.array([*values, *[blank] * (width - len(values))], dtype)
    budget = sampling.thinking_budget
    return SlotParams(
        temperature=np.float32(sampling.temperature),
        top_p=np.float32(sampling.top_p),
        top_k=np.int32(sampling.top_k),
        min_p=np.float32(sampling.min_p),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        presence_penalty=np.float32(sampling.presence_penalty),
        frequency_penalty=np.float32(sampling.frequency_penalty),
        seed=np.uint32(seed & 0xFFFFFFFF),
        stop_ids=pad(sampling.stop_ids, MAX_STOP_IDS, -1, np.int32),
        min_new_tokens=np.int32(sampling.min_new_tokens),
        limit=np.int32(limit),
        bias_ids=pad(sampling.logit_bias, MAX_LOGIT_BIAS, vocab_size, np.int32),
        bias_values=pad(sampling.logit_bias.values(), MAX_LOGIT_BIAS, 0, np.float32),
        thinking_budget=np.int32(-1 if budget is None else budget),
        top_logprobs=np.int32(sampling.top_logprobs),
        constrained=np.bool_(constrained),
    )


def state_of(
    prompt: Sequence[int],
    drawn: Sequence[int],
    *,
    opened: bool,
    budget: int | None,
    vocab_size: int,
    tags: ThinkTags = NO_TAGS,
    allowed: np.ndarray | None = None,
) -> DrawState:
    """A slot's row of NumPy numbers, of a new request or of one whose tokens so far are known.

    Args:
        prompt: its tokens.
        drawn: tokens of the completion; none for a new request.
        opened: the prompt ended in `<think>`.
        budget: of thinking.
        vocab_size: the model's.
        tags: the engine's.
        allowed: bits of what may come next by a grammar, which holds from the first token on where no thought was
            opened; None is no grammar.
    """
    counts = np.bincount(np.asarray(drawn, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.asarray(prompt, np.int64)] |= IN_PROMPT
    recent = [*[-1] * WINDOW, *drawn][-WINDOW:]
    phase, thought = thought_of(drawn, opened=opened, budget=-1 if budget is None else budget, tags=tags)
    if allowed is not None and not opened:
        phase, thought = AFTER, 0
    ready = allowed is not None
    allowed = np.zeros(_words(vocab_size), np.uint32) if allowed is None else allowed
    of_thought = np.int32(phase), np.int32(thought)
    return DrawState(counts, np.int32(len(drawn)), np.array(recent, np.int32), *of_thought, allowed, np.bool_(ready))


def empty_params(slots: int, vocab_size: int) -> SlotParams:
    """NumPy arrays of slots that nothing was asked of."""
    row = params_of(SamplingConfig(max_new_tokens=1, temperature=0.0), seed=0, limit=0, vocab_size=vocab_size)
    return jax.tree.map(lambda a: np.repeat(a[None], slots, axis=0), row)


def empty_state(slots: int, vocab_size: int) -> DrawState:
    """Device arrays of slots without a token."""
    every = lambda value, *shape: jnp.full((slots, *shape), value, jnp.int32)
    allowed = jnp.zeros((slots, _words(vocab_size)), jnp.uint32)
    of_grammar = allowed, jnp.zeros(slots, bool)
    return DrawState(every(0, vocab_size), every(0), every(-1, WINDOW), every(BEFORE), every(0), *of_grammar)


def _words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def waits_for_grammar(params: SlotParams, state: DrawState) -> jax.Array:
    """Whether nothing may be drawn in a slot before the host has said what its grammar allows next."""
    return params.constrained & (state.phase == AFTER) & ~state.ready


def put_rows(of_slots: Rows, slots_R: jax.Array, rows: Rows) -> Rows:
    """The same on the device: R rows into their slots; a slot outside is dropped."""
    return jax.tree.map(lambda array, row: array.at[slots_R].set(row, mode="drop"), of_slots, rows)


def take_rows(of_slots: Rows, slots_R: jax.Array) -> Rows:
    """The rows of R slots; one outside gets the last slot's."""
    return jax.tree.map(lambda array: jnp.take(array, slots_R, axis=0, mode="clip"), of_slots)
