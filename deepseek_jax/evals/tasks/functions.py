"""Functions from their descriptions, under assertions: HumanEval and MBPP, and the plus versions of both."""

import ast
from collections.abc import Mapping, Sequence
from functools import partial
from keyword import iskeyword
from typing import Any

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import amount, maybe, name_of, parsed, text, texts, value
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.running import code_grade, fenced, need_sandbox
from deepseek_jax.evals.task import Answered, Grade, Problem, Style, Task
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.sandbox import Limits
from deepseek_jax.rewards.tests_column import parse_tests

_COMPLETE = (
    "Complete this Python function. Reason step by step, and give the whole function, with the imports that it needs, "
    "in one ```python block at the end.\n\n```python\n{}```"
)
_SIMPLE = (
    "Read the following function signature and docstring, and fully implement the function described. Your response "
    "should only contain the code for this function.\n{}"
)
_SOLVE = (
    "{}\nYour function has to pass these tests:\n\n{}\n\nReason step by step, and give the function, with the imports "
    "that it needs, in one ```python block at the end."
)
_LM_EVAL_MBPP = (
    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)
_HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# Of all tests together; waiting for a processor does not count. MBPP's slowest reference (123) takes 3 s by itself.
_SECONDS, _MBPP_SECONDS, _PLUS_SECONDS = 3.0, 15.0, 60.0
_PLUS = """
def _near(got, wanted):
    if type(wanted) is float or type(got) is float:
        return got == wanted or (got != got and wanted != wanted) or (
            isinstance(got, (int, float)) and abs(got - wanted) <= max({atol!r}, 1e-7 * abs(wanted)))
    if isinstance(wanted, (list, tuple)):
        return isinstance(got, (list, tuple)) and len(got) == len(wanted) and all(map(_near, got, wanted))
    return got == wanted
"""


def _read_humaneval(row: Row, number: int) -> Problem:
    prompt, entry = text(row, "prompt"), text(row, "entry_point")
    # the prompt is the tests' too: some call a helper that it defines
    tests = {"test": text(row, "test"), "entry_point": entry, "prompt": prompt}
    return _problem(row, number, prompt, tests, {"prefix": prompt})


def _read_humaneval_plus(row: Row, number: int) -> Problem:
    if value(row, "plus_input") is None:  # the hub's form, whose `test` has every input and result
        return _read_humaneval(row, number)
    prompt, entry = text(row, "prompt"), text(row, "entry_point")
    solution = prompt + text(row, "canonical_solution")
    return _problem(row, number, prompt, _computed(row, solution, entry), {"prefix": prompt})


def _read_mbpp(row: Row, number: int) -> Problem:
    given = texts(row, "test_list")
    tests = {"asserts": list(given), "setup": maybe(row, "test_setup_code") or _imports(row)}
    return _problem(row, number, text(row, "text", "prompt"), tests, {"tests": "\n".join(given)})


def _read_mbpp_plus(row: Row, number: int) -> Problem:
    more = {"tests": "\n".join(texts(row, "test_list")) if value(row, "test_list") else text(row, "assertion")}
    question = text(row, "prompt", "text")
    if value(row, "plus_input") is not None:
        solution = text(row, "canonical_solution", "code")
        return _problem(row, number, question, _computed(row, solution, text(row, "entry_point")), more)
    return _problem(row, number, question, {"asserts": [text(row, "test")], "setup": _imports(row)}, more)


def _imports(row: Row) -> str:
    return "\n".join(texts(row, "test_imports")) if value(row, "test_imports") else ""


def _problem(row: Row, number: int, question: str, tests: Any, more: Mapping[str, Any]) -> Problem:
    parse_tests(tests)  # so that a row that is no test is refused before anything is drawn
    return Problem(id=name_of(row, number, "task_id"), question=question, tests=tests, more=more)


def _computed(row: Row, solution: str, entry: str) -> dict[str, Any]:
    """Tests whose right results the reference computes, as releases with base_input and plus_input have them."""
    base, plus = (parsed(value(row, name), name) for name in ("base_input", "plus_input"))
    for name, inputs in (("base_input", base), ("plus_input", plus)):
        if not isinstance(inputs, list) or not all(isinstance(each, list) for each in inputs):
            raise ValueError(f"{name!r}: got {inputs!r:.80}, wanted a list of lists of arguments")
    if not entry.isidentifier() or iskeyword(entry):
        raise ValueError(f"'entry_point': got {entry!r:.80}, wanted the name of a function")
    atol = amount(row, "atol", 0.0, most=1.0) if value(row, "atol") else 0.0
    setup = f"nan, inf = float('nan'), float('inf')\n{_wrapped(solution, entry)}\n{_PLUS.format(atol=atol)}"
    check = f"import copy\ndef check(candidate):\n    for given in {[*base, *plus]!r}:\n        " \
            "assert _near(candidate(*copy.deepcopy(given)), _reference(*copy.deepcopy(given)))\n"  # fmt: skip
    return {"test": check, "entry_point": entry, "setup": setup}


def _wrapped(solution: str, entry: str) -> str:
    """The reference under a name that no program has: its module as the body of a function."""
    try:
        body = ast.parse(solution).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise ValueError(f"'canonical_solution': is not Python ({problem})") from None
    inner = "\n".join(ast.unparse(node) for node in body)
    lines = [*inner.splitlines(), f"return {entry}"]
    wrapped = ast.parse("def _make():\n    pass")
    wrapped.body[0].body = ast.parse("\n".join(lines[:-1])).body + ast.parse(f"def f():\n    {lines[-1]}").body[0].body
    return f"{ast.unparse(wrapped)}\n_reference = _make()\n"


def _grade(rows: Sequence[Answered], graders: Graders, *, seconds: float) -> list[Grade]:
    """All assertions pass within so many seconds."""
    limits = Limits(seconds=seconds)
    reward = CodeReward(assert_limits=limits, workers=1, allow_unsandboxed=graders.config.allow_unsandboxed)
    grades = []
    for row in rows:
        completion = row.completion
        if row.style.raw and "```" not in completion:
            completion = fenced(row.problem.more.get("prefix", "") + completion)
        grades.append(code_grade(reward, row.prompt, completion, row.problem.tests))
    return grades


_HUMANEVAL_STYLES = {
    "deepseek": Style(lambda problem: _COMPLETE.format(problem.question)),
    "simple-evals": Style(lambda problem: _SIMPLE.format(problem.question)),
    "lm-eval": Style(lambda problem: problem.question, stop=_HUMANEVAL_STOPS, raw=True),
}
_MBPP_STYLES = {
    "deepseek": Style(lambda problem: _SOLVE.format(problem.question, problem.more["tests"])),
    "lm-eval": Style(
        lambda problem: _LM_EVAL_MBPP.format(problem.question, problem.more["tests"]), stop=("[DONE]",), raw=True
    ),
}
_SOURCE = "openai/human-eval; google-research (MBPP); evalplus; openai/simple-evals; EleutherAI/lm-evaluation-harness"

FUNCTIONS = (
    Task(
        name="humaneval",
        read=_read_humaneval,
        styles=_HUMANEVAL_STYLES,
        grade=partial(_grade, seconds=_SECONDS),
        hub="openai/openai_humaneval::test",
        source=_SOURCE,
        ready=need_sandbox,
        needs="task_id, prompt, test and entry_point",
    ),
    Task(
        name="humaneval_plus",
        read=_read_humaneval_plus,
        styles=_HUMANEVAL_STYLES,
        grade=partial(_grade, seconds=_PLUS_SECONDS),
        hub="evalplus/humanevalplus::test",
        source=_SOURCE,
        ready=need_sandbox,
        needs="task_id, prompt, entry_point and test, or canonical_solution, base_input and plus_input",
    ),
    Task(
        name="mbpp",
        read=_read_mbpp,
        styles=_MBPP_STYLES,
        grade=partial(_grade, seconds=_MBPP_SECONDS),
        hub="google-research-datasets/mbpp:full:test",
        source=_SOURCE,
        ready=need_sandbox,
        needs="text, test_list and test_setup_code",
    ),
    Task(
        name="mbpp_plus",
        read=_read_mbpp_plus,
        styles=_MBPP_STYLES,
        grade=partial(_grade, seconds=_PLUS_SECONDS),
        hub="evalplus/mbppplus::test",
        source=_SOURCE,
        ready=need_sandbox,
        needs="prompt, test_list and test, or canonical_solution, entry_point, base_input and plus_input",
    ),
)
