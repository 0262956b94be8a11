"""Generation from text to text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from deepseek_jax.generation.engine import NO_RECORD, Generator, Record, SamplingConfig
from deepseek_jax.text.tokenizer import Tokenizer


class TextCompletion(NamedTuple):
    """A completion as text (special tokens left out) beside what `generation.engine.Completion` says of it."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    routes: np.ndarray | None = None
    support: np.ndarray | None = None
    penalised: np.ndarray | None = None


def complete(
    generator: Generator,
    weights: nnx.State,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int],
    samples: int = 1,
    record: Record = NO_RECORD,
) -> list[TextCompletion]:
    """Complete tokenised prompts and decode what comes. Arguments and errors as for `Generator.__call__`."""
    found = generator(weights, prompts, sampling, seeds=seeds, samples=samples, record=record)
    return [TextCompletion(tokenizer.decode(c.tokens.tolist()), *c) for c in found]


def seeds_for(*key: int, count: int) -> list[int]:
    """`count` independent seeds that are a function of the key: (run seed, step, prompt), say."""
    return np.random.SeedSequence(key).generate_state(count).tolist()
