"""The weighted sum of reward functions."""

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deepseek_jax.rewards.protocol import RewardFunction, RowsFailed, check_strings

_LOG = logging.getLogger(__name__)
_LOGGED_CHARS = 500


class RewardError(ValueError):
    """A reward function raised; the message names the function and the row, the cause is what it raised."""


_Rows = Mapping[str, Sequence[Any]]
_LOGGERS = ("log_extra", "log_metric")


class _Logged:
    """What functions logged in one call over so many rows."""

    def __init__(self, rows: int):
        self.rows = rows
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """A column for the table of samples, one value a row."""
        if len(values) != self.rows:
            raise ValueError(f"log_extra: {column}: got {len(values)} values, wanted {self.rows}, one a completion")
        self.extra[str(column)] = [_plain(value) for value in values]

    def log_metric(self, name: str, value: float) -> None:
        """A number for the dashboard; those of a step are averaged."""
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"log_metric: {name}: got {value!r}, wanted a finite number")
        self.metrics.setdefault(str(name), []).append(float(value))


class _Scored(NamedTuple):
    """A function's scores, the rows for which it raised, which have None too, and what it logged."""

    scores: list[float | None]
    raised: frozenset[int]
    logged: _Logged


class _Attempt(NamedTuple):
    """What a function returned, or raised."""

    scores: Any
    error: Exception | None
    logged: _Logged


class Graded(NamedTuple):
    """What rows are worth, and what the functions logged beside it.

    total: the weighted sums, NaN where not known. parts: each function's own scores by its name, None where it does
    not apply or raised. extra: columns that functions logged with `log_extra`, one value a row, None where there is
    none. metrics: the numbers that they logged with `log_metric`, in their order.
    """

    total: list[float]
    parts: dict[str, list[float | None]]
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]


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

        Args: as of `RewardFunction`.

        Returns:
          (total, parts): the weighted sum over the functions that apply to each row, and each function's own
          unweighted scores by its name, None where it does not apply or raised. A total is NaN, not known, where no
          function applies, and where a function raised that has a weight.

        Raises:
          ValueError: an argument or a function's result has the wrong number of rows, or a score is not a finite
            number or None.
          RewardError: a function raised, and on_error is "raise".
        """
        graded = self.graded(prompts, completions, completion_ids, **columns)
        return graded.total, graded.parts

    def graded(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> Graded:
        """The same, with what the functions logged.

        Args, Raises: as of the call.
        """
        found = self._all(prompts, completions, completion_ids, columns)
        totals = [self._total(row, found) for row in range(len(completions))]
        if unknown := sum(all(scored.scores[row] is None for scored in found.values()) for row in range(len(totals))):
            _LOG.warning("no reward applies to %d of %d rows; their rewards are not known", unknown, len(totals))
        parts = {name: scored.scores for name, scored in found.items()}
        return Graded(totals, parts, *_joined([scored.logged for scored in found.values()], len(completions)))

    def _all(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: Mapping[str, Any],
    ) -> dict[str, _Scored]:
        """Functions one after another, then the asynchronous ones all at once, as in TRL."""
        check_strings("rewards", prompts, completions)
        for name, column in {"completion_ids": completion_ids, **columns}.items():
            if name in _LOGGERS:
                raise ValueError(f"rewards: {name}: got a column of that name, wanted another; functions log with it")
            if len(column) != len(completions):
                raise ValueError(
                    f"rewards: {name}: got {len(column)} rows, wanted {len(completions)}, one a completion;"
                    " repeat the column as the prompts are"
                )
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        waiting = {name: f for name, f in self.functions.items() if _is_async(f)}
        found = {}
        for name, function in self.functions.items():
            if name not in waiting:
                found[name] = self._scores(name, _attempt(function, rows), rows)
        for name, attempt in zip(waiting, _attempt_together(list(waiting.values()), rows), strict=True):
            found[name] = self._scores(name, attempt, rows)
        return {name: found[name] for name in self.functions}

    def _scores(self, name: str, attempt: _Attempt, rows: _Rows) -> _Scored:
        count = len(rows["completions"])
        if attempt.error is None:
            return _Scored(_checked(name, attempt.scores, count), frozenset(), attempt.logged)
        if isinstance(attempt.error, RowsFailed) and attempt.error.errors:
            for row, error in sorted(attempt.error.errors.items()):
                self._failed(name, row, error, rows, row)
            scores = _checked(name, attempt.error.scores, count)
            return _Scored(scores, frozenset(attempt.error.errors), attempt.logged)
        _LOG.error("reward function %r raised %r for a batch of %d rows", name, attempt.error, count)
        # Row by row, so that the one at fault is named and the others keep their scores.
        alone = [self._score(name, row, {key: [column[row]] for key, column in rows.items()}) for row in range(count)]
        if self.on_error == "raise":
            raise RewardError(
                f"reward function {name!r}: raised {type(attempt.error).__name__}: {attempt.error}, for the batch of"
                f" {count} rows though for none of them alone; make it independent of the batch"
            ) from attempt.error
        scores = [score for scored in alone for score in scored.scores]
        raised = frozenset(row for row, scored in enumerate(alone) if scored.raised)
        return _Scored(scores, raised, _stacked([scored.logged for scored in alone]))

    def _score(self, name: str, row: int, rows: _Rows) -> _Scored:
        """The function's word on this row alone."""
        function = self.functions[name]
        attempt = _attempt_together([function], rows)[0] if _is_async(function) else _attempt(function, rows)
        if attempt.error is None:
            return _Scored(_checked(name, attempt.scores, 1), frozenset(), attempt.logged)
        self._failed(name, row, attempt.error, rows, 0)
        return _Scored([None], frozenset([0]), _Logged(1))

    def _failed(self, name: str, row: int, error: Exception, rows: _Rows, place: int) -> None:
        """Logs a row of the batch, which is at this place of `rows`, and ends the run unless it may fail."""
        _LOG.error(
            "reward function %r raised %r\nprompt: %s\ncompletion: %s",
            name,
            error,
            _cut(rows["prompts"][place]),
            _cut(rows["completions"][place]),
        )
        if self.on_error == "raise":
            raise RewardError(
                f"reward function {name!r}: row {row}: raised {type(error).__name__}: {error}"
                f"{_place(self.functions[name], error)};"
                " see the log for the sample, mend the function, or count such rows as None with on_error='none'"
                " (--reward-error none)"
            ) from error

    def _total(self, row: int, found: Mapping[str, _Scored]) -> float:
        applying = {name: scored.scores[row] for name, scored in found.items() if scored.scores[row] is not None}
        if not applying or any(self.weights[name] for name, scored in found.items() if row in scored.raised):
            return math.nan
        return math.fsum(self.weights[name] * score for name, score in applying.items())


def _place(function: RewardFunction, error: Exception) -> str:
    """Where in the function's own file it happened, if it has one."""
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f" ({Path(own).name}:{lines[-1]})" if own and lines else ""


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
      on_error: a function that raises is called again row by row, unless it says with `RowsFailed` which rows failed;
        the rows at fault are logged with their prompt, their completion and the exception. "raise" then ends the run
        with a RewardError. "none" makes those scores None and, where the function has a weight, the rows' totals NaN,
        which whoever uses them must leave out: what is not known is not 0, an error is not a wrong answer.

    Returns:
      A callable with the functions' signature that returns (total, parts).

    Raises:
      ValueError: no functions, names that differ, a weight that is not a finite number, or an unknown on_error.

    Source: huggingface/trl, `GRPOTrainer` (`reward_weights`).
    Differs: a function that raises is named with its row, and may cost that row alone; a function whose first three
      parameters have names of its own gets them by position.
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


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _call(function: RewardFunction, rows: _Rows, logged: _Logged) -> Any:
    """By keyword, so that a function names only what it looks at; its own names for the first three come by place."""
    loggers = {name: getattr(logged, name) for name in _LOGGERS}
    if _names_its_own(function):
        first = [rows[name] for name in _FIRST]
        return function(*first, **{name: column for name, column in rows.items() if name not in _FIRST}, **loggers)
    return function(**rows, **loggers)


_FIRST = ("prompts", "completions", "completion_ids")


def _names_its_own(function: RewardFunction) -> bool:
    """Whether it has three parameters to be given by place, under names that nobody will give."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return False
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_place) >= 3 and not {p.name for p in by_place[:3]} & set(_FIRST)


def _attempt(function: RewardFunction, rows: _Rows) -> _Attempt:
    logged = _Logged(len(rows["completions"]))
    try:
        return _Attempt(_call(function, rows, logged), None, logged)
    except Exception as error:  # a user's function; `reward_error` says what becomes of it
        return _Attempt(None, error, logged)


def _attempt_together(functions: Sequence[RewardFunction], rows: _Rows) -> list[_Attempt]:
    """Asynchronous functions, waited for at the same time."""

    async def attempt(function: RewardFunction) -> _Attempt:
        logged = _Logged(len(rows["completions"]))
        try:
            return _Attempt(await _call(function, rows, logged), None, logged)
        except Exception as error:  # as in `_attempt`
            return _Attempt(None, error, logged)

    async def together() -> list[_Attempt]:
        return list(await asyncio.gather(*map(attempt, functions)))

    if not functions:
        return []
    # in a thread of its own: the caller's may already run a loop (a notebook's does)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(together())).result()


def _plain(value: Any) -> Any:
    """What JSON can hold, which is what the table of samples is written in."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):  # numpy's too
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _stacked(rows: Sequence[_Logged]) -> _Logged:
    """What was logged row by row, as of one call."""
    whole = _Logged(len(rows))
    names = dict.fromkeys(name for row in rows for name in row.extra)
    whole.extra = {name: [row.extra.get(name, [None])[0] for row in rows] for name in names}
    for row in rows:
        for name, found in row.metrics.items():
            whole.metrics.setdefault(name, []).extend(found)
    return whole


def _joined(logged: Sequence[_Logged], rows: int) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """What several functions logged; of two columns of one name the later has its place, where it has a value."""
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    for one in logged:
        for name, values in one.extra.items():
            before = extra.get(name, [None] * rows)
            extra[name] = [old if new is None else new for old, new in zip(before, values, strict=True)]
        for name, found in one.metrics.items():
            metrics.setdefault(name, []).extend(found)
    return extra, metrics
