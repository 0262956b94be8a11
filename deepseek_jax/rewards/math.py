"""Accuracy of mathematical answers: exactly where that is enough, else by computer algebra in a killable process."""

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, NamedTuple

from deepseek_jax.rewards.answers import answers_match, without_percent
from deepseek_jax.rewards.pool import PoolConfig, WorkerPool
from deepseek_jax.rewards.protocol import RewardFunction, RowsFailed, check_answers, check_strings
from deepseek_jax.text.answers import Extraction, answer_of

_REMEMBERED = 4096
_QUOTED_CHARS = 80
_COUNTED = dict(exact="exact", algebra="algebra", timeouts="timeout", memory="memory", deaths="died", errors="error")


class Verdict(NamedTuple):
    """The grader's word on an answer.

    Attributes:
      right: whether it is the right one; False without a verdict.
      how: "exact", decided without algebra; "algebra"; "timeout" or "memory", an answer that algebra cannot take, which
        counts as wrong; "died" or "error", the grader's own failure, which says nothing of the answer (see
        `pool.Outcome`).
      reason: why there was no verdict, else "".
    """

    right: bool
    how: Literal["exact", "algebra", "timeout", "memory", "died", "error"]
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the grader failed, so that nobody knows if the answer is right."""
        return self.how in ("died", "error")


class MathGrader:
    r"""Compares final answers with the right ones; use it as a context manager around the whole run.

    Worker processes start with the first answer that needs algebra, and are never inherited by or shared with anything
    else. Equal pairs are graded once, and algebra's verdicts and failures are remembered for the next batches.

    Args:
      config: number of workers and their limits.
      percent: "strict": `10\%` is a tenth, never ten. "either": it is right beside 10 as well, and 10 beside it, as in
        the graders of published benchmarks, whose right answers leave the sign out.

    Raises:
      ValueError: another percent.
    """

    def __init__(self, config: PoolConfig | None = None, *, percent: Literal["strict", "either"] = "strict"):
        if percent not in ("strict", "either"):
            raise ValueError(f"MathGrader: percent: got {percent!r}, wanted 'strict' or 'either'; choose one")
        self._percent = percent
        self._pool = WorkerPool("deepseek_jax.rewards.algebra:grade", config)
        self._counts: Counter[str] = Counter()
        self._restarts = 0
        self._remembered: dict[tuple[str, str], Verdict] = {}

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def grade(self, pairs: Sequence[tuple[str, str]], *, counted: bool = True) -> list[Verdict]:
        """Grades a step's answers together, on all workers.

        Args:
          pairs: (answer, right answer), as strings.
          counted: whether `take_metrics` counts them, and the restarts that they cost.

        Returns:
          One verdict a pair, in order.

        Raises:
          ValueError: the grader is closed and algebra is needed.
          RuntimeError: a worker cannot start.
        """
        if self._percent == "either":
            pairs = [without_percent(*pair) for pair in pairs]
        verdicts = {pair: self._remembered.get(pair) or _exactly(*pair) for pair in pairs}
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        restarts = self._pool.restarts
        outcomes = self._pool.map([list(pair) for pair in undecided]) if undecided else []
        if undecided and len(self._remembered) + len(undecided) > _REMEMBERED:
            self._remembered.clear()
        for pair, (kind, value) in zip(undecided, outcomes, strict=True):
            verdicts[pair] = Verdict(value, "algebra") if kind == "done" else Verdict(False, kind, value)
            self._remembered[pair] = verdicts[pair]
        found = [verdicts[pair] for pair in pairs]
        if counted:
            self._restarts += self._pool.restarts - restarts
            self._counts.update(verdict.how for verdict in found)
        return found

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call, of the answers that count: `grader/answers`, the sum of `grader/exact`,
        `grader/algebra`, `grader/timeouts`, `grader/memory`, `grader/deaths` and `grader/errors`; `grader/restarts` of
        workers, which depends on what is remembered and so may differ in a run that goes on after a stop."""
        counts, self._counts = self._counts, Counter()
        restarts, self._restarts = self._restarts, 0
        found = {"answers": counts.total()} | {name: counts[how] for name, how in _COUNTED.items()}
        return {f"grader/{name}": float(count) for name, count in (found | {"restarts": restarts}).items()}


def math_reward(
    grader: MathGrader, *, extraction: Extraction = "strict", unclosed_box: bool = False, counted: bool = True
) -> RewardFunction:
    r"""Makes the accuracy reward: 1.0 where the completion's final answer is the row's, else 0.0.

    Strict and lenient accuracy are two functions, so that both are reported; give the lenient one weight 0.

    Args:
      grader: compares the answers; it must stay open as long as the function is used.
      extraction: "strict" takes a `\boxed{}` or `<answer>` tags, "lenient" also "the answer is" or the last number.
      unclosed_box: whether a box that is never closed may hold the answer.
      counted: whether the grader's metrics count these answers; False for evaluations, which are not of a step.

    Returns:
      A reward function that needs a column `answer` (string, or None where there is none: the score is then None).
      An answer that takes too much time or memory is wrong. It raises ValueError where the numbers of rows differ or
      something is not a string, and `RowsFailed` where the grader failed: it raised, or its worker died twice.

    Raises:
      ValueError: an unknown extraction.

    Source: DeepSeek-R1 paper, section 2.2.2 (accuracy rewards).
    """
    if extraction not in ("strict", "lenient"):
        raise ValueError(f"math_reward: extraction: got {extraction!r}, wanted 'strict' or 'lenient'; choose one")

    def accuracy(
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        *,
        answer: list[str | None],
        **columns: object,
    ) -> list[float | None]:
        check_strings("math_reward", prompts, completions)
        check_answers("math_reward", answer, len(completions))
        scores: list[float | None] = [None if right is None else 0.0 for right in answer]
        pairs: dict[int, tuple[str, str]] = {}
        for row, (prompt, completion, right) in enumerate(zip(prompts, completions, answer, strict=True)):
            if right is not None:
                found = answer_of(prompt, completion, extraction, unclosed_box=unclosed_box)
                if found is not None:
                    pairs[row] = (found, right)
        errors: dict[int, Exception] = {}
        for row, verdict in zip(pairs, grader.grade(list(pairs.values()), counted=counted), strict=True):
            scores[row] = None if verdict.failed else float(verdict.right)
            if verdict.failed:
                errors[row] = _no_verdict(*pairs[row], verdict)
        if errors:
            raise RowsFailed(str(errors[min(errors)]), scores, errors)
        return scores

    return accuracy


def _no_verdict(answer: str, gold: str, verdict: Verdict) -> RuntimeError:
    shown = f"{answer[:_QUOTED_CHARS]!r} beside {gold[:_QUOTED_CHARS]!r}"
    return RuntimeError(f"math_reward: no verdict on {shown}: {verdict.how}, {verdict.reason}")


class _NeedsAlgebra(Exception):
    pass


def _exactly(answer: str, gold: str) -> Verdict | None:
    """The verdict, None where it needs algebra."""
    try:
        return Verdict(answers_match(answer, gold, _refuse), "exact")
    except _NeedsAlgebra:
        return None


def _refuse(answer: str, gold: str) -> bool:
    raise _NeedsAlgebra
