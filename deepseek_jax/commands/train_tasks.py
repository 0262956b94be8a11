"""Rows of benchmarks as questions of a training run: asked, graded and evaluated as their Task says."""

from collections.abc import Sequence

from deepseek_jax.commands.train_settings import Config
from deepseek_jax.data.examples import Example
from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.rewarding import STYLE
from deepseek_jax.evals.task import Task
from deepseek_jax.evals.tasks import task_named

_ASKING = "tasks: got {tasks}, wanted one for each of {count} data sets, or one for all; give as many {option}"


def check_tasks(config: Config, graders: Graders) -> None:
    """Refuse, before anything is read, settings that do not go together, or what these graders cannot grade.

    Raises:
        ValueError: tasks without the accuracy of tasks or the other way round, names of no benchmark, as many as there
            are neither data sets nor one, a reward for tags that no benchmark asks for, or a grader that is not here.
    """
    of = config.questions
    if (config.rewards.accuracy == "task") != bool(of.tasks):
        got = f"{', '.join(of.tasks) or 'none'} with accuracy {config.rewards.accuracy!r}"
        raise ValueError(f"tasks: got {got}, wanted both --tasks NAME and --accuracy task, or neither")
    if not of.tasks:
        return
    trained = _tasks(of.tasks, of.data, "--tasks")
    for form in {task.form for task in trained if config.rewards.weight_format} - {config.rewards.format}:
        raise ValueError(
            f"format: got {config.rewards.format!r} with accuracy 'task', wanted what benchmarks ask for: --format "
            f"{form}, or none of it: --weight-format 0"
        )
    for task in (*trained, *_held_out_tasks(config)):
        task.ready(graders)


class TaskRows:
    """Makes an example of a data set one of its Task.

    Args:
        tasks: names, one for each source, in order, or one for all.
        sources: names of data sets, as examples number them.
        option: by which the tasks are given.
    """

    def __init__(self, tasks: Sequence[str], sources: Sequence[str], option: str):
        self._tasks = _tasks(tasks, sources, option)
        self._rows = [open_source(name) for name in sources]

    def __call__(self, example: Example) -> Example:
        """The question with the Task's instructions, and the columns that `evals.rewarding.task_reward` needs.

        A row of a source beyond those with a Task, of `late_data`, is of none.
        """
        if example.source >= len(self._rows):
            return example._replace(columns={**example.columns, "task": None, "row": {}})
        task, rows = self._tasks[example.source], self._rows[example.source]
        row = dict(rows[example.row])
        try:
            problem = task.read(row, example.row)
        except ValueError as problem:
            raise ValueError(f"{rows.where(example.row)}: {problem}; {task.name} wants {task.needs}") from None
        columns = {**example.columns, "task": task.name, "row": row, "answer": problem.answer}
        return example._replace(question=task.style(STYLE).write(problem), messages=None, columns=columns)


def task_rows(config: Config) -> tuple[TaskRows, TaskRows]:
    """Of the data to train on, and of the held-out rows, which may be of the same data."""
    of = config.questions
    trained = TaskRows(of.tasks, of.data, "--tasks")
    if not of.held_out:
        return trained, trained
    return trained, TaskRows(of.held_out_tasks or of.tasks, of.held_out, "--held-out-tasks")


def _held_out_tasks(config: Config) -> list[Task]:
    of = config.questions
    return _tasks(of.held_out_tasks or of.tasks, of.held_out, "--held-out-tasks") if of.held_out else []


def _tasks(names: Sequence[str], sources: Sequence[str], option: str) -> list[Task]:
    if len(names) not in (1, len(sources)):
        raise ValueError(_ASKING.format(tasks=", ".join(names), count=len(sources), option=option))
    tasks = [task_named(name) for name in names]
    return tasks * len(sources) if len(tasks) == 1 else tasks
