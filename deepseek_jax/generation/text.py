"""Generation from text to text."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.sharding import LOCAL, Layout
from deepseek_jax.text.think import opens_thought, split_thinking
from deepseek_jax.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
R1_SAMPLING = SamplingConfig(max_new_tokens=256, temperature=0.6, top_p=0.95)


def generate(
    model: str | Path | Model,
    prompts: str | Sequence[str | Messages],
    *,
    sampling: SamplingConfig = R1_SAMPLING,
    samples: int = 1,
    seed: int = 0,
    system: str | None = None,
    chat: bool = True,
    tokenizer: Tokenizer | None = None,
    dtype: Precision = "auto",
    layout: Layout = LOCAL,
    quantization: Quantization = "none",
) -> list[Completion]:
    """Complete prompts with a model, all in one batch. `Generator` is for more than that.

    Args:
        model: a folder, a name on the hub, or a model in memory, whose tokenizer is then given.
        prompts: the users' texts, or whole conversations of {"role", "content"}.
        sampling: how to draw; without stop_ids a completion ends with the tokenizer's end of a sequence.
        samples: completions a prompt.
        seed: of the first completion; the others have the numbers after it.
        system: what a conversation begins with.
        chat: put prompts into the model's chat template; base models, which have none, want False.
        tokenizer: of a model in memory.
        dtype: of weights, activations and cache, for a model that is loaded here.
        layout: how a model lies on devices that is loaded here.
        quantization: of a model that is loaded here, as of `load_model`.

    Returns:
        P x samples completions, prompt by prompt.

    Raises:
        ValueError: no such model, no prompts, or prompts that the model or its template does not take.
    """
    if not isinstance(model, Model):
        folder = model_folder(model)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        model = load_model(folder, dtype=dtype_of(dtype), layout=layout, quantization=quantization)
    if tokenizer is None:
        raise ValueError("tokenizer: got none beside a model in memory, wanted its own: Tokenizer.from_folder(folder)")
    given = [prompts] if isinstance(prompts, str) else prompts
    tokens = [encode_prompt(tokenizer, prompt, system=system, chat=chat) for prompt in given]
    sampling = sampling if sampling.stop_ids else dataclasses.replace(sampling, stop_ids=tokenizer.eos_ids)
    generator = _generator(model.config, model.graphdef)
    seeds = range(seed, seed + len(tokens) * samples)
    return generator(model.weights, tokens, sampling, seeds=seeds, samples=samples, tokenizer=tokenizer)


@lru_cache(maxsize=2)
def _generator(config: ModelConfig, graphdef: nnx.GraphDef) -> Generator:
    """What a generator has compiled is kept for the next call."""
    return Generator(config, graphdef)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Messages,
    *,
    system: str | None = None,
    chat: bool = True,
    thinking: bool | None = None,
) -> list[int]:
    """A prompt's tokens.

    Args:
        tokenizer: the model's.
        prompt: text, or a conversation.
        system: what a conversation begins with.
        chat: a text is the user's turn of a conversation; else it is what the model goes on with.
        thinking: the template's switch of that name; None leaves it to the template.

    Raises:
        ValueError: a conversation, a system's text or the switch without `chat`; two texts of the system; or what
            `Tokenizer.chat` refuses.
    """
    if not chat:
        given = {"a conversation": not isinstance(prompt, str), "system": system is not None}
        for what, got in (given | {"thinking": thinking is not None}).items():
            if got:
                raise ValueError(
                    f"{what}: got it with --no-chat, wanted a chat, whose template it is for; leave one out"
                )
        return tokenizer.encode(prompt, add_bos=True)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        if any(isinstance(turn, Mapping) and turn.get("role") == "system" for turn in messages):
            raise ValueError("system: got it beside a conversation with a system's turn, wanted one; leave one out")
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.chat(messages, **({} if thinking is None else {"thinking": thinking}))


def thinking_and_answer(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> tuple[str, str]:
    """A completion of a prompt told apart; the prompt may have opened the thought, as R1's template does."""
    return split_thinking(text, opened=opens_thought(tokenizer.decode(prompt[-16:], skip_special=False)))


def seeds_for(*key: int, count: int) -> list[int]:
    """`count` independent seeds that are a function of the key: (run seed, step, prompt), say."""
    return np.random.SeedSequence(key).generate_state(count).tolist()
