"""Checkpoints in another format: any part equals that part of the whole, and the values are the ones wanted."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deepseek_jax.checkpoint import files, names, recast
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.headers import DTYPES, NAMES, Entry
from deepseek_jax.checkpoint.model_folder import load_config, open_folder
from deepseek_jax.checkpoint.recast import Packed, Unpacked
from deepseek_jax.config import FP8Config
from deepseek_jax.model.decoder import abstract_weights
from tests.checkpoint.folders import (
    KIMI,
    LLAMA_TIED,
    QWEN2,
    QWEN3,
    R1,
    SMALL_BLOCKS,
    V3,
    V32,
    flip_a_bit,
    random_folder,
    random_values,
)

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
# Blocks that do not divide the shape, one block larger than the matrix, and the shape of R1's kv_a in small.
CASES = [((300, 200), (128, 128)), ((17, 23), (5, 7)), ((64, 130), (128, 128)), ((9, 56), (2, 1))]
WHOLE = slice(None)


class Held:
    """Tensors in memory as a checkpoint, which remembers how many bytes each reading took."""

    folder = Path("held")

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors, self.taken = tensors, []
        self.entries = {name: Entry(NAMES[value.dtype], value.shape, 0) for name, value in tensors.items()}

    def where(self, name: str) -> str:
        return f"the file of {name}"

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> np.ndarray:
        value = self._tensors[name]
        part = value[(rows, columns)[: value.ndim]]
        self.taken.append(part.nbytes)
        return part


def fp8_matrix(shape: tuple[int, int], block: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(seed)
    counts = tuple(math.ceil(length / side) for length, side in zip(shape, block, strict=True))
    scale = np.exp2(rng.uniform(-20, 20, counts)).astype(np.float32)
    return {"w": random_values(rng, shape, np.dtype(E4M3), positive=False), "w_scale_inv": scale}


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The scale of each element, float64."""
    tiled = np.repeat(np.repeat(scale.astype(np.float64), block[0], axis=0), block[1], axis=1)
    return tiled[: shape[0], : shape[1]]


def step(exact: np.ndarray) -> np.ndarray:
    """The distance of float8_e4m3fn's numbers around a number: three bits after the first, 2**-9 at least."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-6))) - 3)


def assert_within_half_a_step(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> None:
    """Of the exact quotient, measured in float64; 2**-22 of it is for the two roundings of a product in float32."""
    exact = weight.astype(np.float64) / spread(scale, weight.shape, block)
    error = np.abs(codes.astype(np.float64) - exact)
    assert np.all(error <= step(exact) / 2 + np.abs(exact) * 2.0**-22)


def assert_same(got: np.ndarray, wanted: np.ndarray, name: str = "") -> None:
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
    assert got.tobytes() == np.ascontiguousarray(wanted).tobytes(), name


def cut(data: st.DataObject, length: int) -> slice:
    first, last = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
    return data.draw(st.sampled_from([slice(first, last), slice(first, None), slice(None, last), WHOLE]))


# --- parts ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(case=st.sampled_from(CASES), dtype=st.sampled_from(["BF16", "F32"]), data=st.data())
def test_a_part_of_an_unpacked_matrix_equals_that_part_of_the_whole(case, dtype, data):
    (shape, block), (rows, columns) = case, (cut(data, length) for length in case[0])
    source = Unpacked(Held(fp8_matrix(shape, block, 0)), block, dtype, set())
    assert_same(source.read("w", rows, columns), source.read("w")[rows, columns])


@settings(max_examples=30)
@given(case=st.sampled_from(CASES), scale_fmt=st.sampled_from([None, "ue8m0"]), data=st.data())
def test_a_part_of_a_packed_matrix_and_of_its_scales_equals_that_part_of_the_whole(case, scale_fmt, data):
    shape, block = case
    held = Held({"w": np.random.RandomState(0).standard_normal(shape).astype(BF16)})
    source = Packed(held, FP8Config(weight_block_size=block, scale_fmt=scale_fmt), {"w"})
    for name in ("w", "w_scale_inv"):
        rows, columns = (cut(data, length) for length in source.entries[name].shape)
        assert_same(source.read(name, rows, columns), source.read(name)[rows, columns], name)


def test_scales_are_made_a_few_rows_of_blocks_at_a_time(monkeypatch):
    """A matrix of R1 takes half a gigabyte in float32, its scales some kilobytes."""
    held = Held({"w": np.random.RandomState(0).standard_normal((23, 6)).astype(np.float32)})
    source = Packed(held, FP8Config(weight_block_size=(4, 4)), {"w"})
    wanted = source.read("w_scale_inv")
    assert (wanted.shape, held.taken) == ((6, 2), [23 * 6 * 4])
    for piece, taken in ((2 * 4 * 24, [192, 192, 168]), (1, [96] * 5 + [72])):
        held.taken.clear()
        monkeypatch.setattr(recast, "PIECE", piece)
        assert_same(source.read("w_scale_inv"), wanted)
        assert held.taken == taken


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, block", CASES)
def test_an_unpacked_matrix_is_the_rounded_product_of_codes_and_scales(shape, block):
    """float64 holds the product exactly; float32 rounds it once, and bfloat16 that."""
    tensors = fp8_matrix(shape, block, 1)
    exact = (tensors["w"].astype(np.float64) * spread(tensors["w_scale_inv"], shape, block)).astype(np.float32)
    for dtype in ("F32", "BF16"):
        assert_same(Unpacked(Held(tensors), block, dtype, set()).read("w"), exact.astype(DTYPES[dtype]))


def test_unpacking_casts_the_rest_and_leaves_what_is_to_be_kept():
    rng = np.random.RandomState(0)
    tensors = {name: rng.standard_normal(12).astype(kind) for name, kind in (("a", np.float16), ("b", np.float32))}
    tensors |= {"kept": rng.standard_normal(12).astype(np.float32)} | fp8_matrix((4, 4), (2, 2), 0)
    source = Unpacked(Held(tensors), (2, 2), "BF16", {"kept"})
    assert {name: entry[:2] for name, entry in source.entries.items()} == {
        **{name: ("BF16", (12,)) for name in ("a", "b")},
        "kept": ("F32", (12,)),
        "w": ("BF16", (4, 4)),
    }
    for name in ("a", "b"):
        assert_same(source.read(name), tensors[name].astype(BF16))
    assert_same(source.read("kept", slice(2, 5)), tensors["kept"][2:5])
    assert source.where("w") == "the file of w" and source.folder == Path("held")


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape, block", CASES)
def test_packing_gives_codes_within_half_a_step_and_scales_that_reach_448(shape, block, scale_fmt):
    before = Unpacked(Held(fp8_matrix(shape, block, 2)), block, "BF16", set())
    source = Packed(before, FP8Config(weight_block_size=block, scale_fmt=scale_fmt), {"w"})
    codes, scale = source.read("w"), source.read("w_scale_inv")
    assert {name: entry[:2] for name, entry in source.entries.items()} == {
        "w": ("F8_E4M3", shape),
        "w_scale_inv": ("F32", scale.shape),
    }
    assert (codes.dtype, scale.dtype) == (E4M3, np.float32)
    assert_within_half_a_step(before.read("w"), codes, scale, block)
    rows, columns = (np.arange(0, length, side) for length, side in zip(shape, block, strict=True))
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(codes.astype(np.float64)), rows, 0), columns, 1)
    assert np.all(largest == 448) if scale_fmt is None else np.all((224 <= largest) & (largest <= 448))
    if scale_fmt == "ue8m0":
        assert np.all(np.frexp(scale)[0] == 0.5)


def test_packing_leaves_what_is_packed_already_and_what_shall_not_be():
    tensors = fp8_matrix((6, 6), (4, 4), 0) | {"norm": np.ones(3, BF16), "embed": np.ones((6, 6), BF16)}
    source = Packed(Held(tensors), FP8Config(weight_block_size=(4, 4)), {"w", "absent"})
    assert source.entries == Held(tensors).entries
    for name, value in tensors.items():
        assert_same(source.read(name), value, name)
    assert source.where("w_scale_inv") == "the file of w"


LARGEST = {np.float32: np.finfo(np.float32).max, BF16: ml_dtypes.finfo(BF16).max}


@pytest.mark.parametrize(
    "tensors, make",
    [
        ({"w": np.full((2, 2), LARGEST[np.float32])}, lambda held: Unpacked(held, (2, 2), "BF16", set())),
        (
            {"w": np.full((2, 2), 448, E4M3), "w_scale_inv": np.full((1, 1), 1e36, np.float32)},
            lambda held: Unpacked(held, (2, 2), "F32", set()),
        ),
        # 255 * 2**120 becomes the code 256, which unpacks to 2**128
        (
            {"w": np.full((2, 2), LARGEST[BF16])},
            lambda held: Packed(held, FP8Config(weight_block_size=(2, 2), scale_fmt="ue8m0"), {"w"}),
        ),
    ],
    ids=["float32 to bfloat16", "scale to float32", "bfloat16 to FP8"],
)
def test_numbers_that_would_become_infinite_are_refused(tensors, make):
    with pytest.raises(ValueError, match="the file of w: tensor 'w' has numbers too large for the format asked for"):
        make(Held(tensors)).read("w")


@pytest.mark.parametrize("kind", [np.float32, BF16])
def test_the_largest_numbers_can_be_packed(kind):
    held = Held({"w": np.full((2, 2), LARGEST[kind], kind)})
    source = Packed(held, FP8Config(weight_block_size=(2, 2)), {"w"})
    back = source.read("w").astype(np.float32) * source.read("w_scale_inv")
    np.testing.assert_allclose(back, np.full((2, 2), LARGEST[kind], np.float32), rtol=2.0**-22)


# --- folders -------------------------------------------------------------------------------------

FOLDERS = {
    "small blocks": (SMALL_BLOCKS, None),
    "v3.2": (V32, None),
    "v3.2 unpacked": (V32, "bfloat16"),  # with norms in bfloat16 too
    "v3": (V3, "bfloat16"),
    "qwen2": (QWEN2, "float16"),
    "qwen3": (QWEN3, "bfloat16"),
    "kimi": (KIMI, None),
    "llama": (LLAMA_TIED, "bfloat16"),
}
RECAST = [("small blocks", "bfloat16"), ("small blocks", "float32"), ("small blocks", "fp8")]
RECAST += [("v3.2", "bfloat16"), ("v3.2 unpacked", "float32"), ("v3", "float32"), ("v3", "fp8"), ("qwen2", "bfloat16")]
RECAST += [("qwen2", "fp8"), ("llama", "fp8"), ("qwen3", "fp8"), ("kimi", "bfloat16")]


class Case(NamedTuple):
    """A folder, the same converted to another format, and that exported."""

    source: Path
    to: str
    converted: Path
    exported: Path

    def table(self) -> list[names.Tensor]:
        config = load_config(self.source)
        return names.tensors(config, abstract_weights(config)[1])


@pytest.fixture(scope="module", params=RECAST, ids=" to ".join)
def case(request, tmp_path_factory) -> Case:
    (config, dtype), to = FOLDERS[request.param[0]], request.param[1]
    root = tmp_path_factory.mktemp("case")
    case = Case(root / "hf", to, root / "converted", root / "exported")
    random_folder(case.source, config, dtype)
    values = json.loads((case.source / "config.json").read_text())
    (case.source / "config.json").write_text(json.dumps({**values, "torch_dtype": "float64", "dtype": "float64"}))
    convert_hf(open_folder(case.source, to=to), case.converted)
    export_hf(open_folder(case.converted), case.exported)
    return case


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    source = files.TensorFolder(folder)
    return {name: source.read(name) for name in source.entries}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in names.flat(load_model(folder).weights).items()}


def assert_all_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same(got[name], value, name)


def through_fp8(case: Case, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights packed in blocks of 128 and unpacked by NumPy, one block at a time, but for those that were FP8."""
    config = load_config(case.source)
    stored = files.TensorFolder(case.source).entries
    weights = {key: value.copy() for key, value in weights.items()}
    for row in names.tensors(names.packed(config), abstract_weights(config)[1]):
        if row.dtype != "F8_E4M3" or stored[row.name].dtype == "F8_E4M3":
            continue
        ours = weights[names.key(row.path)]
        matrix = (ours if row.expert is None else ours[row.expert]).T  # a view, [out, in]
        for first, left in itertools.product(range(0, row.shape[0], 128), range(0, row.shape[1], 128)):
            part = matrix[first : first + 128, left : left + 128]
            scale = max(np.abs(part).max() / np.float32(448), np.float32(2.0**-126))
            part[...] = (part * (1 / scale)).astype(E4M3).astype(np.float32) * scale
    return weights


def test_a_recast_folder_loads_to_the_weights_of_its_source_rounded(case: Case):
    """Router biases are never rounded, nor V3.2's norms; and nothing is by float32."""
    exact = weights_of(case.source)
    by_nature = {names.key(row.path) for row in case.table() if row.dtype == "F32"}
    halved = {key: value.astype(BF16).astype(np.float32) for key, value in exact.items() if key not in by_nature}
    wanted = {"float32": exact, "bfloat16": exact | halved, "fp8": through_fp8(case, exact)}[case.to]
    assert_all_same(weights_of(case.converted), wanted)
    assert load_model(case.exported).config == load_model(case.source).config


def test_a_recast_folder_says_what_it_holds(case: Case):
    before = json.loads((case.source / "config.json").read_text())
    fresh = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    quantization = before.pop("quantization_config", fresh)
    for folder in (case.converted, case.exported):
        after = json.loads((folder / "config.json").read_text())
        assert after.pop("quantization_config", None) == (quantization if case.to == "fp8" else None)
        dtype = "float64" if case.to == "fp8" else case.to
        assert after == {**before, "torch_dtype": dtype, "dtype": dtype}
        assert (folder / "tokenizer.json").read_bytes() == (case.source / "tokenizer.json").read_bytes()


def test_a_recast_folder_holds_the_tensors_of_its_format(case: Case):
    """Unpacked, one dtype but for router biases and V3.2's norms; packed, FP8 and scales, the rest as it was."""
    config, source, got = load_config(case.source), tensors_of(case.source), tensors_of(case.exported)
    if case.to == "fp8":
        published = names.published(names.packed(config), abstract_weights(config)[1])
        wanted = {
            row.name: row.dtype if row.dtype == "F8_E4M3" or row.name not in source else None for row in published
        }
        wanted = {name: dtype or NAMES[source[name].dtype] for name, dtype in wanted.items()}
        assert {row.name: row.shape for row in published} == {name: value.shape for name, value in got.items()}
    else:
        one = {"float32": "F32", "bfloat16": "BF16"}[case.to]
        wanted = {row.name: "F32" if row.dtype == "F32" else one for row in case.table()}
        single = {
            name
            for name in wanted
            if name.endswith("e_score_correction_bias") or (config.model_type == "deepseek_v32" and got[name].ndim == 1)
        }
        assert {name for name, dtype in wanted.items() if dtype == "F32"} == (
            single if one == "BF16" else wanted.keys()
        )
    assert {name: NAMES[value.dtype] for name, value in got.items()} == wanted


def test_exporting_is_the_same_from_a_folder_of_either_kind(case: Case, tmp_path: Path):
    """Recast on the way out of a Hugging Face folder, or of one that was converted as stored, or on the way in."""
    convert_hf(open_folder(case.source), tmp_path / "stored")
    wanted = tensors_of(case.exported)
    for number, folder in enumerate((case.source, tmp_path / "stored")):
        export_hf(open_folder(folder, to=case.to), tmp_path / str(number))
        assert_all_same(tensors_of(tmp_path / str(number)), wanted)


@pytest.mark.parametrize("config", [R1, V32], ids=["r1", "v3.2"])
def test_packing_an_unpacked_folder_gives_the_published_one_within_half_a_step(config, tmp_path: Path):
    """By way of bfloat16: dtypes and shapes of every tensor of the published checkpoint, and its config.json."""
    random_folder(tmp_path / "fp8", config)
    export_hf(open_folder(tmp_path / "fp8", to="bfloat16"), tmp_path / "bfloat16")
    assert load_config(tmp_path / "bfloat16") == dataclasses.replace(config, quantization=None)
    export_hf(open_folder(tmp_path / "bfloat16", to="fp8"), tmp_path / "again")
    assert load_config(tmp_path / "again") == config
    rows = names.published(config, abstract_weights(config)[1])
    before, after = tensors_of(tmp_path / "bfloat16"), tensors_of(tmp_path / "again")
    wanted = {row.name: (row.dtype, row.shape) for row in rows}
    assert {name: (NAMES[value.dtype], value.shape) for name, value in after.items()} == wanted
    assert {wanted[name] for name in wanted if name.endswith("correction_bias")} == {("F32", (8,))}
    for row in rows:
        if row.dtype == "F8_E4M3":
            assert_within_half_a_step(before[row.name], after[row.name], after[row.name + names.SCALE], (128, 128))
        elif row.path[-1] != "scale":
            assert_same(after[row.name], before[row.name], row.name)
    load_model(tmp_path / "again")


def test_what_is_packed_already_stays_byte_for_byte(tmp_path: Path):
    """In a folder of which only a part is packed; the rest gets the blocks and the kind of scales of config.json."""
    tensors = random_folder(tmp_path / "hf", SMALL_BLOCKS)
    loose = {name for name in tensors if ".layers.0." in name and f"{name}_scale_inv" in tensors}
    assert len(loose) == 8  # five matrices of attention, three of the dense MLP
    rng = np.random.RandomState(1)
    half = {name: value for name, value in tensors.items() if name.removesuffix("_scale_inv") not in loose}
    half |= {name: rng.standard_normal(tensors[name].shape).astype(BF16) for name in loose}
    save_file(half, tmp_path / "hf" / files.SINGLE)
    export_hf(open_folder(tmp_path / "hf", to="fp8"), tmp_path / "packed")
    got = tensors_of(tmp_path / "packed")
    assert got.keys() == tensors.keys()
    for name in got.keys() - loose - {f"{name}_scale_inv" for name in loose}:
        assert_same(got[name], tensors[name], name)
    for name in loose:
        scale = got[f"{name}_scale_inv"]
        assert_within_half_a_step(half[name], got[name], scale, (5, 7))
        assert np.all(np.frexp(scale)[0] == 0.5), name


def test_a_number_too_large_leaves_no_folder_behind(tmp_path: Path):
    random_folder(tmp_path / "hf", V3, "float32")  # the largest float32 among its numbers
    with pytest.raises(ValueError, match="has numbers too large for the format asked for"):
        convert_hf(open_folder(tmp_path / "hf", to="bfloat16"), tmp_path / "converted")
    with pytest.raises(ValueError, match="has numbers too large for the format asked for"):
        export_hf(open_folder(tmp_path / "hf", to="bfloat16"), tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_changed_bit_of_a_converted_folder_is_seen_on_recasting(tmp_path: Path):
    random_folder(tmp_path / "hf", V3, "bfloat16")
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    flip_a_bit(tmp_path / "converted", "model.layers.1.self_attn.o_proj.weight")
    with pytest.raises(ValueError, match="is not what was converted; the checkpoint is damaged"):
        export_hf(open_folder(tmp_path / "converted", to="float32"), tmp_path / "exported")
