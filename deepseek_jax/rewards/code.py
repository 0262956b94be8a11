"""Code: does the program in a completion pass the hidden tests?"""

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from deepseek_jax.rewards.assertions import PACKAGES, Assertions, TestsUnusable, count_assertions, wanted_names
from deepseek_jax.rewards.outputs import outputs_equal
from deepseek_jax.rewards.programs import extract_program
from deepseek_jax.rewards.protocol import check_strings
from deepseek_jax.rewards.sandbox import Limits, Program, available, processors, run_program
from deepseek_jax.rewards.tests_column import InputOutput, parse_tests

_OUTPUT_ROOM = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CodeReward:
    """Scores completions by hidden tests, with TRL's signature.

    Args:
      share: False: 1.0 where every test passes, else 0.0. True: the share of tests that pass.
      io_limits: of a program on one input; by default 6 s. It may print as much as is wanted and 1 MiB more, or
        `output_bytes` if that is more.
      assert_limits: of a program on all its assertions; by default 3 s.
      tolerance: by how much a printed decimal fraction may miss the wanted one, absolutely or in proportion; 0 for
        LiveCodeBench's exact comparison. See `outputs_equal`.
      reference: name of a column with right programs, None in a row without one. Where a program fails, its tests are
        tried on that too, once, and a row whose own reference fails is an error: its tests are wrong.
      workers: rows graded at once; None: one a processor.
      allow_unsandboxed: see `deepseek_jax.rewards.sandbox.run_program`.

    Source: DeepSeek-R1 paper, section 2.2.2 (compiler feedback on predefined test cases); LiveCodeBench and HumanEval
      (time limits).
    """

    share: bool = False
    io_limits: Limits = Limits(seconds=6.0)
    assert_limits: Limits = Limits(seconds=3.0)
    tolerance: float = 1e-6
    reference: str | None = None
    workers: int | None = None
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"CodeReward: workers: got {self.workers}, wanted 1 or more, or None for one a processor")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"CodeReward: tolerance: got {self.tolerance}, wanted a finite number, 0 or more")

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: object = None,
        *,
        tests: Sequence[Any],
        **columns: object,
    ) -> list[float | None]:
        """Scores the rows.

        Args:
          prompts, completions, completion_ids: as of `RewardFunction`.
          tests: one a row, as `parse_tests` reads them; None or an empty list where there are none.
          **columns: `reference` among them.

        Returns:
          One score a row, None for a row without tests, 0.0 for a completion without a program.

        Raises:
          ValueError: the numbers of rows differ, a prompt or completion is not a string, or tests are malformed.
          TestsUnusable: a row's tests fail through no fault of the program's; nothing is known of the program then.
          SandboxUnavailable: programs cannot be isolated here, or this machine is out of memory or too busy.
        """
        check_strings("code_reward", prompts, completions)
        if len(tests) != len(completions):
            raise ValueError(
                f"code_reward: tests: got {len(tests)} rows, wanted {len(completions)}, one a completion;"
                " repeat the column as the prompts are"
            )
        parsed = [parse_tests(row) for row in tests]
        names = [wanted_names(row) if isinstance(row, Assertions) else frozenset() for row in parsed]
        sources = [extract_program(*row) for row in zip(prompts, completions, names, strict=True)]
        references = self._references(columns, len(completions))
        if self.workers == 1 or len(parsed) < 2:
            return _known([self._tried_score(*row) for row in zip(sources, parsed, references, strict=True)])
        available()  # once, before the threads ask
        with ThreadPoolExecutor(self.workers or processors()) as pool:
            return _known(list(pool.map(self._tried_score, sources, parsed, references)))

    def _tried_score(self, *row: Any) -> float | None | TestsUnusable:
        try:
            return self._score(*row)
        except TestsUnusable as error:
            return error

    def _references(self, columns: Mapping[str, object], rows: int) -> Sequence[str | None]:
        if self.reference is None:
            return [None] * rows
        found = columns.get(self.reference)
        if not (
            isinstance(found, list | tuple) and len(found) == rows and all(isinstance(t, str | None) for t in found)
        ):
            raise ValueError(
                f"code_reward: {self.reference}: got {found!r:.80}, wanted a program or None for each of {rows} rows;"
                " name the column of right programs by `reference`, or leave it out"
            )
        return found

    def _score(
        self, source: str | None, tests: Sequence[InputOutput] | Assertions | None, reference: str | None
    ) -> float | None:
        if tests is None:
            return None
        if source is None:
            return 0.0
        passed = self._count(source, tests)
        hashable = tests if isinstance(tests, Assertions) else tuple(tests)
        if passed < len(tests) and reference is not None and not _passes(self, reference, hashable):
            raise TestsUnusable("code_reward: tests: the row's own reference program fails them; correct the row")
        return passed / len(tests) if self.share else float(passed == len(tests))

    def _count(self, source: str, tests: Sequence[InputOutput] | Assertions) -> int:
        if isinstance(tests, Assertions):
            return count_assertions(source, tests, limits=self.assert_limits, allow_unsandboxed=self.allow_unsandboxed)
        return self._count_outputs(source, tests)

    def _count_outputs(self, source: str, tests: Sequence[InputOutput]) -> int:
        passed = 0
        for test in tests:
            room = max(self.io_limits.output_bytes, len(test.output.encode(errors="replace")) + _OUTPUT_ROOM)
            limits = replace(self.io_limits, output_bytes=room)
            program = Program(source=source, stdin=test.input, limits=limits, packages=PACKAGES)
            ran = run_program(program, allow_unsandboxed=self.allow_unsandboxed)
            right = ran.kind == "ok" and outputs_equal(
                ran.stdout.decode(errors="replace"), test.output, tolerance=self.tolerance
            )
            if not (right or self.share):
                break
            passed += right
        return passed


def _known(found: Sequence[float | None | TestsUnusable]) -> list[float | None]:
    """The scores, or an error that has those of the other rows."""
    errors = {row: of for row, of in enumerate(found) if isinstance(of, TestsUnusable)}
    scores = [None if row in errors else of for row, of in enumerate(found)]
    if errors:
        first = errors[min(errors)]
        raise TestsUnusable(str(first), scores, errors) from first
    return scores


@functools.lru_cache(maxsize=4096)
def _passes(reward: CodeReward, reference: str, tests: tuple[InputOutput, ...] | Assertions) -> bool:
    """Whether a row's reference program passes its tests."""
    names = wanted_names(tests) if isinstance(tests, Assertions) else frozenset()
    program = extract_program("", reference, names) or reference
    return reward._count(program, tests) == len(tests)


code_reward = CodeReward()
"""The reward of R1: 1.0 where the completion's program passes all hidden tests, else 0.0."""
