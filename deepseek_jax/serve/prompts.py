"""Prompts as tokens, made in threads whose slow texts hold up neither the event loop nor the engine."""

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from deepseek_jax.serve.structured import Grammars
from deepseek_jax.text.confined import own_process
from deepseek_jax.text.think import OPEN, opens_thought
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.untrusted import Untrusted

T = TypeVar("T")
_THREADS = 2
_SWITCHES = ("thinking", "enable_thinking")  # of DeepSeek-V3.1's and V3.2's, and of Qwen3's templates
_KEPT_TEXTS = 1 << 17


class Prompt(NamedTuple):
    """A prompt's tokens, and whether it ends inside a thought."""

    tokens: list[int]
    opened: bool


def chats(tokenizer: Tokenizer) -> bool:
    """Whether conversations can be put to its model."""
    return tokenizer.chat_template is not None or tokenizer.chat_encoding is not None


class Prompts:
    """What a server does with its model's tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: the model's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.grammars = tokenizer, Grammars(tokenizer, vocab_size)
        self._untrusted = Untrusted(tokenizer)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="text", initializer=own_process)
        source = tokenizer.chat_template or ""
        self._switches = [name for name in _SWITCHES if re.search(rf"\b{name}\b", source)]
        if not source and tokenizer.chat_encoding is not None:
            self._switches = ["thinking"]
        self._text = lru_cache(maxsize=_KEPT_TEXTS)(lambda token: tokenizer.decode([token], skip_special=False))
        self._length = lru_cache(maxsize=_KEPT_TEXTS)(lambda token: len(tokenizer.decode([token])))

    async def run(self, call: Callable[..., T], *given: Any) -> T:
        """A call of the tokenizer, in a thread for such."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *given)

    def warm_up(self) -> None:
        """Start the processes of the threads, so that no call waits for that."""
        together = threading.Barrier(_THREADS)  # each thread takes one of these
        wait = lambda: (together.wait(timeout=60), self.tokenizer.encode("", add_bos=True))
        for started in [self._pool.submit(wait) for _ in range(_THREADS)]:
            started.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def chat(self, messages: Sequence[dict[str, Any]], thinking: bool | None) -> Prompt:
        """A conversation under the model's template; True opens a thought where the template does not.

        Raises:
            ValueError: the model has no template, or one that refuses the conversation.
        """
        if not chats(self.tokenizer):
            raise ValueError("messages: got a conversation for a model without a chat template; ask /v1/completions")
        switches = {} if thinking is None else dict.fromkeys(self._switches, thinking)
        prompt = self._seen(self._untrusted.chat(messages, **switches))
        if thinking and not prompt.opened:
            tokens = [*prompt.tokens, *self.tokenizer.encode(OPEN + self._line_end, add_bos=False)]
            return Prompt(tokens, True)
        return prompt

    def text(self, prompt: str | Sequence[int]) -> Prompt:
        """A text to go on with, whose control tokens are control tokens; or its tokens."""
        if isinstance(prompt, str):
            return self._seen(self.tokenizer.encode(prompt, add_bos=True))
        return self._seen(list(prompt))

    def spelled(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return [self._text(token) for token in tokens]

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """Characters that each token has in a text, from which special ones are left out."""
        return [self._length(token) for token in tokens]

    def _seen(self, tokens: list[int]) -> Prompt:
        return Prompt(tokens, opens_thought(self.tokenizer.decode(tokens[-16:], skip_special=False)))

    @property
    def _line_end(self) -> str:
        """What follows an opened thought, where the vocabulary has it."""
        try:
            self.tokenizer.encode("\n", add_bos=False)
        except ValueError:
            return ""
        return "\n"
