"""Folders as people have them: copies that are stored or not, scales of every kind, pointers, and two saves in one."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import files, names
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.headers import NAMES, make_header
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.checkpoint.summary import of_model
from deepseek_jax.config import FP8Config, from_hf, to_hf
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from tests.checkpoint import folders

pytestmark = pytest.mark.usefixtures("quick_compilation")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {
    "llama": folders.LLAMA_TIED,
    "qwen3": dataclasses.replace(folders.QWEN3, tie_word_embeddings=True),
    "deepseek": dataclasses.replace(folders.V3, tie_word_embeddings=True, num_nextn_predict_layers=1),
}


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in names.flat(load_model(folder).weights).items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def round_trip(folder: Path, work: Path) -> dict[str, np.ndarray]:
    """Converted and exported again, to the very files; returns what the converted folder loads as."""
    convert_hf(open_folder(folder), work / "converted")
    export_hf(open_folder(work / "converted"), work / "back")
    for file in folder.glob("*.safetensors"):
        assert (work / "back" / file.name).read_bytes() == file.read_bytes()
    return loaded(work / "converted")


# --- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_model_may_store_its_head_again(kind, tmp_path):
    tensors = folders.random_folder(tmp_path / "hf", TIED[kind], "float32")
    wanted = loaded(tmp_path / "hf")
    save_file(tensors | {HEAD: tensors[EMBED].copy()}, tmp_path / "hf" / files.SINGLE)
    same(loaded(tmp_path / "hf"), wanted)
    same(round_trip(tmp_path / "hf", tmp_path), wanted)
    assert not (found := of_model(tmp_path / "hf")).missing + found.unexpected
    save_model(load_model(tmp_path / "hf"), tmp_path / "saved")
    assert HEAD not in load_file(tmp_path / "saved" / files.SINGLE)


@pytest.mark.parametrize("converted", [False, True])
def test_a_tied_model_with_another_head_is_refused(converted, tmp_path):
    tensors = folders.random_folder(tmp_path / "hf", TIED["llama"], "bfloat16")
    other = tensors[EMBED].copy()
    other.view(np.uint16)[-1, -1] ^= 1  # the last bit of the last number
    save_file(tensors | {HEAD: other}, tmp_path / "hf" / files.SINGLE)
    if converted:
        convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    with pytest.raises(ValueError, match=r"'lm_head.weight' is not equal to 'model.embed_tokens.weight'.*tie_word"):
        load_model(tmp_path / ("converted" if converted else "hf"))


@pytest.mark.parametrize("lacking", [("embed_tokens",), ("shared_head.head",), ("embed_tokens", "shared_head.head")])
@pytest.mark.parametrize("config", [folders.R1, folders.SMALL_BLOCKS], ids=["r1", "two-modules"])
def test_an_mtp_module_may_lack_its_copies(config, lacking, tmp_path):
    tensors = folders.random_folder(tmp_path / "hf", config)
    wanted = loaded(tmp_path / "hf")
    first = f"model.layers.{config.num_hidden_layers}."
    kept = {n: t for n, t in tensors.items() if n not in {f"{first}{name}.weight" for name in lacking}}
    assert len(kept) == len(tensors) - len(lacking)
    save_file(kept, tmp_path / "hf" / files.SINGLE)
    same(loaded(tmp_path / "hf"), wanted)
    same(round_trip(tmp_path / "hf", tmp_path), wanted)
    assert of_model(tmp_path / "hf").mtp_held == config.num_nextn_predict_layers


def test_a_module_that_lacks_more_than_copies_is_still_refused(tmp_path):
    tensors = folders.random_folder(tmp_path / "hf", folders.R1)
    del tensors["model.layers.2.eh_proj.weight"]
    save_file(tensors, tmp_path / "hf" / files.SINGLE)
    with pytest.raises(ValueError, match="missing tensor 'model.layers.2.eh_proj.weight'"):
        open_folder(tmp_path / "hf")


# --- scales ----------------------------------------------------------------------------------------

SCALES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E8M0": ml_dtypes.float8_e8m0fnu}


def with_scales(folder: Path, kind: str, config=folders.R1) -> dict[str, np.ndarray]:
    """An FP8 folder whose scales are powers of two, which every dtype holds exactly."""
    tensors = folders.random_folder(folder, config)
    rng = np.random.default_rng(1)
    for name, value in tensors.items():
        if name.endswith(names.SCALE):
            powers = 2.0 ** rng.integers(-12, 3, value.shape)
            tensors[name] = powers.astype(np.float32).astype(SCALES[kind])
    save(folder, tensors)
    return tensors


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """safetensors' own writer knows no F8_E8M0 of NumPy."""
    header = make_header({name: (NAMES[value.dtype], value.shape) for name, value in tensors.items()})
    (folder / files.SINGLE).write_bytes(header.raw + b"".join(value.tobytes() for value in tensors.values()))


@pytest.mark.parametrize("config", [folders.R1, folders.SMALL_BLOCKS], ids=["r1", "small-blocks"])
@pytest.mark.parametrize("kind", ["BF16", "F8_E8M0"])
def test_scales_of_every_kind_give_the_same_weights(kind, config, tmp_path):
    with_scales(tmp_path / "single", "F32", config)
    with_scales(tmp_path / "hf", kind, config)
    wanted = loaded(tmp_path / "single")
    same(loaded(tmp_path / "hf"), wanted)
    same(round_trip(tmp_path / "hf", tmp_path), wanted)
    export_hf(open_folder(tmp_path / "converted", to="float32"), tmp_path / "unpacked")
    same(loaded(tmp_path / "unpacked"), wanted)
    assert kind in of_model(tmp_path / "converted").bytes_by_dtype


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    tensors = with_scales(tmp_path / "hf", "F8_E8M0")
    name = next(n for n in tensors if n.endswith(names.SCALE))
    tensors[name].view(np.uint8)[0, 0] = 0xFF
    save(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match="holds NaN"):
        load_model(tmp_path / "hf")


def test_weights_are_never_of_powers_of_two_alone(tmp_path):
    tensors = folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32")
    tensors[HEAD] = np.ones_like(tensors[HEAD]).astype(ml_dtypes.float8_e8m0fnu)
    save(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match="got dtype F8_E8M0, wanted"):
        open_folder(tmp_path / "hf")


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_packing_with_powers_of_two(stored, tmp_path):
    """Against a float64 twin: the smallest power of two that brings a block's largest magnitude to 448 or below."""
    config = dataclasses.replace(folders.R1, quantization=None)
    tensors = folders.random_folder(tmp_path / "hf", config, stored)
    for name, value in tensors.items():  # no magnitude that only powers of two beyond float32's could bring down
        tensors[name] = np.clip(value.astype(np.float32), -1e30, 1e30).astype(value.dtype)
    save_file(tensors, tmp_path / "hf" / files.SINGLE)
    export_hf(open_folder(tmp_path / "hf", to="fp8-ue8m0"), tmp_path / "packed")
    quantised = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert quantised["scale_fmt"] == "ue8m0" and quantised["weight_block_size"] == [128, 128]
    held = files.TensorFolder(tmp_path / "packed")
    packed = {name: held.read(name) for name in held.entries}
    scales = {name: value for name, value in packed.items() if name.endswith(names.SCALE)}
    assert len(scales) > 20
    for name, scale in scales.items():
        weight = tensors[name.removesuffix(names.SCALE)].astype(np.float64)
        for block in np.ndindex(*scale.shape):
            rows, columns = (slice(128 * n, 128 * n + 128) for n in block)
            most = np.abs(weight[rows, columns]).max()
            wanted = 2.0 ** max(-126, np.ceil(np.log2(most / 448))) if most else 2.0**-126
            assert scale[block] == wanted, (name, block)
            back = packed[name.removesuffix(names.SCALE)][rows, columns].astype(np.float64) * wanted
            assert np.abs(back - weight[rows, columns]).max() <= most / 16 + 1e-45
    same(loaded(tmp_path / "packed"), round_trip(tmp_path / "packed", tmp_path))


def test_scales_of_another_kind_are_not_mixed_in(tmp_path):
    folders.random_folder(tmp_path / "hf", folders.R1)
    with pytest.raises(ValueError, match="other scales than ue8m0; write it --to bfloat16 first"):
        open_folder(tmp_path / "hf", to="fp8-ue8m0")
    assert FP8Config().scale_fmt is None
    folders.random_folder(tmp_path / "v31", folders.SMALL_BLOCKS)
    open_folder(tmp_path / "v31", to="fp8-ue8m0")


# --- files that are not what they are called -------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4995584424\n"


@pytest.mark.parametrize("name", ["config.json", files.INDEX, "model-00002-of-00002.safetensors"])
def test_a_pointer_is_called_one(name, tmp_path):
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32", shards=2)
    (tmp_path / "hf" / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        open_folder(tmp_path / "hf")


def test_a_single_file_may_be_a_pointer_too(tmp_path):
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32")
    (tmp_path / "hf" / files.SINGLE).write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        of_model(tmp_path / "hf")


def _other_save(folder: Path, name: str) -> None:
    newer = {n: t * np.float32(0.5) for n, t in load_file(next(folder.glob("*.safetensors"))).items()}
    save_file(newer, folder / name)


@pytest.mark.parametrize("name", [files.SINGLE, "model-00003-of-00003.safetensors", "model-00001-of-00004.safetensors"])
def test_weights_beside_an_index_that_does_not_name_them_are_refused(name, tmp_path):
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32", shards=2)
    _other_save(tmp_path / "hf", name)
    with pytest.raises(ValueError, match=rf"{name}: model.safetensors.index.json does not name it; remove"):
        open_folder(tmp_path / "hf")


def test_shards_beside_a_single_file_are_refused(tmp_path):
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32")
    _other_save(tmp_path / "hf", "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match="model-00001-of-00002.safetensors: model.safetensors is there as well; remove"
    ):
        open_folder(tmp_path / "hf")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_other_files_beside_the_weights_change_nothing(name, shards, tmp_path):
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32", shards=shards)
    wanted = loaded(tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(b"anything")
    with warnings.catch_warnings(action="error"):
        same(loaded(tmp_path / "hf"), wanted)


@pytest.mark.parametrize("name", ["config.json", files.INDEX, files.SINGLE, "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "device", "circle"])
def test_what_is_no_file_is_not_read(name, kind, tmp_path):
    """A pipe would be waited for, and a device read for ever; an index that cannot be read is not passed over."""
    folders.random_folder(tmp_path / "hf", folders.QWEN2, "float32", shards=1 if name == files.SINGLE else 2)
    path = tmp_path / "hf" / name
    path.unlink()
    targets = {"dangling": "nowhere", "device": "/dev/zero", "circle": path.name}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(targets[kind])
    with pytest.raises(ValueError, match=f"{name}: is no regular file"):
        open_folder(tmp_path / "hf")


@pytest.mark.parametrize("changes", [{"eos_token_id": 24}, {"eos_token_id": [2, 10**9]}, {"bos_token_id": 10**6}])
def test_a_token_outside_the_vocabulary_is_refused(changes):
    values = to_hf(dataclasses.replace(folders.QWEN2, vocab_size=24))
    from_hf(values | {"eos_token_id": [2, 23]})
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}: got .*, wanted less than the vocab_size of 24"):
        from_hf(values | changes)


def test_numbers_that_cannot_be_computed_with_are_no_completion(tmp_path):
    """They are finite, and converted as they are; the logits are not."""
    tensors = folders.random_folder(tmp_path / "hf", folders.LLAMA_TIED, "float32")
    tensors[EMBED][7:] = 3e38
    save_file(tensors, tmp_path / "hf" / files.SINGLE)
    config, graphdef, weights = load_model(tmp_path / "hf")
    with pytest.raises(ValueError, match="request 0: the model's logits are no finite numbers"):
        Generator(config, graphdef)(weights, [[3, 4]], SamplingConfig(max_new_tokens=2), seeds=[0])
