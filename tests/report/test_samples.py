"""Sample tables: whole, in order, each step once, whatever kills the run."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.examples import Prompt
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.samples import Sample, SampleGroup, SampleLog, read_samples, sample_groups
from deepseek_jax.rl.rollout import Rollout


def groups(text: str = "c", **values) -> list[SampleGroup]:
    sample = {"rewards": {"accuracy": 1.0, "format": None}, "reward": 1.0, "advantage": -0.5, "length": 3}
    return [SampleGroup("p", "2", [Sample(text, **(sample | values), finished=True)])]


def steps(folder: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_samples(folder)]


@given(text=st.text())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, text: str):
    folder = tmp_path_factory.mktemp("run")
    SampleLog(folder).write(1, groups(text), "grpo")
    sample = {
        "completion": text,
        "rewards": {"accuracy": 1.0, "format": None},
        "reward": 1.0,
        "advantage": -0.5,
        "length": 3,
        "finished": True,
    }
    assert read_samples(folder) == [
        {"stage": "grpo", "step": 1, "groups": [{"prompt": "p", "answer": "2", "samples": [sample]}]}
    ]


def test_lines_are_strict_json(tmp_path: Path):
    SampleLog(tmp_path).write(1, groups("\ud800", advantage=math.nan, reward=math.inf), "grpo")

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "samples.jsonl").read_text(), parse_constant=refuse)
    assert row["groups"][0]["samples"][0]["advantage"] is None


def test_what_reward_functions_logged_of_a_sample_is_read_back(tmp_path: Path):
    extra = {"parsed": "\\frac{1}{2}\x1b[31m", "tries": 3, "share": 0.5, "sure": True}
    SampleLog(tmp_path).write(1, groups(extra=extra), "grpo")
    assert read_samples(tmp_path)[0]["groups"][0]["samples"][0]["extra"] == extra


def test_the_first_step_and_every_nth_is_wanted(tmp_path: Path):
    assert [step for step in range(1, 25) if SampleLog(tmp_path, every=10).wants(step)] == [1, 10, 20]
    with pytest.raises(ValueError, match="every: got 0"):
        SampleLog(tmp_path, every=0)


@given(
    plan=st.lists(st.tuples(st.sampled_from(["sft", "grpo"]), st.integers(1, 4)), max_size=12),
    stage=st.sampled_from(["sft", "grpo", "other"]),
    step=st.integers(0, 12),
)
def test_truncating_has_the_law_of_the_metrics(tmp_path_factory, plan, stage, step):
    """The same steps written to both logs, the same ones are left in both."""
    folder = tmp_path_factory.mktemp("run")
    metrics, samples, last = MetricLog(folder), SampleLog(folder), {"sft": 0, "grpo": 0}
    for name, more in plan:
        last[name] += more
        metrics.write(last[name], {"loss": 1.0}, name)
        samples.write(last[name], groups(), name)
    metrics.truncate(stage, step)
    samples.truncate(stage, step)
    assert steps(folder) == [(row["stage"], row["step"]) for row in (read_metrics(folder) if plan else [])]
    assert all(number <= step for name, number in steps(folder) if name == stage)
    metrics.close()


def test_a_step_that_goes_back_is_refused_until_truncated(tmp_path: Path):
    log = SampleLog(tmp_path)
    log.write(10, groups(), "grpo")
    with pytest.raises(ValueError, match=r"step 5 comes after step 10: call truncate\('grpo', 4\)"):
        log.write(5, groups(), "grpo")
    log.truncate("grpo", 4)
    log.write(5, groups(), "grpo")
    assert steps(tmp_path) == [("grpo", 5)]


@given(cut=st.integers(min_value=1, max_value=100))
def test_a_half_written_last_line_is_dropped(tmp_path_factory: pytest.TempPathFactory, cut: int):
    folder = tmp_path_factory.mktemp("run")
    log = SampleLog(folder)
    log.write(1, groups(), "grpo")
    log.write(2, groups(), "grpo")
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert steps(folder) == [("grpo", 1)]
    SampleLog(folder).write(2, groups("again"), "grpo")
    assert [row["groups"][0]["samples"][0]["completion"] for row in read_samples(folder)] == ["c", "again"]


# Is killed while it writes, or after: no more rows than are read in no time.
KILLED = """
import sys, time
from deepseek_jax.report.samples import Sample, SampleGroup, SampleLog
log = SampleLog(sys.argv[1], every=1)
for step in range(1, 400):
    log.write(step, [SampleGroup("p", None, [Sample("c" * 5000, {}, 0.0, 0.0, 1, False)] * 4)], "grpo")
    if step == 20:
        print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_run_resumes_with_every_step_once(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(steps(tmp_path)) >= 20
    log = SampleLog(tmp_path, every=1)
    log.truncate("grpo", 15)
    for step in range(16, 31):
        log.write(step, groups(), "grpo")
    assert steps(tmp_path) == [("grpo", step) for step in range(1, 31)]


@pytest.mark.parametrize(
    ("wanted", "left"), [(None, list(range(1, 8))), (1, [7]), (2, [1, 7]), (3, [1, 4, 7]), (99, list(range(1, 8)))]
)
def test_reading_takes_lines_at_even_distances_of_each_stage(tmp_path: Path, wanted, left):
    log = SampleLog(tmp_path)
    log.write(1, groups(), "sft")
    for step in range(1, 8):
        log.write(step, groups(), "grpo")
    assert [row["step"] for row in read_samples(tmp_path, steps=wanted) if row["stage"] == "grpo"] == left
    assert ("sft", 1) in [(row["stage"], row["step"]) for row in read_samples(tmp_path, steps=wanted)]


def test_a_run_without_samples_has_none(tmp_path: Path):
    assert read_samples(tmp_path) == read_samples(tmp_path / "samples.jsonl", steps=3) == []
    with pytest.raises(ValueError, match="steps: got 0"):
        read_samples(tmp_path, steps=0)


def test_groups_come_from_a_rollout_with_what_the_loss_saw():
    prompts = [Prompt(f"p{p}", [1], {"answer": p} if p else {}) for p in range(3)]
    drawn = [SimpleNamespace(text=f"c{row}", tokens=np.arange(row), finished=row % 2 == 0) for row in range(6)]
    rewards = np.arange(6, dtype=np.float32).reshape(3, 2)
    rollout = Rollout(prompts, drawn, rewards, {"accuracy": [0.0, 1.0, None, 3.0, 4.0, 5.0]})
    found = sample_groups(rollout, -rewards, prompts=2)
    assert [(g.prompt, g.answer) for g in found] == [("p0", None), ("p1", "1")]
    assert found[1].samples == [
        Sample("c2", {"accuracy": None}, 2.0, -2.0, 2, True),
        Sample("c3", {"accuracy": 3.0}, 3.0, -3.0, 3, False),
    ]
    assert [len(g.samples) for g in sample_groups(rollout, -rewards, prompts=9, samples=1)] == [1, 1, 1]
    assert all(not sample.extra for group in found for sample in group.samples)
    logged = rollout._replace(extra={"parsed": ["0", "1", None, "3", "4", "5"], "tries": [0, 1, 2, None, 4, 5]})
    of_second = sample_groups(logged, -rewards, prompts=2)[1].samples
    assert [sample.extra for sample in of_second] == [{"tries": 2}, {"parsed": "3"}]
    with pytest.raises(ValueError, match=r"advantages: got shape \(6,\), wanted \(3, 2\)"):
        sample_groups(rollout, rewards.ravel(), prompts=1)
