import json
import math
import os
import signal
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from deepseek_jax.report.metrics import MetricLog, WandbConfig, explain_first_loss, read_metrics


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


# Is killed while it writes, or after: no more rows than are read in no time.
KILLED = """
import sys, time
from deepseek_jax.report.metrics import MetricLog
log = MetricLog(sys.argv[1])
for step in range(1, 400):
    log.write(step, {"loss": 1.0 / step}, "sft")
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


# --- Weights & Biases ------------------------------------------------------------------------------


class Service:
    """Stands for wandb: what the server has of each run, by its id."""

    class Error(Exception):
        pass

    def __init__(self):
        self.errors = SimpleNamespace(Error=self.Error)
        self.asked: list[dict] = []
        self.runs: dict[str, list[tuple[int, dict]]] = {}
        self.metrics: list[tuple[str, str]] = []
        self.open = 0

    def init(self, **settings):
        if settings["project"] == "closed":
            raise self.Error("api_key not configured\n(no-tty)")
        self.asked.append(settings)
        self.open += 1
        history = self.runs.setdefault(settings["id"], [])
        return SimpleNamespace(
            log=lambda values, step: history.append((step, values)),
            define_metric=lambda name, step_metric: self.metrics.append((name, step_metric)),
            finish=self._finish,
        )

    def _finish(self):
        self.open -= 1


@pytest.fixture
def service(monkeypatch) -> Service:
    fake = Service()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("deepseek_jax.report.metrics.find_spec", lambda name: fake)
    return fake


def test_nothing_goes_to_wandb_unasked(tmp_path: Path, service: Service):
    fill(tmp_path)
    assert service.asked == [] and not (tmp_path / "wandb.json").exists()


def test_a_line_is_a_step_there_and_each_stage_has_its_own_axis(tmp_path: Path, service: Service):
    with MetricLog(tmp_path, wandb=WandbConfig(project="p", name="n", offline=True)) as log:
        log.write(1, {"loss": 2.0}, "sft")
        log.write(1, {"loss": 0.0, "reward": math.nan}, "grpo")
    ((first, second),) = service.runs.values()
    assert first == (0, {"sft/loss": 2.0, "sft/step": 1})
    assert second[0] == 1 and second[1]["grpo/loss"] == 0.0 and math.isnan(second[1]["grpo/reward"])
    assert service.metrics == [("sft/*", "sft/step"), ("grpo/*", "grpo/step")]
    (asked,) = service.asked
    assert (asked["project"], asked["name"], asked["mode"]) == ("p", "n", "offline")
    assert (asked["resume"], asked["dir"]) == ("allow", str(tmp_path)) and service.open == 0


def test_a_resumed_run_is_the_same_one_there_with_every_step_once(tmp_path: Path, service: Service):
    """Killed after step 5 with a checkpoint at step 3; then killed again at once; then run to the end."""
    for resumed, end in ((0, 5), (3, 4), (3, 9)):
        log = MetricLog(tmp_path, wandb=WandbConfig(project="p"))
        log.truncate("grpo", resumed)
        for step in range(resumed + 1, end + 1):
            log.write(step, {"loss": 1 / step}, "grpo")
    ((identity, history),) = service.runs.items()
    assert [step for step, _ in history] == list(range(9))
    assert [values["grpo/step"] for _, values in history] == list(range(1, 10))
    assert len(service.asked) == 3 and {asked["id"] for asked in service.asked} == {identity}
    assert steps(tmp_path) == [("grpo", step) for step in range(1, 10)]


def test_a_log_that_was_closed_opens_the_run_again(tmp_path: Path, service: Service):
    log = MetricLog(tmp_path, wandb=WandbConfig(project="p"))
    log.write(1, {"loss": 1.0}, "sft")
    log.close()
    log.write(2, {"loss": 1.0}, "sft")
    log.close()
    assert len(service.runs) == 1 and service.open == 0
    assert [step for history in service.runs.values() for step, _ in history] == [0, 1]


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, service: Service):
    with pytest.raises(ValueError, match=r"wandb: cannot start: api_key not configured \(no-tty\); log in") as error:
        MetricLog(tmp_path, wandb=WandbConfig(project="closed"))
    assert "\n" not in str(error.value)


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.report.metrics.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb: not installed.*pip install 'deepseek_jax\[wandb\]'"):
        MetricLog(tmp_path, wandb=WandbConfig(project="p"))
    with pytest.raises(ValueError, match="wandb project: got an empty name"):
        WandbConfig(project="")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install -e '.[wandb]'")
def test_wandb_itself_takes_a_run_and_its_resume_offline(tmp_path: Path):
    for resumed, end in ((0, 3), (2, 5)):
        with MetricLog(tmp_path, wandb=WandbConfig(project="p", offline=True)) as log:
            log.truncate("grpo", resumed)
            for step in range(resumed + 1, end + 1):
                log.write(step, {"loss": 1 / step}, "grpo")
    identity = json.loads((tmp_path / "wandb.json").read_text())
    assert identity["sent"] == 5
    found = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 2 and all(path.name == f"run-{identity['id']}.wandb" for path in found)
    assert all(path.stat().st_size > 0 for path in found)


# --- the first loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        ({"loss": 0.0, "reward": 0.3}, "is right"),
        ({"loss": -3e-8, "reward": 0.3, "frac_reward_zero_std": 0.9}, "is right"),
        ({"loss": 0.0, "reward": 0.0, "frac_reward_zero_std": 1.0}, "nothing to learn from"),
        ({"loss": 0.01, "reward": 0.3}, None),
        ({"loss": math.nan, "reward": 0.3}, None),
        ({"loss": 0.0}, None),
        ({"reward": 0.3}, None),
    ],
)
def test_a_first_loss_of_zero_is_explained(metrics: dict, word: str | None):
    told = explain_first_loss(metrics)
    assert told is None if word is None else word in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path, name, monkeypatch):
    """Also of TensorBoard's files, whose own library would wait for ever once its thread has died of it."""
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 1.0}, "grpo")
    if name == "tensorboard":
        with Path("/dev/full").open("wb") as full:
            monkeypatch.setattr(log._writers["grpo"]._writer._py_recordio_writer, "_writer", full)
            with pytest.raises(OSError, match=r"No space left on device: .*tensorboard/grpo"):
                log.write(2, {"loss": 1.0}, "grpo")
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    else:
        log.path.unlink()
        log.path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            log.write(2, {"loss": 1.0}, "grpo")
