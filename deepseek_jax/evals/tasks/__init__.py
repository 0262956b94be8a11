"""The benchmarks by their names; another one is one short file and its line here."""

from collections.abc import Sequence

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


def files_of(names: Sequence[str], given: Sequence[str], option: str) -> dict[str, str]:
    """The data of benchmarks, by their names.

    Args:
        names: of the benchmarks that are asked for.
        given: NAME=FILE of each, or one plain FILE for a single benchmark.
        option: for messages.

    Raises:
        ValueError: what does not say of which benchmark it is, is of one that is not asked for, or comes second.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, file = each.partition("=")
        if not equals or name not in TASKS:
            name, file = names[0], each
            if len(names) > 1:
                raise ValueError(
                    f"{option}: got {each!r} for {', '.join(names)}, wanted NAME=FILE, such as {name}=FILE"
                )
        if name not in names:
            raise ValueError(f"{option}: got {each!r}, wanted data of {', '.join(names)}; add {name} to --benchmark")
        if not file.strip():
            raise ValueError(f"{option}: got {each!r}, wanted a file, a folder or a name on the hub after it")
        if name in found:
            raise ValueError(
                f"{option}: got {found[name]!r} and {file!r} for {name}, wanted one; a folder holds several"
            )
        found[name] = file
    return found
