"""Code: does the program in a completion pass the hidden tests?"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from deepseek_jax.rewards.assertions import CANDIDATE, Assertions, TestsUnusable, count_assertions
from deepseek_jax.rewards.combine import check_strings
from deepseek_jax.rewards.sandbox import Limits, Program, available, processors, run_programs

_FENCE = re.compile(r"[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^`\n]*?)[ \t]*\r?")
_PYTHON = ("python", "python3", "py")


@dataclass(frozen=True, kw_only=True)
class InputOutput:
    """A test by standard input and output.

    Args:
      input: what the program reads.
      output: what it must print, as `outputs_equal` compares it.
    """

    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class CodeReward:
    """Scores completions by hidden tests, with TRL's signature.

    Args:
      share: False: 1.0 where every test passes, else 0.0. True: the share of tests that pass.
      io_limits: of a program on one input; by default 6 s.
      assert_limits: of a program on all its assertions; by default 3 s.
      workers: rows graded at once; None: one a processor.
      allow_unsandboxed: see `deepseek_jax.rewards.sandbox.run_program`.

    Source: DeepSeek-R1 paper, section 2.2.2 (compiler feedback on predefined test cases); LiveCodeBench and HumanEval
      (time limits).
    """

    share: bool = False
    io_limits: Limits = Limits(seconds=6.0)
    assert_limits: Limits = Limits(seconds=3.0)
    workers: int | None = None
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"CodeReward: workers: got {self.workers}, wanted 1 or more, or None for one a processor")

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        *,
        tests: Sequence[Any],
        **columns: object,
    ) -> list[float | None]:
        """Scores the rows; see `code_reward`."""
        check_strings("code_reward", prompts, completions)
        if len(tests) != len(completions):
            raise ValueError(
                f"code_reward: tests: got {len(tests)} rows, wanted {len(completions)}, one a completion;"
                " repeat the column as the prompts are"
            )
        parsed = [parse_tests(row) for row in tests]
        sources = [extract_program(*row) for row in zip(prompts, completions, strict=True)]
        if self.workers == 1 or len(parsed) < 2:
            return [self._score(*row) for row in zip(sources, parsed, strict=True)]
        available()  # once, before the threads ask
        with ThreadPoolExecutor(self.workers or processors()) as pool:
            return list(pool.map(self._score, sources, parsed))

    def _score(self, source: str | None, tests: Sequence[InputOutput] | Assertions | None) -> float | None:
        if tests is None:
            return None
        if source is None:
            return 0.0
        if isinstance(tests, Assertions):
            passed = count_assertions(
                source, tests, limits=self.assert_limits, allow_unsandboxed=self.allow_unsandboxed
            )
            total = len(tests.tests)
        else:
            passed, total = self._count_outputs(source, tests), len(tests)
        return passed / total if self.share else float(passed == total)

    def _count_outputs(self, source: str, tests: Sequence[InputOutput]) -> int:
        passed = 0
        for test in tests:
            program = Program(source=source, stdin=test.input, limits=self.io_limits)
            (ran,) = run_programs([program], workers=1, allow_unsandboxed=self.allow_unsandboxed)
            right = ran.kind == "ok" and outputs_equal(ran.stdout.decode(errors="replace"), test.output)
            if not (right or self.share):
                break
            passed += right
        return passed


def code_reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    tests: Sequence[Any],
    **columns: object,
) -> list[float | None]:
    """1.0 where the completion's program passes all hidden tests, else 0.0.

    Other settings: `CodeReward(share=True, ...)` makes a function of the same signature.

    Args:
      prompts: one a row; one that ends in `<think>` makes a completion that never closes it unanswered.
      completions: one a row.
      completion_ids: not used.
      tests: one a row, as `parse_tests` reads them; None or an empty list where there are none.
      **columns: not used.

    Returns:
      One score a row, None for a row without tests, 0.0 for a completion without a program.

    Raises:
      ValueError: the numbers of rows differ, a prompt or completion is not a string, or tests are malformed.
      SandboxUnavailable: programs cannot be isolated here.

    Source: DeepSeek-R1 paper, section 2.2.2.
    """
    return CodeReward()(prompts, completions, completion_ids, tests=tests)


def extract_program(prompt: str, completion: str) -> str | None:
    """The program of a completion: its last fenced block of Python.

    Thoughts hold no answers: where there is a `</think>`, only what follows the last one counts, and after a `<think>`
    that is never closed, or that the prompt opened, there is nothing.

    Args:
      prompt: what the model was given.
      completion: what it wrote.

    Returns:
      What stands in the last closed block that is labelled python, python3 or py; None where there is none.
    """
    before, closed, final = completion.rpartition("</think>")
    if not closed:
        final = "" if prompt.rstrip().endswith("<think>") else completion.partition("<think>")[0]
    program: str | None = None
    fence, label = "", ""
    lines: list[str] = []
    for line in final.split("\n"):
        match = _FENCE.fullmatch(line)
        if not fence and match:
            fence, label, lines = match[1], match[2].lower(), []
        elif fence and match and match[1].startswith(fence) and not match[2]:
            program = "\n".join(lines) + "\n" if label in _PYTHON else program
            fence = ""
        elif fence:
            lines.append(line)
    return program


_TEXTS = ("setup", "test", "entry_point")


def parse_tests(row: Any) -> list[InputOutput] | Assertions | None:
    """Reads a row of the `tests` column.

    Args:
      row: None; a list of {"input": str, "output": str} (LiveCodeBench; a "testtype" must be "stdin"); a list of
        assert statements (MBPP); {"asserts": [...], "setup": str} for those that need imports; or {"test": str,
        "entry_point": str, "setup": str} where "test" defines check(candidate) (HumanEval; its prompt makes a setup,
        so that helpers of the tests are not the program's). "setup" may be left out. JSON text of one of these too.

    Returns:
      The tests; None where there are none.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"code_reward: tests: got {row[:80]!r}, wanted JSON ({error}); correct the row") from None
    if row is None or (isinstance(row, list | tuple) and not row):
        return None
    if isinstance(row, list | tuple) and all(isinstance(test, str) for test in row):
        return Assertions(tests=tuple(row))
    if isinstance(row, list | tuple) and all(isinstance(test, Mapping) for test in row):
        return [_input_output(test) for test in row]
    if isinstance(row, Mapping) and not all(isinstance(row.get(name, ""), str) for name in _TEXTS):
        raise ValueError(
            f"code_reward: tests: got {repr(row)[:120]}, wanted text in {', '.join(_TEXTS)}; correct the row"
        )
    if isinstance(row, Mapping) and set(row) <= {"asserts", "setup"} and _strings(row.get("asserts")):
        return Assertions(tests=tuple(row["asserts"]), setup=row.get("setup", "")) if row["asserts"] else None
    if isinstance(row, Mapping) and {"test", "entry_point"} <= set(row) <= {"test", "entry_point", "setup"}:
        setup = row.get("setup", "") + "\n" + row["test"]
        return Assertions(tests=(f"check({CANDIDATE})",), setup=setup, entry_point=row["entry_point"])
    raise ValueError(
        f"code_reward: tests: got {repr(row)[:120]}, wanted None, a list of input and output, a list of assert"
        " statements, or a mapping of asserts or of test and entry_point; convert the column"
    )


def outputs_equal(got: str, wanted: str) -> bool:
    """Compares what a program printed with what it should have.

    Both are stripped and split into lines, each line stripped. There must be as many lines, and each pair must be the
    same text or, word for word, the same finite numbers.

    Args:
      got: the program's standard output.
      wanted: the test's.

    Returns:
      Whether they agree.

    Source: LiveCodeBench, lcb_runner/evaluation/testing_util.py.
    Differs: infinities and NaN are compared as text.
    """
    lines, wanted_lines = got.strip().split("\n"), wanted.strip().split("\n")
    return len(lines) == len(wanted_lines) and all(map(_same_line, lines, wanted_lines))


def _input_output(test: Mapping[str, Any]) -> InputOutput:
    kind = test.get("testtype", "stdin")
    if kind != "stdin" or not all(isinstance(test.get(key), str) for key in ("input", "output")):
        raise ValueError(
            f"code_reward: tests: got {repr(dict(test))[:120]}, wanted input and output as strings and no testtype but"
            " stdin; write calls of functions as assert statements"
        )
    return InputOutput(input=test["input"], output=test["output"])


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _same_line(line: str, wanted: str) -> bool:
    line, wanted = line.strip(), wanted.strip()
    if line == wanted:
        return True
    numbers, wanted_numbers = _numbers(line), _numbers(wanted)
    return numbers is not None and numbers == wanted_numbers


def _numbers(line: str) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return numbers if all(number.is_finite() for number in numbers) else None
