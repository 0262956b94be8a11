"""Multiple choice: GPQA, MMLU, MMLU-Pro."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import letter, name_of, text, texts
from deepseek_jax.evals.forms import answer_line
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered, Grade, Problem, Published, Style, Task
from deepseek_jax.rewards.choice import chosen_option
from deepseek_jax.text.answers import extract_lenient

_SIMPLE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n"
    "{question}\n\n{options}"
)
_REASONED = re.compile(r"\(?([A-Z])\)?(?:\s*[,;.]\s+|\s+)(?:because|since|as|for|which|given)\b")
_LM_EVAL = "{question}\n{options}\nAnswer:"


@lru_cache(maxsize=1)
def _orders(rows: int) -> list[list[int]]:
    draw = random.Random(0)
    return [draw.sample(range(4), 4) for _ in range(rows)]


def gpqa_order(number: int) -> list[int]:
    """Where the right and the three wrong options stand in a row of that number.

    Source: openai/simple-evals, gpqa_eval.py (one draw a row from Random(0)). Differs: all samples of a row have one
        order, where each repetition there has its own.
    """
    rows = 1024
    while number >= rows:
        rows *= 2
    return _orders(rows)[number]


def _read_gpqa(row: Row, number: int) -> Problem:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    given = [text(row, name).strip() for name in names]
    choices = tuple(given[place] for place in gpqa_order(number))
    id = name_of(row, number, "Record ID")
    return _problem(id, text(row, "Question"), choices, ascii_uppercase[choices.index(given[0])])


def _read_options(row: Row, number: int) -> Problem:
    choices = texts(row, "options", "choices")
    if len(choices) > len(ascii_uppercase):
        raise ValueError(f"'options': got {len(choices)}, wanted at most {len(ascii_uppercase)}")
    right = letter(row, len(choices), "answer", "answer_index")
    id = name_of(row, number, "question_id", "id")
    return _problem(id, text(row, "question"), choices, right)


def _problem(id: str, question: str, choices: tuple[str, ...], right: str) -> Problem:
    return Problem(id=id, question=question.strip(), answer=right, choices=choices)


def grade_choices(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """The chosen option beside the right one; an option's text is as good as its letter."""
    grades = []
    for row in rows:
        found = row.style.strict(row.text)
        chosen = None if found is None else _option(found, row.problem.choices)
        guess = extract_lenient(row.text)
        lax = chosen or (None if guess is None else _option(guess, row.problem.choices))
        right = row.problem.answer
        grades.append(Grade(float(chosen == right), float(lax == right), chosen))
    return grades


def _option(answer: str, choices: Sequence[str]) -> str | None:
    """A letter, an option's text, or a letter with its reason behind it."""
    reasoned = _REASONED.match(answer)
    return chosen_option(answer, choices) or (chosen_option(reasoned[1], choices) if reasoned else None)


def _same(pairs: Sequence[tuple[str, str]], graders: Graders) -> list[bool]:
    return [first == second for first, second in pairs]


def _written(template: str, mark: str = ")") -> Callable[[Problem], str]:
    def write(problem: Problem) -> str:
        letters = ascii_uppercase[: len(problem.choices)]
        options = "\n".join(f"{name}{mark} {each}" for name, each in zip(letters, problem.choices, strict=True))
        return template.format(letters=letters, question=problem.question, options=options)

    return write


def _bare(found: str) -> str | None:
    """A completion of the raw style begins with its answer."""
    return answer_line(found) or found.strip().split("\n")[0].strip() or None


_STYLES: Mapping[str, Style] = {
    # R1 took simple-evals' prompt for these
    "deepseek": Style(_written(_SIMPLE), strict=answer_line),
    "simple-evals": Style(_written(_SIMPLE), strict=answer_line),
    "lighteval": Style(_written(_SIMPLE), strict=answer_line),
    "lm-eval": Style(_written(_LM_EVAL, "."), stop=("\n\n", "Question:"), strict=_bare),
}


def _task(name: str, read: Callable[[Row, int], Problem], hub: str, needs: str, samples: int = 1) -> Task:
    return Task(
        name=name,
        read=read,
        styles=_STYLES,
        grade=grade_choices,
        hub=hub,
        source="openai/simple-evals (R1's prompt too); huggingface/lighteval; EleutherAI/lm-evaluation-harness 0.4.13, "
        "zero-shot and generated. Differs from lighteval: MMLU-Pro's letters are all ten.",
        needs=needs,
        published=Published(samples=samples),
        same=_same,
        batch=256,
    )


CHOICE = (
    _task(
        "gpqa",
        _read_gpqa,
        "Idavidrein/gpqa:gpqa_diamond:train",
        "Question, Correct Answer, Incorrect Answer 1 to 3",
        samples=64,
    ),
    _task("mmlu", _read_options, "cais/mmlu:all:test", "question, choices and answer"),
    _task("mmlu_pro", _read_options, "TIGER-Lab/MMLU-Pro::test", "question, options and answer"),
)
