"""A Task: one benchmark as one object, for evaluation, rewards and rejection sampling alike.

A row of its data is read as a Problem; a style writes the prompt; `grade` says of completions whether they are right.
What could not be graded has the score None, which is never counted as wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deepseek_jax.data.sources import Row, Source
from deepseek_jax.evals.graders import Graders
from deepseek_jax.text.answers import extract_answer
from deepseek_jax.text.think import with_opening

StyleName = Literal["deepseek", "simple-evals", "lighteval", "lm-eval"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row of a benchmark.

    Args:
        id: the data set's own name of it, or its number.
        question: what is asked, without instructions.
        answer: the right answer; None where tests decide.
        tests: as `rewards.tests_column.parse_tests` reads them, or what else the task's grade needs.
        choices: texts of the options, in order, of multiple choice.
        more: what else prompts, grades and metrics look at (`rating`, say).
    """

    id: str
    question: str
    answer: str | None = None
    tests: Any = None
    choices: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


class Style(NamedTuple):
    """How a prompt is written, and where a completion of it has its answer.

    write: the user's text. stop: texts that end a completion. strict: the answer in the form asked for, or None.
    raw: the completion goes on with the prompt's own text (a function's beginning).
    """

    write: Callable[[Problem], str]
    stop: tuple[str, ...] = ()
    strict: Callable[[str], str | None] = extract_answer
    raw: bool = False


class Published(NamedTuple):
    """The settings of published results: samples a problem, and how tokens are drawn."""

    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32_768


class Answered(NamedTuple):
    """A completion to grade.

    prompt: as text; one that ends in `<think>` has opened the completion's thought.
    """

    problem: Problem
    style: Style
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The completion with the thought that its prompt opened."""
        return with_opening(self.prompt, self.completion)


class Grade(NamedTuple):
    """What a completion is worth.

    score: 1 right, 0 wrong, None not graded. lenient: likewise, by a laxer extraction; None where there is no such.
    answer: what was extracted, for votes. reason: why it was not graded, else "". parts: further scores by name.
    """

    score: float | None
    lenient: float | None = None
    answer: str | None = None
    reason: str = ""
    parts: Mapping[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Args:
        name: on the command line.
        read: a row and its number as a Problem; ValueError says which field is wrong.
        styles: ways to ask, by name; "deepseek" is among them.
        grade: of completions, in order.
        hub: where the data is to be had, as `data.sources.open_source` names it.
        source: what prompts and grades follow.
        needs: fields of a row, for messages.
        form: of a completion that its prompts ask for, by the names of `train --format`.
        published: settings of R1's figures.
        same: whether two answers are one, for the vote among samples; None: there is no vote.
        batch: completions graded in one call at most.
        rated: its problems have ratings, so that there is an Elo.
        ready: refuses, before anything is drawn, to grade where something that it takes is missing.
    """

    name: str
    read: Callable[[Row, int], Problem]
    styles: Mapping[str, Style]
    grade: Callable[[Sequence[Answered], Graders], list[Grade]]
    hub: str
    source: str
    needs: str
    form: Literal["boxed", "tags"] = "boxed"
    published: Published = Published()
    same: Callable[[Sequence[tuple[str, str]], Graders], list[bool]] | None = None
    batch: int = 1
    rated: bool = False
    ready: Callable[[Graders], None] = lambda graders: None

    def style(self, name: str) -> Style:
        """A style by its name; ValueError names those there are."""
        if name not in self.styles:
            raise ValueError(
                f"prompt_style: got {name!r}, wanted one that {self.name} has: {', '.join(self.styles)}; "
                "choose it by --prompt-style"
            )
        return self.styles[name]

    def problems(self, source: Source, limit: int | None = None) -> list[Problem]:
        """The first rows of a data set.

        Raises:
            ValueError: a row that is none of this benchmark's, with its file, line and field.
        """
        count = len(source) if limit is None else min(limit, len(source))
        return [self._problem(source, number) for number in range(count)]

    def _problem(self, source: Source, number: int) -> Problem:
        row = source[number]
        try:
            return self.read(row, number)
        except ValueError as problem:
            raise ValueError(
                f"{source.where(number)}: {problem}; {self.name} wants {self.needs}, as {self.hub} has them"
            ) from None
