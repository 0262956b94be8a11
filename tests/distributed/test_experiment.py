"""R1-Zero on eight devices: a mesh learns as one device does, and two processes of four as one of eight."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from deepseek_jax import distributed
from deepseek_jax.commands import toy
from deepseek_jax.commands import train as r1_zero
from deepseek_jax.commands.settings_file import with_values
from deepseek_jax.commands.train_settings import defaults
from deepseek_jax.commands.train_setup import prepare
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rewards.recipe import Rewards
from tests.checkpoint.folders import QWEN2
from tests.distributed import launch as starter

# What a run does that costs as little as one can: two steps of each stage, and all that is around them.
SMALL = with_values(
    defaults({}),
    {
        **{"train_questions": 32, "eval_questions": 8, "terms": 2, "largest": 19},
        **{"cold_start_examples": 16, "cold_start_epochs": 2, "cold_start_batch": 16},
        **{"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "eval_every": 2, "save_every": 2},
    },
)
MESH = {"mesh_fsdp": 2, "mesh_expert": 2, "mesh_tensor": 2}


def shallow(name: str) -> ModelConfig:
    """One layer, with experts: less to compile."""
    tiny = preset(name)
    return dataclasses.replace(tiny, num_hidden_layers=1, moe=dataclasses.replace(tiny.moe, first_k_dense_replace=0))


def rows(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(("time", "per_second"))} for row in read_metrics(folder)]


def assert_close(found: list[dict], wanted: list[dict], tolerance: float) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for got, row in zip(found, wanted, strict=True):
        for name, value in row.items():
            close = pytest.approx(value, rel=tolerance, abs=tolerance) if isinstance(value, float) else value
            assert got[name] == close, (row["stage"], row["step"], name)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def launch(monkeypatch):
    """Starts laws of this file."""
    monkeypatch.setattr(starter, "CODE", starter.CODE.replace("laws", "test_experiment"))
    return starter.launch


# --- what the processes do -----------------------------------------------------------------------


def a_dense_model_is_reinforced(folder: Path, /) -> None:
    reinforced(
        folder, dataclasses.replace(QWEN2, num_hidden_layers=1), {"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}
    )


def one_with_experts_is_reinforced(folder: Path, /) -> None:
    reinforced(folder, shallow("tiny"), MESH)


def reinforced(folder: Path, architecture: ModelConfig, mesh: dict[str, int]) -> None:
    """By two GRPO steps on one device, and on a mesh of eight."""
    toy.preset = lambda name: architecture
    reward = combine({"accuracy": by_length_and_first_token}, {"accuracy": 1.0})
    graded = Rewards(reward, reward, dict)
    changes = {"beta": 0.1, "warmup": 1, "eval_every": 3}
    for name, sizes in (("one", {}), ("mesh", mesh)):
        config = with_values(SMALL, {"output": folder / name, **changes, **sizes})
        setup = prepare(config, graded)
        assert len(jax.tree.leaves(setup.model.weights)[0].sharding.device_set) == (8 if sizes else 1)
        with MetricLog(config.output) as log:
            r1_zero.reinforce(config, setup, setup.model.weights, log, "a run")


def by_length_and_first_token(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float]:
    """A reward that samples of an untrained model differ in."""
    return [float(len(ids) % 3 + ids[0] % 2) for ids in completion_ids]


def the_experiment_runs(folder: Path, /) -> None:
    """On all eight devices, with its layers in a stack; a process notes which files of the run it wrote."""
    toy.preset = shallow
    written = []

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            written.append(str(arguments[0]))

    sys.addaudithook(note)
    run = folder / "run"
    r1_zero.main(with_values(SMALL, {"output": run, "scan_layers": True, "remat": "layers", **MESH}))
    of_run = [path for path in written if str(run) in path and "/checkpoints/" not in path]
    (folder / f"written.{distributed.process_index()}.json").write_text(json.dumps(of_run))


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("law", [a_dense_model_is_reinforced, one_with_experts_is_reinforced])
def test_a_mesh_reinforces_as_one_device_does(law, tmp_path, launch):
    """Every number that is logged of two steps, loss and KL term among them, to 1e-4; the samples are the same."""
    launch(law, tmp_path, processes=1, devices=8)
    one, mesh = (rows(tmp_path / name) for name in ("one", "mesh"))
    assert {"loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"} <= one[0].keys()
    assert one[0]["grad_norm"] > 0.1 and one[1]["kl"] > 0 and one[0]["reward_std"] > 0.1
    assert_close(mesh, one, tolerance=1e-4)


@pytest.mark.slow
def test_two_processes_run_the_experiment_as_one(tmp_path, launch):
    launch(the_experiment_runs, tmp_path / "one", processes=1, devices=8)
    main, other = launch(the_experiment_runs, tmp_path / "two", processes=2, devices=4)
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    assert "accuracy after GRPO" in main.out and other.out == ""
    for key in ("accuracy_before", "accuracy_after", "tokens", "parameters"):
        assert summary(one)[key] == summary(two)[key], key
    assert len(rows(one)) == 4
    assert_close(rows(two), rows(one), tolerance=1e-5)
    wanted, got = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(got[name], tensor, rtol=0, atol=1e-4, err_msg=name)
    wrote = [json.loads((tmp_path / "two" / f"written.{number}.json").read_text()) for number in (0, 1)]
    assert any(path.endswith("metrics.jsonl") for path in wrote[0]) and wrote[1] == []
