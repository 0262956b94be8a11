"""The command line of tools/evaluate.py, on a whole small model folder."""

import dataclasses
import json
import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.evaluate import main as evaluate_main
from deepseek_jax.config import preset
from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.budgets import curve
from deepseek_jax.evals.task import Answered
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
OPENED = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}<think>"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A small model that draws at random, whose chat template opens a thought."""
    tokenizer = Tokenizer.characters(string.printable, chat_template=OPENED)
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe, vocab_size=tokenizer.vocab_size)
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    target = tmp_path_factory.mktemp("models") / "thinker"
    save_model(Model(config, abstract_weights(config)[0], weights), target, tokenizer=tokenizer.files)
    return target


@pytest.fixture
def evaluate(command_line):
    return command_line(evaluate_main)


@pytest.fixture
def data(tmp_path):
    """Six rows, whose right answers a random model gives now and then."""
    rows = [{"question": f"{number}?", "answer": "#### 7"} for number in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_times(folder):
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_benchmark_is_scored_and_its_samples_kept(thinker, data, evaluate, tmp_path, monkeypatch):
    options = ("--benchmark", "gsm8k", "--data", data, "--max-tokens", 12, "--batch", 4, "--temperature", 1.0)
    first = tmp_path / "first"
    status, out, err = evaluate(thinker, *options, "--samples", 2, "--output", first)
    assert status == 0, err
    assert "gsm8k: " in out and "% cut off" in out
    values = json.loads((first / "summary.json").read_text())["gsm8k"]
    assert {"pass@1", "stderr", "n", "samples", "truncated", "tokens_per_second"} <= values.keys()
    assert (values["n"], values["samples"], values["settings"]["temperature"]) == (6, 2, 1.0)
    lines = without_times(first)
    assert [(line["number"], line["sample"]) for line in lines] == [(n, s) for n in range(6) for s in range(2)]
    # every line can be graded again from itself
    (problem, *_) = TASKS["gsm8k"].problems(open_source(str(data)))
    assert lines[0]["asked"] == TASKS["gsm8k"].style("deepseek").write(problem) and lines[0]["opened"]
    row = Answered(problem, TASKS["gsm8k"].style("deepseek"), "<think>", lines[0]["completion"])
    assert row.text == "<think>" + lines[0]["completion"]
    # the same seed in another batch, begun with fewer problems and samples: the same file
    second = tmp_path / "second"
    for more in (("--limit", 2), ("--samples", 2)):
        assert evaluate(thinker, *options, *more, "--output", second, "--batch", 3)[0] == 0
    assert without_times(second) == lines
    # budgets: only thoughts that are longer are drawn again
    status, out, err = evaluate(
        thinker, *options, "--samples", 2, "--output", first, "--thinking-budgets", "3,6", "--temperature", 1.0
    )
    assert status == 0, err
    lines = without_times(first)
    of = {budget: [line for line in lines if line["budget"] == budget] for budget in (None, 3, 6)}
    for budget in (3, 6):
        cut = {(line["number"], line["sample"]) for line in of[None] if line["thinking_tokens"] > budget}
        assert {(line["number"], line["sample"]) for line in of[budget]} == cut and cut
        for line in of[budget]:
            whole = next(w for w in of[None] if (w["number"], w["sample"]) == (line["number"], line["sample"]))
            head, closed, _ = line["completion"].partition("\n</think>")
            assert closed and whole["completion"].startswith(head) and line["thinking_tokens"] == budget + 2
    points = json.loads((first / "summary.json").read_text())["gsm8k"]["thinking"]
    assert [point["budget"] for point in points] == [3, 6, None]
    assert points[0]["thinking_tokens"] < points[1]["thinking_tokens"] < points[2]["thinking_tokens"]
    assert (first / "thinking.png").read_bytes()[:4] == b"\x89PNG"
    # another run's folder is not gone on with
    status, _, err = evaluate(thinker, *options, "--output", first, "--seed", 1)
    assert status == 1 and "have seed 0, not 1" in err and err.count("\n") == 1
    data.write_text('{"question": "other", "answer": "1"}\n')
    status, _, err = evaluate(thinker, *options, "--output", first)
    assert status == 1 and "gsm8k there are of other data" in err


def test_the_curve_has_the_shortest_thoughts_first():
    of = lambda tokens, score: {"mean_thinking_tokens": tokens, "pass@1": score, "stderr": 0.1}
    found = curve({"none": of(90, 0.9), "512": of(50, 0.7), "64": of(20, 0.2)})
    assert [(point["budget"], point["pass@1"]) for point in found] == [(64, 0.2), (512, 0.7), (None, 0.9)]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("MODEL",), "benchmark: got none"),
        (("MODEL", "--benchmark", "gsm9k"), "benchmark: got 'gsm9k', wanted one of gsm8k, "),
        (("--benchmark", "gsm8k"), "model: got none, wanted MODEL, or the address of a server by --server URL"),
        (("MODEL", "--benchmark", "mbpp", "--prompt-style", "lighteval"), "prompt_style: got 'lighteval'"),
        (("MODEL", "--benchmark", "gsm8k,svamp", "--data", "x"), "data: got 'x' for gsm8k, svamp, wanted NAME=FILE"),
        (("MODEL", "--benchmark", "gsm8k", "--samples", 0), "samples: got 0, wanted at least 1"),
        (("MODEL", "--benchmark", "gsm8k", "--samples", 2, "--temperature", 0), "samples: got 2 at --temperature 0"),
        (("MODEL", "--benchmark", "gsm8k", "--max-tokens", 0), "max_tokens: got 0, wanted at least 1"),
        (("MODEL", "--benchmark", "gsm8k", "--thinking-budgets", "1,x"), "thinking_budgets: got '1,x'"),
        (("--server", "http://x", "--benchmark", "gsm8k", "--thinking-budgets", "1"), "a server closes no thought"),
        (("MODEL", "--benchmark", "gsm8k", "--data", "no.jsonl"), "no.jsonl: no such file"),
        (("MODEL", "--benchmark", "gsm8k"), "gsm8k: its data is not here"),
        (("MODEL", "--benchmark", "gsm8k", "--data", "ROWS"), "rows.jsonl:2: no field 'answer'"),
        (("MODEL", "--benchmark", "gsm8k", "--data", ""), "data: got '', wanted a file"),
        (("MODEL", "--benchmark", "gsm8k", "--data", "gsm8k"), "gsm8k: no such file"),
        (("MODEL", "--benchmark", "gsm8k", "--data", "gsm8k="), "data: got 'gsm8k=', wanted a file"),
        (
            ("MODEL", "--benchmark", "gsm8k", "--data", "svamp=x"),
            "data: got 'svamp=x', wanted data of gsm8k; add svamp",
        ),
        (
            ("MODEL", "--benchmark", "gsm8k", "--data", "gsm8k=x", "gsm8k=y"),
            "data: got 'x' and 'y' for gsm8k, wanted one",
        ),
        (("MODEL", "--benchmark", "gsm8k", "--data", "x", "y"), "data: got 'x' and 'y' for gsm8k, wanted one"),
        (
            ("MODEL", "--benchmark", "gsm8k", "--data", "LONG"),
            "gsm8k: problem 1 (1): got 2073 tokens, wanted at most 255",
        ),
    ],
)
def test_mistakes_are_one_line(words, wanted, thinker, evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("deepseek_jax.data.sources.HubTable", lambda *of: (_ for _ in ()).throw(ValueError("offline")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "?", "answer": "1"}\n{"question": "?"}\n')
    long = tmp_path / "long.jsonl"
    long.write_text(f'{{"question": "?", "answer": "1"}}\n{{"question": "{"a" * 2000}", "answer": "1"}}\n')
    words = [{"MODEL": thinker, "ROWS": rows, "LONG": long}.get(word, word) for word in words]
    status, out, err = evaluate(*words, "--output", tmp_path / "out")
    assert status == 1 and wanted in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_bound_to_settings_by_its_samples(thinker, data, evaluate, tmp_path, monkeypatch):
    """One whose run ended before its first sample takes others; samples of settings that nobody knows, or graded by
    others, are not gone on with."""
    options = (
        thinker,
        "--benchmark",
        "gsm8k",
        "--data",
        data,
        "--limit",
        1,
        "--max-tokens",
        4,
        "--output",
        tmp_path / "out",
    )
    with monkeypatch.context() as patched:
        patched.setattr("deepseek_jax.commands.evaluate.run", lambda *of: (_ for _ in ()).throw(ValueError("away")))
        assert evaluate(*options, "--seed", 7)[0] == 1 and (tmp_path / "out" / "config.json").exists()
    status, _, err = evaluate(*options)
    assert status == 0, err
    status, _, err = evaluate(*options, "--seconds", 2)
    assert status == 1 and "the samples of gsm8k there are of other settings of grading" in err
    (tmp_path / "out" / "config.json").unlink()
    status, _, err = evaluate(*options)
    assert status == 1 and "config.json: is missing, so that nobody knows" in err and err.count("\n") == 1


def test_a_mistyped_model_is_told_before_any_data_is_fetched(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.commands.evaluate.open_source", lambda name: pytest.fail("data was asked for"))
    status, out, err = evaluate(tmp_path / "none", "--benchmark", "gsm8k", "--output", tmp_path / "out")
    assert status == 1 and out == "" and err.startswith(f"error: {tmp_path / 'none'}: no such folder")


@pytest.mark.slow
def test_killed_at_ten_moments_the_file_is_the_same(thinker, data, tmp_path):
    """Byte for byte but for times."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    options = ["--benchmark", "gsm8k", "--data", str(data), "--max-tokens", "200", "--batch", "2", "--samples", "16"]
    command = [sys.executable, "tools/evaluate.py", str(thinker), *options, "--temperature", "1.0", "--output"]
    start = lambda folder: subprocess.Popen(
        [*command, str(folder)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(600) == 0
    total, kills = len(without_times(whole)), 0
    lines = lambda: (killed / "samples.jsonl").read_bytes().count(b"\n") if (killed / "samples.jsonl").exists() else 0
    for moment in range(10):
        child, before = start(killed), lines()
        due = before + (0 if moment == 0 else 1 + moment % 3)
        while lines() < due and child.poll() is None:
            time.sleep(0.002)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills == 10 and lines() < total
    assert start(killed).wait(600) == 0
    assert without_times(killed) == without_times(whole)
