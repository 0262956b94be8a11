import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from deepseek_jax.train.metrics import MetricLog, read_metrics


def steps(folder: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_metrics(folder)]


def fill(folder: Path) -> None:
    """A run of two stages, five steps each."""
    with MetricLog(folder) as log:
        for stage in ("sft", "grpo"):
            for step in range(1, 6):
                log.write(step, {"loss": 1 / step}, stage)


def shown_by_tensorboard(folder: Path, stage: str) -> dict[str, list[int]]:
    """The steps of each tag that are left once purges are applied as TensorBoard applies them."""
    shown: dict[str, list[int]] = {}
    for path in sorted((folder / "tensorboard" / stage).iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                shown = {tag: [s for s in kept if s < event.step] for tag, kept in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append(event.step)
    return {tag: kept for tag, kept in shown.items() if kept}


def test_what_is_written_is_read_back(tmp_path: Path):
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "rewards/format/mean": np.float32(0.25), "kl": jnp.float32(2.0)}, "grpo")
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 1.7e9
    assert row == {"stage": "grpo", "step": 1, "loss": 0.5, "rewards/format/mean": 0.25, "kl": 2.0}
    assert shown_by_tensorboard(tmp_path, "grpo") == {
        "grpo/loss": [1],
        "grpo/rewards/format/mean": [1],
        "grpo/kl": [1],
    }


def test_lines_are_strict_json_and_keep_nan_and_infinity(tmp_path: Path):
    with MetricLog(tmp_path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}, "sft")

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (raw["a"], raw["b"], raw["c"], raw["d"]) == (None, None, None, 1.0)
    assert raw["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf and "nonfinite" not in row


def test_a_resume_cuts_the_steps_that_will_be_run_again(tmp_path: Path):
    fill(tmp_path)
    with MetricLog(tmp_path) as log:
        log.truncate("grpo", 3)
        assert steps(tmp_path) == [("sft", s) for s in range(1, 6)] + [("grpo", s) for s in range(1, 4)]
        log.write(4, {"loss": 9.0}, "grpo")
    assert steps(tmp_path)[-1] == ("grpo", 4)
    assert shown_by_tensorboard(tmp_path, "grpo") == {"grpo/loss": [1, 2, 3, 4]}
    assert shown_by_tensorboard(tmp_path, "sft") == {"sft/loss": [1, 2, 3, 4, 5]}


def test_a_resume_in_an_early_stage_forgets_the_later_ones(tmp_path: Path):
    fill(tmp_path)
    with MetricLog(tmp_path) as log:
        log.truncate("sft", 5)
        assert steps(tmp_path) == [("sft", s) for s in range(1, 6)]
    assert shown_by_tensorboard(tmp_path, "sft") == {"sft/loss": [1, 2, 3, 4, 5]}
    assert shown_by_tensorboard(tmp_path, "grpo") == {}


def test_a_resume_before_a_stage_logged_anything_keeps_the_stages_before_it(tmp_path: Path):
    fill(tmp_path)
    with MetricLog(tmp_path) as log:
        log.truncate("evaluation", 0)
        assert len(steps(tmp_path)) == 10


def test_opening_a_log_again_keeps_what_is_there(tmp_path: Path):
    """A run killed after its last step still has to write its report from these lines."""
    fill(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricLog(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_half_written_last_line_is_dropped(tmp_path_factory: pytest.TempPathFactory, cut: int):
    folder = tmp_path_factory.mktemp("run")
    with MetricLog(folder) as log:
        for step in (1, 2):
            log.write(step, {"loss": 0.125}, "sft")
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(folder) == [("sft", 1)]
    with MetricLog(folder) as log:
        log.write(2, {"loss": 0.25}, "sft")
    assert [row["loss"] for row in read_metrics(folder)] == [0.125, 0.25]


KILLED = """
import sys
from deepseek_jax.train.metrics import MetricLog
log = MetricLog(sys.argv[1])
for step in range(1, 10**9):
    log.write(step, {"loss": 1.0 / step}, "sft")
    if step == 20:
        print("written", flush=True)
"""


def test_a_killed_run_resumes_with_every_step_once(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(steps(tmp_path)) >= 20
    with MetricLog(tmp_path) as log:
        log.truncate("sft", 15)
        for step in range(16, 31):
            log.write(step, {"loss": 0.0}, "sft")
    assert steps(tmp_path) == [("sft", step) for step in range(1, 31)]


def test_truncate_lets_a_stage_go_back(tmp_path: Path):
    with MetricLog(tmp_path) as log:
        for step in range(1, 5):
            log.write(step, {"loss": 1.0}, "grpo")
        with pytest.raises(ValueError, match=r"step 3 comes after step 4: call truncate\('grpo', 2\)"):
            log.write(3, {"loss": 1.0}, "grpo")
        log.truncate("grpo", 2)
        log.write(3, {"loss": 1.0}, "grpo")
    assert steps(tmp_path) == [("grpo", 1), ("grpo", 2), ("grpo", 3)]
    assert shown_by_tensorboard(tmp_path, "grpo") == {"grpo/loss": [1, 2, 3]}


@pytest.mark.parametrize("stage", ["", "..", "a/b", "a b"])
def test_a_stage_that_cannot_name_a_folder_is_refused(tmp_path: Path, stage: str):
    with MetricLog(tmp_path) as log, pytest.raises(ValueError, match="stage must be"):
        log.write(1, {"loss": 1.0}, stage)
    assert os.listdir(tmp_path) == []


def test_a_reserved_name_is_refused(tmp_path: Path):
    with MetricLog(tmp_path) as log, pytest.raises(ValueError, match="'time' is reserved"):
        log.write(1, {"time": 1.0}, "sft")


@pytest.mark.parametrize(("line", "complaint"), [("{]", "not JSON"), ('{"loss": 1}', "'stage' and 'step'")])
def test_a_spoilt_line_is_named(tmp_path: Path, line: str, complaint: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"stage": "sft", "step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: .*{complaint}"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl: no such file"):
        read_metrics(tmp_path)
