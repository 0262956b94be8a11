"""Model folders: every tensor comes through bit for bit, and damage is one line naming the file, found and wanted."""

import json
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.convert import convert_hf, export_hf, write_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.model_folder import load_config, open_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands import convert, logits
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from tests.checkpoint.folders import (
    KIMI,
    LLAMA_TIED,
    QWEN2,
    QWEN3,
    R1,
    SMALL_BLOCKS,
    V2,
    V3,
    V32,
    flip_a_bit,
    random_folder,
    stored_at,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHARD = "model-00002-of-00004.safetensors"


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
        (V2, "bfloat16", 4),
        (R1, None, 4),
        (R1, "bfloat16", 1),
        (SMALL_BLOCKS, None, 1),
        (V32, None, 4),
        (V32, "float32", 1),
        (V3, "bfloat16", 4),
        (V3, "float16", 1),
        (QWEN2, "float32", 4),
        (QWEN2, "bfloat16", 1),
        (QWEN3, "float32", 1),
        (QWEN3, "bfloat16", 4),
        (KIMI, None, 4),
        (KIMI, "bfloat16", 1),
        (LLAMA_TIED, "float16", 4),
        (LLAMA_TIED, "bfloat16", 1),
    ],
    ids=lambda value: value.model_type if isinstance(value, ModelConfig) else str(value),
)
def test_converting_and_exporting_gives_back_the_very_files(config, dtype, shards, tmp_path: Path):
    """Every tensor as stored, FP8 with its scales, MTP modules with their copies, and the indexer."""
    source, converted, exported = tmp_path / "hf", tmp_path / "converted", tmp_path / "exported"
    random_folder(source, config, dtype, shards)
    convert_hf(open_folder(source), converted)
    export_hf(open_folder(converted), exported)
    assert {path.name for path in exported.iterdir()} == {path.name for path in source.iterdir()}
    for path in source.iterdir():
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    assert load_config(converted) == config


@pytest.mark.parametrize("config", [V3, QWEN3, LLAMA_TIED], ids=lambda config: config.model_type)
def test_saving_a_loaded_model_gives_back_every_tensor(config, tmp_path: Path):
    tensors = random_folder(tmp_path / "hf", config, "bfloat16", 4)
    save_model(load_model(tmp_path / "hf", dtype=None), tmp_path / "saved")
    assert_same(tensors_of(tmp_path / "saved"), tensors)
    assert load_config(tmp_path / "saved") == config
    save_model(load_model(tmp_path / "hf", dtype=None), tmp_path / "beside", source=tmp_path / "hf")
    assert (tmp_path / "beside" / "tokenizer.json").is_file()


def test_a_converted_folder_loads_to_the_same_weights(tmp_path: Path):
    random_folder(tmp_path / "hf", V3, "bfloat16")
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
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
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / files.SINGLE)
    source = files.TensorFolder(tmp_path / "one")
    write_hf(source, tmp_path, writer.plan(source, shard_bytes=200))
    assert_same(tensors_of(tmp_path), tensors)
    index = json.loads((tmp_path / files.INDEX).read_text())
    held = {file.name: load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))}
    assert [list(part) for part in held.values()] == [["t1", "t2", "t3", "t4"], ["t5"], ["t6"], ["t7"], ["t8"]]
    assert list(held) == [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}
    shapes = {name: entry.shape for name, entry in files.TensorFolder(tmp_path).entries.items()}
    assert shapes == {name: value.shape for name, value in tensors.items()}


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
    "missing shard": (lambda f: (f / SHARD).unlink(), (f"{SHARD}: no such file; the index places", "tensors there")),
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
    "tensor twice": (
        edit_tensors(lambda tensors: tensors.update({"model.embed_tokens.weight": np.zeros((64, 16), np.float32)})),
        (f"{SHARD}: tensor 'model.embed_tokens.weight' is also in model-0000",),
    ),
    "NaN": (put(np.nan), (WHERE, "holds NaN or infinite values")),
    "infinity": (put(-np.inf), (WHERE, "holds NaN or infinite values")),
    "int8": (
        edit_tensors(lambda tensors: tensors.update({min(tensors): np.ones((64, 16), np.int8)})),
        (WHERE, "got dtype I8, wanted F32 or F16 or BF16 or F8_E4M3"),
    ),
    "float64": (
        edit_tensors(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].astype(np.float64)})),
        (WHERE, "got dtype F64, wanted F32 or F16 or BF16 or F8_E4M3"),
    ),
    "experts of two dtypes": (
        edit_tensors(lambda tensors: tensors.update({EXPERT: np.ones((16, 64), np.float16)})),
        ("tensors like 'model.layers.1.mlp.experts.0.down_proj.weight': got F16 and F32, wanted one dtype",),
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
        ("config.json: model_type: got 'nonesuch', wanted deepseek_v3,", "kimi_k2, qwen2, qwen3 or llama"),
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
        convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    for part in says:
        assert part in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_an_existing_destination_is_left_alone(whole: Path, tmp_path: Path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    for write in (convert_hf, export_hf):
        with pytest.raises(ValueError, match="mine: exists already; choose a new folder or remove it"):
            write(open_folder(whole), target)
    with pytest.raises(ValueError, match="mine: exists already"):
        save_model(load_model(whole), target)
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
    convert_hf(open_folder(whole), whole.with_name("converted"))
    return whole.with_name("converted")


WEIGHT = "model.layers.1.self_attn.o_proj.weight"


def cut_a_file(folder: Path) -> None:
    """In the middle of a weight."""
    places, value = stored_at(folder, WEIGHT)
    for path, start in places:
        path.write_bytes(path.read_bytes()[: start + len(value) // 2])


def exchange_two_hashes(folder: Path) -> None:
    """As if two tensors of one shape had been written in each other's place."""
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    one, other = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    edit_json(folder / "manifest.json", tensors=tensors)


def another_header(folder: Path) -> None:
    (folder / "source" / f"{SHARD}.header").unlink()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (edit_config(intermediate_size=40), "tensor 'model.layers.0.mlp.down_proj.weight': got shape [16, 24], wanted"),
        (edit_config(num_hidden_layers=1), "unexpected tensor 'model.layers.1."),
        (edit_config(num_hidden_layers=3), "missing tensor 'model.layers.2."),
        (lambda folder: shutil.rmtree(folder / "weights" / "layers.1"), "weights/layers.1: array 'attention.kv_a' can"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing; the folder was not written"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: tensors: got NoneType, wanted"),
        (
            lambda folder: edit_json(folder / "manifest.json", tensors={"model.norm.weight": {"dtype": "F64"}}),
            "manifest.json: tensor 'model.norm.weight': wanted a dtype of F32",
        ),
        (cut_a_file, "cannot be read"),
        (
            lambda folder: flip_a_bit(folder, WEIGHT),
            f"tensor {WEIGHT!r} is not what was converted; the checkpoint is damaged",
        ),
        (exchange_two_hashes, "is not what was converted; the checkpoint is damaged"),
        (another_header, "source: the headers are not those of the tensors in manifest.json"),
    ],
    ids=lambda value: "" if callable(value) else value[:24],
)
def test_a_damaged_converted_folder_is_named(spoil, says, converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "converted")
    spoil(tmp_path / "converted")
    with pytest.raises(ValueError) as caught:
        export_hf(open_folder(tmp_path / "converted"), tmp_path / "hf")
    assert says in str(caught.value)
    assert not (tmp_path / "hf").exists()


# --- FP8, MTP ------------------------------------------------------------------------------------

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
EH_PROJ = "model.layers.2.eh_proj.weight"


def dequantised(tensors: dict[str, np.ndarray], name: str, block: tuple[int, int]) -> np.ndarray:
    """float64, one weight at a time."""
    weight, scale = tensors[name].astype(np.float64), tensors.get(name + "_scale_inv")
    if scale is None:
        return weight
    rows, columns = np.indices(weight.shape)
    return weight * scale.astype(np.float64)[rows // block[0], columns // block[1]]


@pytest.mark.parametrize("config", [R1, SMALL_BLOCKS, V32], ids=["r1", "small blocks", "v3.2"])
def test_fp8_weights_are_computed_with_unpacked(config, tmp_path: Path):
    """In float32 exactly (a product of 4 and of 24 bits, rounded once), and in bfloat16 rounded once more at most."""
    tensors = random_folder(tmp_path / "hf", config)
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    for folder in (tmp_path / "hf", tmp_path / "converted"):
        loaded = (names.flat(load_model(folder, dtype=dtype).weights) for dtype in (np.float32, None))
        exact, rounded = ({key: np.asarray(value) for key, value in weights.items()} for weights in loaded)
        assert "mtp.0.layer.mlp.experts.gate" in exact
        for row in names.tensors(config, abstract_weights(config)[1]):
            if row.copy_of:
                continue
            wanted = dequantised(tensors, row.name, config.quantization.weight_block_size)
            wanted = wanted.T if row.transposed else wanted
            got, half = exact[names.key(row.path)], rounded[names.key(row.path)]
            got, half = (a if row.expert is None else a[row.expert] for a in (got, half))
            np.testing.assert_array_equal(got, wanted.astype(np.float32))
            kind = np.float32 if row.dtype == "F32" else ml_dtypes.bfloat16
            assert half.dtype == kind
            np.testing.assert_array_equal(half, wanted.astype(np.float32).astype(kind))


def test_a_saved_fp8_model_is_unpacked_and_says_so(tmp_path: Path):
    random_folder(tmp_path / "hf", R1)
    model = load_model(tmp_path / "hf", dtype=None)
    for source in (None, tmp_path / "hf"):
        save_model(model, tmp_path / "saved", source=source)
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
        back = load_model(tmp_path / "saved", dtype=None)
        assert back.config == model.config
        assert_same(
            jax.tree.map(np.asarray, names.flat(back.weights)), jax.tree.map(np.asarray, names.flat(model.weights))
        )
        shutil.rmtree(tmp_path / "saved")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(O_PROJ + "_scale_inv"), f"missing tensor '{O_PROJ}_scale_inv'"),
        (lambda t: t.update({O_PROJ: np.ones((136, 96), np.float32)}), f"unexpected tensor '{O_PROJ}_scale_inv'"),
        (
            lambda t: t.update({O_PROJ + "_scale_inv": np.ones((1, 1), np.float32)}),
            f"tensor '{O_PROJ}_scale_inv': got shape [1, 1], wanted [2, 1] by config.json",
        ),
        (
            lambda t: t.update({O_PROJ + "_scale_inv": np.ones((2, 1), np.float16)}),
            f"tensor '{O_PROJ}_scale_inv': got dtype F16, wanted F32",
        ),
        (lambda t: t[O_PROJ].view(np.uint8).flat.__setitem__(7, 0xFF), f"tensor '{O_PROJ}' holds NaN"),
        (lambda t: t.pop(EH_PROJ), f"missing tensor '{EH_PROJ}'"),
        (lambda t: t.update({EH_PROJ.replace("2", "3"): t[EH_PROJ]}), "unexpected tensor 'model.layers.3.eh_proj"),
    ],
    ids=["no scale", "scale alone", "misshapen scale", "float16 scale", "NaN", "half a module", "a module more"],
)
def test_damage_to_fp8_and_mtp_is_named(change, says, tmp_path: Path):
    tensors = random_folder(tmp_path / "hf", R1)
    (tmp_path / "hf" / files.SINGLE).unlink()
    change(tensors)
    write_folder(tmp_path / "hf", tensors, 1)
    for read in (load_model, lambda folder: convert_hf(open_folder(folder), tmp_path / "converted")):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "hf")
        assert says in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_fp8_weights_without_the_size_of_their_blocks_are_refused(tmp_path: Path):
    random_folder(tmp_path / "hf", R1)
    edit_config(quantization_config=None)(tmp_path / "hf")
    with pytest.raises(ValueError, match="got FP8 weights, wanted a quantization_config in config.json"):
        load_model(tmp_path / "hf")


def test_a_folder_without_its_mtp_module_is_taken_as_it_is(tmp_path: Path):
    """As transformers saves it: config.json still promises the module."""
    tensors = random_folder(tmp_path / "hf", R1, "bfloat16")
    (tmp_path / "hf" / files.SINGLE).unlink()
    main = {name: value for name, value in tensors.items() if not name.startswith("model.layers.2.")}
    write_folder(tmp_path / "hf", main, 1)
    assert load_model(tmp_path / "hf").config.num_nextn_predict_layers == 0
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    export_hf(open_folder(tmp_path / "converted"), tmp_path / "exported")
    assert_same(tensors_of(tmp_path / "exported"), main)


def test_copies_that_are_none_are_told_and_kept(tmp_path: Path):
    """The module in memory shares the main model's embedding; the folder's other one is converted all the same."""
    tensors = random_folder(tmp_path / "hf", R1, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(tmp_path / "hf")
    save_model(model, tmp_path / "saved")
    assert_same(tensors_of(tmp_path / "saved"), tensors)
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"] + np.float32(1)
    (tmp_path / "hf" / files.SINGLE).unlink()
    write_folder(tmp_path / "hf", tensors, 1)
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    for folder in (tmp_path / "hf", tmp_path / "converted"):
        with pytest.warns(UserWarning, match="layers.2.shared_head.head.weight is not the copy of lm_head.weight"):
            load_model(folder)


# --- the command line ----------------------------------------------------------------------------


def refused(main: Callable, monkeypatch, capsys, *arguments: Path) -> str:
    """What a command says that ends with 1: one line."""
    monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run(main)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_a_tool_says_a_users_mistake_in_one_line(whole: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "hf")
    edit_bytes(lambda raw: raw[:-64])(tmp_path / "hf")
    error = refused(convert.main, monkeypatch, capsys, tmp_path / "hf", tmp_path / "converted")
    assert f"{SHARD}: not a whole safetensors file" in error
    assert not (tmp_path / "converted").exists()


def test_logits_refuse_tokens_outside_the_vocabulary(whole: Path, tmp_path: Path, monkeypatch, capsys):
    np.save(tmp_path / "tokens.npy", np.array([[1, 64]], np.int32))
    arguments = whole, tmp_path / "tokens.npy", tmp_path / "logits.npy"
    error = refused(logits.main, monkeypatch, capsys, *arguments)
    assert "tokens.npy: token 64: wanted 0 to 63" in error
    assert not (tmp_path / "logits.npy").exists()
