"""The protocol of reward functions, and what they check of the rows that they get."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol


class RewardFunction(Protocol):
    """Scores completions, one value a row; None means that the function does not apply to the row.

    It is called by keyword, so that it may name only what it looks at and take the rest as `**kwargs`; further
    keywords are `log_extra(column, values)`, values one a row for the table of samples, and `log_metric(name, value)`,
    a number for the dashboard. It may be `async`: such functions are waited for together.

    Args:
      prompts: one a row, as text. One that ends in `<think>` has opened the completion's thought.
      completions: one a row, without end-of-sequence text.
      completion_ids: their tokens, one list a row.
      **columns: the data set's other columns, one value a row each.

    Returns:
      One score a row.

    Raises:
      ValueError: the numbers of rows differ, or something is not a string.

    Source: huggingface/trl, `GRPOTrainer` (`reward_funcs`).
    Differs: prompts and completions are plain strings, never lists of messages.
    """

    # Any, so that a type checker takes functions that name columns of their own.
    def __call__(self, *args: Any, **columns: Any) -> Any: ...


class RowsFailed(RuntimeError):
    """Raised by a function that scored a batch but for some rows, and so need not be asked again row by row.

    Args:
      message: what failed, for whoever calls the function by itself.
      scores: one a row; None for those that failed.
      errors: what failed, by row; none where the function has no rows.
    """

    def __init__(
        self, message: str, scores: Sequence[float | None] = (), errors: Mapping[int, Exception] = MappingProxyType({})
    ):
        super().__init__(message)
        self.scores, self.errors = list(scores), dict(errors)


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


def check_answers(name: str, answers: list[str | None], rows: int) -> None:
    """Refuses a column of right answers that does not fit its rows.

    Args:
      name: the reward function's name, for the message.
      answers: the column.
      rows: how many completions there are.

    Raises:
      ValueError: the number of rows differs, or one is neither a string nor None.
    """
    if len(answers) != rows:
        raise ValueError(
            f"{name}: answer: got {len(answers)} rows, wanted {rows}, one a completion;"
            " repeat the column as the prompts are"
        )
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise ValueError(
                f"{name}: answer: got {type(answer).__name__} {answer!r}, wanted a string or None; convert it"
            )
