"""The names table: every tensor of a published checkpoint once, with its shape, and nothing else."""

import math
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias


@pytest.fixture(scope="module")
def r1() -> nnx.State:
    return abstract_weights(preset("r1-671b"))[1]


@pytest.fixture(scope="module")
def table(r1) -> dict[str, tuple[int, ...]]:
    rows = names.tensors(r1)
    shapes = {row.name: row.shape for row in rows}
    assert len(shapes) == len(rows)  # every name once
    return shapes


def test_r1_has_the_tensors_of_the_published_checkpoint(table):
    """91,991 on the hub: the main model's, one scale for each of 45,808 FP8 weights, and the MTP layer's.

    The MTP layer has what any MoE layer has, and embed_tokens, enorm, hnorm, eh_proj and shared_head's norm and head.
    """
    of_moe_layer = sum(name.startswith("model.layers.60.") for name in table)
    assert of_moe_layer == 7 + 2 + 2 + 3 * (256 + 1)  # attention, norms, router, experts
    assert len(table) == 91_991 - 45_808 - (of_moe_layer + 6)


def test_r1_has_the_published_number_of_parameters(r1, table):
    """671,026,404,352, and 58 router biases of 256 that training does not count."""
    params, biases = nnx.split_state(r1, nnx.Param, RouterBias)
    count = lambda state: sum(math.prod(leaf.shape) for leaf in names.flat(state).values())
    assert (count(params), count(biases)) == (671_026_404_352, 58 * 256)
    assert sum(map(math.prod, table.values())) == count(params) + count(biases)


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("v2-lite", 15_706_484_224, 5291),
        ("distill-qwen-1.5b", 1_777_088_000, 339),
        ("distill-qwen-7b", 7_615_616_512, 339),
        ("distill-llama-8b", 8_030_261_248, 291),
    ],
)
def test_other_models_have_the_published_number_of_parameters(name, parameters, tensors):
    rows = names.tensors(abstract_weights(preset(name))[1])
    assert sum(math.prod(row.shape) for row in rows) == parameters
    assert len({row.name for row in rows}) == len(rows) == tensors


def test_r1_shapes_are_those_of_the_published_checkpoint(table):
    attention = {
        "input_layernorm.weight": (7168,),
        "post_attention_layernorm.weight": (7168,),
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
    }
    mlp = lambda inner: {"gate_proj": (inner, 7168), "up_proj": (inner, 7168), "down_proj": (7168, inner)}
    dense = {f"mlp.{part}.weight": shape for part, shape in mlp(18432).items()}
    sparse = {"mlp.gate.weight": (256, 7168), "mlp.gate.e_score_correction_bias": (256,)}
    for expert in (*(f"experts.{e}" for e in range(256)), "shared_experts"):
        sparse |= {f"mlp.{expert}.{part}.weight": shape for part, shape in mlp(2048).items()}
    wanted = {"model.embed_tokens.weight": (129280, 7168), "lm_head.weight": (129280, 7168)}
    wanted |= {"model.norm.weight": (7168,)}
    for layer in range(61):
        parts = attention | (dense if layer < 3 else sparse)
        wanted |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    assert table == wanted


def test_the_table_covers_every_weight_once(r1):
    """Each of our arrays is either one tensor of the file or as many as it has experts, in order."""
    experts = {}
    for row in names.tensors(r1):
        experts.setdefault(row.path, []).append(row.expert)
    paths = dict(nnx.to_flat_state(r1))
    assert experts.keys() == paths.keys()
    counts = Counter()
    for path, numbers in experts.items():
        stacked = len(paths[path].get_raw_value().shape) == 3
        assert numbers == (list(range(256)) if stacked else [None])
        counts[stacked] += 1
    assert counts[True] == 3 * 58


def test_flat_and_unflat_are_inverse():
    _, abstract = abstract_weights(preset("tiny"))
    flat = names.flat(abstract)
    arrays = {key: jnp.full(leaf.shape, number) for number, (key, leaf) in enumerate(flat.items())}
    back = names.flat(names.unflat(arrays, abstract))
    assert back.keys() == arrays.keys() == flat.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, arrays[key])
    assert {"embed", "layers.0.mlp.gate", "layers.1.mlp.experts.down", "layers.2.attention.q_a"} <= flat.keys()
