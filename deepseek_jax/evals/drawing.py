"""Where samples come from: the engine, or (in `evals.server`) a server; both give each as soon as it is there."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from flax import nnx

from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import Messages, encode_prompt
from deepseek_jax.text.think import CLOSE, OPEN, opens_thought
from deepseek_jax.text.tokenizer import Tokenizer


class Wanted(NamedTuple):
    """A sample to draw: the user's text or a conversation, its seed, texts that end it, and how many tokens it may
    think."""

    text: str | Messages
    seed: int
    stop: tuple[str, ...] = ()
    budget: int | None = None


class Drawn(NamedTuple):
    """A sample.

    prompt: as text; it may end in `<think>`. text: of the completion. tokens: how many, and of these the thought's with
    its tags, None where not known. finished: it ended by itself. prompt_tokens: None where not known.
    """

    prompt: str
    text: str
    tokens: int
    thinking_tokens: int | None
    finished: bool
    prompt_tokens: int | None = None

    @property
    def thinks(self) -> bool:
        """Whether it begins with a thought."""
        return opens_thought(self.prompt) or self.text.lstrip().startswith(OPEN)

    @property
    def unclosed(self) -> bool:
        """Whether its thought never ends."""
        return self.thinks and CLOSE not in self.text


class Drawer(Protocol):
    """Draws samples."""

    def __call__(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, Drawn]]:
        """All of them, each with its number, as they end."""
        ...

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Refuse what cannot be asked, before anything is drawn; ValueError says which."""
        ...


class EngineDrawer:
    """Draws from a model's weights.

    Args:
        generator: of the model.
        weights: of the model.
        tokenizer: the model's.
        sampling: how to draw; stop texts and budgets are each sample's own.
        batch: samples at a time.
        system: text that conversations begin with.
        chat: use the chat template; base models have none.
    """

    def __init__(
        self,
        generator: Generator,
        weights: nnx.State,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        batch: int,
        system: str | None = None,
        chat: bool = True,
    ):
        self.generator, self.weights, self.tokenizer = generator, weights, tokenizer
        self.sampling, self.batch, self._how = sampling, batch, {"system": system, "chat": chat}
        self._encoded: dict[str, list[int]] = {}

    def check(self, wanted: Sequence[Wanted]) -> None:
        context = self.generator.config.max_position_embeddings
        for number, each in enumerate(wanted):
            try:
                self.sampling.limit(len(self._tokens(each.text)), context)
            except ValueError as problem:
                raise ValueError(f"prompt {number}: {str(problem).removeprefix('prompt: ')}") from None

    def __call__(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, Drawn]]:
        kinds = list(dict.fromkeys((each.stop, each.budget) for each in wanted))
        for stop, budget in kinds:
            numbers = [number for number, each in enumerate(wanted) if (each.stop, each.budget) == (stop, budget)]
            sampling = dataclasses.replace(self.sampling, stop=stop, thinking_budget=budget)
            prompts = [self._tokens(wanted[number].text) for number in numbers]
            found = self.generator.each(
                self.weights,
                prompts,
                sampling,
                seeds=[wanted[number].seed for number in numbers],
                tokenizer=self.tokenizer,
                slots=self.batch,
            )
            for place, completion in found:
                yield numbers[place], self._drawn(prompts[place], completion)

    def _tokens(self, text: str | Messages) -> list[int]:
        key = text if isinstance(text, str) else json.dumps(text)
        if key not in self._encoded:
            self._encoded[key] = encode_prompt(self.tokenizer, text, **self._how)
        return self._encoded[key]

    def _drawn(self, prompt: Sequence[int], completion: Completion) -> Drawn:
        told = self.tokenizer.decode(prompt, skip_special=False)
        tokens = completion.tokens.tolist()
        drawn = Drawn(told, completion.text or "", len(tokens), 0, completion.finished, len(prompt))
        return drawn._replace(thinking_tokens=thinking_tokens(self.tokenizer, tokens) if drawn.thinks else 0)


def thinking_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many tokens a completion that begins with a thought spends on it, `</think>` included."""
    closed = lambda count: CLOSE in tokenizer.decode(tokens[:count], skip_special=False)
    if not closed(len(tokens)):
        return len(tokens)
    low, high = 0, len(tokens)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle, high)
    return high
