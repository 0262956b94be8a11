"""The command line of tools/inspect_hf.py: figures of folders and presets, and what is amiss with a folder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.convert import convert_hf
from deepseek_jax.checkpoint.headers import NAMES, Entry
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.summary import Summary, of_model, of_preset
from deepseek_jax.commands.inspect import main
from deepseek_jax.config import PRESETS, preset, to_hf
from deepseek_jax.model.decoder import abstract_weights
from tests.checkpoint.folders import KIMI, LLAMA_TIED, QWEN2, QWEN3, R1, V2, V32, random_folder, write_folder

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [field.name for field in dataclasses.fields(Summary)]


@pytest.fixture
def inspect(command_line):
    return command_line(main)


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, dtype, shards",
    [
        (R1, None, 4),
        (V32, None, 1),
        (R1, "bfloat16", 1),
        (V2, "float32", 4),
        (QWEN2, "float16", 1),
        (LLAMA_TIED, "bfloat16", 1),
        (QWEN3, "bfloat16", 4),
        (KIMI, None, 1),
    ],
    ids=["r1", "v3.2", "r1 unpacked", "v2", "qwen2", "llama", "qwen3", "kimi"],
)
def test_the_figures_are_those_of_the_files_and_of_the_converted_folder(config, dtype, shards, inspect, tmp_path: Path):
    tensors = random_folder(tmp_path / "hf", config, dtype, shards)
    status, text, error = inspect(tmp_path / "hf", "--json")
    found = json.loads(text)
    assert (status, error, list(found)) == (0, "", FIELDS)

    on_disk = 0
    for file in (tmp_path / "hf").glob("*.safetensors"):
        with file.open("rb") as stream:
            on_disk += os.stat(file).st_size - 8 - int.from_bytes(stream.read(8), "little")
    by_dtype, weights, module = Counter(), 0, 0
    for name, value in tensors.items():
        by_dtype[NAMES[value.dtype]] += value.nbytes
        weights += 0 if name.endswith("_scale_inv") else value.size
        module += value.size if name.startswith("model.layers.2.") and not name.endswith("_scale_inv") else 0
    assert found["bytes"] == on_disk == by_dtype.total()
    assert found["bytes_by_dtype"] == by_dtype and list(found["bytes_by_dtype"]) == [
        n for n, _ in by_dtype.most_common()
    ]
    assert (found["tensors"], found["parameters"], found["mtp_parameters"]) == (len(tensors), weights, module)
    assert found["architecture"] == config.model_type
    assert found["mtp_promised"] == found["mtp_held"] == config.num_nextn_predict_layers
    assert found["missing"] == found["unexpected"] == []
    if dtype is None:
        assert of_model(tmp_path / "hf") == of_preset(config)

    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    assert inspect(tmp_path / "converted", "--json") == (status, text, error)
    assert inspect(tmp_path / "converted") == inspect(tmp_path / "hf")


def test_a_folder_larger_than_any_memory_is_inspected_without_reading_a_weight(inspect, tmp_path: Path):
    """Ten of R1's layers: files of 107 GB that take no room, all holes but for their headers."""
    config = dataclasses.replace(preset("r1-671b"), num_hidden_layers=10)
    rows = names.published(config, abstract_weights(config)[1])

    class Shapes:
        folder = tmp_path
        entries = {row.name: Entry(row.dtype, row.shape, 0) for row in rows}

    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    writer.ShardWriter(tmp_path, writer.plan(Shapes())).close()
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 200e6
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 100e9
    status, text, _ = inspect(tmp_path, "--json")
    assert status == 0 and json.loads(text) == dataclasses.asdict(of_preset(config))


def test_the_figures_of_the_published_r1(inspect):
    status, text, error = inspect("--preset", "r1-671b", "--json")
    assert (status, error) == (0, "")
    assert json.loads(text) == {
        "architecture": "deepseek_v3",
        "tensors": 91_991,
        "bytes": 688_574_839_360,
        "parameters": 671_026_404_352 + 58 * 256 + 13_463_426_304,
        "mtp_parameters": 13_463_426_304,
        "bytes_by_dtype": {"F8_E4M3": 680_571_043_840, "BF16": 7_837_573_120, "F32": 166_222_400},
        "mtp_promised": 1,
        "mtp_held": 1,
        "missing": [],
        "unexpected": [],
    }
    status, text, error = inspect("--preset", "r1-671b")
    assert (status, error) == (0, "")
    assert "tensors       91,991\nbytes         688,574,839,360 (688.6 GB)\n" in text
    assert "  F8_E4M3     680,571,043,840 (680.6 GB)\n" in text
    assert "parameters    684,489,845,504, of them in MTP modules 13,463,426,304\n" in text
    assert "MTP modules   1 of the 1 in config.json\nmissing       0\nunexpected    0\n" in text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_figures(name, inspect):
    status, text, error = inspect("--preset", name, "--json")
    found = json.loads(text)
    assert (status, error, found["architecture"]) == (0, "", preset(name).model_type)
    assert found["bytes"] == sum(found["bytes_by_dtype"].values()) > 0
    if preset(name).quantization is None:
        assert found["bytes"] == 2 * found["parameters"] + found["bytes_by_dtype"].get("F32", 0) // 2


# --- what is amiss -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def r1(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("r1") / "hf"
    return folder, random_folder(folder, R1)


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
MODULE = "model.layers.2."
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    "change, missing, unexpected",
    [
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight"], []),
        (lambda t: t.update({"model.extra": np.ones(3, np.int8)}), [], ["model.extra"]),
        (lambda t: t.pop(O_PROJ + "_scale_inv"), [O_PROJ + "_scale_inv"], []),
        (lambda t: t.update({O_PROJ: np.ones((136, 96), ml_dtypes.bfloat16)}), [], [O_PROJ + "_scale_inv"]),
        (lambda t: t.pop(MODULE + "eh_proj.weight"), [MODULE + "eh_proj.weight"], []),
        (
            lambda t: t.update({"model.layers.3.enorm.weight": t[MODULE + "enorm.weight"]}),
            [],
            ["model.layers.3.enorm.weight"],
        ),
        (lambda t: t.update({"lm_head.Weight": t.pop("lm_head.weight")}), ["lm_head.weight"], ["lm_head.Weight"]),
        (lambda t: t.update({"a\n\x1b[2Jb": np.ones(1, np.float32)}), [], ["a\n\x1b[2Jb"]),
    ],
    ids=["removed", "added", "no scale", "scale alone", "half a module", "a module more", "renamed", "unprintable"],
)
def test_tensors_that_are_amiss_are_named_and_the_exit_status_is_1(change, missing, unexpected, r1, inspect, tmp_path):
    shutil.copytree(r1[0], tmp_path / "hf")
    tensors = dict(r1[1])
    change(tensors)
    write_folder(tmp_path / "hf", tensors, 1)
    status, text, error = inspect(tmp_path / "hf", "--json")
    found = json.loads(text)
    assert (status, error, found["missing"], found["unexpected"]) == (1, "", missing, unexpected)
    assert found["tensors"] == len(tensors) and found["bytes"] == sum(value.nbytes for value in tensors.values())
    status, text, error = inspect(tmp_path / "hf")
    listed = lambda what, which: [f"{what:<14}{len(which)}", *(f"  {name!r}" for name in which)]
    assert text.splitlines()[-len(missing) - len(unexpected) - 2 :] == listed("missing", missing) + listed(
        "unexpected", unexpected
    )
    assert (status, error) == (1, "")


def test_many_names_are_cut_short_but_in_json(r1, inspect, tmp_path: Path):
    shutil.copytree(r1[0], tmp_path / "hf")
    tensors = {name: value for name, value in r1[1].items() if not name.startswith("model.layers.0.")}
    write_folder(tmp_path / "hf", tensors, 1)
    gone = sorted(r1[1].keys() - tensors.keys())
    # what is not there is taken for unpacked, so that its scales are not missed
    gone = [name for name in gone if not name.endswith("_scale_inv")]
    assert json.loads(inspect(tmp_path / "hf", "--json")[1])["missing"] == gone
    lines = inspect(tmp_path / "hf")[1].splitlines()
    start = lines.index(f"missing       {len(gone)}")
    assert lines[start + 1 : start + 11] == [f"  {name!r}" for name in gone[:10]]
    assert lines[start + 11 :] == [f"  and {len(gone) - 10} more; --json lists them all", "unexpected    0"]


def test_a_folder_without_its_mtp_module_is_whole(r1, inspect, tmp_path: Path):
    """transformers drops the module on save. Rotary tables that old exports stored are nothing amiss either."""
    shutil.copytree(r1[0], tmp_path / "hf")
    tensors = {name: value for name, value in r1[1].items() if not name.startswith(MODULE)}
    write_folder(tmp_path / "hf", tensors | {INV_FREQ: np.ones(4, np.float32)}, 1)
    status, text, _ = inspect(tmp_path / "hf", "--json")
    found = json.loads(text)
    assert (status, found["missing"], found["unexpected"]) == (0, [], [])
    assert (found["mtp_promised"], found["mtp_held"], found["mtp_parameters"]) == (1, 0, 0)
    assert "MTP modules   0 of the 1 in config.json\n" in inspect(tmp_path / "hf")[1]


def cut_the_file(folder: Path) -> None:
    file = folder / files.SINGLE
    file.write_bytes(file.read_bytes()[:-1])


def forget_the_blocks(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": None}))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (cut_the_file, "model.safetensors: not a whole safetensors file (tensors end at byte"),
        (
            lambda folder: (folder / files.SINGLE).unlink(),
            "hf: no model.safetensors and no model.safetensors.index.json",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "weights").mkdir(), "manifest.json: missing; the folder was not written to its end"),
        (forget_the_blocks, "got FP8 weights, wanted a quantization_config in config.json"),
        (shutil.rmtree, "hf: no such folder"),
    ],
    ids=["cut", "no weights", "no config", "garbage config", "no manifest", "no blocks", "no folder"],
)
def test_a_damaged_folder_is_one_line(spoil, says, r1, inspect, tmp_path: Path):
    shutil.copytree(r1[0], tmp_path / "hf")
    spoil(tmp_path / "hf")
    for options in ((), ("--json",)):
        status, text, error = inspect(tmp_path / "hf", *options)
        assert (status, text) == (1, "")
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "error: wanted either a model or --preset NAME\n"),
        (("here", "--preset", "tiny"), "error: wanted either a model or --preset NAME\n"),
        (("--preset", "r2"), f"error: preset: got 'r2', wanted one of {', '.join(PRESETS)}\n"),
    ],
    ids=["neither", "both", "unknown"],
)
def test_a_folder_or_a_preset(arguments, says, inspect):
    assert inspect(*arguments) == (1, "", says)


def test_the_script_itself(r1, tmp_path: Path):
    command = [sys.executable, str(ROOT / "tools" / "inspect_hf.py"), str(r1[0]), "--json"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == dataclasses.asdict(of_model(r1[0]))
