"""The rewards of a run by their weights, and what they need open while it lasts."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.choice import choice_reward
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.combine import CombinedReward, RewardFunction, combine
from deepseek_jax.rewards.format import format_reward, soft_format_reward
from deepseek_jax.rewards.language import language_reward
from deepseek_jax.rewards.lengths import length_penalty, repetition_penalty_reward
from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.rewards.structure import structure_reward


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which rewards count, and how much. A weight of 0 leaves a reward out.

    Args:
        accuracy: how answers are compared: "exact" as numbers and text, "math" by computer algebra as well, in
            processes that can be killed, "choice" as letters of multiple choice, "code" by running the program against
            the hidden tests of the column `tests`.
        weight_accuracy: of the right answer.
        weight_format: of the exact <think>/<answer> format.
        weight_soft_format: of its cosine form, which rewards parts of it (the design documents: 0.3).
        weight_language: of the share of the thought's words in `language` (the design documents: 0.2).
        language: two letters.
        weight_structure: of the reasoning-structure score, which can be gamed (R1: 0).
        weight_repetition: of the penalty for repeated words, from -1 to 0.
        weight_overlong: of DAPO's penalty for the last `overlong_cache` tokens before the limit, from -1 to 0.
        overlong_cache: tokens over which that penalty grows.
        reward_error: a reward that raises is logged with its sample and ends the run ("raise"), or does not count for
            that sample ("none"); it is never 0.
        allow_unsandboxed: run programs of the model even where they cannot be isolated. Do not.
    """

    accuracy: Literal["exact", "math", "choice", "code"] = "exact"
    weight_accuracy: float = 1.0
    weight_format: float = 0.3
    weight_soft_format: float = 0.0
    weight_language: float = 0.0
    language: str = "en"
    weight_structure: float = 0.0
    weight_repetition: float = 0.0
    weight_overlong: float = 0.0
    overlong_cache: int = 0
    reward_error: Literal["raise", "none"] = "raise"
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if name.startswith("weight_") and not math.isfinite(weight):
                raise ValueError(f"{name}: got {weight}, wanted a finite number")
        if self.weight_overlong and self.overlong_cache < 1:
            raise ValueError(f"overlong_cache: got {self.overlong_cache}, wanted at least 1 token for weight_overlong")


class Rewards(NamedTuple):
    """A run's rewards.

    total: the weighted sum. accuracy: that part of it by itself, for evaluations. take_metrics: what graders counted
    since it was last called, by the names of dashboards.
    """

    total: CombinedReward
    accuracy: RewardFunction
    take_metrics: Callable[[], dict[str, float]]


@contextmanager
def rewards(config: RewardConfig, *, max_new_tokens: int) -> Iterator[Rewards]:
    """The rewards that have a weight, summed up; graders' processes end with the block.

    Args:
        config: which.
        max_new_tokens: the sampler's limit, which the penalty for overlong answers leads up to.

    Raises:
        ValueError: no reward has a weight, an unknown language, or a cache that is longer than the limit.
    """
    with MathGrader() as grader:  # starts no process before the first answer that needs one
        functions: dict[str, RewardFunction] = {}
        accuracy = _accuracy(config, grader)
        if config.weight_accuracy:
            functions["accuracy"] = accuracy
        if config.weight_format:
            functions["format"] = format_reward
        if config.weight_soft_format:
            functions["soft_format"] = soft_format_reward
        if config.weight_language:
            functions["language"] = language_reward(language=config.language)
        if config.weight_structure:
            functions["structure"] = structure_reward
        if config.weight_repetition:
            functions["repetition"] = repetition_penalty_reward()
        if config.weight_overlong:
            functions["overlong"] = length_penalty(max_length=max_new_tokens, cache=config.overlong_cache)
        if not functions:
            raise ValueError("weight_accuracy: got 0, and no other reward has a weight; wanted one at least")
        weights = {name: vars(config)[f"weight_{name}"] for name in functions}
        take_metrics = grader.take_metrics if config.accuracy == "math" else dict
        yield Rewards(combine(functions, weights, on_error=config.reward_error), accuracy, take_metrics)


def _accuracy(config: RewardConfig, grader: MathGrader) -> RewardFunction:
    if config.accuracy == "math":
        return math_reward(grader)
    if config.accuracy == "choice":
        return choice_reward()
    if config.accuracy == "code":
        return CodeReward(allow_unsandboxed=config.allow_unsandboxed)
    return accuracy_reward
