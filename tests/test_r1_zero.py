"""The R1-Zero experiment from its command line: a whole small run, and runs that are killed on their way."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands import distill_settings, toy
from deepseek_jax.commands import train as r1_zero
from deepseek_jax.commands.run_options import saved_dtype
from deepseek_jax.commands.settings_file import options_of, with_values
from deepseek_jax.commands.train_settings import Config, DataOptions, check, defaults, run_settings, settings
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import enter_folder, room_needed, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments/r1_zero.py"
QUESTIONS = 8
TINY = {
    "train-questions": 64,
    "eval-questions": QUESTIONS,
    "terms": 2,
    "largest": 19,
    "cold-start-examples": 16,
    "cold-start-epochs": 4,
    "cold-start-batch": 16,
    "prompts-per-step": 2,
    "group-size": 2,
    "max-new-tokens": 16,
    "steps": 4,
    "eval-every": 4,
    "save-every": 2,
}


def arguments(output: Path, **changes) -> list[str]:
    settings = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return ["--output", str(output), *(part for k, v in settings.items() for part in (f"--{k}", str(v)))]


def small(output: Path, **changes) -> Config:
    """Settings of the toy task."""
    return with_values(defaults({}), {"output": output, **changes})


def main(monkeypatch, *given: str) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["r1_zero.py", *given])
    try:
        run(r1_zero.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1_zero") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
        shallow = dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe)  # less to compile
        monkeypatch.setattr(toy, "preset", lambda name: shallow)
        assert main(monkeypatch, *arguments(folder, steps=2, eval_every=2, cold_start_epochs=2)) == 0
    return folder


def test_a_run_leaves_its_summary_report_metrics_events_and_model(finished):
    summary = json.loads((finished / "summary.json").read_text())
    keys = {
        *("accuracy_before", "accuracy_after", "stderr_before", "stderr_after"),
        *("questions", "wall_seconds", "tokens", "seed"),
    }
    assert keys <= summary.keys()
    for when in ("before", "after"):
        mean, stderr = summary[f"accuracy_{when}"], summary[f"stderr_{when}"]
        assert 0 <= mean <= 1
        assert stderr == pytest.approx((mean * (1 - mean) / QUESTIONS) ** 0.5)
    assert (summary["questions"], summary["seed"]) == (QUESTIONS, 0)
    assert summary["wall_seconds"] > 0

    rows = read_metrics(finished)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in ("cold_start", "grpo") for n in (1, 2)]
    assert {"reward", "completions/mean_length", "kl", "entropy", "num_tokens"} <= rows[-1].keys()
    assert summary["tokens"] == rows[-1]["num_tokens"]
    # Two prompts of "a+b=?" are 5 to 7 characters and 3 marks each; each of their 2 samples has 1 to 16 tokens.
    assert 2 * 4 * (8 + 1) <= summary["tokens"] <= 2 * 4 * (10 + 16)

    for stage in ("cold_start", "grpo"):
        assert any(path.stat().st_size > 200 for path in (finished / "tensorboard" / stage).glob("events*"))
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") >= 4 or report.count("<img") >= 4 or report.count("data:image") >= 4
    assert not re.search(r'(src|href)="https?:', report)  # whole in itself


def test_the_trained_model_can_be_loaded(finished):
    model = load_model(finished / "model")
    tokenizer = Tokenizer.from_folder(finished / "model")
    assert model.config.eos_token_ids == tokenizer.eos_ids
    assert tokenizer.decode(tokenizer.encode("12+3=?", add_bos=False)) == "12+3=?"
    tensors = load_file(finished / "model" / "model.safetensors")
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert any(np.any(t) for name, t in tensors.items() if name.endswith("e_score_correction_bias"))


def test_a_finished_folder_is_left_alone(finished, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(monkeypatch, *arguments(finished, steps=2, eval_every=2, cold_start_epochs=2)) == 1
    assert error_line(capsys).startswith(f"error: {finished}: holds a finished run")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 250}, "max_new_tokens: got 250 after prompts of up to"),  # the model's context is 256
        ({"lora_rank": 2, "lora_targets": "q_praj"}, "targets: got 'q_praj'"),
        ({"accuracy": "choice"}, "choice_reward: answer: got"),
    ],
)
def test_what_the_model_or_the_grader_cannot_do_is_refused_before_training(
    tmp_path, monkeypatch, capsys, changes, message
):
    assert main(monkeypatch, *arguments(tmp_path / "run", **changes)) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_settings_of_data_without_data_or_for_several_sets_are_refused():
    with pytest.raises(ValueError, match="held_out: got a setting for data, but no --data"):
        DataOptions(held_out=("a.jsonl",))
    with pytest.raises(ValueError, match="pass_rates: got rates by row with 2 data sets, wanted one"):
        DataOptions(data=("a.jsonl", "b.jsonl"), pass_rates=Path("rates.jsonl"))


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size: got 1, wanted at least 2"),
        ({"updates_per_rollout": 3}, "updates_per_rollout 3 x micro_batches 1 does not divide the 4 samples of a step"),
        ({"loss_type": "cispo"}, "epsilon_high: got None with cispo, wanted the largest ratio"),
        ({"top_p": 0.9}, "keep_sampling_mask: got False with top_p 0.9"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, changes, message):
    assert main(monkeypatch, *arguments(tmp_path / "run", **changes)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "the data set is empty"),
        ('{"question": "1+1=?", "answer": "2"}\n{"question": 3}\n', ":2: 'answer': got None"),
        ('{"question": "1+1=?", "answer": "2"}\n', "got 1 rows, wanted 2 or more: one is held out"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, monkeypatch, capsys, text, message):
    data = tmp_path / "rows.jsonl"
    if text is not None:
        data.write_text(text)
    assert main(monkeypatch, *arguments(tmp_path / "run", data=data)) == 1
    error = error_line(capsys)
    assert error.startswith(f"error: {data}") and message in error
    assert not (tmp_path / "run").exists()


def test_another_setting_does_not_go_on_with_an_unfinished_run(tmp_path):
    first, other = (small(tmp_path / "run", lr=lr) for lr in (1e-4, 2e-4))
    check(first)
    write_json(first.output / "config.json", settings(first))
    check(first)
    with pytest.raises(ValueError, match="has lr 0.0001, not 0.0002"):
        check(other)


# --- killed runs -----------------------------------------------------------------------------------


def launch(folder: Path, cache: Path, **changes) -> subprocess.Popen:
    # Runs share what they compiled, so that the kills fall on work and not on the compiler.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    lengths = {"steps": 30, "cold_start_epochs": 16, "eval_every": 10, "sampling_rounds": 2} | changes
    command = [sys.executable, str(SCRIPT), *arguments(folder, **lengths)]
    with (folder.parent / f"{folder.name}.txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def lines(folder: Path, stage: str) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count(f'"stage": "{stage}"') if path.exists() else 0


def kill_within(process: subprocess.Popen, folder: Path, stage: str, at_least: int, delay: float) -> None:
    """SIGKILL, `delay` seconds after the stage has done some steps."""
    deadline = time.monotonic() + 300
    while lines(folder, stage) < at_least and process.poll() is None:
        assert time.monotonic() < deadline, f"{stage} did not begin"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def comparable(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(("time", "per_second"))} for row in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "moments"),
    [
        ({}, [("cold_start", n) for n in (0, 4, 9)] + [("grpo", n) for n in (0, 2, 5, 8, 11, 14, 17)]),
        ({"dtype": "bfloat16", "steps": 12}, [("cold_start", 4), ("grpo", 2), ("grpo", 5)]),
    ],
    ids=["float32", "bfloat16"],
)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, changes, moments):
    cache, whole, broken = tmp_path / "cache", tmp_path / "whole", tmp_path / "broken"
    assert launch(whole, cache, **changes).wait(timeout=600) == 0, (tmp_path / "whole.txt").read_text()

    chance = random.Random(0)
    for stage, at_least in moments:
        kill_within(launch(broken, cache, **changes), broken, stage, at_least, chance.uniform(0, 0.5))
        assert not (broken / "summary.json").exists(), "it was over before the kill: kill earlier"
    assert launch(broken, cache, **changes).wait(timeout=600) == 0, (tmp_path / "broken.txt").read_text()

    wanted, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, broken))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.tobytes(), name
    assert comparable(broken) == comparable(whole)
    for key in ("accuracy_before", "accuracy_after", "tokens", "seed", "questions"):
        first, second = (json.loads((folder / "summary.json").read_text())[key] for folder in (whole, broken))
        assert first == second, key


@pytest.mark.slow
def test_a_run_killed_before_its_summary_can_be_finished(tmp_path):
    """All training is done and only the end is missing: metrics of both stages must still be there for the report."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    assert launch(folder, cache).wait(timeout=600) == 0
    before = comparable(folder)
    (folder / "summary.json").unlink()
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "model")
    assert launch(folder, cache).wait(timeout=600) == 0, (tmp_path / "run.txt").read_text()
    assert comparable(folder) == before
    assert (folder / "model" / "tokenizer.json").exists() and (folder / "report.html").exists()


# --- a run's folder over its life ------------------------------------------------------------------


def begun(folder: Path, base: str | None = None, **changes) -> Config:
    config = small(folder, **changes)
    check(config)
    enter_folder(folder, run_settings(config, base))
    return config


@pytest.mark.parametrize("changes", [{"steps": 61}, {"save_every": 3, "eval_every": 4, "samples_every": 5}])
def test_a_run_goes_on_with_more_steps_other_intervals_and_under_another_name(tmp_path, monkeypatch, changes):
    begun(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    monkeypatch.chdir(tmp_path)
    for name in ("moved", "link", tmp_path / "moved", "../" + tmp_path.name + "/moved"):
        check(small(Path(name), **changes))


def test_a_finished_run_goes_on_with_more_steps_alone(tmp_path):
    folder = tmp_path / "run"
    identity = json.loads((begun(folder).output / "config.json").read_text())["run"]
    write_json(folder / "summary.json", {})
    for steps in (60, 59):
        with pytest.raises(ValueError, match="holds a finished run of 60 steps; raise --steps"):
            check(small(folder, steps=steps))
    begun(folder, steps=70)
    assert not (folder / "summary.json").exists()
    assert json.loads((folder / "config.json").read_text())["run"] == identity
    (folder / "checkpoints" / "grpo" / "64").mkdir(parents=True)
    with pytest.raises(ValueError, match="steps: got 60, but the run there has done 64; give --steps 64 or more"):
        check(small(folder))


def last_step(folder: Path, **metrics) -> None:
    with MetricLog(folder) as log:
        log.write(1, metrics, "grpo")


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": math.nan},
        {"loss": 0.1, "grad_norm": math.inf},
        {"loss": 0.1, "grad_norm": 1.0, "nonfinite_updates": 1.0},
    ],
    ids=str,
)
def test_what_ends_a_run_may_be_changed_where_it_ended_so_and_nothing_else(tmp_path, metrics):
    folder = begun(tmp_path / "run", lr=1.0).output
    last_step(folder, **metrics)
    for changes in ({"lr": 1e-4}, {"lr": 1.0, "skip_grad_norm": 5.0}, {"lr": 1e-4, "skip_grad_norm": 5.0}):
        check(small(folder, **changes, cold_start_lr=1e-3))
    with pytest.raises(ValueError, match="has group_size 16, not 8"):
        check(small(folder, lr=1e-4, group_size=8))
    begun(folder, lr=1e-4)
    last_step(folder, loss=0.1, grad_norm=1.0, nonfinite_updates=0.0)
    with pytest.raises(ValueError, match="has lr 0.0001, not 0.0002"):
        check(small(folder, lr=2e-4))


def test_a_step_left_out_does_not_end_a_run(tmp_path):
    folder = begun(tmp_path / "run", skip_grad_norm=1.0).output
    last_step(folder, loss=math.nan, grad_norm=math.nan, nonfinite_updates=0.0, skipped_updates=1.0)
    with pytest.raises(ValueError, match="has lr 0.0002, not 0.1"):
        check(small(folder, lr=0.1, skip_grad_norm=1.0))


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_a_run_which_goes_on_with_another_rate(tmp_path, monkeypatch, capsys):
    """In the cold start as in GRPO: one line, a status, nothing exported; and the folder is not lost."""
    folder = tmp_path / "run"
    begin = lambda **changes: main(monkeypatch, *arguments(folder, steps=3, save_every=1, warmup=0, **changes))
    assert begin(cold_start_lr="inf", lr="inf") == 1
    assert re.search("^error: cold_start: step 1 of 4: .* not finite, .*: none; go on", error_line(capsys))
    assert begin(lr="inf") == 1
    assert re.search("^error: grpo: step 1 of 3: .* not finite, .*: none; go on", error_line(capsys))
    assert not {"model", "summary.json", "report.html"} & {path.name for path in folder.iterdir()}
    assert begin() == 0
    tensors = load_file(folder / "model" / "model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["stage"] == "grpo"] == [1, 2, 3]
    assert not any(row["nonfinite_updates"] for row in rows)


def test_a_run_holds_its_folder_against_a_second_one(tmp_path, monkeypatch, capsys):
    """From before its model is prepared, and under another name of the folder."""
    (tmp_path / "link").symlink_to("run")

    def while_the_first_prepares(*of):
        monkeypatch.setattr(r1_zero, "prepare", lambda *of: pytest.fail("the second was let in"))
        assert main(monkeypatch, *arguments(tmp_path / "link")) == 1
        raise ValueError("the first ends here")

    monkeypatch.setattr(r1_zero, "prepare", while_the_first_prepares)
    assert main(monkeypatch, *arguments(tmp_path / "run")) == 1
    second, first = capsys.readouterr().err.splitlines()
    assert second.startswith(f"error: {tmp_path / 'link'}: in use by another process, {os.getpid()} on ")
    assert first == "error: the first ends here"


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_a_folder_that_the_run_did_not_write_is_refused_at_the_start(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name}: exists already and was not written by this run"):
        check(small(tmp_path / "run", lora_rank=2))


def test_a_base_whose_weights_changed_is_refused(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    config = small(folder, model=base, lora_rank=2)
    enter_folder(folder, run_settings(config, check(config)))
    base.rename(tmp_path / "elsewhere")
    moved = with_values(config, {"model": tmp_path / "elsewhere"})
    check(moved)
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="began with a base model of fingerprint .* its files are others"):
        check(moved)
    with pytest.raises(ValueError, match="began with a base model"):
        check(with_values(config, {"model": None}))


@pytest.mark.parametrize(
    ("written", "asked", "wanted"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": "bfloat16"}, "float32", "float32"),
        ({"torch_dtype": "float16"}, "auto", "float32"),  # which bfloat16 could not hold
        ({}, "auto", "float32"),
        ({}, "bfloat16", "bfloat16"),
        (None, "auto", "float32"),
        (None, "bfloat16", "bfloat16"),
    ],
)
def test_a_model_is_saved_as_the_one_it_began_with(tmp_path, written, asked, wanted):
    if written is not None:
        (tmp_path / "config.json").write_text(json.dumps(written))
    assert saved_dtype(asked, None if written is None else tmp_path) == wanted


def test_a_run_begun_in_another_precision_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    held = begun(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # "auto" on the CPU
    check(with_values(held, {"dtype": "float32"}))
    assert r1_zero.computing(held) == "computes in float32 (--dtype auto) on the CPU, and updates weights of float32"
    monkeypatch.setattr(r1_zero.jax, "default_backend", lambda: "gpu")  # "auto" is bfloat16 there
    with pytest.raises(ValueError, match="has dtype 'float32', not 'bfloat16'"):
        check(held)
    check(with_values(held, {"dtype": "float32"}))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_the_last_whole_checkpoint(tmp_path, number):
    def write():
        with room_needed(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path / "metrics.jsonl"))

    with pytest.raises(OSError, match="metrics.jsonl: .*no checkpoint is whole yet: make room") as caught:
        write()
    assert os.strerror(number).lower() in str(caught.value)
    for place in ("cold_start/9", "grpo/4", "grpo/6.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / place).mkdir(parents=True)
    os.utime(tmp_path / "checkpoints" / "cold_start" / "9", (1, 1))
    with pytest.raises(OSError, match="the last whole checkpoint is .*checkpoints/grpo/4: make room"):
        write()


def test_the_columns_are_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "1+1=?", "out": {"truth": "2"}}\n' * 2)
    given = ["--data", str(data), "--question-columns", "text", "--output", str(tmp_path / "run")]
    assert main(monkeypatch, *given) == 1
    assert "name it by --answer-column" in error_line(capsys)
    assert main(monkeypatch, *given, "--answer-column", "out.truth") == 1
    assert "got 1 rows, wanted 2 or more" in error_line(capsys)  # read, and too few


STAGES = [
    path for pattern in ("train/*.py", "commands/train*.py") for path in sorted((ROOT / "deepseek_jax").glob(pattern))
]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_option_that_a_text_names_exists(path):
    """Of all text in the stages' files and the experiment, against the parser of the command that has the stage."""
    named = {name for file in (path, SCRIPT) for name in re.findall(r"--([a-z]+(?:-[a-z]+)*)", file.read_text())}
    known = set(settings(Config())) | {"mesh", "config", "help_all"}  # `--mesh-*`
    if path.stem in ("distill_loss", "on_policy"):
        known |= set(options_of(distill_settings.Config))
    assert {name.replace("-", "_").removeprefix("no_") for name in named} <= known


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background is started with it ignored


@pytest.mark.parametrize("script", ["experiments/r1_zero.py", "tools/generate.py", "tools/plan.py"])
@pytest.mark.parametrize("seconds", [0.15, 0.6])
def test_ctrl_c_while_it_imports_is_one_line(tmp_path, script, seconds):
    root = ROOT
    # counted from where the script begins, which the interpreter itself may take long to come to
    code = "import runpy, sys; sys.argv = sys.argv[1:]; "
    code += "from deepseek_jax.interrupt import end_at_once; end_at_once(); print('begun', flush=True); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, script, "--help"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    while process.stdout.readline() != "begun\n":
        assert process.poll() is None
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    if process.returncode == 0:
        pytest.skip("it was over before the signal")
    assert (process.returncode, error) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "options, said", [([], "without a chat_template"), (["--no-chat"], "names no end-of-sequence")]
)
def test_a_model_without_template_or_end_is_refused_before_training(options, said, tmp_path, monkeypatch, capsys):
    """A chat is never raw text in silence, and completions that cannot end teach nothing."""
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    shape = dataclasses.replace(preset("tiny"), vocab_size=32, num_hidden_layers=1, moe=moe)
    if options:
        shape = dataclasses.replace(shape, eos_token_id=None)
    model = jax.jit(lambda: split(Decoder(shape, rngs=nnx.Rngs(0)))[1])()
    files = dict(Tokenizer.characters(ALPHABET, chat_template=TEMPLATE).files)
    settings = json.loads(files["tokenizer_config.json"])
    del settings["eos_token" if options else "chat_template"]
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    save_model(Model(shape, abstract_weights(shape)[0], model), tmp_path / "model", tokenizer=files)
    given = [*arguments(tmp_path / "run"), "--model", str(tmp_path / "model"), "--prompt", "{question}", *options]
    assert main(monkeypatch, *given) == 1
    assert said in error_line(capsys)
    assert not (tmp_path / "run").exists()
