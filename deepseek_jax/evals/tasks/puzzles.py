"""Puzzles of `data.puzzles`, as the recipe `r1` writes them into its folder."""

from collections.abc import Sequence

from deepseek_jax.data.puzzles import check_row, is_right
from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import maybe, name_of, text
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered, Grade, Problem, Style, Task
from deepseek_jax.rewards.format import format_reward
from deepseek_jax.rewards.language import language_reward
from deepseek_jax.text.answers import extract_answer, extract_lenient

_KEPT = ("family", "level", "language", "numbers", "target", "answer")


def _read(row: Row, number: int) -> Problem:
    check_row(row)
    more = {name: row.get(name) for name in _KEPT}
    if more["language"] is not None:
        language_reward(language=more["language"])  # refuses an unknown one
    answer = maybe(row, "answer") or None
    return Problem(id=name_of(row, number, "id"), question=text(row, "question"), answer=answer, more=more)


def _grade(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    return [_one(row) for row in rows]


def _one(row: Answered) -> Grade:
    more, found = row.problem.more, extract_answer(row.text)
    loose = found if found is not None else extract_lenient(row.text)
    score, lenient = (float(of is not None and is_right(more, of)) for of in (found, loose))
    one = {"prompts": [row.prompt], "completions": [row.completion], "completion_ids": [[]]}
    (form,) = format_reward(**one)
    parts = {"format": float(form or 0.0)}
    if more["language"] is not None:
        (parts["language"],) = language_reward(language=more["language"])(**one)
    for name in ("family", "level"):
        if more[name] is not None:
            parts[f"{name} {more[name]}"] = score
    return Grade(score, lenient, found, parts=parts)


PUZZLES = Task(
    name="puzzles",
    read=_read,
    styles={"deepseek": Style(lambda problem: problem.question)},
    grade=_grade,
    hub="questions/held_out.jsonl of a run of r1",
    source="data/puzzles.py",
    needs="question and answer, and of a countdown numbers and target",
    form="tags",
    same=lambda pairs, graders: [one.strip() == other.strip() for one, other in pairs],
    batch=256,
)
