"""Accuracy: is the final answer the right one?"""

from deepseek_jax.rewards.answers import answers_equal
from deepseek_jax.rewards.protocol import check_answers, check_strings
from deepseek_jax.text.answers import answer_of


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
      prompts, completions, completion_ids: as of `RewardFunction`.
      answer: the right answer of each row (for GSM8K what `gsm8k_answer` returns); the score is None where it is.

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
