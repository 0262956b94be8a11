"""A budget of thinking: where a thought stands, token by token, and what closes it when the budget is used up.

A slot that has thought its budget is made to write a closing message and `</think>`. The same few rules run on the
device, for all rows of a step, and on the host, for a request whose state is made anew from its tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.text.think import CLOSE, OPEN
from deepseek_jax.text.tokenizer import Tokenizer

WINDOW = 8  # tokens that a tag may have
_SPELLINGS = 32  # ways to write a tag, with what tokens may hold beside it
_MESSAGE = 64  # tokens of a closing message and its tag
_BLANKS = 64  # tokens of nothing but whitespace
_SPACES = ("", "\n", " ")
BEFORE, THINKING, CLOSING, AFTER = range(4)


class ThinkTags(NamedTuple):
    """What an engine knows of thoughts: int32 arrays of fixed sizes, so that no model or message recompiles.

    Args:
        opening: [spellings, WINDOW] the ids of `<think>`, ended by its last, -1 before its first.
        closing: [spellings, WINDOW] likewise those of `</think>`.
        message: [64] what a thought is closed with, the tag at its end.
        length: tokens of it; 0 closes no thought.
        blank: [64] the ids of nothing but whitespace, then -1: they may stand before an opening tag.
    """

    opening: np.ndarray
    closing: np.ndarray
    message: np.ndarray
    length: np.int32
    blank: np.ndarray


NO_TAGS = ThinkTags(
    opening=np.full((_SPELLINGS, WINDOW), -1, np.int32),
    closing=np.full((_SPELLINGS, WINDOW), -1, np.int32),
    message=np.zeros(_MESSAGE, np.int32),
    length=np.int32(0),
    blank=np.full(_BLANKS, -1, np.int32),
)
"""Of an engine that knows no tokenizer: nothing opens or closes a thought."""


def think_tags(tokenizer: Tokenizer, message: str) -> ThinkTags:
    """The tags as a tokenizer writes them.

    Args:
        tokenizer: the model's.
        message: what a thought ends with that is out of budget, without the tag.

    Raises:
        ValueError: the message has too many tokens, or a tag more than `WINDOW`.
    """
    if not message.strip() and not _written(tokenizer, message):
        message = ""  # a small vocabulary may have no line end
    ids = tokenizer.encode(message + CLOSE, add_bos=False)
    if len(ids) > _MESSAGE:
        raise ValueError(
            f"message: got {len(ids)} tokens with {CLOSE}, wanted at most {_MESSAGE}; shorten what closes a thought"
        )
    padded = np.zeros(_MESSAGE, np.int32)
    padded[: len(ids)] = ids
    # a thought opens at the beginning, and closes after any text
    opening, closing = _padded(tokenizer, OPEN, _SPACES), _padded(tokenizer, CLOSE, (*_SPACES, "a", "."))
    return ThinkTags(opening, closing, padded, np.int32(len(ids)), _blank(tokenizer))


def _blank(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that runs of whitespace are made of."""
    runs = [of * count for of in ("\n", " ", "\t", "\r\n", " \n", "\n ") for count in range(1, 17)]
    found = {token for run in runs for token in _written(tokenizer, run)}
    blank = sorted(token for token in found if tokenizer.decode([token], skip_special=False).isspace())[:_BLANKS]
    return np.array([*blank, *[-1] * (_BLANKS - len(blank))], np.int32)


def _written(tokenizer: Tokenizer, text: str) -> list[int]:
    """Its tokens; none where a small vocabulary cannot write it, which then no completion holds either."""
    try:
        return tokenizer.encode(text, add_bos=False)
    except ValueError:
        return []


def _padded(tokenizer: Tokenizer, tag: str, before: Sequence[str]) -> np.ndarray:
    rows = np.full((_SPELLINGS, WINDOW), -1, np.int32)
    for row, ids in zip(rows, sorted(set(_spellings(tokenizer, tag, before))), strict=False):
        if len(ids) > WINDOW:
            raise ValueError(
                f"tokenizer: got one that writes {tag} as {len(ids)} tokens, wanted at most {WINDOW}; use no budget"
            )
        row[-len(ids) :] = ids
    return rows


def _spellings(tokenizer: Tokenizer, tag: str, befores: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The fewest tokens that hold a tag, where a tokenizer may merge its ends with the text around."""
    alone = tokenizer.encode(tag, add_bos=False)
    if len(alone) == 1:  # a token of its own is never merged
        yield tuple(alone)
        return
    for before in befores:
        for after in ("", "\n", "\n\n", " ", "a"):
            ids = _written(tokenizer, before + tag + after)
            if not ids:
                continue
            end = next(n for n in range(len(ids) + 1) if tag in tokenizer.decode(ids[:n], skip_special=False))
            start = next(n for n in range(end, -1, -1) if tag in tokenizer.decode(ids[n:end], skip_special=False))
            yield tuple(ids[start:end])


# --- on the device, by row ------------------------------------------------------------------------


def forced(
    phase_R: jax.Array, count_R: jax.Array, budget_R: jax.Array, tags: ThinkTags
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a thought stands before a draw, and the token that must then come, -1 where the model chooses.

    Args:
        phase_R: int32, BEFORE a thought, THINKING, CLOSING (being made to write the message) or AFTER it.
        count_R: int32, tokens thought, or of the message written.
        budget_R: int32, -1 for none.
        tags: the engine's.

    Returns:
        phase_R, count_R, token_R.
    """
    spent_R = (phase_R == THINKING) & (budget_R >= 0) & (count_R >= budget_R) & (tags.length > 0)
    phase_R, count_R = jnp.where(spent_R, CLOSING, phase_R), jnp.where(spent_R, 0, count_R)
    next_R = jnp.asarray(tags.message)[jnp.minimum(count_R, _MESSAGE - 1)]
    return phase_R, count_R, jnp.where(phase_R == CLOSING, next_R, -1)


def thought_on(
    phase_R: jax.Array, count_R: jax.Array, recent_RW: jax.Array, tags: ThinkTags
) -> tuple[jax.Array, jax.Array]:
    """Where a thought stands after a draw.

    Args:
        phase_R, count_R: as `forced` left them. Before a thought, tokens count from the first that is not blank on.
        recent_RW: int32 [R, WINDOW], the last tokens, this draw's at the end and -1 before the first.
        tags: the engine's.

    Returns:
        phase_R, count_R.
    """
    before_R = phase_R == BEFORE
    blank_R = jnp.any(recent_RW[:, -1:] == jnp.asarray(tags.blank), axis=-1)
    count_R = jnp.where(before_R & (count_R == 0) & blank_R, 0, count_R + 1)
    # A tag opens a thought at a completion's beginning alone; one that comes later is the answer's.
    first_RG = jnp.sum(tags.opening >= 0, axis=-1) == count_R[:, None]
    opened_R = before_R & jnp.any(_ends_in(recent_RW, tags.opening) & first_RG, axis=-1)
    closed_R = (phase_R == THINKING) & jnp.any(_ends_in(recent_RW, tags.closing), axis=-1)
    closed_R |= (phase_R == CLOSING) & (count_R >= tags.length)
    phase_R = jnp.where(opened_R, THINKING, jnp.where(closed_R, AFTER, phase_R))
    return phase_R, jnp.where(opened_R | closed_R, 0, count_R)


def _ends_in(recent_RW: jax.Array, spellings: jax.Array) -> jax.Array:
    """By row, in which of the spellings it ends."""
    equal = (spellings == -1) | (recent_RW[:, None] == spellings)
    return jnp.all(equal, axis=-1) & (spellings[:, -1] != -1)


# --- on the host, of one request ------------------------------------------------------------------


def thought_of(tokens: Sequence[int], *, opened: bool, budget: int, tags: ThinkTags) -> tuple[int, int]:
    """Phase and count after tokens that were drawn, as the device has them.

    Args:
        tokens: of the completion.
        opened: the prompt ended in `<think>`.
        budget: -1 for none.
        tags: the engine's.
    """
    spelt = lambda rows: [tuple(row[row >= 0].tolist()) for row in np.asarray(rows) if row[-1] >= 0]
    opening, closing = spelt(tags.opening), spelt(tags.closing)
    ends_in = lambda tags, end: any(tuple(tokens[max(0, end - len(tag)) : end]) == tag for tag in tags)
    phase, count, blank = (THINKING if opened else BEFORE), 0, set(tags.blank[tags.blank >= 0].tolist())
    for end, token in enumerate(tokens, 1):
        if phase == THINKING and 0 <= budget <= count and tags.length > 0:
            phase, count = CLOSING, 0
        count += not (phase == BEFORE and count == 0 and token in blank)
        began = phase == BEFORE and ends_in([tag for tag in opening if len(tag) == count], end)
        closed = (phase == THINKING and ends_in(closing, end)) or (phase == CLOSING and count >= tags.length)
        phase = THINKING if began else AFTER if closed else phase
        count = 0 if began or closed else count
    return phase, count
