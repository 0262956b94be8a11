"""Programming contests: LiveCodeBench, and Codeforces with checkers and ratings."""

import math
from collections.abc import Sequence
from typing import Any

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import amount, lines, maybe, name_of, objects, parsed, text, value
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.private_tests import hidden_tests
from deepseek_jax.evals.running import code_grade, need_sandbox, passes_all, tried
from deepseek_jax.evals.task import Answered, Grade, Problem, Published, Style, Task
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.programs import extract_program
from deepseek_jax.rewards.sandbox import Limits
from deepseek_jax.rewards.tests_column import parse_tests

_LCB_SECONDS = 6.0
_STDIN = (
    "Write a Python program that reads from standard input and writes to standard output. Reason step by step, and "
    "give the program in one ```python block at the end."
)
_STARTER = (
    "Write your solution in Python with this beginning. Reason step by step, and give the solution in one ```python "
    "block at the end.\n\n```python\n{}\n```"
)


def livecodebench_tests(problem: Problem) -> list[dict[str, Any]]:
    """Public and hidden tests together, unpacked."""
    public = objects(problem.tests["public"], "public_test_cases")
    hidden = hidden_tests(problem.tests["private"]) if problem.tests["private"] else []
    name = problem.more["func_name"]
    given = [*public, *objects(hidden, "private_test_cases")]
    return [test | {"func_name": name} if name else test for test in given]


def _read_livecodebench(row: Row, number: int) -> Problem:
    starter = maybe(row, "starter_code")
    metadata = parsed(value(row, "metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"'metadata': got {metadata!r:.80}, wanted an object")
    asked = lines(text(row, "question_content"), _STARTER.format(starter.rstrip()) if starter.strip() else _STDIN)
    more = {"func_name": str(metadata.get("func_name") or ""), "date": str(value(row, "contest_date") or "")}
    more |= {"difficulty": str(value(row, "difficulty") or "")}
    # unpacked again for every grade, for all of them together are gigabytes
    tests = {"public": value(row, "public_test_cases"), "private": maybe(row, "private_test_cases")}
    problem = Problem(id=name_of(row, number, "question_id"), question=asked, tests=tests, more=more)
    try:
        found = parse_tests(livecodebench_tests(problem))
    except ValueError as wrong:
        raise ValueError(f"'private_test_cases': {wrong}") from None
    if found is None:
        raise ValueError("'public_test_cases', 'private_test_cases': got no test")
    return problem


def _grade_livecodebench(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """Every test passes, each within 6 s; lines stripped, as many, equal as text or as decimal numbers."""
    limits = Limits(seconds=graders.config.seconds or _LCB_SECONDS)
    given = {"io_limits": limits, "tolerance": 0.0, "workers": 1}
    unsafe = graders.config.allow_unsandboxed
    grades = []
    for row in rows:
        tests = livecodebench_tests(row.problem)
        of_all = Limits(seconds=min(120.0, limits.seconds * len(tests)))  # functional tests run in one process
        reward = CodeReward(**given, assert_limits=of_all, allow_unsandboxed=unsafe)
        grades.append(code_grade(reward, row.prompt, row.completion, tests))
    return grades


def _read_codeforces(row: Row, number: int) -> Problem:
    seconds = amount(row, "time_limit", 2.0, most=3600)
    megabytes = amount(row, "memory_limit", 256.0, most=1 << 20)
    if value(row, "description") is None:
        asked, tests = text(row, "problem", "question"), value(row, "tests")
    else:
        asked, tests = _statement(row, seconds, megabytes), value(row, "official_tests", "tests")
    if not isinstance(tests, list) or not tests or not isinstance(found := parse_tests(tests), list):
        raise ValueError(f"'official_tests': got {tests!r:.80}, wanted a list of input and output")
    rating = value(row, "rating")
    if rating is not None and (type(rating) not in (int, float) or not math.isfinite(rating)):
        raise ValueError(f"'rating': got {rating!r:.80}, wanted a number")
    more = {
        "rating": rating,
        "checker": maybe(row, "generated_checker") or None,
        "seconds": seconds,
        "megabytes": megabytes,
        "by_file": value(row, "input_mode") == "file",
        "interactive": bool(maybe(row, "interaction_format")),
    }
    id = name_of(row, number, "id")
    return Problem(id=id, question=lines(asked, _STDIN), tests=found, more=more)


def _statement(row: Row, seconds: float, megabytes: float) -> str:
    parts = [text(row, "description")]
    titles = (("input_format", "Input"), ("output_format", "Output"), ("note", "Note"))
    parts += [f"{title}\n{found}" for name, title in titles if (found := maybe(row, name))]
    for example in objects(value(row, "examples"), "examples"):
        given, wanted = maybe(example, "input"), maybe(example, "output")
        parts.append(f"Example\n```input\n{given}\n```\n```output\n{wanted}\n```")
    limits = f"Time limit: {seconds:g} s. Memory limit: {megabytes:g} MB."
    return lines(maybe(row, "title"), *parts, limits)


def _grade_codeforces(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """Every official test passes within the problem's own limits, by its checker where it has one."""
    return [tried(lambda row=row: _grade_one(row, graders)) for row in rows]


def _grade_one(row: Answered, graders: Graders) -> Grade:
    more = row.problem.more
    if more["interactive"]:
        return Grade(None, reason="an interactive problem")
    source = extract_program(row.prompt, row.completion)
    if source is None:
        return Grade(0.0, 0.0)
    limits = Limits(
        seconds=graders.config.seconds or more["seconds"], memory_bytes=max(256 << 20, int(more["megabytes"]) << 20)
    )
    given = {"checker": more["checker"], "by_file": more["by_file"], "config": graders.config}
    score = float(passes_all(source, row.problem.tests, limits=limits, **given))
    return Grade(score, score)


_ASKED = {"deepseek": Style(lambda problem: problem.question)}

CONTESTS = (
    Task(
        name="livecodebench",
        read=_read_livecodebench,
        styles=_ASKED,
        grade=_grade_livecodebench,
        hub="livecodebench/code_generation_lite (its files test.jsonl, test2.jsonl, ...)",
        source="LiveCodeBench; R1's figure is of problems from 2024-08 to 2025-01, 8 samples each",
        ready=need_sandbox,
        needs="question_content, starter_code, public_test_cases, private_test_cases and metadata",
        published=Published(samples=8),
    ),
    Task(
        name="codeforces",
        read=_read_codeforces,
        styles=_ASKED,
        grade=_grade_codeforces,
        hub="open-r1/codeforces:verifiable:test",
        source="open-r1/codeforces; R1 took 10 contests of Division 2 and 16 samples",
        ready=need_sandbox,
        needs="description, official_tests, rating, time_limit, or problem and tests",
        published=Published(samples=16),
        rated=True,
    ),
)
