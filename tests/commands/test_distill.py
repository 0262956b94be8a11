"""The distill command: every loss, from every kind of teacher, what is refused, and runs that are broken off."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands import distill, distill_samples
from deepseek_jax.commands.distill_settings import rate_of
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.evals.drawing import Drawn
from deepseek_jax.evals.samples import Key, Samples
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.text.tokenizer import Tokenizer
from tests.checkpoint.folders import LLAMA_TIED, QWEN2, V3

ROOT = Path(__file__).resolve().parents[2]
OWN = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
OTHER = Tokenizer.characters(ALPHABET[::-1], chat_template=TEMPLATE)
SIZES = {"num_hidden_layers": 1, "max_position_embeddings": 64, "vocab_size": OWN.vocab_size, "initializer_range": 0.2}
KINDS = {
    "qwen2": (QWEN2, 0, OWN),
    "llama": (LLAMA_TIED, 1, OWN),
    "mla": (dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, first_k_dense_replace=0)), 2, OWN),
    "other": (QWEN2, 3, OTHER),
}
TINY = ("--batch-size", 4, "--steps", 2, "--lr", 0.01, "--save-every", 1, "--eval-rows", 2, "--warmup", 1)
ASKED = ("--samples", 2, "--sample-temperature", 1.0, "--sample-top-p", 1.0, "--max-new-tokens", 40)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small models of every kind, untrained: they write at random, and end by chance."""
    found = {}
    for name, (config, seed, tokenizer) in KINDS.items():
        config = dataclasses.replace(config, **SIZES)
        weights = jax.jit(lambda config=config, seed=seed: split(Decoder(config, rngs=nnx.Rngs(seed)))[1])()
        found[name] = tmp_path_factory.mktemp("models") / name
        save_model(Model(config, abstract_weights(config)[0], weights), found[name], tokenizer=tokenizer.files)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    asked = [f"{n}+{n + 1}=?" for n in range(16)]
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in [*asked, asked[0]]))
    return path


@pytest.fixture
def call(command_line):
    return command_line(distill.main)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed(before: Path, after: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert one.keys() == other.keys()
    return any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_teachers_text_is_sampled_kept_and_learnt_by_a_student_of_another_kind(folders, data, call, tmp_path):
    out = tmp_path / "run"
    given = ("--teacher", folders["mla"], "--student", folders["qwen2"], "--data", data, "--output", out, *ASKED, *TINY)
    status, told, err = call(*given)
    assert status == 0, err
    samples, rows, found = lines(out / "samples.jsonl"), lines(out / "rows.jsonl"), summary(out)
    assert [(of["number"], of["sample"]) for of in samples] == [(n, s) for n in range(16) for s in range(2)]
    fit = [of for of in samples if of["finished"] and of["completion"] and not of["unclosed"]]
    assert [(row["prompt"], row["completion"]) for row in rows] == [(of["prompt"], of["completion"]) for of in fit]
    assert found["teacher_samples"] == 32 and sum(found["samples_left_out"].values()) == 32 - len(rows) > 0
    assert found["rows"] + found["held_out_rows"] + sum(found["rows_left_out"].values()) == len(rows)
    assert f"the teacher's samples: {len(rows)} of 32 to learn from; left out: " in told
    assert "dropped 1 of 17 rows" in told
    assert found["objective"] == "sequence" and changed(folders["qwen2"], out / "model")
    load_model(out / "model")
    status, _, err = call(*given)
    assert status == 1 and "holds a finished run of 2 steps; raise --steps" in err
    status, _, err = call(*given, "--steps", 3)  # which draws nothing anew, and goes on
    assert status == 0 and summary(out)["steps"] == 3
    (out / "samples.jsonl").unlink()
    status, _, err = call(*given, "--lr", 0.5)  # refused before anything is drawn
    assert status == 1 and "the run there has lr 0.01, not 0.5" in err and not (out / "samples.jsonl").exists()
    (tmp_path / "mine" / "model").mkdir(parents=True)
    status, _, err = call(*given, "--output", tmp_path / "mine")
    assert status == 1 and "model: exists already and was not written by this run" in err
    assert not (tmp_path / "mine" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("student", "teacher"), [("llama", "mla"), pytest.param("mla", "qwen2", marks=pytest.mark.slow)]
)
def test_a_teachers_logits_are_learnt_at_its_own_text(folders, data, call, tmp_path, student, teacher):
    out = tmp_path / "run"
    given = ("--teacher", folders[teacher], "--student", folders[student], "--data", data, "--output", out)
    status, _, err = call(*given, *ASKED, *TINY, "--loss", "forward-kl", "--pack", "--micro-batches", 2)
    assert status == 0, err
    found = summary(out)
    assert found["objective"] == "forward-kl" and found["kl_after"] < found["kl_before"]
    rows = read_metrics(out)
    assert rows[0]["loss"] == pytest.approx(9 * rows[0]["kl"], rel=1e-4)
    assert changed(folders[student], out / "model")


def test_a_students_own_samples_are_judged_by_several_teachers(folders, data, call, tmp_path):
    out = tmp_path / "run"
    teachers = ("--teacher", folders["mla"], folders["llama"], "--teacher-weights", 1, 3)
    given = ("--student", folders["qwen2"], "--data", data, "--output", out, "--samples", 2, "--max-new-tokens", 8)
    status, _, err = call(*teachers, *given, *TINY, "--loss", "reverse-kl")
    assert status == 0, err
    assert summary(out)["objective"] == "reverse-kl" and summary(out)["kl_after"] < summary(out)["kl_before"]
    assert changed(folders["qwen2"], out / "model") and not (out / "samples.jsonl").exists()
    teachers = ("--teacher", folders["mla"], folders["llama"], "--teacher-weights", 1, 2)
    status, _, err = call(*teachers, *given, *TINY, "--loss", "reverse-kl", "--steps", 3)
    assert status == 1 and "the run there has teacher_weights [1.0, 3.0], not [1.0, 2.0]" in err


def test_a_file_of_samples_is_learnt_without_a_teacher_and_its_logits_with_one(folders, call, tmp_path):
    rows = [{"prompt": f"{n}+1=?", "completion": f"{n + 1}"} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--teacher-samples", file, "--student", folders["qwen2"], *TINY)
    status, told, err = call(*given, "--output", tmp_path / "text")
    assert status == 0, err
    assert "cut into tokens by the student's tokenizer" in told and summary(tmp_path / "text")["rows"] == 10
    given += ("--teacher", folders["mla"], "--loss", "forward-kl", "--output", tmp_path / "logits")
    status, _, err = call(*given)
    assert status == 0, err
    assert "kl_after" in summary(tmp_path / "logits")


def test_another_tokenizer_teaches_by_text_alone_and_it_is_said(folders, data, call, tmp_path):
    given = ("--teacher", folders["other"], "--student", folders["qwen2"], "--data", data, *ASKED, *TINY)
    for loss in ("forward-kl", "reverse-kl"):
        status, _, err = call(*given, "--loss", loss, "--output", tmp_path / loss)
        assert status == 1 and err.count("\n") == 1
        assert "has other tokens than the student (id 9 is '0' here and ';' there)" in err
        assert f"wanted the same for --loss {loss}; take --loss sequence" in err
        assert not (tmp_path / loss).exists()
    status, told, err = call(*given, "--output", tmp_path / "run")
    assert status == 0, err
    assert "note: the teacher has other tokens: its text is cut into tokens again, by the student's tokenizer" in told


BAD = {
    "student: got none": ("--teacher", "mla", "--data", "DATA"),
    "teacher: got none, wanted a model's folder or a server": ("--student", "qwen2", "--data", "DATA"),
    "data: got neither of --data and --teacher-samples": ("--student", "qwen2", "--teacher", "mla"),
    "data: got both of --data and --teacher-samples": (
        *("--student", "qwen2", "--teacher", "mla", "--data", "DATA", "--teacher-samples", "DATA"),
    ),
    "teacher: got 2 with --loss sequence, wanted one": (
        *("--student", "qwen2", "--data", "DATA", "--teacher", "mla", "llama"),
    ),
    "teacher: got a server with --loss forward-kl, wanted a folder": (
        *("--student", "qwen2", "--data", "DATA", "--teacher", "http://localhost:9", "--loss", "forward-kl"),
    ),
    "teacher_samples: got some with --loss reverse-kl": (
        *("--student", "qwen2", "--teacher-samples", "DATA", "--teacher", "mla", "--loss", "reverse-kl"),
    ),
    "nothing.jsonl: no such file or folder": ("--student", "qwen2", "--teacher", "mla", "--data", "nothing.jsonl"),
    "no question column": ("--student", "qwen2", "--teacher", "mla", "--data", "ROWS"),
    "the data set is empty": ("--student", "qwen2", "--teacher", "mla", "--data", "EMPTY"),
    "/nowhere: no such folder": ("--student", "qwen2", "--teacher", "/nowhere", "--data", "DATA"),
    "sample_temperature: got -1": (
        *("--student", "qwen2", "--teacher", "mla", "--data", "DATA", "--sample-temperature", "-1"),
    ),
    "samples: got 3, wanted a divisor": (
        *("--student", "qwen2", "--teacher", "mla", "--data", "DATA", "--loss", "reverse-kl", "--samples", "3"),
    ),
    "mtp_weight: got 0.1 with --loss forward-kl": (
        *("--student", "qwen2", "--teacher", "mla", "--data", "DATA", "--loss", "forward-kl", "--mtp-weight", "0.1"),
    ),
}


@pytest.mark.parametrize("says", BAD)
def test_what_cannot_work_is_one_line_and_leaves_nothing(folders, data, call, tmp_path, says):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"label": "x"}\n')
    stand = {**folders, "DATA": data, "EMPTY": tmp_path / "empty.jsonl", "ROWS": tmp_path / "rows.jsonl"}
    status, _, err = call(*(stand.get(word, word) for word in BAD[says]), "--output", tmp_path / "run")
    assert status in (1, 2) and says in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_reached_is_one_line_and_leaves_nothing(folders, data, call, tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.evals.server.time.sleep", lambda seconds: None)
    given = ("--teacher", "http://127.0.0.1:9", "--student", folders["qwen2"], "--data", data)
    for more in ((), ("--server-model", "r1")):
        status, _, err = call(*given, *more, "--output", tmp_path / "run")
        assert status == 1 and err.count("\n") == 1 and "http://127.0.0.1:9/v1/" in err and "refused" in err
        assert not (tmp_path / "run").exists()


# --- broken off --------------------------------------------------------------------------------------


def test_sampling_that_is_broken_off_goes_on_and_other_settings_are_refused(folders, data, call, tmp_path, monkeypatch):
    others = ("--student", folders["qwen2"], "--data", data, *ASKED, *TINY)
    given = ("--teacher", folders["mla"], *others)
    append, drawn = Samples.append, []

    def dying(held, records):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(records)
        append(held, records)

    monkeypatch.setattr(Samples, "append", dying)
    status, *_ = call(*given, "--output", tmp_path / "broken")
    assert status != 0 and len(lines(tmp_path / "broken" / "samples.jsonl")) == 5
    assert not (tmp_path / "broken" / "rows.jsonl").exists()
    counted = []
    monkeypatch.setattr(Samples, "append", lambda held, records: (counted.append(1), append(held, records)))
    for changed, says in (
        ((*given, "--sample-temperature", 0.5), "the samples there have sample_temperature 1.0, not 0.5"),
        ((*given, "--seed", 1), "the samples there have seed 0, not 1"),
        ((*others, "--teacher", folders["llama"]), "the samples there have teacher "),
    ):
        status, _, err = call(*changed, "--output", tmp_path / "broken")
        assert status == 1 and says in err and not counted
    status, _, err = call(*given, "--output", tmp_path / "broken")
    assert status == 0 and len(counted) == 32 - 5, err
    status, _, err = call(*given, "--output", tmp_path / "whole")
    assert status == 0, err
    for name in ("samples.jsonl", "rows.jsonl", "model/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl"])
def test_a_run_that_is_killed_in_training_ends_as_an_unbroken_one(folders, data, tmp_path, loss):
    command = [sys.executable, str(ROOT / "experiments/distill.py"), "--teacher", str(folders["mla"])]
    command += ["--student", str(folders["qwen2"]), "--data", str(data), "--loss", loss, *map(str, (*ASKED, *TINY))]
    command += ["--steps", "4"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = lambda name: subprocess.Popen([*command, "--output", str(tmp_path / name)], env=environment)
    assert start("whole").wait() == 0
    stage = "sft" if loss == "forward-kl" else "distill"
    broken, saved = start("broken"), tmp_path / "broken" / "checkpoints" / stage / "2"
    while broken.poll() is None and not saved.exists():
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL
    assert start("broken").wait() == 0
    files = [(tmp_path / of / "model" / "model.safetensors").read_bytes() for of in ("whole", "broken")]
    assert files[0] == files[1]


# --- a server ----------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """One that thinks about every question, and is cut off at the third."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *of):
            pass

        def answer(self, values):
            body = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"data": [{"id": "r1"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][-1]["content"]
            message = {"role": "assistant", "content": text[0], "reasoning_content": f"{text[0]}=?"}
            finish = "length" if text.startswith("3") else "stop"
            usage = {"completion_tokens": 5, "prompt_tokens": 4}
            self.answer({"choices": [{"message": message, "finish_reason": finish}], "usage": usage})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_servers_text_is_learnt_with_its_thoughts(folders, data, call, server, tmp_path):
    out = tmp_path / "run"
    status, _, err = call("--teacher", server, "--student", folders["qwen2"], "--data", data, "--output", out, *TINY)
    assert status == 0, err
    rows = lines(out / "rows.jsonl")
    assert rows[1] == {"prompt": "1+2=?", "completion": "<think>1=?</think>1", "id": 1} and len(rows) == 15
    assert summary(out)["samples_left_out"] == {"cut at the limit of tokens": 1}
    assert summary(out)["taught_by"] == ["r1"] and json.loads((out / "teacher.json").read_text())["teacher"] == "r1"


# --- pieces ------------------------------------------------------------------------------------------


def test_a_thought_that_the_template_opened_is_part_of_what_is_learnt():
    """The teacher's prompt ends in <think>, and its text begins behind it."""
    key = Key("teacher", 0, 0)
    of = lambda prompt, text: distill_samples._record(key, Drawn(prompt, text, 3, None, True))
    assert of("1?<think>\n", "1\n</think>\n\n2")["completion"] == "<think>\n1\n</think>\n\n2"
    assert of("1?", "<think>\n1\n</think>\n\n2")["completion"] == "<think>\n1\n</think>\n\n2"
    unfit = lambda prompt, text: distill_samples._unfit(of(prompt, text))
    assert unfit("1?<think>\n", "1") == "with a thought that never ends" and unfit("1?", "") == "empty"
    assert unfit("1?", "2") is None


def test_rates_are_those_of_r1s_students():
    wanted = {
        "qwen-1.5b": 1e-4,
        "qwen-7b": 8e-5,
        "qwen-14b": 7e-5,
        "qwen-32b": 6e-5,
        "llama-8b": 5e-5,
        "llama-70b": 2e-5,
    }
    assert {name: rate_of(preset(f"distill-{name}")) for name in wanted} == wanted
    assert rate_of(preset("tiny")) == 1e-4
