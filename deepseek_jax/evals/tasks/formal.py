"""Formal proofs: a checker of one's own says whether a file of the model's passes."""

import re
from collections.abc import Sequence

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import lines, maybe, name_of, text
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.outer import run_outer
from deepseek_jax.evals.running import need_sandbox, tried
from deepseek_jax.evals.task import Answered, Grade, Problem, Style, Task
from deepseek_jax.rewards.programs import labelled_blocks

_SECONDS, _MEMORY = 300.0, 64 << 30
_LABELS = ("lean", "lean4", "coq", "rocq", "isabelle", "")
_ASKED = (
    "Complete this formal statement with a proof. Give the whole file, the statement unchanged, in one ```{} block."
)
# What lets a checker pass a statement that is not proved.
_GAPS = re.compile(r"\b(?:sorry|admit|Admitted|oops|axiom|native_decide|Axiom|Parameter|unsafe|implemented_by)\b")
_OPENS = re.compile(r"/-|\(\*|--")
_CLOSES = {"/-": "-/", "(*": "*)", "--": "\n"}


def _read(row: Row, number: int) -> Problem:
    statement = text(row, "formal_statement", "statement")
    more = {"header": maybe(row, "header"), "file": maybe(row, "file_name") or "Problem.lean"}
    more |= {"statement": statement, "informal": maybe(row, "informal_prefix", "informal_statement")}
    if "/" in more["file"] or more["file"] in ("main.py", "inputs.json", ".", ".."):
        raise ValueError(f"'file_name': got {more['file']!r}, wanted a plain name such as Problem.lean")
    return Problem(id=name_of(row, number, "name", "id"), question=statement, more=more)


def _ready(graders: Graders) -> None:
    need_sandbox(graders)
    words = graders.config.checker
    if not words:
        raise ValueError("checker: got none for formal, wanted a command such as --checker lean {file}")


def _written(problem: Problem) -> str:
    more = problem.more
    body = f"```lean\n{lines(more['header'], more['informal'], more['statement'])}\n```"
    return lines(_ASKED.format("lean"), body)


def _grade(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """The statement stands in the file, nothing is left open, and the checker ends with status 0."""
    return [tried(lambda row=row: _one(row, graders)) for row in rows]


def _one(row: Answered, graders: Graders) -> Grade:
    blocks = labelled_blocks(row.text, _LABELS)
    if not blocks:
        return Grade(0.0)
    more, block = row.problem.more, blocks[-1]
    if not claims(block, more["statement"]) or _GAPS.search(_without_comments(block)):
        return Grade(0.0)
    words = [word.replace("{file}", more["file"]) for word in graders.config.checker]
    words += [] if any("{file}" in word for word in graders.config.checker) else [more["file"]]
    # the header is the benchmark's own, in the place of whatever the model wrote before the statement
    body = block if more["header"].strip() in block else lines(more["header"], block)
    ran = run_outer(
        words,
        files={more["file"]: body},
        seconds=graders.config.seconds or _SECONDS,
        memory_bytes=_MEMORY,
        config=graders.config,
    )
    if isinstance(ran, str):
        return Grade(None, reason=f"checker: {ran}"[:300])
    return Grade(float(ran[0].status == 0))


def claims(block: str, statement: str) -> bool:
    """Whether a file holds a statement up to its proof, white space and comments aside."""
    plain = lambda source: "".join(_without_comments(source).split())
    head = re.split(r":=\s*(?:by)?\s*(?:sorry)?\s*$|\bsorry\s*$|Proof\.?\s*$", statement.rstrip())[0]
    return plain(head) in plain(block)


def _without_comments(source: str) -> str:
    """In one pass; a comment that is never closed ends the file."""
    kept, place = [], 0
    while (opened := _OPENS.search(source, place)) is not None:
        kept.append(source[place : opened.start()])
        end = source.find(_CLOSES[opened[0]], opened.end())
        if end < 0:
            return " ".join(kept)
        place = end + (0 if opened[0] == "--" else 2)
    return " ".join([*kept, source[place:]])


FORMAL = Task(
    name="formal",
    read=_read,
    styles={"deepseek": Style(_written)},
    grade=_grade,
    hub="no public place (rows of name, header and formal_statement, such as miniF2F's in Lean 4)",
    source="deepseek-ai/DeepSeek-Prover-V1.5 (fields of miniF2F's rows)",
    ready=_ready,
    needs="formal_statement, and header where there is one",
)
