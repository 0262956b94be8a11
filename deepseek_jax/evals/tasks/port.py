"""Porting: a program in Python, then the same in another language, both under the same tests."""

import dataclasses
from collections.abc import Sequence

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import lines, name_of, text, value
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.outer import LANGUAGES, language_here, run_outer
from deepseek_jax.evals.running import need_sandbox, passes_all, tried
from deepseek_jax.evals.task import Answered, Grade, Problem, Style, Task
from deepseek_jax.rewards.outputs import outputs_equal
from deepseek_jax.rewards.programs import extract_program, labelled_blocks
from deepseek_jax.rewards.sandbox import Limits
from deepseek_jax.rewards.tests_column import parse_tests

_SECONDS = 6.0
_ASKED = (
    "Write a program in Python that reads from standard input and writes to standard output. Then port it to {}: the "
    "same program, which has to pass the same tests. Give the first in one ```python block and the second in one "
    "```{} block."
)


def _read(row: Row, number: int) -> Problem:
    tests = value(row, "tests", "official_tests")
    if not tests or not isinstance(found := parse_tests(tests), list):
        raise ValueError(f"'tests': got {tests!r:.80}, wanted a list of input and output")
    asked = text(row, "problem", "question", "question_content", "description")
    return Problem(id=name_of(row, number, "id", "question_id"), question=asked, tests=found)


def _ready(graders: Graders) -> None:
    need_sandbox(graders)
    language_here(graders.config.language)


def _written(language: str) -> Style:
    label = LANGUAGES[language].labels[0]
    return Style(lambda problem: lines(problem.question, _ASKED.format(label, label)))


def _asked(problem: Problem) -> str:
    """By the first language whose tools are here; `for_language` asks for another."""
    return _written(language_here(None)).write(problem)


def _grade(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """Both programs pass every test; the parts say which does."""
    return [tried(lambda row=row: _both(row, graders)) for row in rows]


def _both(row: Answered, graders: Graders) -> Grade:
    seconds = graders.config.seconds or _SECONDS
    tests, language = row.problem.tests, LANGUAGES[language_here(graders.config.language)]
    python = extract_program(row.prompt, row.completion)
    limits = Limits(seconds=seconds)
    first = python is not None and passes_all(python, tests, limits=limits, checker=None, config=graders.config)
    blocks = labelled_blocks(row.text, language.labels)
    second = bool(blocks)
    if blocks:
        ran = run_outer(
            language.run,
            files={language.file: blocks[-1]},
            inputs=[test.input for test in tests],
            builds=language.builds,
            build_seconds=language.seconds,
            seconds=seconds,
            memory_bytes=language.memory_bytes,
            config=graders.config,
        )
        second = not isinstance(ran, str) and len(ran) == len(tests)
        second = second and all(
            of.status == 0 and outputs_equal(of.stdout, test.output) for of, test in zip(ran, tests, strict=True)
        )
    return Grade(float(first and second), parts={"python": float(first), "port": float(second)})


def for_language(language: str) -> Task:
    """The task that asks for a language by its name."""
    return dataclasses.replace(PORT, styles={"deepseek": _written(language)})


PORT = Task(
    name="port",
    read=_read,
    styles={"deepseek": Style(_asked)},
    grade=_grade,
    hub="open-r1/codeforces:verifiable:test",
    source="the design documents of this package (a program and its translation under the same tests)",
    ready=_ready,
    needs="problem and tests, a list of input and output",
)
