"""Puzzles: does the final answer solve the row's question, by the rule of its family?"""

from typing import Any

from deepseek_jax.data.puzzles import is_right
from deepseek_jax.rewards.protocol import check_strings
from deepseek_jax.text.answers import answer_of


def puzzle_reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    answer: list[str | None],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's final answer solves the puzzle, else 0.0.

    Args:
      prompts, completions, completion_ids: as of `RewardFunction`.
      answer: a right answer of each row; the score is None where it is, as for general talk.
      **columns: `numbers` and `target`, where there are countdowns among the rows.

    Raises:
      ValueError: the numbers of rows differ, or something is not a string.
    """
    check_strings("puzzle_reward", prompts, completions)
    scores: list[float | None] = []
    for place, right in enumerate(answer):
        row = {name: columns[name][place] for name in ("numbers", "target") if name in columns} | {"answer": right}
        found = answer_of(prompts[place], completions[place])
        scores.append(None if right is None else float(found is not None and is_right(row, found)))
    return scores
