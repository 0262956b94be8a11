"""A conversation as tokens, and which of them the assistant wrote: what supervised fine-tuning learns.

What counts is the assistant's text with the token that ends its turn: never a header, a user's text, or the line break
that a template sets behind a turn. A template with `{% generation %}` tags says itself what that is. Of any other, turn
i begins where the rendering of the messages before it, with the opening of an answer, ends. A template that opens none
is rendered with another text in the turn's place, which shows where the text stands.

A turn counts only where the template keeps it: its text, thoughts included, has to stand in the rendering, and the
rendering of the messages up to it has to be the beginning of the whole. R1's template drops the thoughts of every turn,
Qwen3's those of earlier ones; what is left of such a turn would teach to answer without thinking.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.text.think import CLOSE, OPEN, split_thinking
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.worker import GENERATION_CLOSES, GENERATION_OPENS

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPENS, _CLOSES = "\ufdd0", "\ufdd1"  # no characters, so that they stand in no text
_OTHER_TEXT = "qzjxanswerqzjx"


class MaskedTokens(NamedTuple):
    """A text's tokens, and which of them are learnt.

    tokens int32 [n]; mask bool [n]. unlearnt: turns of the assistant that do not count, because the template does not
    keep them. continued: the template drops the thoughts of the last turn, which stands behind the opening of an
    answer instead, as the model would write it. missing: texts of the user or the system that the template leaves out.
    """

    tokens: np.ndarray
    mask: np.ndarray
    unlearnt: int = 0
    continued: bool = False
    missing: int = 0


class _Turn(NamedTuple):
    """The rendering up to a turn, the place of its text there, and whether all of it is there."""

    through: str
    start: int
    end: int
    kept: bool


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    history: int = 0,
    unlearnt: Collection[int] = (),
    **variables: Any,
) -> MaskedTokens:
    """A conversation under a checkpoint's own template.

    Args:
        tokenizer: with a chat template, or DeepSeek-V3.2's.
        messages: "role", "content" and, for answers, "reasoning_content".
        history: messages at the beginning that are not learnt.
        unlearnt: numbers of further ones, from 0.
        **variables: further variables of the template, such as `thinking`.

    Raises:
        ValueError: no turn of the assistant, the template refuses the conversation, or keeps none of its turns.

    Source: huggingface/transformers, `apply_chat_template(return_assistant_tokens_mask=True)`, for templates with
        `{% generation %}` tags. Differs: turns whose thoughts such a template drops do not count.
    """
    of_assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [i for i in of_assistant if i >= history and i not in unlearnt]
    if not turns:
        raise ValueError("no assistant turn")
    given = tokenizer, messages, turns, variables
    if tokenizer.chat_template is not None and _TAG.search(tokenizer.chat_template):
        text, spans, continued = *_marked(*given), False
    else:
        text, spans, continued = _found(*given)
    if not spans:
        raise ValueError("the chat template keeps no assistant turn whole")
    dropped, asked = max(0, len(turns) - len(spans)), messages[: turns[-1]]
    missing = sum(of["role"] != "assistant" and str(of["content"]).strip() not in text for of in asked)
    return _masked(tokenizer, text, spans)._replace(unlearnt=dropped, continued=continued, missing=missing)


def text_tokens(tokenizer: Tokenizer, prompt: str, completion: str) -> MaskedTokens:
    """A prompt and what continues it, without a template; the completion and an end-of-sequence token are learnt."""
    text = f"{prompt}{completion}{tokenizer.eos or ''}"
    return _masked(tokenizer, text, [(len(prompt), len(text))])


def _masked(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> MaskedTokens:
    tokens, places = tokenizer.encode_with_offsets(text, add_bos=True)
    starts, ends = np.array(places, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    mask[:1] = False  # nothing predicts the first one
    return MaskedTokens(np.array(tokens, np.int32), mask)


# --- templates that mark what the assistant writes -------------------------------------------------


def _marked(tokenizer, messages, turns, variables) -> tuple[str, list[tuple[int, int]]]:
    if any(mark in str(message.get("content")) for message in messages for mark in (_OPENS, _CLOSES)):
        raise ValueError("a text holds U+FDD0 or U+FDD1, which are no characters")
    marks = {GENERATION_OPENS: _OPENS, GENERATION_CLOSES: _CLOSES}
    rendered = tokenizer.render(messages, add_generation_prompt=False, **variables, **marks)
    text, spans = "", []
    for number, piece in enumerate(re.split(f"[{_OPENS}{_CLOSES}]", rendered)):
        if number % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    every = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) == len(every):
        of_turn = dict(zip(every, spans, strict=True))
        return text, [of_turn[i] for i in turns if _keeps(messages[i], text[slice(*of_turn[i])])]
    if len(every) > len(turns):
        raise ValueError("the chat template marks another number of turns than there are, some of which are history")
    return text, spans


# --- those that do not ----------------------------------------------------------------------------


def _found(tokenizer, messages, turns, variables) -> tuple[str, list[tuple[int, int]], bool]:
    render = lambda messages, opened: tokenizer.render(messages, add_generation_prompt=opened, **variables)
    prefixes_end_open = tokenizer.chat_template is None  # DeepSeek-V3.2's: a user's message opens the answer
    opening = lambda i: _opening(render, messages[:i], prefixes_end_open)
    found = {i: _turn(render, messages[: i + 1], opening(i)) for i in turns}
    last, continued = turns[-1], None
    if not found[last].kept and _parts(messages[last])[0]:
        continued = _continued(render, messages[: last + 1], opening(last))
    if continued is not None:
        found[last] = continued
    text = render(messages, False) if continued is None else continued.through
    learnt = [of for of in found.values() if of.kept and text.startswith(of.through[: of.end])]
    return text, [(of.start, of.end) for of in learnt], continued is not None


def _opening(render: Callable, before: Sequence[Mapping], always: bool) -> str | None:
    """The text up to the place where an answer begins; None where the template opens none."""
    if not before:
        return None
    opened = render(before, True)
    return opened if always or opened != render(before, False) else None


def _turn(render: Callable, messages: Sequence[Mapping], opened: str | None) -> _Turn:
    """The last of the messages."""
    through = render(messages, False)
    end = len(through.rstrip())
    if opened is not None and through.startswith(opened):
        start = len(opened)
    else:
        header, trailer = _around(render, messages)
        if not (through.startswith(header) and through.endswith(trailer)):
            return _Turn(through, 0, end, False)
        start = len(header)
    return _Turn(through, start, end, _keeps(messages[-1], through[start:end]))


def _around(render: Callable, messages: Sequence[Mapping]) -> tuple[str, str]:
    """What stands before and after the last message's text."""
    header, found, trailer = render(
        [*messages[:-1], {"role": messages[-1]["role"], "content": _OTHER_TEXT}], False
    ).partition(_OTHER_TEXT)
    if not found:
        raise ValueError("the chat template leaves out what the assistant says")
    return header, trailer


def _continued(render: Callable, messages: Sequence[Mapping], opened: str | None) -> _Turn | None:
    """The last message behind the opening of an answer; None where the template opens none."""
    if opened is None:
        return None
    reasoning, answer = _parts(messages[-1])
    written = f"{OPEN}{reasoning}{CLOSE}{answer}"
    if "reasoning_content" in messages[-1]:
        written = f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{answer}"
    if opened.rstrip().endswith(OPEN):
        written = written.removeprefix(OPEN)
        written = written.removeprefix("\n") if opened.endswith("\n") else written
    text = f"{opened}{written}{_around(render, messages)[1].rstrip()}"
    return _Turn(text, len(opened), len(text), True)


def _parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """An answer's thoughts and the rest of it."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], message["content"]
    if CLOSE not in message["content"]:
        return "", message["content"]
    return split_thinking(message["content"], opened=True)


def _keeps(message: Mapping[str, Any], written: str) -> bool:
    """Whether what was written holds a message's thoughts, and after them its answer."""
    thoughts, answer = (part.strip() for part in _parts(message))
    after = written.partition(thoughts)[2] if thoughts else written
    return thoughts in written and answer in after
