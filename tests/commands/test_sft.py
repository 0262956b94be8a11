"""The SFT command: a whole small run, a run on its model with an adapter, and one that is killed on its way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.commands import sft, toy
from deepseek_jax.config import preset
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--batch-size", "4", "--steps", "2", "--save-every", "1", "--eval-rows", "4"]
ROWS = [
    *({"messages": [{"role": "user", "content": f"{n}+1=?"}, {"role": "assistant", "content": "1"}]} for n in range(9)),
    {"prompt": "1+1=?", "completion": "2"},
    {"conversations": [{"from": "human", "value": "2*2=?"}, {"from": "gpt", "value": "4"}]},
    {"messages": [{"role": "user", "content": "1"}]},
    {"messages": [{"role": "tool", "content": "1"}]},
    {"prompt": "1", "completion": "1" * 70},
]


def shallow():
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    return dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe)  # less to compile


def main(monkeypatch, *given: str) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["sft", *given])
    monkeypatch.setattr(toy, "preset", lambda name: shallow())
    try:
        run(sft.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert main(monkeypatch, "--output", str(folder), *TINY) == 0
    return folder


def data(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_a_run_leaves_its_summary_report_metrics_and_model(finished):
    summary = json.loads((finished / "summary.json").read_text())
    rows = read_metrics(finished)
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), ("sft", 2)]
    wanted = {"loss", "mean_token_accuracy", "tokens_per_second", "learning_rate", "step_time", "grad_norm"}
    assert wanted <= rows[0].keys()
    assert summary["loss_before"] == pytest.approx(np.log(32), abs=0.6)  # of 32 tokens, none is known yet
    assert summary["loss_after"] == rows[-1]["eval/loss"] < summary["loss_before"]
    assert summary["rows"] + summary["held_out_rows"] == 1_500 and summary["held_out_rows"] == 4
    assert 0 < summary["learnt_tokens"] < summary["tokens"] and summary["rows_left_out"] == {}
    assert "<svg" in (finished / "report.html").read_text(encoding="utf-8")
    load_model(finished / "model")
    assert Tokenizer.from_folder(finished / "model").chat_template


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(finished, monkeypatch, capsys):
    assert main(monkeypatch, "--output", str(finished), *TINY) == 1
    assert "holds a finished run of 2 steps; raise --steps" in capsys.readouterr().err
    assert main(monkeypatch, "--output", str(finished), *TINY, "--lr", "1") == 1
    assert "the run there has lr 0.003, not 1.0" in capsys.readouterr().err


def test_an_adapter_learns_rows_of_every_form_packed_and_what_is_left_out_is_told(
    finished, tmp_path, monkeypatch, capsys
):
    folder, model = tmp_path / "run", str(finished / "model")
    given = ["--output", str(folder), "--model", model, "--data", data(tmp_path), *TINY]
    assert main(monkeypatch, *given, "--lora-rank", "2", "--pack", "--max-length", "64", "--lr", "0.01") == 0
    told = capsys.readouterr().out
    for reason in ("no assistant turn", "role 'tool', wanted", "more than 64 tokens"):
        assert f"dropped 1 of 14 rows: {reason}" in told
    assert "to learn: 7 rows, " in told and "held out: 4 rows, " in told and "2 updates of 4 rows, 1.1 epochs" in told
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(summary["rows_left_out"].values()) == 3 and summary["rows"] == 7
    assert (folder / "adapter" / "adapter_config.json").exists()
    before, after = (load_file(path / "model.safetensors") for path in (finished / "model", folder / "model"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    assert [row["rows"] for row in read_metrics(folder)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "MODEL"], "data: got --model without --data"),
        (["--data", "DATA"], "model: got --data without --model"),
        (["--model", "MODEL", "--data", "DATA", "--max-length", "1000"], "max_length: got 1000, wanted at most 256"),
        (["--model", "MODEL", "--data", "DATA", "--batch-size", "64"], "batch_size: got 64, wanted at most 12"),
        (["--model", "MODEL", "--data", "DATA", "--eval-rows", "12"], "eval_rows: got 12, wanted fewer than the 12"),
        (["--model", "MODEL", "--data", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
        (["--model", "MODEL", "--data", "DATA", "--mtp-weight", "0.1"], "mtp_weight: got 0.1 for a model without"),
        (["--mtp-modules", "1", "--model", "MODEL", "--data", "DATA"], "mtp_modules: got 1, wanted it without --model"),
        (["--mtp-modules", "-1"], "mtp_modules: got -1, wanted 0 or more"),
        (["--steps", "2", "--micro-batches", "5"], "micro_batches 5 does not divide the 32 rows"),
    ],
)
def test_what_cannot_work_is_one_line(finished, tmp_path, monkeypatch, capsys, given, says):
    stand = {"MODEL": str(finished / "model"), "DATA": data(tmp_path)}
    given = [stand.get(word, word) for word in given]
    assert main(monkeypatch, "--output", str(tmp_path / "run"), *given) in (1, 2)
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/sft.py"), *TINY, "--steps", "4", "--pack"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = lambda name: subprocess.Popen([*command, "--output", str(tmp_path / name)], env=environment)
    assert start("whole").wait() == 0
    broken, saved = start("broken"), tmp_path / "broken" / "checkpoints" / "sft" / "2"
    while broken.poll() is None and not saved.exists():
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL
    assert start("broken").wait() == 0
    timed = ("time", "step_time", "tokens_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(tmp_path / of)]
        for of in ("whole", "broken")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    files = [(tmp_path / of / "model" / "model.safetensors").read_bytes() for of in ("whole", "broken")]
    assert files[0] == files[1]
