"""A model's programs under tests, as grades: a test's own failure or a missing sandbox gives no score."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from deepseek_jax.evals.graders import GraderConfig, Graders
from deepseek_jax.evals.task import Grade
from deepseek_jax.rewards.assertions import PACKAGES, TestsUnusable
from deepseek_jax.rewards.code import CodeReward
from deepseek_jax.rewards.outputs import outputs_equal
from deepseek_jax.rewards.sandbox import CompletedProgram, Limits, Program, SandboxUnavailable, available, run_program
from deepseek_jax.rewards.tests_column import InputOutput

_OUTPUT_ROOM = 1 << 20
_CHECKER_LIMITS = Limits(seconds=30.0)
_PASSED, _FAILED = {"1", "1.0", "ok", "true", "yes", "accepted", "correct"}, {"0", "0.0", "false", "no", "wrong"}
# Runs another file of its folder as the main program, with these arguments.
_AS_MAIN = "import runpy, sys\nsys.argv = {argv!r}\nsys.path[0] = '.'\nrunpy.run_path({file!r}, run_name='__main__')\n"
# Reads input.txt and writes output.txt; what it prints is no answer. It may end by sys.exit().
_BY_FILE = """
import os, runpy, sys
out = os.dup(1)
os.dup2(2, 1)
sys.argv, sys.path[0] = ["solution.py"], "."
try:
    runpy.run_path("solution.py", run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
if os.path.exists("output.txt"):
    with open("output.txt", "rb") as found, os.fdopen(out, "wb") as told:
        told.write(found.read())
"""
_NONSENSE = "no answer of any kind"


def fenced(program: str) -> str:
    """A program as the only one of a completion."""
    return f"~~~~~~python\n{program}\n~~~~~~"


def need_sandbox(graders: Graders) -> None:
    """Refuse to grade programs where they cannot be isolated, without leave; ValueError says what is missing."""
    reason = None if graders.config.allow_unsandboxed else available()
    if reason is not None:
        raise ValueError(f"benchmark: {reason}; or run programs unprotected: --allow-unsandboxed")


def tried(run: Callable[[], Grade]) -> Grade:
    """What `run` grades; None with the reason where the tests, or the sandbox, are at fault."""
    try:
        return run()
    except (TestsUnusable, SandboxUnavailable) as problem:
        return Grade(None, reason=f"{type(problem).__name__}: {problem}"[:300])


def passes(reward: CodeReward, prompt: str, completion: str, tests: Any) -> float | None:
    """The score of one completion."""
    return reward([prompt], [completion], [[]], tests=[tests])[0]


def code_grade(reward: CodeReward, prompt: str, completion: str, tests: Any) -> Grade:
    """Strict: the program stands in a fenced block; lenient: the whole answer may be it."""

    def run() -> Grade:
        score = passes(reward, prompt, completion, tests)
        lenient = score
        if score == 0.0 and "```" not in completion and "~~~" not in completion:
            lenient = passes(reward, "", fenced(completion.rpartition("</think>")[2]), tests)
        return Grade(score, lenient, reason="" if score is not None else "the row has no tests")

    return tried(run)


# --- tests by standard input with a checker, or by files ------------------------------------------


def run_on(program: Program, test: InputOutput, *, by_file: bool, allow_unsandboxed: bool) -> CompletedProgram:
    """A program on one test's input, from standard input or from input.txt to output.txt."""
    room = max(program.limits.output_bytes, len(test.output.encode(errors="replace")) + _OUTPUT_ROOM)
    limits = replace(program.limits, output_bytes=room)
    if by_file:
        files = {"solution.py": program.source, "input.txt": test.input}
        program = replace(program, source=_BY_FILE, files=files, limits=limits)
    else:
        program = replace(program, stdin=test.input, limits=limits)
    return run_program(program, allow_unsandboxed=allow_unsandboxed)


def passes_all(
    source: str,
    tests: list[InputOutput],
    *,
    limits: Limits,
    checker: str | None,
    by_file: bool = False,
    config: GraderConfig,
) -> bool:
    """Whether a program passes every test, by a checker where there is one.

    Raises:
        TestsUnusable: the checker says neither yes nor no.
    """
    program = Program(source=source, limits=limits, packages=PACKAGES)
    run = partial(run_on, program, by_file=by_file, allow_unsandboxed=config.allow_unsandboxed)
    for test in tests:
        ran = run(test)
        printed = ran.stdout.decode(errors="replace")
        if ran.kind != "ok":
            return False
        if checker is None:
            good = outputs_equal(printed, test.output)
        else:
            good = _checked(checker, test, printed, config)
        if not good:
            return False
    return True


def _checked(checker: str, test: InputOutput, printed: str, config: GraderConfig) -> bool:
    """What a checker says of an output: its first word is 1 or 0, or its exit status speaks for it.

    One that falls over an output refuses it, if it takes the right one; one without a word passes an output, if it
    does not pass nonsense.
    """
    said = _said(checker, test, printed, config)
    if said == "nothing" and _said(checker, test, _NONSENSE, config) == "nothing":
        raise TestsUnusable("checker: says nothing and passes any output, wanted 1 or 0; correct the row")
    if said not in ("right", "wrong", "nothing") and _said(checker, test, test.output, config) not in (
        "right",
        "nothing",
    ):
        raise TestsUnusable(f"checker: {said}, wanted 1 or 0; correct the row")
    return said in ("right", "nothing")


def _said(checker: str, test: InputOutput, printed: str, config: GraderConfig) -> str:
    """ "right", "wrong", "nothing" where it ends well without a word, or how it failed."""
    names = ("input.txt", "correct_output.txt", "solution_output.txt")
    files = dict(zip(names, (test.input, test.output, printed), strict=True)) | {"checker.py": checker}
    source = _AS_MAIN.format(argv=["checker.py", *names], file="checker.py")
    program = Program(source=source, files=files, limits=_CHECKER_LIMITS, packages=PACKAGES)
    ran = run_program(program, allow_unsandboxed=config.allow_unsandboxed)
    words = ran.stdout.decode(errors="replace").split()
    word = words[0].casefold().strip(".,:!") if words else ""
    if ran.kind == "ok" and (word in _PASSED or not word):
        return "right" if word else "nothing"
    if word in _FAILED or (ran.kind == "error" and not word and not ran.stderr.rstrip().endswith(b"Error")
                           and b"Traceback" not in ran.stderr):  # fmt: skip
        return "wrong"
    last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:] or [" ".join(words)[:80]]
    return f"{ran.kind}: {last[0]!r}"
