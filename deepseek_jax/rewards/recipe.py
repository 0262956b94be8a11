"""The rewards of a run by their weights, and what they need open while it lasts."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from deepseek_jax import distributed
from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.choice import check_choice, choice_reward
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.combine import CombinedReward, combine
from deepseek_jax.rewards.format import boxed_format_reward, format_reward, soft_format_reward
from deepseek_jax.rewards.language import language_reward
from deepseek_jax.rewards.lengths import length_penalty, repetition_penalty_reward
from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.rewards.own import own_rewards
from deepseek_jax.rewards.protocol import RewardFunction, check_answers
from deepseek_jax.rewards.sandbox import available
from deepseek_jax.rewards.structure import structure_reward
from deepseek_jax.rewards.tests_column import parse_tests


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which rewards count, and how much. A weight of 0 leaves a reward out.

    Args:
        accuracy: how answers are compared: "exact" as numbers and text, "math" by computer algebra as well, in
            processes that can be killed, "choice" as letters of multiple choice, "code" by running the program against
            the hidden tests of the column `tests`, "task" as the benchmark that a row is of does (`--tasks`).
        percent: for "math": 10% is a tenth and never ten ("strict"), or right beside 10 as well ("either"), as for
            published benchmarks.
        tolerance: for "code": by how much a printed decimal fraction may miss the wanted one, absolutely or in
            proportion; 0 compares exactly.
        reference_column: for "code": a column with right programs. A row whose own program fails its tests is an error
            of the row and no model's.
        choices: letters of the options, in order, for "choice".
        format: which form of a completion is rewarded: "tags" is R1-Zero's, a thought and an answer in tags; "boxed" a
            thought, where one is opened, closed before the answer, and the answer in \\boxed{}.
        weight_accuracy: weight of the reward for the right answer.
        weight_format: weight of the reward for that form (R1-Zero: as of the right answer).
        weight_soft_format: of its cosine form, which rewards parts of it (the design documents: 0.3).
        weight_language: of the share of the thought's words in `language` (the design documents: 0.2).
        language: two letters, or "row" for those of each row's column `language`.
        weight_structure: of the reasoning-structure score, which can be gamed (R1: 0).
        weight_repetition: of the penalty for repeated words, from -1 to 0.
        weight_overlong: of DAPO's penalty for the last `overlong_cache` tokens before the limit, from -1 to 0.
        overlong_cache: tokens over which that penalty grows.
        reward: one's own function as FILE.py:function, or FILE.py:function:weight; it is called as the others are,
            f(prompts, completions, completion_ids, **columns), and returns a list of numbers, or None where it does not
            apply.
        reward_error: a reward that raises is logged with its sample and ends the run ("raise"), or leaves that
            sample's weighted sum unknown, NaN ("none"); neither it nor the sum is ever 0 for that.
        allow_unsandboxed: run programs of the model even where they cannot be isolated. Do not.
    """

    accuracy: Literal["exact", "math", "choice", "code", "task"] = "math"
    percent: Literal["strict", "either"] = "strict"
    tolerance: float = 1e-6
    reference_column: str | None = None
    choices: str = "ABCDE"
    format: Literal["tags", "boxed"] = "tags"
    weight_accuracy: float = 1.0
    weight_format: float = 1.0
    weight_soft_format: float = 0.0
    weight_language: float = 0.0
    language: str = "en"
    weight_structure: float = 0.0
    weight_repetition: float = 0.0
    weight_overlong: float = 0.0
    overlong_cache: int = 0
    reward: tuple[str, ...] = ()
    reward_error: Literal["raise", "none"] = "raise"
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if name.startswith("weight_") and not math.isfinite(weight):
                raise ValueError(f"{name}: got {weight}, wanted a finite number")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance: got {self.tolerance}, wanted a finite number, 0 or more")
        if self.reference_column is not None and self.accuracy != "code":
            raise ValueError(
                f"reference_column: got {self.reference_column!r} with accuracy {self.accuracy!r}, wanted it with "
                "--accuracy code alone; leave it out"
            )
        if self.weight_overlong and self.overlong_cache < 1:
            raise ValueError(f"overlong_cache: got {self.overlong_cache}, wanted at least 1 token for weight_overlong")


class Rewards(NamedTuple):
    """A run's rewards.

    total: the weighted sum. accuracy: that part of it by itself, for evaluations, whose answers `take_metrics` does not
    count. take_metrics: what graders counted since it was last called, by the names of dashboards.
    """

    total: CombinedReward
    accuracy: CombinedReward
    take_metrics: Callable[[], dict[str, float]]


@contextmanager
def rewards(config: RewardConfig, *, max_new_tokens: int, by_task: RewardFunction | None = None) -> Iterator[Rewards]:
    """The rewards that have a weight, summed up; graders' processes end with the block. All processes call it alike.

    Args:
        config: which.
        max_new_tokens: the sampler's limit, which the penalty for overlong answers leads up to.
        by_task: the accuracy "task", `evals.rewarding.task_reward`.

    Raises:
        ValueError: no reward has a weight, an unknown language, a cache that is longer than the limit, choices that are
            not different letters, a file of one's own that has not its function, or programs to run where they cannot
            be isolated, without leave.
    """
    if config.accuracy == "code" and not config.allow_unsandboxed:
        reason = distributed.on_main(available)
        if reason is not None:
            raise ValueError(f"accuracy: got 'code', but {reason}; or run programs unprotected: --allow-unsandboxed")
    if config.accuracy == "task" and by_task is None:
        raise ValueError("accuracy: got 'task' without by_task, wanted the benchmarks' reward function")
    with MathGrader(percent=config.percent) as grader:  # starts no process before the first answer that needs one
        functions: dict[str, RewardFunction] = {}
        if config.weight_accuracy:
            functions["accuracy"] = _accuracy(config, grader, by_task, counted=True)
        if config.weight_format:
            functions["format"] = boxed_format_reward if config.format == "boxed" else format_reward
        if config.weight_soft_format:
            functions["soft_format"] = soft_format_reward
        if config.weight_language:
            functions["language"] = language_reward(language=None if config.language == "row" else config.language)
        if config.weight_structure:
            functions["structure"] = structure_reward
        if config.weight_repetition:
            functions["repetition"] = repetition_penalty_reward()
        if config.weight_overlong:
            functions["overlong"] = length_penalty(max_length=max_new_tokens, cache=config.overlong_cache)
        own = {reward.function: reward for reward in own_rewards(config.reward)}
        weights = {name: vars(config)[f"weight_{name}"] for name in functions}
        if taken := sorted(own.keys() & weights.keys()):
            raise ValueError(f"{taken[0]}: got a function of that name, which a reward of the recipe has; rename it")
        functions |= {name: reward.load() for name, reward in own.items()}
        weights |= {name: reward.weight for name, reward in own.items()}
        if not functions:
            raise ValueError("weight_accuracy: got 0, and no other reward has a weight; wanted one at least")
        take_metrics = grader.take_metrics if config.accuracy == "math" else dict
        alone = combine(
            {"accuracy": _accuracy(config, grader, by_task, counted=False)},
            {"accuracy": 1.0},
            on_error=config.reward_error,
        )
        yield Rewards(combine(functions, weights, on_error=config.reward_error), alone, take_metrics)


def check_columns(config: RewardConfig, columns: Mapping[str, object]) -> None:
    """Refuses an example that the accuracy could not grade, before a run comes to it. Runs nothing.

    Args:
        config: which accuracy, and whether another reward has a weight.
        columns: one row's, by name.

    Raises:
        ValueError: the column `answer` (for "code": `tests`) is missing or is not what the accuracy reads, or there is
            nothing in it and no other reward has a weight.
    """
    if config.accuracy == "task":
        return  # a Task has read the row
    name = "tests" if config.accuracy == "code" else "answer"
    if name not in columns:
        raise ValueError(
            f"{name}: got columns {', '.join(columns) or 'none'}, wanted {name!r} for --accuracy {config.accuracy}; "
            f"say which column holds it by --{name}-column, or choose another --accuracy"
        )
    if config.reference_column is not None and config.reference_column not in columns:
        raise ValueError(
            f"reference_column: got {config.reference_column!r}, wanted one of {', '.join(columns)}; name the column "
            "of right programs by --reference-column, or leave it out"
        )
    wanted = columns[name]
    if config.accuracy == "code":
        wanted = parse_tests(wanted)
    else:
        check_answers("accuracy", [wanted], 1)
    if config.accuracy == "choice" and wanted is not None:
        check_choice(wanted, columns.get("choices"), letters=config.choices)
    others = (weight for key, weight in vars(config).items() if key.startswith("weight_") and key != "weight_accuracy")
    if wanted is None and not any(others) and not config.reward:
        raise ValueError(f"{name}: got none, wanted some where accuracy is the only reward; leave the row out")


def _accuracy(
    config: RewardConfig, grader: MathGrader, by_task: RewardFunction | None, *, counted: bool
) -> RewardFunction:
    if config.accuracy == "task" and by_task is not None:
        return by_task
    if config.accuracy == "math":
        return math_reward(grader, counted=counted)
    if config.accuracy == "choice":
        return choice_reward(letters=config.choices)
    if config.accuracy == "code":
        return CodeReward(
            tolerance=config.tolerance,
            reference=config.reference_column,
            allow_unsandboxed=config.allow_unsandboxed,
        )
    return accuracy_reward
