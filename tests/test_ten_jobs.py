"""The README's ten jobs as a new user does them: its very commands, by the installed wheel, outside the tree."""

import dataclasses
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as dsj
from deepseek_jax.data.arithmetic import TEMPLATE
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.report.metrics import read_metrics
from tests.checkpoint.folders import QWEN2
from tests.checkpoint.test_hub import cached
from tests.wheel import ROOT, child, wheel

README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = {
    title: re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^##)", README, re.DOTALL | re.MULTILINE)
}
HUB_NAME = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
ENDS = (2, *range(70, 100))
# What makes a job small: added at the end of its commands.
SHORT_GRPO = "--prompts-per-step 2 --group-size 4 --max-new-tokens 4 --accuracy exact"
SHORT_SFT = "--steps 2 --batch-size 2 --lr 1e-2"


def commands(title: str) -> list[str]:
    """A job's commands, a line each, as they stand in the README."""
    return [line for kind, block in JOBS[title] if kind == "bash" for line in block.splitlines()]


class Desk(NamedTuple):
    """A new user's folder, beside the package that pip installed."""

    folder: Path
    environment: dict[str, str]

    def words(self, command: str, short: str = "") -> list[str]:
        """A command for a shell, with more options before what is redirected or said."""
        parts = re.fullmatch(r"(.*?)(\s+[>#].*)?", command)
        return ["bash", "-c", f"{parts[1]} {short}{parts[2] or ''}"]

    def run(self, command: str, short: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
        done = child(*self.words(command, short), cwd=self.folder, **self.environment)
        assert done.returncode == status, f"{command} {short}\n{done.stdout}\n{done.stderr}"
        return done

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        source = dsj.open_folder(self.folder / name).stored
        return {tensor: source.read(tensor) for tensor in source.entries}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip installs the wheel into."""
    folder = tmp_path_factory.mktemp("pip")
    into = folder / "packages"
    done = child(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", into, wheel(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return into


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """MODEL, R1's architecture in FP8 with a chat template, and a dense one for the hub.

    Their tokens are characters, and many of them end a text, so that completions differ in length.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = dsj.Tokenizer.characters(string.printable, chat_template=TEMPLATE)
    sizes = {"vocab_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 512, "eos_token_id": ENDS}
    tiny = dsj.preset("tiny")
    small = dataclasses.replace(tiny, **sizes, moe=dataclasses.replace(tiny.moe, first_k_dense_replace=0))
    for name, config in {"float32": small, "dense": dataclasses.replace(QWEN2, **sizes)}.items():
        graphdef, weights = jax.jit(lambda config=config: split(Decoder(config, rngs=nnx.Rngs(0))))()
        dsj.save_model(dsj.Model(config, graphdef, weights), folder / name, tokenizer=tokenizer.files)
    dsj.export_hf(dsj.open_folder(folder / "float32", to="fp8"), folder / "MODEL")
    cached(folder / "hub", HUB_NAME, "main", folder / "dense")
    return folder


@pytest.fixture
def desk(tmp_path, installed, models) -> Desk:
    shutil.copytree(models / "MODEL", tmp_path / "MODEL")
    path = f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {
        "PATH": path,
        "PYTHONPATH": str(installed),
        "HF_HUB_CACHE": str(models / "hub"),
        "HF_HUB_OFFLINE": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    questions = [{"question": f"{n} + 1 = ?", "answer": f"One more than {n}.\n#### {n + 1}"} for n in range(8)]
    chats = [[{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(8)]
    lines(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1 = ?"}, {"messages": chats[0][:1]}])
    lines(tmp_path / "gsm8k.jsonl", questions)
    lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    return Desk(tmp_path, environment)


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the README itself ---------------------------------------------------------------------------


def test_there_are_ten_jobs_of_a_command_or_two():
    assert len(JOBS) == 10
    for title in JOBS:
        assert 1 <= len(commands(title)) <= 2, title
        assert all(line.startswith("deepseek-jax ") for line in commands(title))


# --- jobs of seconds -----------------------------------------------------------------------------


def test_the_package_is_the_wheels(desk, installed):
    where = desk.run(f"{sys.executable} -c 'import deepseek_jax; print(deepseek_jax.__file__)'").stdout
    assert where == f"{installed}/deepseek_jax/__init__.py\n"
    assert desk.run("deepseek-jax --version").stdout == f"deepseek-jax {dsj.__version__}\n"


def test_inspect(desk):
    model, published = (desk.run(line).stdout for line in commands("Inspect a checkpoint"))
    size = sum(value.nbytes for value in desk.tensors("MODEL").values())
    assert f"tensors       {len(desk.tensors('MODEL'))}\n" in model and f"bytes         {size:,} " in model
    assert "F8_E4M3" in model and "missing       0\nunexpected    0\n" in model
    assert "tensors       91,991\n" in published and "688.6 GB" in published


def test_convert_fp8_to_bfloat16_and_back(desk):
    for line in commands("Convert FP8 to bfloat16 and back"):
        desk.run(line)
    first, wide, again = (desk.tensors(name) for name in ("MODEL", "BFLOAT16", "FP8"))
    assert first.keys() == again.keys() and not any("scale" in name for name in wide)
    codes = [name for name, value in first.items() if value.dtype.name == "float8_e4m3fn"]
    assert len(codes) > 5
    for name, value in first.items():
        if name.endswith("scale_inv"):  # bfloat16 keeps eight bits of the largest number of a block
            np.testing.assert_allclose(again[name], value, rtol=2**-8, err_msg=name)
        elif name in codes:
            assert again[name].tobytes() == value.tobytes(), name
            assert wide[name].dtype.name == "bfloat16"
        else:
            np.testing.assert_allclose(again[name].astype(np.float32), value.astype(np.float32), rtol=2**-8)


def test_generate_from_a_file_of_prompts(desk):
    (line,) = commands("Generate from a file of prompts")
    desk.run(line, "--max-tokens 4")
    rows = [json.loads(text) for text in (desk.folder / "completions.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(0, 0), (1, 0)]
    assert all(1 <= row["tokens"] <= 4 for row in rows)


# --- longer jobs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_plan(desk):
    shown = desk.run(commands("Plan for accelerators, and compile for them")[0]).stdout
    assert re.search(r"^fits +yes", shown, re.MULTILINE) and re.search(r"^chips +\d+ x v5p", shown, re.MULTILINE)


@pytest.mark.slow
def test_compile_for_a_pod(desk):
    line = commands("Plan for accelerators, and compile for them")[1]
    if find_spec("libtpu") is None:
        done = desk.run(line, status=1)
        assert done.stderr.count("\n") == 1 and "pip install" in done.stderr, done.stderr
        pytest.skip("needs libtpu: pip install -e '.[pod]'; without it one line says so, which was tested")
    shown = desk.run(line).stdout
    assert "decode on v5p:4x4x4" in shown and "% left" in shown


@pytest.mark.slow
def test_a_model_by_its_hub_name(desk):
    (line,) = commands("Use a model by its hub name")
    assert f" {HUB_NAME} " in line
    assert re.search(r"^[1-4] tokens in ", desk.run(line, "--max-tokens 4").stderr, re.MULTILINE)


@pytest.mark.slow
def test_fine_tune_on_conversations(desk):
    (line,) = commands("Fine-tune on conversations")
    shown = desk.run(line, SHORT_SFT).stdout
    assert "to learn: 8 rows" in shown
    run = desk.folder / "runs/sft"
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert changed(desk, "runs/sft/model") and (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "summary.json").read_text())["rows"] == 8


def changed(desk: Desk, name: str) -> list[str]:
    """Tensors of a trained model that are others than those it began with, by more than rounding."""
    desk.run("deepseek-jax export MODEL STARTED --to float32")
    first, last = desk.tensors("STARTED"), desk.tensors(name)
    assert first.keys() == last.keys()
    near = lambda one, two: np.allclose(one, two.astype(np.float32), rtol=0, atol=2**-8 * np.abs(one).max())
    return [key for key, value in first.items() if not near(value, last[key])]


@pytest.mark.slow
def test_grpo_with_a_reward_of_ones_own(desk):
    title = "GRPO with your own reward"
    (source,) = (block for kind, block in JOBS[title] if kind == "python")
    (desk.folder / "rewards.py").write_text(source)
    (line,) = commands(title)
    desk.run(line, f"{SHORT_GRPO} --steps 2 --lr 1e-2")
    rows = read_metrics(desk.folder / "runs/mine")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["rewards/short/mean"] <= 1 for row in rows)
    assert changed(desk, "runs/mine/model")


@pytest.mark.slow
def test_grpo_on_verls_parquet(desk):
    if find_spec("pyarrow") is None:
        pytest.skip("needs pyarrow: pip install -e '.[data]'")
    import pyarrow
    import pyarrow.parquet

    for name, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": f"{n} + 1 = ?"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
                "extra_info": {"split": name, "index": n},
            }
            for n in numbers
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), desk.folder / f"{name}.parquet")
    (line,) = commands("GRPO on verl's Parquet files")
    shown = desk.run(line, f"{SHORT_GRPO.replace('exact', 'math')} --steps 2").stdout
    assert "held out: the first 4 questions of --held-out" in shown
    rows = read_metrics(desk.folder / "runs/grpo")
    assert [row["step"] for row in rows] == [1, 2] and all("rewards/accuracy/mean" in row for row in rows)


@pytest.mark.slow
def test_train_lora_and_merge_it(desk):
    train, merge = commands("Train LoRA, and merge it")
    desk.run(train, f"{SHORT_GRPO} --steps 2 --lr 1e-2 --weight-overlong 1 --overlong-cache 4")
    desk.run(merge, "--dtype float32")
    assert (desk.folder / "runs/lora/adapter/adapter_config.json").is_file()
    differing = changed(desk, "MERGED")
    assert differing and all("proj" in name for name in differing)


@pytest.mark.slow
def test_resume_and_extend(desk):
    begun, longer = (
        line.replace(f"--steps {of}", f"--steps {few}")
        for line, of, few in zip(commands("Resume a run, and extend it"), (200, 400), (8, 16), strict=True)
    )
    assert "--steps 8 " in begun and "--steps 16 " in longer
    short = f"{SHORT_GRPO} --save-every 1"
    killed_after(desk, begun, short, desk.folder / "runs/grpo/checkpoints/grpo/1")
    assert not (desk.folder / "runs/grpo/summary.json").exists()
    desk.run(begun, short)
    desk.run(longer, short)
    assert [row["step"] for row in read_metrics(desk.folder / "runs/grpo")] == [*range(1, 17)]
    assert json.loads((desk.folder / "runs/grpo/model/.written-by.json").read_text())["steps"] == 16


def killed_after(desk: Desk, command: str, short: str, saved: Path) -> None:
    """Begins a run and kills it as soon as a checkpoint is there."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **desk.environment}
    process = subprocess.Popen(
        ["exec " + desk.words(command, short)[2]],
        shell=True,
        executable="/bin/bash",
        cwd=desk.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
