"""The command line of tools/generate.py: its options as users type them, on a whole small model folder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.convert import convert_hf
from deepseek_jax.checkpoint.folder import Model, save_hf
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.commands import generate as command
from deepseek_jax.commands.generate import main
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.generation.text import TextCompletion
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe)
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    model = Model(config, abstract_weights(config)[0], weights)
    target = tmp_path_factory.mktemp("models") / "hf"
    save_hf(model, target, tokenizer=Tokenizer.characters(ALPHABET, chat_template=TEMPLATE).files)
    convert_hf(open_folder(target), target.with_name("converted"))
    return target


@pytest.fixture
def generate(command_line):
    return command_line(main)


def test_options_as_documented_and_the_same_from_a_converted_folder(folder, generate):
    options = ("--prompt", "1+2=?", "--max-tokens", 6, "--temperature", 0.8, "--top-p", 0.9, "--seed", 3)
    status, text, notes = generate(folder, *options)
    assert status == 0 and text.endswith("\n") and "tokens in" in notes
    assert generate(folder.with_name("converted"), *options, "--chat")[:2] == (0, text)
    assert generate(folder, *options, "--no-chat")[1] != text


@pytest.mark.slow
def test_a_model_is_divided_over_all_devices(folder):
    """Four of them, in a process of their own, and one: the same text."""
    options = ["--prompt", "1+2=?", "--max-tokens", "6", "--temperature", "0.8", "--seed", "3", "--samples", "2"]
    texts = []
    for devices, more in ((1, []), (4, ["--serve-tensor", "2"]), (4, ["--serve-expert", "2", "--serve-tensor", "1"])):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "tools/generate.py", str(folder), *options, *more]
        child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert child.returncode == 0, child.stderr
        texts.append(child.stdout)
    assert texts[0].strip() and texts[0] == texts[1] == texts[2]


def test_bfloat16_is_what_is_computed_in(folder, generate, monkeypatch):
    seen = []
    complete = command.complete
    note = lambda *arguments, **options: seen.append(arguments[1].norm.dtype) or complete(*arguments, **options)
    monkeypatch.setattr("deepseek_jax.commands.generate.complete", note)
    for options in ((), ("--dtype", "float32"), ("--dtype", "bfloat16")):
        assert generate(folder, "--prompt", "1+2=?", "--max-tokens", 2, *options)[0] == 0
    assert [dtype.name for dtype in seen] == ["float32", "float32", "bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "1", "--serve-tensor", "3"), "error: mesh: expert 1 x tensor 3 do not divide the 1 devices"),
        (("--prompt", "hello"), "error: encode: got 'h', wanted text"),
        (("--prompt", "1" * 300), "error: prompt 0: got 303 tokens, wanted 1 to 255"),
        (("--prompt", "1", "--top-p", "0"), "error: top_p: got 0.0"),
    ],
)
def test_mistakes_are_one_line(folder, generate, arguments, message):
    status, _, error = generate(folder, *arguments)
    assert status == 1 and error.startswith(message) and error.count("\n") == 1


def variant(folder, target, **files):
    """A copy of a model's folder with other files of text; None leaves one out."""
    shutil.copytree(folder, target)
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    return target


def test_a_model_without_a_template_is_not_sent_raw_text_as_a_chat(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    bare = variant(folder, tmp_path / "bare", tokenizer_config__json=config)
    status, text, error = generate(bare, "--prompt", "1+2=?")
    assert status == 1 and not text and error.count("\n") == 1 and "--no-chat" in error
    raw = generate(bare, "--prompt", "1+2=?", "--max-tokens", 2, "--no-chat")
    assert raw[0] == 0 and raw[1] == generate(folder, "--prompt", "1+2=?", "--max-tokens", 2, "--no-chat")[1]


def test_sampling_without_an_end_is_said(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    model = json.loads((folder / "config.json").read_text())
    del config["eos_token"]
    endless = variant(
        folder, tmp_path / "endless", tokenizer_config__json=config, config__json={**model, "eos_token_id": None}
    )
    status, _, notes = generate(endless, "--prompt", "1", "--max-tokens", 2)
    assert status == 0 and "names no end-of-sequence token; sampling ends at --max-tokens" in notes


def test_the_switch_of_thinking_is_the_templates(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('thinking is ' ~ thinking) }}"
    asks = variant(folder, tmp_path / "asks", tokenizer_config__json=config)
    assert "thinking is True" in generate(asks, "--prompt", "1", "--thinking", "True")[2]
    assert "thinking is False" in generate(asks, "--prompt", "1", "--thinking", "False")[2]
    assert "leave one out" in generate(asks, "--prompt", "1", "--no-chat", "--thinking", "True")[2]


def test_what_a_template_says_does_not_reach_the_terminal_raw(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = r"{{ raise_exception('\x1b[2J\x1b]0;owned\x07 no\nsuch \u202echat') }}"
    status, _, error = generate(variant(folder, tmp_path / "asks", tokenizer_config__json=config), "--prompt", "1")
    assert status == 1 and error.count("\n") == 1 and r"\x1b[2J\x1b]0;owned\x07 no such \u202echat" in error
    assert error[:-1].isprintable()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_completion_is_escaped_on_a_terminal_alone(terminal, folder, generate, monkeypatch):
    written = "\x1b[31mred\x07\n\ttab 5\u202f%, 5\u2009m"
    completion = TextCompletion(written, np.array([1, 2]), np.zeros(2), finished=False)
    monkeypatch.setattr("deepseek_jax.commands.generate.complete", lambda *of, **options: [completion])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, text, _ = generate(folder, "--prompt", "1", "--max-tokens", 2)
    assert status == 0 and text == (r"\x1b[31mred\x07" + "\n\ttab 5\u202f%, 5\u2009m" if terminal else written) + "\n"


def test_ids_that_the_model_does_not_have_are_refused(folder, generate, tmp_path):
    tokenizer = Tokenizer.characters(ALPHABET + "".join(map(chr, range(0x4E00, 0x5E00))), chat_template=TEMPLATE)
    wide = variant(folder, tmp_path / "wide")
    tokenizer.save(wide)
    status, _, error = generate(wide, "--prompt", chr(0x5DFF))
    assert status == 1 and "wanted ids below the model's vocab_size" in error and error.count("\n") == 1


def test_a_mistyped_folder_is_named(tmp_path, generate):
    status, _, error = generate(tmp_path / "nowhere", "--prompt", "1")
    assert status == 1 and "nowhere" in error and error.count("\n") == 1
