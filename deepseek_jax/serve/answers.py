"""One completion as it comes: thought and answer apart, their tokens counted, log-probs in OpenAI's forms."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from deepseek_jax.generation.live import Live
from deepseek_jax.serve.calls import Call
from deepseek_jax.serve.prompts import Prompts
from deepseek_jax.serve.streams import Part
from deepseek_jax.text.think import CLOSE, Piece, ThinkParser
from deepseek_jax.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # instead of -inf, which JSON does not have
_WINDOW = 16  # tokens that the closing tag and what was held back before it may have


class Choice:
    """A completion of a conversation, so far.

    Args:
        prompts: for the texts of tokens.
        opened: its prompt ended inside a thought.

    Attributes:
        tokens: of it.
        live: the engine's record.
    """

    def __init__(self, prompts: Prompts, *, opened: bool):
        self._prompts, self._parser = prompts, ThinkParser(opened=opened)
        self._thought = 0
        self._thinks = opened
        self.tokens: list[int] = []
        self.live: Live | None = None

    async def feed(self, part: Part) -> list[Piece]:
        """What is new, told apart."""
        before, closed = len(self.tokens), self._parser.closed
        self.tokens += part.tokens
        self.live = part.live
        pieces = self._parser.feed(part.text)
        self._thinks = self._parser.thinks
        if part.finished:
            pieces += self._parser.finish()
        if self._parser.closed and not closed:
            start = max(0, before - _WINDOW)
            self._thought = start + await self._prompts.run(_closing, self._prompts.tokenizer, self.tokens[start:])
        return pieces

    @property
    def thought_tokens(self) -> int:
        """Of the thought, its tags included."""
        return self._thought if self._parser.closed else len(self.tokens) if self._thinks else 0

    @property
    def finish_reason(self) -> str:
        return "stop" if self.live.stopped else "length"

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended it."""
        return None if self.live.stream is None else self.live.stream.stopped

    async def logprobs(self, start: int) -> dict[str, Any]:
        """Of the tokens from `start` on, those of the thought apart."""
        spell = await _speller(self._prompts, self.live, self.tokens, start)
        every = [_of_token(spell, self.live, self.tokens, at) for at in range(start, len(self.tokens))]
        thought = max(0, self.thought_tokens - start)
        return {"content": every[thought:], "reasoning_content": every[:thought]}


async def whole_texts(call: Call, choices: Sequence[Choice]) -> list[tuple[str, str]]:
    """Thought and answer of each completion of a call, once all are finished."""
    texts = [{"reasoning": "", "answer": ""} for _ in choices]
    async for parts in call.parts():
        for part in parts:
            for kind, text in await choices[part.number].feed(part):
                texts[part.number][kind] += text
    return [(text["reasoning"], text["answer"]) for text in texts]


def _closing(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many of the tokens it takes to close the thought."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if CLOSE in tokenizer.decode(tokens[:middle], skip_special=False):
            high = middle
        else:
            low = middle + 1
    return low


async def _speller(prompts: Prompts, live: Live, tokens: Sequence[int], start: int) -> Callable[[int], str]:
    """The text of every token that the log-probs from `start` on name."""
    named = set(tokens[start:])
    for ids, _ in live.top[start : len(tokens)]:
        named.update(id for id in ids.tolist() if id >= 0)
    named = sorted(named)
    return dict(zip(named, await prompts.run(prompts.spelled, named), strict=True)).__getitem__


def _best(spell: Callable[[int], str], live: Live, at: int) -> list[tuple[str, float]]:
    if at >= len(live.top):
        return []
    ids, values = (part.tolist() for part in live.top[at])
    return [(spell(id), finite(value)) for id, value in zip(ids, values, strict=True) if id >= 0]


def _of_token(spell: Callable[[int], str], live: Live, tokens: Sequence[int], at: int) -> dict[str, Any]:
    best = [_as_chat(text, value) for text, value in _best(spell, live, at)]
    return _as_chat(spell(tokens[at]), finite(live.logprobs[at])) | {"top_logprobs": best}


def _as_chat(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}


def finite(value: float) -> float:
    """A log-prob that JSON has."""
    return max(float(value), LEAST_LOGPROB)


async def text_logprobs(
    prompts: Prompts, live: Live, tokens: Sequence[int], start: int, offset: int, *, echo: int = 0
) -> dict[str, list]:
    """Log-probs in the form of /v1/completions.

    Args:
        prompts: for the texts of tokens.
        live: the completion's record.
        tokens: its own, so far.
        start: of them, the first that is wanted.
        offset: of that one's text.
        echo: tokens of the prompt to begin with, whose likeliest others are known by their log-probs alone: they
            stand under the text "<likeliest>".
    """
    spell = await _speller(prompts, live, tokens, start)
    texts = [spell(token) for token in tokens[start:]]
    values: list[float | None] = [finite(live.logprobs[at]) for at in range(start, len(tokens))]
    tops: list[dict[str, float] | None] = [dict(_best(spell, live, at)) for at in range(start, len(tokens))]
    for top, text, value in zip(tops, texts, values, strict=True):
        top.setdefault(text, value)
    if echo:
        of_prompt = await prompts.run(prompts.spelled, live.request.tokens[:echo])
        texts, values = of_prompt + texts, [None, *map(finite, live.prompt_logprobs)] + values
        known = zip(of_prompt[1:], live.prompt_logprobs, live.prompt_likeliest, strict=True)
        tops = [None, *(_of_prompt(*each) for each in known), *tops]
    lengths = await prompts.run(prompts.lengths, [*live.request.tokens[:echo], *tokens[start:]])
    offsets = [offset + before for before in accumulate([0, *lengths[:-1]])][: len(texts)]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _of_prompt(text: str, value: float, likeliest: float) -> dict[str, float]:
    found = {text: finite(value)}
    return found if value == likeliest else {"<likeliest>": finite(likeliest)} | found
