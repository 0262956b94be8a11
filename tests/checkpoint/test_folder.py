"""Model folders: every tensor comes through bit for bit, and damage is one line naming the file, found and wanted."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import files, names
from deepseek_jax.checkpoint.folder import convert_hf, export_hf, load_config, load_model, save_hf
from deepseek_jax.config import GQAConfig, ModelConfig, RopeConfig, preset, to_hf
from deepseek_jax.model.decoder import abstract_weights

ROOT = Path(__file__).resolve().parents[2]
V3 = dataclasses.replace(preset("tiny"), hidden_size=16, intermediate_size=24, num_hidden_layers=2)
QWEN2 = dataclasses.replace(
    V3,
    model_type="qwen2",
    attention=GQAConfig(num_key_value_heads=2, head_dim=4, qkv_bias=True),
    rope=RopeConfig(theta=1e4),
    moe=None,
)
LLAMA_TIED = dataclasses.replace(
    QWEN2,
    model_type="llama",
    tie_word_embeddings=True,
    attention=GQAConfig(num_key_value_heads=4, head_dim=4, qkv_bias=False),
)
SHARD = "model-00002-of-00004.safetensors"


def random_folder(folder: Path, config: ModelConfig, dtype: str, shards: int = 1) -> dict[str, np.ndarray]:
    """Make a Hugging Face folder; returns its tensors, zeros of both signs, subnormals and the largest among them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    (folder / "tokenizer.json").write_text('{"à": "la lettre"}\n')
    rng = np.random.RandomState(0)
    tensors = {}
    for row in names.tensors(abstract_weights(config)[1]):
        kind = np.float32 if row.name.endswith("e_score_correction_bias") else np.dtype(dtype)
        value = rng.standard_normal(row.shape).astype(kind)
        info = ml_dtypes.finfo(kind)
        value.flat[:4] = [-0.0, 0.0, info.smallest_subnormal, info.max]
        tensors[row.name] = value
    if shards == 1:
        save_file(tensors, folder / files.SINGLE)
        return tensors
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


# --- what goes in comes out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, dtype, shards",
    [
        (V3, "float32", 1),
        (V3, "bfloat16", 4),
        (V3, "float16", 1),
        (QWEN2, "float32", 4),
        (QWEN2, "bfloat16", 1),
        (LLAMA_TIED, "float16", 4),
        (LLAMA_TIED, "bfloat16", 1),
    ],
    ids=lambda value: value.model_type if isinstance(value, ModelConfig) else str(value),
)
def test_converting_and_exporting_gives_back_every_tensor(config, dtype, shards, tmp_path: Path):
    source, converted, exported = tmp_path / "hf", tmp_path / "converted", tmp_path / "exported"
    tensors = random_folder(source, config, dtype, shards)
    convert_hf(source, converted)
    export_hf(converted, exported)
    assert_same(tensors_of(exported), tensors)
    for name in ("config.json", "tokenizer.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes() == (converted / name).read_bytes()
    assert load_config(converted) == config


@pytest.mark.parametrize("config", [V3, LLAMA_TIED], ids=lambda config: config.model_type)
def test_saving_a_loaded_model_gives_back_every_tensor(config, tmp_path: Path):
    tensors = random_folder(tmp_path / "hf", config, "bfloat16", 4)
    save_hf(load_model(tmp_path / "hf", dtype=None), tmp_path / "saved")
    assert_same(tensors_of(tmp_path / "saved"), tensors)
    assert load_config(tmp_path / "saved") == config
    save_hf(load_model(tmp_path / "hf", dtype=None), tmp_path / "beside", source=tmp_path / "hf")
    assert (tmp_path / "beside" / "tokenizer.json").is_file()


def test_a_converted_folder_loads_to_the_same_weights(tmp_path: Path):
    random_folder(tmp_path / "hf", V3, "bfloat16")
    convert_hf(tmp_path / "hf", tmp_path / "converted")
    for dtype in (None, np.float32):
        ours, theirs = (names.flat(load_model(tmp_path / f, dtype=dtype).weights) for f in ("converted", "hf"))
        assert_same(jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, theirs))


def test_weights_are_computed_in_one_dtype_and_router_biases_stay_float32(tmp_path: Path):
    random_folder(tmp_path / "hf", V3, "float16")
    flat = names.flat(load_model(tmp_path / "hf", dtype=ml_dtypes.bfloat16).weights)
    assert {key for key, value in flat.items() if value.dtype == np.float32} == {"layers.1.mlp.bias"}
    assert {value.dtype.name for key, value in flat.items() if key != "layers.1.mlp.bias"} == {"bfloat16"}


def test_tensors_lie_transposed_and_experts_stacked(tmp_path: Path):
    tensors = random_folder(tmp_path / "hf", V3, "float32")
    flat = names.flat(load_model(tmp_path / "hf").weights)
    o = "self_attn.o_proj.weight"
    np.testing.assert_array_equal(flat["layers.0.attention.o"], tensors[f"model.layers.0.{o}"].T)
    np.testing.assert_array_equal(flat["embed"], tensors["model.embed_tokens.weight"])
    for expert in range(8):
        up = tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        np.testing.assert_array_equal(flat["layers.1.mlp.experts.up"][expert], up.T)


def test_large_checkpoints_are_written_in_shards(tmp_path: Path):
    """In the order given, no shard above the size asked for, and an index that says where each tensor lies."""
    tensors = {f"t{number}": np.full((number, 5), number, np.float32) for number in range(1, 9)}
    total = sum(value.nbytes for value in tensors.values())
    files.write_tensors(tmp_path, iter(tensors.items()), total, shard_bytes=200)
    assert_same(tensors_of(tmp_path), tensors)
    index = json.loads((tmp_path / files.INDEX).read_text())
    held = {file.name: load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))}
    assert [list(part) for part in held.values()] == [["t1", "t2", "t3", "t4"], ["t5"], ["t6"], ["t7"], ["t8"]]
    assert list(held) == [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    assert index["metadata"] == {"total_size": total}
    assert {name: files.TensorFolder(tmp_path).shape(name) for name in tensors} == {
        name: value.shape for name, value in tensors.items()
    }


# --- damage --------------------------------------------------------------------------------------


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / files.INDEX).read_text())
        change(index["weight_map"])
        (folder / files.INDEX).write_text(json.dumps(index))

    return spoil


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))


def edit_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD)

    return spoil


def put(value: float) -> Callable[[Path], None]:
    """Set one number in the middle of one tensor."""
    return edit_tensors(lambda tensors: tensors[min(tensors)].flat.__setitem__(1, value))


def overlap(raw: bytes) -> bytes:
    """A header whose first two tensors share their bytes."""
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    body = json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + raw[8 + size :]


def remove_weights(folder: Path) -> None:
    for file in [folder / files.INDEX, *folder.glob("*.safetensors")]:
        file.unlink()


WHERE = f"{SHARD}: tensor 'lm_head.weight'"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"  # in that shard
SPOILED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), (f"{SHARD}: missing; the index places", "tensors there")),
    "truncated": (edit_bytes(lambda raw: raw[:-64]), (f"{SHARD}: not a whole safetensors file",)),
    "truncated header": (edit_bytes(lambda raw: raw[:20]), (f"{SHARD}: not a whole safetensors file",)),
    "empty shard": (edit_bytes(lambda raw: b""), (f"{SHARD}: not a whole safetensors file",)),
    "huge header": (
        edit_bytes(lambda raw: struct.pack("<Q", 1 << 60) + raw[8:]),
        (f"{SHARD}: not a whole safetensors file",),
    ),
    "overlapping offsets": (edit_bytes(overlap), (f"{SHARD}: not a whole safetensors file",)),
    "wrong shape": (
        edit_config(intermediate_size=40),
        ("tensor 'model.layers.0.mlp.", "down_proj.weight': got shape [16, 24], wanted [16, 40] by config.json"),
    ),
    "unexpected tensor": (edit_config(num_hidden_layers=1), ("unexpected tensor 'model.layers.1.", "config.json")),
    "missing tensor": (edit_config(num_hidden_layers=3), ("missing tensor 'model.layers.2.", "config.json")),
    "fewer experts": (
        edit_config(n_routed_experts=4, n_group=2),
        ("unexpected tensor 'model.layers.1.mlp.experts.4.",),
    ),
    "tied": (edit_config(tie_word_embeddings=True), ("unexpected tensor 'lm_head.weight'",)),
    "tensor twice": (
        edit_tensors(lambda tensors: tensors.update({"model.embed_tokens.weight": np.zeros((64, 16), np.float32)})),
        (f"{SHARD}: tensor 'model.embed_tokens.weight' is also in model-0000",),
    ),
    "NaN": (put(np.nan), (WHERE, "holds NaN or infinite values")),
    "infinity": (put(-np.inf), (WHERE, "holds NaN or infinite values")),
    "int8": (
        edit_tensors(lambda tensors: tensors.update({min(tensors): np.ones((64, 16), np.int8)})),
        (WHERE, "got dtype I8, wanted F32, F16 or BF16"),
    ),
    "float64": (
        edit_tensors(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].astype(np.float64)})),
        (WHERE, "got dtype F64, wanted F32, F16 or BF16"),
    ),
    "experts of two dtypes": (
        edit_tensors(lambda tensors: tensors.update({EXPERT: np.ones((16, 64), np.float16)})),
        ("tensors like 'model.layers.1.mlp.experts.0.down_proj.weight': got float16 and float32, wanted one dtype",),
    ),
    "index outside": (
        edit_index(lambda index: index.update({"model.norm.weight": "../hf/" + SHARD})),
        (files.INDEX, "tensor 'model.norm.weight': file '../hf/" + SHARD + "' lies outside the folder"),
    ),
    "index to the root": (
        edit_index(lambda index: index.update({"model.norm.weight": "/etc/passwd"})),
        (files.INDEX, "file '/etc/passwd' lies outside the folder"),
    ),
    "index of numbers": (
        edit_index(lambda index: index.update({"model.norm.weight": 3})),
        (files.INDEX, "tensor 'model.norm.weight': file 3 lies outside the folder"),
    ),
    "index of config": (
        edit_index(lambda index: index.update({"model.norm.weight": "config.json"})),
        ("config.json: not a whole safetensors file",),
    ),
    "index names more": (
        edit_index(lambda index: index.update({"model.extra": SHARD})),
        (f"{SHARD}: tensor 'model.extra' is not there, though the index says so",),
    ),
    "empty index": (edit_index(lambda index: index.clear()), (files.INDEX, "weight_map: wanted an object")),
    "garbage index": (lambda f: (f / files.INDEX).write_text("{]"), (f"{files.INDEX}: not JSON",)),
    "index is a list": (lambda f: (f / files.INDEX).write_text("[]"), (f"{files.INDEX}: got a JSON list",)),
    "deep index": (lambda f: (f / files.INDEX).write_text("[" * 100_000), (f"{files.INDEX}: not JSON",)),
    "no weights": (remove_weights, ("no model.safetensors and no model.safetensors.index.json",)),
    "unknown architecture": (
        edit_config(model_type="nonesuch"),
        ("config.json: model_type: got 'nonesuch', wanted deepseek_v3, deepseek_v2, qwen2 or llama",),
    ),
    "unknown key": (edit_config(hyper_factor=3), ("config.json: unknown key 'hyper_factor'",)),
    "wrong type": (edit_config(hidden_size="16"), ("config.json: hidden_size: got '16', wanted a whole number",)),
    "empty object": (lambda f: (f / "config.json").write_text("{}"), ("config.json: key 'model_type' is missing",)),
    "empty config": (lambda f: (f / "config.json").write_text(""), ("config.json: not JSON",)),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json: not JSON",)),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ("config.json: got a JSON list",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: no such file",)),
    "no folder": (shutil.rmtree, ("hf: no such folder",)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undamaged folder of four shards."""
    folder = tmp_path_factory.mktemp("whole") / "hf"
    random_folder(folder, V3, "float32", 4)
    return folder


@pytest.mark.parametrize("what", SPOILED)
def test_damage_is_named_and_nothing_is_written(what, whole: Path, tmp_path: Path):
    spoil, says = SPOILED[what]
    shutil.copytree(whole, tmp_path / "hf")
    spoil(tmp_path / "hf")
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError) as caught:
        convert_hf(tmp_path / "hf", tmp_path / "converted")
    for part in says:
        assert part in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_an_existing_destination_is_left_alone(whole: Path, tmp_path: Path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    for write in (convert_hf, export_hf):
        with pytest.raises(ValueError, match="mine: exists already; choose a new folder or remove it"):
            write(whole, target)
    with pytest.raises(ValueError, match="mine: exists already"):
        save_hf(load_model(whole), target)
    assert [file.read_text() for file in tmp_path.rglob("*.*")] == ["keep"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "model") as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.partial").mkdir()  # what SIGKILL leaves
    (tmp_path / ".model.partial" / "stale").touch()
    with files.new_folder(tmp_path / "model") as partial:
        (partial / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/new"]


@pytest.fixture(scope="module")
def converted(whole: Path) -> Path:
    convert_hf(whole, whole.with_name("converted"))
    return whole.with_name("converted")


def cut_the_largest_file(folder: Path) -> None:
    largest = max((path for path in (folder / "weights").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


# Orbax reads in threads of its own, whose exceptions pytest would list one by one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "spoil, says",
    [
        (edit_config(intermediate_size=40), "array 'layers.0.mlp.down': got shape [24, 16], wanted [40, 16]"),
        (edit_config(num_hidden_layers=1), "unexpected array 'layers.1."),
        (edit_config(num_hidden_layers=3), "missing array 'layers.2."),
        (lambda folder: shutil.rmtree(folder / "weights" / "state"), "not a whole Orbax checkpoint"),
        (lambda folder: (folder / "weights" / "state" / "_METADATA").unlink(), "not a whole Orbax checkpoint"),
        (cut_the_largest_file, "not a whole Orbax checkpoint"),
    ],
    ids=["shape", "unexpected", "missing", "no arrays", "no metadata", "truncated"],
)
def test_a_damaged_converted_folder_is_named(spoil, says, converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "converted")
    spoil(tmp_path / "converted")
    with pytest.raises(ValueError) as caught:
        export_hf(tmp_path / "converted", tmp_path / "hf")
    assert says in str(caught.value) and "weights" in str(caught.value)
    assert not (tmp_path / "hf").exists()


# --- the command line ----------------------------------------------------------------------------


def run_tool(name: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_tool_says_a_users_mistake_in_one_line(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "hf")
    edit_bytes(lambda raw: raw[:-64])(tmp_path / "hf")
    done = run_tool("convert_hf", tmp_path / "hf", tmp_path / "converted")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"{SHARD}: not a whole safetensors file" in done.stderr
    assert not (tmp_path / "converted").exists()


def test_logits_refuse_tokens_outside_the_vocabulary(whole: Path, tmp_path: Path):
    np.save(tmp_path / "tokens.npy", np.array([[1, 64]], np.int32))
    done = run_tool("logits", whole, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "tokens.npy: token 64: wanted 0 to 63" in done.stderr
    assert not (tmp_path / "logits.npy").exists()
