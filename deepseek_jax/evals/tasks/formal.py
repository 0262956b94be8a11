"""Formal proofs: a checker of one's own says whether a file of the model's passes."""

import re
from collections.abc import Sequence
from pathlib import PurePath

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
# What lets a checker pass a statement that is not proved, or gives its words another meaning.
_GAPS = re.compile(
    r"#exit|#eval|\+native|(?<![\w.])(?:sorry|admit|stop|axiom|constant|native_decide|unsafe|implemented_by|extern|prelude"
    r"|variables?|include|(?:default_)?instance|macro|macro_rules|notation3?|infix[lr]?|prefix|postfix|syntax"
    r"|declare_syntax_cat|elab|elab_rules|by_elab|run_cmd|run_elab|run_meta|(?:builtin_)?initialize"
    r"|Admitted|Abort|Fail|Axioms?|Parameters?|Variables?|Hypothes[ie]s|Context|Conjecture|Notation|Infix|Unset"
    r"|bypass_check|oops|axiomatization|oracle|ML|quick_and_dirty)(?!\w)|skipKernelTC|educeBool"
)
_PROOF = re.compile(r":=\s*(?:by)?\s*(?:sorry)?\s*$|\bsorry\s*$|Proof\.?(?:\s*Admitted\.?)?\s*$")
_IMPORT = re.compile(r"^[ \t]*import[ \t].*\n?", re.MULTILINE)
_NAMES = {".v": "coq", ".thy": "isabelle"}  # by the ending of a file; of others it is Lean
_OUTSIDE = {"lean": re.compile(r"""/-|--|(?<!\w)r(#*)"|"|'\\?"'"""), "ml": re.compile(r"\(\*")}
_INSIDE = {"lean": re.compile(r"/-|-/"), "ml": re.compile(r"\(\*|\*\)")}
_STRING = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)


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
    name = _language(more["file"])
    body = f"```{name}\n{lines(more['header'], more['informal'], more['statement'])}\n```"
    return lines(_ASKED.format(name), body)


def _grade(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """The statement stands in the file, nothing is left open, and the checker ends with status 0."""
    return [tried(lambda row=row: _one(row, graders)) for row in rows]


def _one(row: Answered, graders: Graders) -> Grade:
    blocks = labelled_blocks(row.text, _LABELS)
    if not blocks:
        return Grade(0.0)
    more, block = row.problem.more, blocks[-1].strip()
    # the header is the benchmark's own, in the place of whatever the model imports
    header = more["header"].strip()
    body = _IMPORT.sub("", block.removeprefix(header)) if header else block
    gaps = lambda code: len(_GAPS.findall(code_of(code, more["file"])))
    if not claims(body, more["statement"], more["file"]) or gaps(body) > gaps(_head(more["statement"], more["file"])):
        return Grade(0.0)
    words = [word.replace("{file}", more["file"]) for word in graders.config.checker]
    words += [] if any("{file}" in word for word in graders.config.checker) else [more["file"]]
    ran = run_outer(
        words,
        files={more["file"]: lines(more["header"], body)},
        seconds=graders.config.seconds or _SECONDS,
        memory_bytes=_MEMORY,
        config=graders.config,
    )
    if isinstance(ran, str):
        return Grade(None, reason=f"checker: {ran}"[:300])
    return Grade(float(ran[0].status == 0))


def claims(block: str, statement: str, file: str = "Problem.lean") -> bool:
    """Whether a file holds a statement and then its proof, white space and comments aside."""
    plain = lambda source: "".join(source.split())
    head = plain(_head(statement, file))
    # a longer statement ("or True") has something else after it
    return bool(head) and head + (":=" if _language(file) == "lean" else "") in plain(code_of(block, file))


def _head(statement: str, file: str) -> str:
    """A statement up to its proof."""
    return _PROOF.split(code_of(statement, file).rstrip())[0]


def _language(file: str) -> str:
    return _NAMES.get(PurePath(file).suffix, "lean")


def code_of(source: str, file: str = "Problem.lean") -> str:
    """A file without its comments, which nest, and in Lean without its strings; in one pass. What is never closed ends
    it."""
    language = "lean" if _language(file) == "lean" else "ml"
    kept, place, depth = [], 0, 0
    while (found := (_INSIDE if depth else _OUTSIDE)[language].search(source, place)) is not None:
        if not depth:
            kept.append(source[place : found.start()])
        mark, place = found[0], found.end()
        if mark in ("/-", "(*"):
            depth += 1
        elif mark in ("-/", "*)"):
            depth -= 1
        elif mark == "--":
            place = _after(source.find("\n", place), source)
        elif mark.startswith("r"):
            place = _after(source.find(end := f'"{found[1]}', place), source, len(end))
        elif mark == '"':
            closed = _STRING.match(source, place)
            place = len(source) if closed is None else closed.end()
    return " ".join(kept if depth else [*kept, source[place:]])


def _after(place: int, source: str, length: int = 0) -> int:
    return len(source) if place < 0 else place + length


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
