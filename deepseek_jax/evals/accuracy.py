"""Greedy accuracy on questions with known answers."""

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.data.examples import Prompt
from deepseek_jax.evals.measures import clustered
from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.combine import CombinedReward, combine
from deepseek_jax.text.tokenizer import Tokenizer

_EXACT = combine({"accuracy": accuracy_reward}, {"accuracy": 1.0})


class Accuracy(NamedTuple):
    """Share of right answers among those graded, its standard error, each completion with its score, and how many were
    graded: those whose score is not None."""

    mean: float
    stderr: float
    completions: list[Completion]
    scores: list[float | None]
    graded: int


def greedy_accuracy(
    generator: Generator,
    weights: nnx.State,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    grade: CombinedReward = _EXACT,
    batch: int = 128,
) -> Accuracy:
    """Answer every prompt at temperature 0 and grade the final answers.

    Args:
        prompts: with an `answer` column, or what `grade` wants.
        grade: its part "accuracy" is 1 for a right answer, 0 for a wrong one, and None for what is left out: a prompt
            to which it does not apply, or for which it raised under on_error="none". In several processes the main one
            grades.
        batch: prompts at a time.

    Raises:
        ValueError: no prompts, a `grade` without that part, or no answer that could be graded.
        RewardError: it raised, under on_error="raise".
    """
    if not prompts:
        raise ValueError("greedy_accuracy: prompts: got none, wanted at least one; hold some questions out")
    if "accuracy" not in grade.functions:
        raise ValueError(f"greedy_accuracy: grade: got {', '.join(grade.functions)}, wanted 'accuracy'; name it so")
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=stop_ids)
    found: list[Completion] = []
    for start in range(0, len(prompts), batch):
        part = [p.tokens for p in prompts[start : start + batch]]
        found += generator(weights, part, sampling, seeds=[0] * len(part), tokenizer=tokenizer)
    scores = distributed.on_main(
        lambda: grade.graded(
            prompts=[p.text for p in prompts],
            completions=[c.text for c in found],
            completion_ids=[c.tokens.tolist() for c in found],
            **{name: [p.columns[name] for p in prompts] for name in prompts[0].columns},
        ).parts["accuracy"]
    )
    mean = clustered([[score] for score in scores])
    if mean is None:
        raise ValueError(
            f"greedy_accuracy: got None for all {len(scores)} answers, wanted a score for one at least;"
            " see the log for rewards that raised, or give prompts with right answers"
        )
    return Accuracy(mean.mean, mean.stderr, found, scores, mean.n)
