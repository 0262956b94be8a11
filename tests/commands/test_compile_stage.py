"""What `compile` makes of the stages of R1's recipe: by the numbers of the paper's preset, as the stages run it."""

import json
import sys
from pathlib import Path
from typing import get_args

import jax
import pytest

from deepseek_jax.cli import run
from deepseek_jax.commands import compile
from deepseek_jax.commands.compile_stage import StageName, stage_step
from deepseek_jax.commands.r1_presets import PAPER
from deepseek_jax.commands.r1_stages import Maker
from deepseek_jax.commands.settings_file import values_of
from deepseek_jax.config import preset
from deepseek_jax.plan.chips import chip
from deepseek_jax.rl.shared_rows import shared_shape, work_of

MAKE = Maker(PAPER, Path("held_out.jsonl"), "gsm8k", 0)
FILE = Path("rows.jsonl")
STAGES = {
    "cold_start": MAKE.sft("cold_start", model="base", learn=FILE),
    "sft": MAKE.sft("sft", model="base", learn=FILE),
    "rl_1": MAKE.rl("rl_1", model="cold_start", ask=FILE),
    "rl_2": MAKE.rl("rl_2", model="sft", ask=FILE),
}


@pytest.mark.parametrize("name", STAGES)
def test_an_update_learns_by_the_settings_that_its_stage_runs_with(name):
    """All of them, but for how often it says and saves something, and where it is computed."""
    of_run = json.loads(json.dumps(values_of(stage_step(name).run), default=str))
    ran = STAGES[name].settings
    shared = of_run.keys() & ran.keys()
    assert {key: of_run[key] for key in shared} == {key: ran[key] for key in shared}
    assert {"lr", "micro_batches", "balance_alpha", "bias_gamma", "moments", "pack"} <= shared
    assert {*PAPER[name]} - shared <= {"max_length", "weight_accuracy", "weight_format", "weight_language", "late_step"}


def test_the_papers_numbers():
    """arXiv 2501.12948 v2: 8,192 outputs in 16 updates, 128 rows of fine-tuning, 32,768 tokens."""
    found = {name: stage_step(name)[:3] for name in get_args(StageName)}
    assert found["cold_start"] == found["sft"] == ("train", 128, 32_768)
    assert found["rl_1"] == found["rl_2"] == ("grpo", 512, 32_768)
    assert found["rejection"] == found["evaluation"] == ("decode", 16, 32_768)
    assert stage_step("rl_1", "decode")[:3] == ("decode", 256, 32_768)
    assert stage_step("rl_1", "sync").step == "sync"
    assert (stage_step("rl_1").run.temperature, stage_step("rl_2").run.temperature) == (1.0, 0.7)


@pytest.mark.parametrize("prompt", [1, 1_024])
def test_an_update_has_a_sample_a_row(prompt):
    """Of R1, to which completions of 32,768 tokens are so much work that no shared prompt makes up for longer rows."""
    run = stage_step("rl_1").run
    groups = run.prompts_per_step // run.updates_per_rollout
    sizes = {"group_size": run.group_size, "prompt": prompt, "completion": run.max_new_tokens}
    found = shared_shape(work_of(preset("r1-671b")), groups=groups, **sizes)
    assert (found.rows, found.width, found.per_row) == (stage_step("rl_1").batch, prompt - 1 + 32_768, 1)


def tasks(monkeypatch, *given: str) -> list:
    """What the command line would compile, on one device."""
    seen = []
    monkeypatch.setattr(compile, "device_topology", lambda name: (chip("v5p"), jax.devices()[:1]))
    monkeypatch.setattr(compile.compiled, "compile_step", lambda task, of_chip: seen.append(task) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["compile", "--preset", "tiny", "--topology", "v5p:1x1x1", *given])
    try:
        run(compile.main)
    except SystemExit as end:
        return seen or [end.code]
    raise AssertionError("it went on without a compiled step")


def test_the_command_line_takes_a_stage_and_what_is_said_beside_it(monkeypatch):
    [task] = tasks(monkeypatch, "--stage", "rl_1", "--micro-batches", "8", "--moments", "bfloat16")
    assert (task.step, task.batch, task.context, task.micro_batches) == ("grpo", 512, 32_768, 8)
    assert (task.settings.loss.epsilon_high, task.settings.micro_batches) == (10.0, 8)
    assert (task.settings.moments, task.settings.dtype) == ("bfloat16", "bfloat16")
    [task] = tasks(monkeypatch, "--stage", "sft", "--batch", "4", "--context", "64")
    assert (task.step, task.batch, task.context, task.settings.pack) == ("train", 4, 64, True)
    [task] = tasks(monkeypatch, "--stage", "rl_2", "--step", "decode")
    assert (task.step, task.batch, task.context) == ("decode", 256, 32_768)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "step: got none, wanted one: --step STEP, or --stage STAGE of R1's recipe"),
        (("--stage", "sft", "--step", "grpo"), "step: got grpo of the stage sft, wanted train"),
        (("--stage", "rejection", "--step", "train"), "step: got train of the stage rejection, wanted decode"),
    ],
)
def test_what_no_stage_computes_is_refused(given, said, monkeypatch, capsys):
    assert tasks(monkeypatch, *given) == [1]
    assert capsys.readouterr().err.strip() == f"error: {said}"
