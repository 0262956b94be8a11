"""The protocol of reward functions, and their weighted sum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol


class RewardFunction(Protocol):
    """Scores completions, one value a row; None means that the function does not apply to the row.

    Source: huggingface/trl, `GRPOTrainer` (`reward_funcs`).
    Differs: prompts and completions are plain strings, never lists of messages.
    """

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]: ...


def check_strings(name: str, prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Refuses rows that are not pairs of strings.

    Args:
      name: the reward function's name, for the message.
      prompts: one a row, as text.
      completions: one a row, as text.

    Raises:
      ValueError: the lengths differ, or a row is not a string.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"{name}: got {len(prompts)} prompts and {len(completions)} completions, wanted as many of each;"
            " repeat a prompt for each of its completions"
        )
    for kind, texts in (("prompts", prompts), ("completions", completions)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"{name}: {kind}[{row}]: got {type(text).__name__}, wanted a string;"
                    " pass rendered text, not lists of messages"
                )


@dataclass(frozen=True, kw_only=True)
class CombinedReward:
    """A weighted sum of reward functions; `combine` makes it.

    Args:
      functions: reward functions by name.
      weights: one finite weight for each name.
    """

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> tuple[list[float], dict[str, list[float | None]]]:
        """Scores the rows with every function.

        Args:
          prompts: one a row.
          completions: one a row.
          completion_ids: token ids, one list a row.
          **columns: the data set's other columns, one value a row each.

        Returns:
          (total, parts): the weighted sum over the functions that apply to each row, and each function's own
          unweighted scores by its name.

        Raises:
          ValueError: an argument or a function's result has the wrong number of rows, a score is not a finite
            number or None, or no function applies to a row.
        """
        check_strings("rewards", prompts, completions)
        for name, column in {"completion_ids": completion_ids, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(
                    f"rewards: {name}: got {len(column)} rows, wanted {len(completions)}, one a completion;"
                    " repeat the column as the prompts are"
                )
        parts = {
            name: _checked(name, function(prompts, completions, completion_ids, **columns), len(completions))
            for name, function in self.functions.items()
        }
        return [self._total(row, parts) for row in range(len(completions))], parts

    def _total(self, row: int, parts: Mapping[str, list[float | None]]) -> float:
        applying = {name: scores[row] for name, scores in parts.items() if scores[row] is not None}
        if not applying:
            raise ValueError(
                f"rewards: row {row}: got None from every function ({', '.join(parts)}), wanted a score"
                " from one at least; add a function that applies to every row, or leave the row out"
            )
        return math.fsum(self.weights[name] * score for name, score in applying.items())


def combine(functions: dict[str, RewardFunction], weights: dict[str, float]) -> CombinedReward:
    """Makes one reward of several.

    Args:
      functions: reward functions by the names under which their parts are reported.
      weights: a finite weight for each of the same names.

    Returns:
      A callable with the functions' signature that returns (total, parts).

    Raises:
      ValueError: no functions, names that differ, or a weight that is not a finite number.

    Source: huggingface/trl, `GRPOTrainer` (`reward_weights`).
    Differs: TRL warns when no function applies to a row; this refuses, since the advantage would be
      undefined.
    """
    if not functions or set(functions) != set(weights):
        raise ValueError(
            f"combine: got functions {sorted(functions)} and weights {sorted(weights)}, wanted the same"
            " names, one at least; give every function its weight"
        )
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"combine: weights[{name!r}]: got {weight!r}, wanted a finite number; correct it")
    return CombinedReward(functions=dict(functions), weights=dict(weights))


def _checked(name: str, scores: list[float | None], rows: int) -> list[float | None]:
    """The function's scores as floats, or an error that names it."""
    if not isinstance(scores, list | tuple) or len(scores) != rows:
        got = f"{len(scores)} scores" if isinstance(scores, list | tuple) else type(scores).__name__
        raise ValueError(
            f"reward function {name!r}: got {got}, wanted a list of {rows}, one a completion; return None"
            " for rows to which it does not apply"
        )
    for row, score in enumerate(scores):
        if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
            raise ValueError(
                f"reward function {name!r}: row {row}: got {score!r}, wanted a finite number or None; correct it"
            )
    return [None if score is None else float(score) for score in scores]
