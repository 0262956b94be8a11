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


def test_a_run_costs_less_than_its_grader(tmp_path):
    """By processor time, so that the law does not depend on what else the machine does; once warm.

    The grader's own speed is held by tests/rewards/test_throughput.py; a run drains it and adds little.
    """
    task = TASKS["math500"]
    with Graders() as graders:
        for seed in (1, 2):
            folder = tmp_path / str(seed)
            folder.mkdir()
            completions, gold, _ = mix(seed)
            rows = [{"problem": "?", "answer": f"\\boxed{{{answer}}}"} for answer in gold]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            benchmark = Benchmark(task, task.problems(open_source(str(folder / "rows.jsonl"))), "deepseek", 1, 0)
            held = Samples(folder)
            with Progress(len(rows), "test", console=Console(quiet=True)) as progress:
                begin, before, alone = time.perf_counter(), processor_seconds(graders.math), time.process_time()
                run(benchmark, Recorded(completions), graders, held, progress)
                wall, work = time.perf_counter() - begin, processor_seconds(graders.math) - before
                own = time.process_time() - alone
            print(
                f"{len(rows) / wall:.0f} answers/s, {2 * len(rows) / work:.0f} by processor time on two cores", end=" "
            )
            print(f"({len(rows) / own:.0f} without the grader's processes)")
            assert len(held) == len(rows)
    assert len(rows) / own >= 500 and own < work - own
