"""Models loaded to be served packed: the codes of an FP8 folder, bytes as planned, and what dense twins draw."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.adapters import new_adapter
from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.lora import LoRAConfig, merge, with_adapter
from deepseek_jax.model.packing import packed_weights
from deepseek_jax.ops.packed import Packed, dense
from deepseek_jax.plan.weights import weight_bytes
from deepseek_jax.sharding import Layout
from tests.checkpoint.folders import LLAMA_TIED, QWEN3, R1, SMALL_BLOCKS, V2, V32, random_folder
from tests.generation.test_engine import KINDS, model

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEMES = ["fp8", "int8", "int4"]


def packed_of(weights: nnx.State) -> dict[str, Packed]:
    flat = names.flat(weights)
    return {key: value for key, value in flat.items() if isinstance(value, Packed)}


def unpacked(weights: nnx.State) -> nnx.State:
    """Dense float32 weights of the same codes."""
    of = lambda value: dense(value, jnp.float32) if isinstance(value, Packed) else value
    return nnx.from_flat_state(
        [(path, leaf.replace(of(leaf.get_raw_value()))) for path, leaf in nnx.to_flat_state(weights)]
    )


@pytest.mark.parametrize("config", [R1, SMALL_BLOCKS, V32])
def test_an_fp8_folder_keeps_its_codes_and_scales(tmp_path, config):
    """Bit for bit, turned to [in, out], experts one after another; widths that blocks do not divide among them."""
    tensors = random_folder(tmp_path / "folder", config)
    stored = lambda name: np.asarray(tensors[name]).view(np.uint8)
    loaded = load_model(tmp_path / "folder", quantization="fp8")
    packed = packed_of(loaded.weights)
    assert sum(name.endswith(names.SCALE) for name in tensors) == sum(
        value.shape[0] if value.ndim == 3 else 1 for value in packed.values()
    )
    for key, name in {
        "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
        "mlp.shared.down": "mlp.shared_experts.down_proj",
    }.items():
        value = packed[f"layers.1.{key}"]
        assert np.array_equal(np.asarray(value.codes).view(np.uint8).T, stored(f"model.layers.1.{name}.weight"))
        assert np.array_equal(np.asarray(value.scale).T, tensors[f"model.layers.1.{name}.weight{names.SCALE}"])
    experts = packed["layers.1.mlp.experts.up"]
    for expert in range(config.moe.n_routed_experts):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert np.array_equal(np.asarray(experts.codes[expert]).view(np.uint8).T, stored(name))
    plain = load_model(tmp_path / "folder", quantization="none")
    for key, value in names.flat(unpacked(loaded.weights)).items():
        np.testing.assert_array_equal(value, names.flat(plain.weights)[key], err_msg=key)


@pytest.mark.parametrize("config", [R1, V2, QWEN3, LLAMA_TIED], ids=lambda config: config.model_type)
@pytest.mark.parametrize("quantization", SCHEMES)
def test_bytes_held_are_those_planned(tmp_path, config, quantization):
    """As a program is given them: its arguments' size by the compiler."""
    random_folder(tmp_path / "folder", config, "float32" if config is V2 else None)
    loaded = load_model(tmp_path / "folder", dtype=jnp.bfloat16, quantization=quantization)
    summed = lambda leaf: jnp.sum(leaf.astype(jnp.float32))
    arguments = jax.jit(lambda weights: jax.tree.map(summed, weights)).lower(loaded.weights).compile()
    held = sum(value.nbytes for value in names.flat(loaded.weights).values())
    assert held == weight_bytes(config, quantization, mtp=True)
    assert arguments.memory_analysis().argument_size_in_bytes == held


@cache
def served(kind: str, quantization: str):
    """Greedy tokens of packed weights, and of the dense float32 weights that they stand for."""
    config = dataclasses.replace(KINDS[kind], num_nextn_predict_layers=0)
    graphdef, weights = model(kind)
    weights = nnx.split_state(weights, lambda path, _: path[0] == "mtp", ...)[1]
    generator = Generator(config, abstract_weights(config)[0])
    packed = packed_weights(config, weights, quantization)
    found = []
    for each in (packed, unpacked(packed), weights):
        prompts = [[1, 5, 9, 2, 2, 7, 11], [4], [3, 8, 8, 1]]
        sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
        found.append(generator(each, prompts, sampling, seeds=[0] * 3))
    return found


@pytest.mark.parametrize(("kind", "quantization"), [("mla-moe", "fp8"), ("v3.2", "int4"), ("gqa", "int8")])
def test_logits_are_those_of_dense_weights_of_the_codes(kind, quantization):
    graphdef, weights = model(kind)
    packed = packed_weights(KINDS[kind], weights, quantization)
    tokens = jnp.asarray([[1, 5, 9, 2, 2, 7, 11, 4, 3, 8, 8, 1]])

    @jax.jit
    def logits(weights):
        module = nnx.merge(graphdef, weights)
        return module.logits(module(tokens).x_BTD)

    np.testing.assert_allclose(logits(packed), logits(unpacked(packed)), rtol=0, atol=1e-5)
    assert np.abs(logits(packed) - logits(weights)).max() > 1e-3  # packing does change the weights


@pytest.mark.slow  # each compiles an engine of its own
@pytest.mark.parametrize("quantization", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_draws_what_dense_weights_of_its_codes_draw(kind, quantization):
    packed, plain, first = served(kind, quantization)
    for got, wanted in zip(packed, plain, strict=True):
        assert got.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, rtol=0, atol=1e-5)
    logprobs = lambda of: np.concatenate([each.logprobs for each in of])
    assert np.abs(logprobs(first) - logprobs(plain)).max() > 1e-3  # packing does change the weights


def test_loaded_at_once_or_packed_in_memory_is_the_same(tmp_path):
    """And scanned layers hold the same codes in front of one another."""
    random_folder(tmp_path / "folder", V2, "bfloat16")
    plain = load_model(tmp_path / "folder")
    for quantization in SCHEMES:
        loaded = load_model(tmp_path / "folder", quantization=quantization)
        later = packed_weights(plain.config, plain.weights, quantization)
        stacked = load_model(tmp_path / "folder", quantization=quantization, layout=Layout(scan_layers=True))
        got = packed_of(stacked.weights)
        for key, value in packed_of(loaded.weights).items():
            layer = key.removeprefix("layers.")
            of_stack = jax.tree.map(lambda a: a[0], got[f"stacks.{layer}"])
            for one, other in ((value, packed_of(later)[key]), (value, of_stack)):
                for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                    assert a.dtype == b.dtype
                    np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32), err_msg=key)


@pytest.mark.slow
def test_an_adapter_runs_beside_packed_weights(tmp_path):
    """It draws what it draws beside the dense weights that they stand for; summed into them it is refused."""
    graphdef, weights = split(Decoder(QWEN3, rngs=nnx.Rngs(0)))
    loaded = Model(QWEN3, graphdef, packed_weights(QWEN3, weights, "int4"))
    lora = LoRAConfig(rank=2, alpha=4.0, targets="all-linear")
    adapter = new_adapter(loaded.config, lora, seed=0)
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    generator = Generator(loaded.config, loaded.graphdef)
    draw = lambda weights: [
        of.tokens.tolist()
        for of in generator(weights, [[1, 2, 3]], SamplingConfig(max_new_tokens=6, temperature=0.0), seeds=[0])
    ]
    beside = lambda weights: draw(with_adapter(weights, adapter, lora))
    assert beside(loaded.weights) == beside(unpacked(loaded.weights))
    with pytest.raises(ValueError, match="got packed ones, layers.0.attention.k among them, wanted a model without"):
        merge(loaded.weights, adapter, lora)


def test_mistakes_are_one_line(tmp_path):
    random_folder(tmp_path / "folder", QWEN3)
    with pytest.raises(ValueError, match="quantization: got 'nf4', wanted one of none, fp8, int8, int4"):
        load_model(tmp_path / "folder", quantization="nf4")
    loaded = load_model(tmp_path / "folder", quantization="int8")
    with pytest.raises(ValueError, match="got 'fp8' for weights that are packed already, layers.0.attention.k as int8"):
        packed_weights(loaded.config, loaded.weights, "fp8")
    assert packed_of(packed_weights(loaded.config, loaded.weights, "int8")) != {}
    with pytest.raises(ValueError, match="got packed ones, .* wanted a model without quantization to be written"):
        save_model(loaded, tmp_path / "written")
    assert not (tmp_path / "written").exists()
