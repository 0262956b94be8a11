"""The protocol of reward functions, and their weighted sum."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol

_LOG = logging.getLogger(__name__)
_LOGGED_CHARS = 500


class RewardFunction(Protocol):
    """Scores completions, one value a row; None means that the function does not apply to the row.

    Source: huggingface/trl, `GRPOTrainer` (`reward_funcs`).
    Differs: prompts and completions are plain strings, never lists of messages.
    """

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]: ...


class RewardError(RuntimeError):
    """A reward function raised; the message names the function and the row, the cause is what it raised."""


class _Scored(NamedTuple):
    """A function's scores, and the rows for which it raised; those have None too."""

    scores: list[float | None]
    raised: frozenset[int]


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
      on_error: what becomes of a row for which a function raises: "raise" ends the run, "none" makes that score None
        and the row's total NaN.
    """

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    on_error: Literal["raise", "none"] = "raise"

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
          unweighted scores by its name, None where it does not apply or raised. A total is NaN, not known, where a
          function raised that has a weight, or that was the only one to apply.

        Raises:
          ValueError: an argument or a function's result has the wrong number of rows, a score is not a finite
            number or None, or no function applies to a row.
          RewardError: a function raised, and on_error is "raise".
        """
        found = self._all(prompts, completions, completion_ids, columns)
        totals = [self._total(row, found) for row in range(len(completions))]
        return totals, {name: scored.scores for name, scored in found.items()}

    def parts(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> dict[str, list[float | None]]:
        """Scores the rows with every function, without the sum: rows to which none applies are no mistake here.

        Args:
          prompts, completions, completion_ids, **columns: as for the call.

        Returns:
          Each function's unweighted scores by its name, None where it does not apply or raised.

        Raises:
          ValueError: as for the call, but for rows to which no function applies.
          RewardError: a function raised, and on_error is "raise".
        """
        found = self._all(prompts, completions, completion_ids, columns)
        return {name: scored.scores for name, scored in found.items()}

    def _all(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: Mapping[str, Any],
    ) -> dict[str, _Scored]:
        check_strings("rewards", prompts, completions)
        for name, column in {"completion_ids": completion_ids, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(
                    f"rewards: {name}: got {len(column)} rows, wanted {len(completions)}, one a completion;"
                    " repeat the column as the prompts are"
                )
        return {
            name: self._scores(name, function, prompts, completions, completion_ids, columns)
            for name, function in self.functions.items()
        }

    def _scores(
        self,
        name: str,
        function: RewardFunction,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: Mapping[str, Any],
    ) -> _Scored:
        try:
            scores = function(prompts, completions, completion_ids, **columns)
        except Exception as error:
            _LOG.error("reward function %r raised %r for a batch of %d rows", name, error, len(completions))
            # Row by row, so that the one at fault is named and the others keep their scores.
            rows = [
                self._score(name, function, row, (prompts, completions, completion_ids), columns)
                for row in range(len(completions))
            ]
            if self.on_error == "raise":
                raise RewardError(
                    f"reward function {name!r}: raised {type(error).__name__}: {error}, for the batch of"
                    f" {len(completions)} rows though for none of them alone; make it independent of the batch"
                ) from error
            scores = [score for scored in rows for score in scored.scores]
            return _Scored(scores, frozenset(row for row, scored in enumerate(rows) if scored.raised))
        return _Scored(_checked(name, scores, len(completions)), frozenset())

    def _score(
        self,
        name: str,
        function: RewardFunction,
        row: int,
        arguments: tuple[Sequence[Any], ...],
        columns: Mapping[str, Any],
    ) -> _Scored:
        """The function's word on this row alone."""
        prompts, completions, ids = ([argument[row]] for argument in arguments)
        try:
            scores = function(prompts, completions, ids, **{key: [column[row]] for key, column in columns.items()})
        except Exception as error:
            _LOG.error(
                "reward function %r raised %r\nprompt: %s\ncompletion: %s",
                name,
                error,
                _cut(prompts[0]),
                _cut(completions[0]),
            )
            if self.on_error == "none":
                return _Scored([None], frozenset([0]))
            raise RewardError(
                f"reward function {name!r}: row {row}: raised {type(error).__name__}: {error};"
                " see the log for the sample, mend the function, or count such rows as None with on_error='none'"
            ) from error
        return _Scored(_checked(name, scores, 1), frozenset())

    def _total(self, row: int, found: Mapping[str, _Scored]) -> float:
        applying = {name: scored.scores[row] for name, scored in found.items() if scored.scores[row] is not None}
        raised = [name for name, scored in found.items() if row in scored.raised]
        if raised and (not applying or any(self.weights[name] for name in raised)):
            return math.nan
        if not applying:
            raise ValueError(
                f"rewards: row {row}: got None from every function ({', '.join(found)}), wanted a score"
                " from one at least; add a function that applies to every row, or leave the row out"
            )
        return math.fsum(self.weights[name] * score for name, score in applying.items())


def combine(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float],
    *,
    on_error: Literal["raise", "none"] = "raise",
) -> CombinedReward:
    """Makes one reward of several.

    Args:
      functions: reward functions by the names under which their parts are reported.
      weights: a finite weight for each of the same names; 0 reports a part that does not count.
      on_error: a function that raises is called again row by row, and the rows at fault are logged with their prompt,
        their completion and the exception. "raise" then ends the run with a RewardError. "none" makes those scores
        None and, where the function has a weight, the rows' totals NaN, which whoever uses them must leave out: what
        is not known is not 0, an error is not a wrong answer.

    Returns:
      A callable with the functions' signature that returns (total, parts).

    Raises:
      ValueError: no functions, names that differ, a weight that is not a finite number, or an unknown on_error.

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
    if on_error not in ("raise", "none"):
        raise ValueError(f"combine: on_error: got {on_error!r}, wanted 'raise' or 'none'; choose one")
    return CombinedReward(functions=dict(functions), weights=dict(weights), on_error=on_error)


def _cut(text: str) -> str:
    """The text's two ends, as a Python literal: a sample must not forge lines of the log."""
    if len(text) <= _LOGGED_CHARS:
        return repr(text)
    half = _LOGGED_CHARS // 2
    return f"{text[:half]!r} ... {len(text) - 2 * half} characters ... {text[-half:]!r}"


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
