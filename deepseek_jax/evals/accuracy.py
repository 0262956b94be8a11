"""Greedy accuracy on questions with known answers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from deepseek_jax import processes
from deepseek_jax.generate.engine import Generator, SamplingConfig
from deepseek_jax.generate.text import TextCompletion, complete
from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.combine import RewardFunction
from deepseek_jax.rl.rollout import Prompt
from deepseek_jax.text.tokenizer import Tokenizer


class Accuracy(NamedTuple):
    """Share of right answers, its standard error, and each completion with its score."""

    mean: float
    stderr: float
    completions: list[TextCompletion]
    scores: list[float]


def greedy_accuracy(
    generator: Generator,
    weights: nnx.State,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    grade: RewardFunction = accuracy_reward,
    batch: int = 128,
) -> Accuracy:
    """Answer every prompt at temperature 0 and grade the final answers.

    Args:
        prompts: with an `answer` column, or what `grade` wants.
        grade: 1 for a right answer, 0 for a wrong one. In several processes the main one grades.
        batch: prompts at a time.
    """
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=stop_ids)
    found: list[TextCompletion] = []
    for start in range(0, len(prompts), batch):
        part = [p.tokens for p in prompts[start : start + batch]]
        found += complete(generator, weights, tokenizer, part, sampling, seeds=[0] * len(part))
    scores = processes.on_main(
        lambda: grade(
            prompts=[p.text for p in prompts],
            completions=[c.text for c in found],
            completion_ids=[c.tokens.tolist() for c in found],
            **{name: [p.columns[name] for p in prompts] for name in prompts[0].columns},
        )
    )
    mean = sum(scores) / len(scores)
    return Accuracy(mean, math.sqrt(mean * (1 - mean) / len(scores)), found, scores)
