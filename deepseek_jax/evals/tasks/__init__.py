"""The benchmarks by their names; another one is one short file and its line here."""

from deepseek_jax.evals.task import Task
from deepseek_jax.evals.tasks.choice import CHOICE
from deepseek_jax.evals.tasks.contests import CONTESTS
from deepseek_jax.evals.tasks.formal import FORMAL
from deepseek_jax.evals.tasks.functions import FUNCTIONS
from deepseek_jax.evals.tasks.mathematics import MATHEMATICS
from deepseek_jax.evals.tasks.patches import PATCHES
from deepseek_jax.evals.tasks.port import PORT
from deepseek_jax.evals.tasks.puzzles import PUZZLES

TASKS: dict[str, Task] = {
    task.name: task for task in (*MATHEMATICS, *CHOICE, *FUNCTIONS, *CONTESTS, PATCHES, FORMAL, PORT, PUZZLES)
}


def task_named(name: str) -> Task:
    """A benchmark.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"benchmark: got {name!r}, wanted one of {', '.join(TASKS)}")
    return TASKS[name]
