"""Grading never limits: answers a second through a whole run; run with -m slow -s to see the figures."""

import json
import time

import pytest
from rich.console import Console

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.drawing import Drawn
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.run import Benchmark, run
from deepseek_jax.evals.samples import Samples
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.report.progress import Progress
from tests.rewards.test_throughput import mix, processor_seconds

pytestmark = pytest.mark.slow


class Recorded:
    """Gives recorded completions as fast as they are taken."""

    def __init__(self, texts):
        self.texts = texts

    def check(self, wanted):
        pass

    def __call__(self, wanted):
        yield from ((number, Drawn("", text, 100, 50, True)) for number, text in enumerate(self.texts))


def timed(task, rows, texts, folder):
    """Wall seconds of a run, processor seconds of it and of the mathematical grader, and its samples."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = task.problems(open_source(str(folder / "rows.jsonl")))
    held = Samples(folder)
    with Graders() as graders, Progress(len(rows), "test", console=Console(quiet=True)) as progress:
        graders.math.grade([("x+1", "1+x")] * 2)
        begin, before = time.perf_counter(), processor_seconds(graders.math)
        run(Benchmark(task, problems, "deepseek", 1, 0), Recorded(texts), graders, held, progress)
        return time.perf_counter() - begin, processor_seconds(graders.math) - before, held


def test_five_hundred_mathematical_answers_a_second(tmp_path):
    """By processor time on two cores, so that the law does not depend on what else the machine does."""
    completions, gold, _ = mix(3)
    rows = [{"problem": "?", "answer": f"\\boxed{{{answer}}}"} for answer in gold]
    wall, work, held = timed(TASKS["math500"], rows, completions, tmp_path)
    print(f"{len(rows) / wall:.0f} answers/s, {2 * len(rows) / work:.0f} by processor time on two cores")
    assert len(held) == len(rows) and 2 * len(rows) / work >= 500
