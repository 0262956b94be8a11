"""Benchmarks' Tasks as rewards: every row is graded by its own Task, for reinforcement and rejection sampling."""

from collections import defaultdict
from collections.abc import Mapping

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered, Grade
from deepseek_jax.evals.tasks import task_named
from deepseek_jax.rewards.protocol import RewardFunction, RowsFailed, check_strings

STYLE = "deepseek"
"""In which training asks rows of benchmarks."""


def task_reward(graders: Graders, *, style: str = STYLE) -> RewardFunction:
    """Makes the reward whose rows say which Task they are of.

    Args:
        graders: open as long as the function is used.
        style: in which the rows were asked, which says where answers are.

    Returns:
        A reward function that needs the columns `task`, a benchmark's name or None (the score is then None), and
        `row`, that benchmark's row. The score is the grade's. It raises ValueError for a row that is none of its
        Task's, and `RowsFailed` where completions could not be graded: that is no 0.
    """

    def accuracy(
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        *,
        task: list[str | None],
        row: list[Mapping],
        **columns: object,
    ) -> list[float | None]:
        check_strings("task_reward", prompts, completions)
        places = defaultdict(list)
        for place, name in enumerate(task):
            if name is not None:
                places[name].append(place)
        scores: list[float | None] = [None] * len(completions)
        errors: dict[int, Exception] = {}
        for name, of in places.items():
            given = [(prompts[place], completions[place], row[place], place) for place in of]
            for place, grade in zip(of, _grades(name, given, graders, style), strict=True):
                scores[place] = grade.score
                if grade.score is None:
                    errors[place] = RuntimeError(f"task_reward: {name}: no verdict: {grade.reason}")
        if errors:
            raise RowsFailed(str(errors[min(errors)]), scores, errors)
        return scores

    return accuracy


def _grades(name: str, given: list[tuple[str, str, Row, int]], graders: Graders, style: str) -> list[Grade]:
    task = task_named(name)
    found = task.style(style)
    rows = [Answered(task.read(dict(row), place), found, prompt, text) for prompt, text, row, place in given]
    return [
        grade for at in range(0, len(rows), task.batch) for grade in task.grade(rows[at : at + task.batch], graders)
    ]
