"""Accuracy: is the final answer the right one?"""

from deepseek_jax.rewards.answers import answers_equal
from deepseek_jax.rewards.combine import check_strings
from deepseek_jax.text.answers import Extraction, answer_of, extract_answer, extract_lenient, gsm8k_answer

__all__ = [
    "Extraction",
    "accuracy_reward",
    "answer_of",
    "answers_equal",
    "check_answers",
    "extract_answer",
    "extract_lenient",
    "gsm8k_answer",
]


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


def accuracy_reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    answer: list[str | None],
    **columns: object,
) -> list[float | None]:
    """1.0 where the completion's final answer is the row's, else 0.0.

    Args:
      prompts: one a row; one that ends in `<think>` makes a completion that never closes it unanswered.
      completions: one a row.
      completion_ids: not used.
      answer: the right answer of each row (for GSM8K what `gsm8k_answer` returns), None where there is none.
      **columns: not used.

    Returns:
      One score a row, None for a row without a right answer.

    Raises:
      ValueError: the numbers of rows differ, or something is not a string.

    Source: DeepSeek-R1 paper, section 2.2.2 (accuracy rewards).
    Differs: compares with `answers_equal` only, so that it needs no other process; `rewards.math` also understands
      units, lists and algebra.
    """
    check_strings("accuracy_reward", prompts, completions)
    check_answers("accuracy_reward", answer, len(completions))
    return [_score(*row) for row in zip(prompts, completions, answer, strict=True)]


def _score(prompt: str, completion: str, answer: str | None) -> float | None:
    if answer is None:
        return None
    found = answer_of(prompt, completion)
    return float(found is not None and answers_equal(found, answer))
