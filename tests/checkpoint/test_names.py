"""The names table: every tensor of a published checkpoint once, with its shape, and nothing else."""

import dataclasses
import math
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import FP8Config, preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias

WIDTHS = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@pytest.fixture(scope="module")
def r1() -> nnx.State:
    return abstract_weights(preset("r1-671b"))[1]


@pytest.fixture(scope="module", params=["r1-671b", "v3.2-671b"])
def published(request) -> tuple[str, dict[str, names.Tensor]]:
    """The name of a preset, and the rows of its published checkpoint by name."""
    rows = names.published(preset(request.param), abstract_weights(preset(request.param))[1])
    by_name = {row.name: row for row in rows}
    assert len(by_name) == len(rows)  # every name once
    return request.param, by_name


def nbytes(row: names.Tensor) -> int:
    return math.prod(row.shape) * WIDTHS[row.dtype]


def test_the_published_checkpoints_have_their_tensors_and_bytes(published):
    """R1's, as the hub's index counts them; V3.2 has seven tensors more in each of 62 layers, and its norms in float32.

    An indexer of V3.2 is wq_b and wk with their scales, the two of k_norm, and weights_proj.
    """
    preset_name, rows = published
    indexer = 8192 * 1536 + 4 * 64 * 12 + 128 * 7168 + 4 * 56 + 4 * (128 + 128) + 2 * 64 * 7168
    of_norms = 61 * (2 * 7168 + 1536 + 512) + 7168 + (2 * 7168 + 1536 + 512 + 3 * 7168)
    tensors, fp8, size = {
        "r1-671b": (91_991, 45_808, 688_574_839_360),
        "v3.2-671b": (91_991 + 62 * 7, 45_808 + 62 * 2, 688_574_839_360 + 62 * indexer + 2 * of_norms),
    }[preset_name]
    assert len(rows) == tensors == {"r1-671b": 91_991, "v3.2-671b": 92_425}[preset_name]
    assert sum(row.dtype == "F8_E4M3" for row in rows.values()) == fp8
    assert sum(map(nbytes, rows.values())) == size


def test_r1_has_the_published_number_of_parameters(r1):
    """671,026,404,352 without the MTP module, which stores 13.463 B, of them copies of embedding and head.

    Training does not count the 256 router biases of 58 MoE layers.
    """
    params, biases = (names.flat(state) for state in nnx.split_state(r1, nnx.Param, RouterBias))
    count = lambda flat, mtp: sum(math.prod(leaf.shape) for key, leaf in flat.items() if key.startswith("mtp.") == mtp)
    assert (count(params, False), count(biases, False)) == (671_026_404_352, 58 * 256)
    module = count(params, True) + count(biases, True)
    assert round(module / 1e9, 2) == 11.61
    stored = [math.prod(row.shape) for row in names.tensors(preset("r1-671b"), r1) if row.path[0] == "mtp"]
    assert sum(stored) == module + 2 * 129_280 * 7168 == 13_463_426_304


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("v2-lite", 15_706_484_224, 5291),
        ("distill-qwen-1.5b", 1_777_088_000, 339),
        ("distill-qwen-7b", 7_615_616_512, 339),
        ("distill-llama-8b", 8_030_261_248, 291),
        ("distill-qwen3-8b", 8_190_735_360, 399),
        ("kimi-k2", 1_026_408_232_448, 3 + 12 + 60 * (11 + 3 * 385)),
    ],
)
def test_other_models_have_the_published_number_of_parameters(name, parameters, tensors):
    rows = names.tensors(preset(name), abstract_weights(preset(name))[1])
    assert sum(math.prod(row.shape) for row in rows) == parameters
    assert len({row.name for row in rows}) == len(rows) == tensors


SHAPES = {
    "input_layernorm": (7168,),
    "post_attention_layernorm": (7168,),
    "self_attn.q_a_proj": (1536, 7168),
    "self_attn.q_a_layernorm": (1536,),
    "self_attn.q_b_proj": (24576, 1536),
    "self_attn.kv_a_proj_with_mqa": (576, 7168),
    "self_attn.kv_a_layernorm": (512,),
    "self_attn.kv_b_proj": (32768, 512),
    "self_attn.o_proj": (7168, 16384),
}
INDEXER = {"wq_b": (8192, 1536), "wk": (128, 7168), "k_norm": (128,), "weights_proj": (64, 7168)}
MTP = {"enorm": (7168,), "hnorm": (7168,), "shared_head.norm": (7168,), "eh_proj": (7168, 14336)}
MTP |= {"embed_tokens": (129280, 7168), "shared_head.head": (129280, 7168)}
BFLOAT16 = {"mlp.gate", "self_attn.indexer.weights_proj", "eh_proj", "embed_tokens", "shared_head.head"}
SCALES = {  # a row for each 128 rows and what is left of them, and columns alike
    "self_attn.q_a_proj": (12, 56),
    "self_attn.q_b_proj": (192, 12),
    "self_attn.kv_a_proj_with_mqa": (5, 56),
    "self_attn.kv_b_proj": (256, 4),
    "self_attn.o_proj": (56, 128),
    "self_attn.indexer.wq_b": (64, 12),
    "self_attn.indexer.wk": (1, 56),
    **{f"mlp.{part}_proj": shape for part, shape in {"gate": (144, 56), "up": (144, 56), "down": (56, 144)}.items()},
}


def of_layer(layer: int, sparse_attention: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of one layer of the published R1 (or V3.2), 61 being the MTP module."""
    shapes = dict(SHAPES) | (
        {f"self_attn.indexer.{name}": shape for name, shape in INDEXER.items()} if sparse_attention else {}
    )
    mlp = lambda inner: {"gate_proj": (inner, 7168), "up_proj": (inner, 7168), "down_proj": (7168, inner)}
    experts = [""] if layer < 3 else [*(f"experts.{expert}." for expert in range(256)), "shared_experts."]
    for expert in experts:
        shapes |= {f"mlp.{expert}{part}": shape for part, shape in mlp(18432 if layer < 3 else 2048).items()}
    shapes |= {} if layer < 3 else {"mlp.gate": (256, 7168)}
    shapes |= MTP if layer == 61 else {}
    rows = {}
    for name, shape in shapes.items():
        norm = "F32" if sparse_attention else "BF16"
        rows[f"{name}.weight"] = shape, norm if len(shape) == 1 else "BF16" if name in BFLOAT16 else "F8_E4M3"
        if rows[f"{name}.weight"][1] == "F8_E4M3":
            few = {(2048, 7168): (16, 56), (7168, 2048): (56, 16)}
            rows[f"{name}.weight_scale_inv"] = few.get(shape) or SCALES[name], "F32"
    rows |= {"self_attn.indexer.k_norm.bias": ((128,), "F32")} if sparse_attention else {}
    rows |= {} if layer < 3 else {"mlp.gate.e_score_correction_bias": ((256,), "F32")}
    return rows


def test_shapes_and_dtypes_are_those_of_the_published_checkpoint(published):
    preset_name, rows = published
    sparse_attention = preset_name == "v3.2-671b"
    wanted = {"model.embed_tokens.weight": ((129280, 7168), "BF16"), "lm_head.weight": ((129280, 7168), "BF16")}
    wanted["model.norm.weight"] = (7168,), "F32" if sparse_attention else "BF16"
    for layer in range(62):
        wanted |= {f"model.layers.{layer}.{name}": row for name, row in of_layer(layer, sparse_attention).items()}
    assert {name: (row.shape, row.dtype) for name, row in rows.items()} == wanted


def test_the_table_covers_every_weight_once(r1):
    """Each of our arrays is either one tensor of the file or as many as it has experts, in order."""
    experts, copies = {}, []
    for row in names.tensors(preset("r1-671b"), r1):
        if row.copy_of:
            copies.append((row.name, row.path))
        else:
            experts.setdefault(row.path, []).append(row.expert)
    paths = dict(nnx.to_flat_state(r1))
    assert experts.keys() == paths.keys()
    counts = Counter()
    for path, numbers in experts.items():
        stacked = len(paths[path].get_raw_value().shape) == 3
        assert numbers == (list(range(256)) if stacked else [None])
        counts[stacked] += 1
    assert counts[True] == 3 * 59
    assert copies == [
        ("model.layers.61.embed_tokens.weight", ("mtp", 0, "embed")),
        ("model.layers.61.shared_head.head.weight", ("mtp", 0, "head")),
    ]


def test_scales_lie_beside_their_weights(r1):
    row = next(row for row in names.tensors(preset("r1-671b"), r1) if row.name.endswith("0.self_attn.kv_b_proj.weight"))
    scale = row.scale((100, 512))
    assert (scale.name, scale.shape, scale.dtype) == (f"{row.name}_scale_inv", (328, 1), "F32")
    assert scale.path == (*row.path, "scale") and scale.transposed == row.transposed


@pytest.mark.parametrize(
    "held, count",
    [
        ([], 0),
        (["model.layers.2.mlp.gate.weight", "model.norm.weight", "lm_head.weight"], 0),
        (["model.layers.3.enorm.weight"], 1),
        (["model.layers.3.enorm.weight", "model.layers.4.input_layernorm.weight"], 2),
        (["model.layers.4.enorm.weight"], 2),  # the first is then missing, which is damage and not a choice
        (["model.layers.5.enorm.weight", "model.layers.30.enorm.weight"], 2),
        (["model.layers.9999999999.enorm.weight", "model.layers.x.enorm.weight", "amodel.layers.3.enorm.weight"], 0),
        (["model.layers.3", "model.layers.-3.enorm.weight", "model.layers.٣.enorm.weight"], 0),
    ],
)
def test_modules_of_which_nothing_is_held_do_not_count(held, count):
    promised = dataclasses.replace(preset("tiny"), num_nextn_predict_layers=2)
    assert names.with_held_modules(promised, held) == dataclasses.replace(promised, num_nextn_predict_layers=count)
    assert names.with_held_modules(preset("tiny"), held) == preset("tiny")


def test_a_model_that_is_packed_already_keeps_its_blocks():
    small = dataclasses.replace(preset("tiny"), quantization=FP8Config(weight_block_size=(5, 7)))
    assert names.packed(small) == small
    assert names.packed(preset("tiny")) == dataclasses.replace(preset("tiny"), quantization=FP8Config())


def test_flat_and_unflat_are_inverse():
    _, abstract = abstract_weights(preset("tiny"))
    flat = names.flat(abstract)
    arrays = {key: jnp.full(leaf.shape, number) for number, (key, leaf) in enumerate(flat.items())}
    back = names.flat(names.unflat(arrays, abstract))
    assert back.keys() == arrays.keys() == flat.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, arrays[key])
    assert {"embed", "layers.0.mlp.gate", "layers.1.mlp.experts.down", "layers.2.attention.q_a"} <= flat.keys()
