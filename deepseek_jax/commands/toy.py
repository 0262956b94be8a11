"""The toy task of the train command: a small model made from nothing, chains of arithmetic, and the numbers of both."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.data.arithmetic import Chain, draw_chains, trace
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """Chains of arithmetic, where no data is given, and the cold start of a model made from nothing.

    Args:
        terms: numbers in a generated question.
        largest: largest number in a generated question.
        operators: of generated questions, read from left to right: "+", "*" or "+*".
        modulus: generated questions keep remainders only; None keeps whole numbers.
        train_questions: generated questions to train on.
        cold_start_examples: answers that a small model imitates before GRPO.
        cold_start_worked: share of them whose thoughts go step by step; the others only guess.
        cold_start_epochs: passes over them.
        cold_start_batch: examples an update.
        cold_start_lr: peak learning rate of the cold start.
    """

    terms: int = 4
    largest: int = 9
    operators: str = "+"
    modulus: int | None = 10
    train_questions: int = 4_000
    cold_start_examples: int = 1_500
    cold_start_worked: float = 0.4
    cold_start_epochs: int = 12
    cold_start_batch: int = 32
    cold_start_lr: float = 2e-3

    def chains(self, eval_questions: int, seed: int) -> list[Chain]:
        """The held-out questions, then those to train on."""
        return draw_chains(
            self.train_questions + eval_questions,
            terms=self.terms,
            largest=self.largest,
            operators=self.operators,
            modulus=self.modulus,
            seed=seed,
        )

    def worked(self, chains: Sequence[Chain], seed: int) -> list[tuple[Chain, str]]:
        """The first chains with the answers that a small model imitates, without their end."""
        shown = chains[: self.cold_start_examples]
        worked = np.random.default_rng(seed).random(len(shown)) < self.cold_start_worked
        return [(chain, trace(chain, worked=w)) for chain, w in zip(shown, worked, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ToyPreset:
    """What a model made from nothing wants otherwise than the papers, by the names of the options: half a million
    parameters learn at a rate, from groups and in completions of their own size, and sums need no computer algebra."""

    steps: int = 60
    prompts_per_step: int = 16
    max_new_tokens: int = 48
    lr: float = 2e-4
    accuracy: str = "exact"
    weight_format: float = 0.3


TOY: dict[str, Any] = dataclasses.asdict(ToyPreset())
QUICK: dict[str, Any] = {"cold_start_epochs": 4, "eval_questions": 64, "steps": 8, "eval_every": 4, "save_every": 4}
"""What `--quick` changes, by the names of the options."""


def small_config(tokenizer: Tokenizer, mtp_modules: int = 0) -> ModelConfig:
    """The preset `tiny` with the task's vocabulary, and so many modules for multi-token prediction."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0]}
    rows = -(-tokenizer.vocab_size // 32) * 32
    return dataclasses.replace(preset("tiny"), vocab_size=rows, num_nextn_predict_layers=mtp_modules, **ids)


def small_model(tokenizer: Tokenizer, seed: int, mtp_modules: int = 0) -> Model:
    """A model of it, from random weights."""
    architecture = small_config(tokenizer, mtp_modules)
    graphdef, weights = split(Decoder(architecture, rngs=nnx.Rngs(seed)))
    return Model(architecture, graphdef, weights)
