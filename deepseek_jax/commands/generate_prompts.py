"""The prompts of `generate`: read, encoded, and refused where the model cannot take them."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.commands.generate_settings import PromptOptions, by_option
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.sources import open_source
from deepseek_jax.distributed import on_main
from deepseek_jax.generation.engine import CLOSING
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.slots import params_of
from deepseek_jax.generation.text import Messages, encode_prompt
from deepseek_jax.generation.thinking import think_tags
from deepseek_jax.text.tokenizer import Tokenizer

T = TypeVar("T")


def read(asked: PromptOptions) -> list[str | Messages]:
    """The prompts that are asked for.

    Raises:
        ValueError: no such file, no prompts in it, or a row without one.
    """
    if asked.prompt is not None:
        return [on_main(sys.stdin.read).removesuffix("\n") if asked.prompt == "-" else asked.prompt]
    prompts = asked.prompts
    if prompts.suffix == ".txt" and prompts.is_file():
        try:
            lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as problem:
            raise ValueError(f"{prompts}: got no UTF-8 text ({problem}); save it as such") from None
        if not lines:
            raise ValueError(f"{prompts}: got no line with a prompt, wanted at least one")
        return lines
    rows = open_source(str(prompts))
    return [_of_row(rows[number], rows.where(number)) for number in range(len(rows))]


def _of_row(row: dict, where: str) -> str | Messages:
    found = row.get("messages", row.get("prompt"))
    if not isinstance(found, str | list):
        raise ValueError(f'{where}: got {sorted(row)}, wanted "prompt", a text, or "messages", a conversation')
    return found


def how(asked: PromptOptions) -> dict[str, Any]:
    """The arguments of `encode_prompt` beside tokenizer and prompt."""
    return {"system": asked.system, "chat": asked.chat, "thinking": asked.thinking}


def encoded(tokenizer: Tokenizer, prompts: Sequence[str | Messages], asked: PromptOptions) -> list[list[int]]:
    """The prompts' tokens."""
    encode = partial(encode_prompt, tokenizer, **how(asked))
    return [_numbered(number, len(prompts), lambda each=each: encode(each)) for number, each in enumerate(prompts)]


def probe(tokenizer: Tokenizer, asked: PromptOptions) -> list[list[int]]:
    """A turn of a conversation, to see that there can be one."""
    return [encode_prompt(tokenizer, "1", **how(asked))]


def check(
    folder: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    asked: Sequence[Sequence[int]],
    sampling: SamplingConfig,
) -> None:
    """Refuse what the model cannot read or draw, before it is loaded."""
    context, size = model.max_position_embeddings, model.vocab_size
    for number, tokens in enumerate(asked):
        if not tokens:
            raise ValueError(f"prompt {number}: got no token, wanted at least one")
        _numbered(number, len(asked), lambda tokens=tokens: sampling.limit(len(tokens), context))
        if max(tokens) >= size:
            raise ValueError(
                f"{folder}: the tokenizer gives the prompt the id {max(tokens)}, wanted ids below the model's "
                f"vocab_size {size}; take both from the same checkpoint"
            )
    params_of(sampling, seed=0, limit=1, vocab_size=size)
    if sampling.thinking_budget is not None:
        think_tags(tokenizer, CLOSING)


def _numbered(number: int, count: int, call: Callable[[], T]) -> T:
    """What `call` returns; of several prompts, what is wrong with one is said with its number."""
    try:
        return call()
    except ValueError as problem:
        text = by_option(str(problem))
        raise ValueError(f"prompt {number}: {text.removeprefix('prompt: ')}" if count > 1 else text) from None
