"""One benchmark's samples drawn, graded while others are drawn, and kept; what is there already is not drawn again."""

import time
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

from deepseek_jax.evals.drawing import Drawer, Drawn, Wanted
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.measures import clustered
from deepseek_jax.evals.samples import Key, Samples
from deepseek_jax.evals.task import Answered, Grade, Problem, Task
from deepseek_jax.generation.text import seeds_for
from deepseek_jax.report.progress import Progress
from deepseek_jax.rewards.sandbox import processors

_LOOKS = 0.5  # seconds between two running scores, each of which is worked out of all samples


class Benchmark(NamedTuple):
    """What is asked: a task's problems in a style, so many samples of each, by one seed."""

    task: Task
    problems: Sequence[Problem]
    style: str
    samples: int
    seed: int

    def keys(self, budget: int = -1) -> list[Key]:
        """Of all samples, problem by problem."""
        count = range(len(self.problems))
        return [Key(self.task.name, number, sample, budget) for number in count for sample in range(self.samples)]

    def wanted(self, key: Key) -> Wanted:
        """A sample to draw: its seed is a function of the run's, the benchmark, the problem and the sample's number."""
        style = self.task.style(self.style)
        (seed,) = seeds_for(self.seed, zlib.crc32(self.task.name.encode()), key.number, key.sample, count=1)
        budget = None if key.budget < 0 else key.budget
        return Wanted(style.write(self.problems[key.number]), seed, style.stop, budget)


def check(benchmark: Benchmark, drawer: Drawer) -> None:
    """Refuse a problem that the model cannot be asked, before anything is drawn or written; ValueError names it."""
    name = benchmark.task.name
    for number, problem in enumerate(benchmark.problems):
        try:
            drawer.check([benchmark.wanted(Key(name, number, 0))])
        except ValueError as told:
            reason = str(told).removeprefix("prompt 0: ")
            raise ValueError(f"{name}: problem {number} ({problem.id:.60}): {reason}") from None


def run(benchmark: Benchmark, drawer: Drawer, graders: Graders, held: Samples, progress: Progress) -> None:
    """Draw and grade what is not there yet.

    Args:
        benchmark: what is asked.
        drawer: where samples come from.
        graders: open.
        held: the samples that are there; new ones are added as they are graded.
        progress: shows how many are done, and the running score with its error.
    """
    draw(benchmark, [key for key in benchmark.keys() if held.get(key) is None], drawer, graders, held, progress)


def draw(
    benchmark: Benchmark,
    missing: Sequence[Key],
    drawer: Drawer,
    graders: Graders,
    held: Samples,
    progress: Progress,
) -> None:
    """Draw and grade these samples."""
    if not missing:
        return
    wanted = [benchmark.wanted(key) for key in missing]
    grading = _Grading(benchmark, graders, held, progress)
    before = time.perf_counter()
    try:
        for number, drawn in drawer(wanted):
            now = time.perf_counter()
            grading.add(missing[number], wanted[number], drawn, now - before)
            before = now
    except BaseException:
        grading.stop()
        raise
    grading.finish()


class _Grading:
    """Grades in threads what the drawer gives; several samples in a call where the task takes them so."""

    def __init__(self, benchmark: Benchmark, graders: Graders, held: Samples, progress: Progress):
        self._benchmark, self._graders, self._held, self._progress = benchmark, graders, held, progress
        self._waiting: deque[tuple[Key, Wanted, Drawn, float]] = deque()
        self._pool = ThreadPoolExecutor(processors(), thread_name_prefix="grading")
        self._started: deque[Future] = deque()
        self._lock, self._looked = Lock(), 0.0
        self._scores: dict[int, list[float | None]] = {}
        for key in benchmark.keys():
            if (record := held.get(key)) is not None:
                self._scores.setdefault(key.number, []).append(record["score"])

    def add(self, key: Key, wanted: Wanted, drawn: Drawn, seconds: float) -> None:
        self._waiting.append((key, wanted, drawn, seconds))
        self._started.append(self._pool.submit(self._grade))
        while self._started and self._started[0].done():
            self._started.popleft().result()

    def finish(self) -> None:
        try:
            for future in self._started:
                future.result()
        finally:
            self.stop()

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _grade(self) -> None:
        taken = []
        while len(taken) < self._benchmark.task.batch:
            try:
                taken.append(self._waiting.popleft())
            except IndexError:
                break
        if not taken:
            return
        task, style = self._benchmark.task, self._benchmark.task.style(self._benchmark.style)
        problems = self._benchmark.problems
        rows = [Answered(problems[key.number], style, drawn.prompt, drawn.text) for key, _, drawn, _ in taken]
        grades = task.grade(rows, self._graders)
        records = [self._record(*of, grade) for of, grade in zip(taken, grades, strict=True)]
        self._held.append(records)
        with self._lock:
            for record in records:
                self._scores.setdefault(record["number"], []).append(record["score"])
            self._progress.update(self._progress.step + len(records), **self._running())

    def _running(self) -> dict[str, str]:
        now = time.monotonic()
        if now - self._looked < _LOOKS and self._progress.step < self._progress.total - 1:
            return {}
        self._looked = now
        found = clustered(list(self._scores.values()))
        return {} if found is None else {"pass@1": f"{100 * found.mean:.1f} ± {100 * found.stderr:.1f} %"}

    def _record(self, key: Key, wanted: Wanted, drawn: Drawn, seconds: float, grade: Grade) -> dict[str, Any]:
        return {
            "benchmark": key.benchmark,
            "number": key.number,
            "id": self._benchmark.problems[key.number].id,
            "sample": key.sample,
            "budget": wanted.budget,
            "seed": wanted.seed,
            "asked": wanted.text,
            "opened": drawn.prompt.rstrip().endswith("<think>"),
            "completion": drawn.text,
            "score": grade.score,
            "lenient": grade.lenient,
            "answer": grade.answer,
            "right": self._benchmark.problems[key.number].answer,
            "reason": grade.reason,
            "parts": dict(grade.parts),
            "prompt_tokens": drawn.prompt_tokens,
            "tokens": drawn.tokens,
            "thinking_tokens": drawn.thinking_tokens,
            "truncated": not drawn.finished,
            "unclosed": drawn.unclosed,
            "seconds": round(seconds, 6),
        }
