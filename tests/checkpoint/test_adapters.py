"""Adapters by Hugging Face's names, their folders, and what of a folder is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.adapters import CONFIG, WEIGHTS, adapted_paths, load_adapter, new_adapter, save_adapter
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.commands import merge as merge_lora
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.lora import LoRAConfig, merge
from deepseek_jax.sharding import LOCAL, Layout
from tests.checkpoint.folders import KIMI, LLAMA_TIED, QWEN2, QWEN3, R1, V2, V3, V32, random_folder

STACKED = Layout(scan_layers=True)
ALL = LoRAConfig(rank=3, alpha=6, targets="all-linear")
MODELS = {"v3": V3, "v2": V2, "v32": V32, "kimi": KIMI, "qwen2": QWEN2, "qwen3": QWEN3, "llama-tied": LLAMA_TIED}


def trained(config: ModelConfig, lora: LoRAConfig, dtype=jnp.float32, layout=LOCAL) -> nnx.State:
    """Numbers of every kind, no B zero."""
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(random.normal(0, 0.3, a.shape), dtype)
    return jax.tree.map(draw, new_adapter(config, lora, seed=0, layout=layout))


def same_bits(one: nnx.State, other: nnx.State) -> None:
    one, other = names.flat(one), names.flat(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
        assert np.asarray(value).tobytes() == np.asarray(other[key]).tobytes(), key


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a Qwen2's queries and outputs, to be spoiled."""
    lora = dataclasses.replace(ALL, targets=("q_proj", "o_proj"))
    save_adapter(trained(QWEN2, lora), lora, QWEN2, tmp_path / "adapter", base="a/model")
    return tmp_path / "adapter"


def rewrite(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(values))


# --- out and in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LOCAL, STACKED], ids=["layers", "stacks"])
@pytest.mark.parametrize("model", MODELS)
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path, model, layout):
    config, lora = MODELS[model], ALL
    adapter = trained(config, lora, layout=layout)
    save_adapter(adapter, lora, config, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    found = load_adapter(tmp_path / "adapter", config, layout=layout)
    same_bits(found.weights, adapter)
    assert (found.lora.rank, found.lora.alpha, found.lora.rslora) == (3, 6, False)
    assert set(adapted_paths(config, found.lora)) == set(adapted_paths(config, lora))


def test_layers_and_stacks_write_the_same_file(tmp_path):
    for name, layout in (("layers", LOCAL), ("stacks", STACKED)):
        save_adapter(new_adapter(V3, ALL, seed=0, layout=layout), ALL, V3, tmp_path / name)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("layers", "stacks")]
    assert files[0] == files[1]


def test_settings_and_dtypes_come_back(tmp_path):
    lora = LoRAConfig(rank=2, alpha=0.5, targets=("k_proj", "q_proj"), rslora=True)
    adapter = trained(QWEN2, lora, jnp.bfloat16)
    save_adapter(adapter, lora, QWEN2, tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter", QWEN2, dtype=jnp.bfloat16)
    assert found.lora == lora
    same_bits(found.weights, adapter)


def test_a_folder_has_pefts_names_and_orientation(tmp_path):
    lora = dataclasses.replace(ALL, targets=("kv_b_proj", "experts.down_proj", "shared_experts.up_proj"))
    adapter = trained(V3, lora)
    save_adapter(adapter, lora, V3, tmp_path / "adapter", base="a/model")
    held, prefix = load_file(tmp_path / "adapter" / WEIGHTS), "base_model.model.model.layers."
    attention, moe = adapter.layers[1].attention, adapter.layers[1].mlp
    for module, pair, expert in (
        ("1.self_attn.kv_b_proj", attention.kv_b, ...),
        ("1.mlp.shared_experts.up_proj", moe.shared.up, ...),
        ("1.mlp.experts.5.down_proj", moe.experts.down, 5),
    ):
        np.testing.assert_array_equal(held[f"{prefix}{module}.lora_A.weight"], pair.a[...][expert].T)
        np.testing.assert_array_equal(held[f"{prefix}{module}.lora_B.weight"], pair.b[...][expert].T)
    assert held[f"{prefix}0.self_attn.kv_b_proj.lora_A.weight"].shape[0] == 3
    assert len(held) == 2 * (2 + 8 + 1)  # two layers' attention; 8 experts and the shared ones of the second
    values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (values["r"], values["lora_alpha"], values["use_rslora"], values["peft_type"]) == (3, 6, False, "LORA")
    assert values["base_model_name_or_path"] == "a/model"
    assert values["target_modules"] == ["experts.down_proj", "kv_b_proj"]
    assert values["target_parameters"] == ["mlp.shared_experts.up_proj.weight"]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, folder):
    lora = dataclasses.replace(ALL, targets=("q_proj",))
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(trained(QWEN2, lora), lora, QWEN2, folder)
    with pytest.raises(ValueError, match="adapter: layers.0.attention.k.a is not what its targets say"):
        save_adapter(
            trained(QWEN2, lora), dataclasses.replace(ALL, targets=("k_proj", "q_proj")), QWEN2, tmp_path / "b"
        )
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight: got shape \[3, 16\], wanted \[4, 16\]"):
        save_adapter(trained(QWEN2, lora), dataclasses.replace(lora, rank=4), QWEN2, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("targets", "rslora", "message"),
    [
        (("experts.gate_proj",), False, "targets: got mlp.experts.gate_proj alone"),
        (("experts.up_proj", "o_proj"), False, "targets: got mlp.experts.up_proj alone"),
        ("all-linear", True, "rslora: got True for routed experts"),
    ],
)
def test_routed_experts_that_peft_could_not_read_are_not_written(tmp_path, targets, rslora, message):
    lora = dataclasses.replace(ALL, targets=targets, rslora=rslora)
    with pytest.raises(ValueError, match=message):
        save_adapter(new_adapter(V3, lora, seed=0), lora, V3, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets", "wanted"),
    [
        (QWEN2, ("q_proj",), ["layers.0.attention.q", "layers.1.attention.q"]),
        (QWEN3, ("self_attn.k_proj",), ["layers.0.attention.k", "layers.1.attention.k"]),
        (KIMI, ("q_b_proj",), ["layers.0.attention.q_b", "layers.1.attention.q_b"]),
        (V3, ("kv_a_proj_with_mqa",), ["layers.0.attention.kv_a", "layers.1.attention.kv_a"]),
        (V3, ("mlp.gate_proj",), ["layers.0.mlp.gate"]),
        (V3, ("shared_experts.gate_proj",), ["layers.1.mlp.shared.gate"]),
        (V3, ("experts.gate_proj",), ["layers.1.mlp.experts.gate"]),
        (V3, ("gate_proj",), ["layers.0.mlp.gate", "layers.1.mlp.experts.gate", "layers.1.mlp.shared.gate"]),
        (
            V3,
            ("mlp.up_proj", "up_proj", "experts.up_proj"),
            [f"layers.{of}.up" for of in ("0.mlp", "1.mlp.experts", "1.mlp.shared")],
        ),
    ],
)
def test_a_target_is_the_end_of_a_modules_name(config, targets, wanted):
    found = adapted_paths(config, dataclasses.replace(ALL, targets=targets))
    assert sorted(map(names.key, found)) == sorted(wanted)


@pytest.mark.parametrize("config", [R1, V32, KIMI, QWEN2, QWEN3])
def test_all_linear_is_every_projection_of_the_layers(config):
    found = {names.key(path) for path in adapted_paths(config, ALL)}
    assert not any("router" in key or "indexer" in key or "norm" in key or "mtp" in key for key in found)
    attention = 5 if config.moe else 4
    mlp = 9 if config.moe else 6  # a dense layer, and a layer of shared and of routed experts
    assert len(found) == 2 * attention + mlp


@pytest.mark.parametrize(
    ("config", "target"),
    [
        *((QWEN2, of) for of in ("x_proj", "lm_head", "embed_tokens", "input_layernorm", "proj", "attn.q_proj", "")),
        *(
            (V3, of)
            for of in ("gate", "mlp.gate", "q_proj", "k_proj", "gate_up_proj", "eh_proj", "e_score_correction_bias")
        ),
        *((QWEN3, of) for of in ("q_norm", "k_norm", "self_attn.q_norm")),
        *((V32, of) for of in ("wq_b", "indexer.wk", "weights_proj")),
    ],
)
def test_an_unknown_target_is_refused_with_those_that_there_are(config, target):
    with pytest.raises(ValueError, match=f"targets: got '{target}', wanted 'all-linear' or .*self_attn.o_proj"):
        adapted_paths(config, dataclasses.replace(ALL, targets=("o_proj", target)))


# --- in, from others and from enemies ------------------------------------------------------------


def test_what_peft_writes_beside_is_taken(folder):
    """Keys that are off or say nothing of the arithmetic; names with layers, as "all-linear" gives them."""
    before = load_adapter(folder, QWEN2)
    off = {"use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0}
    said = {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16, "revision": "main"}
    full = [f"model.layers.{layer}.self_attn.{of}_proj" for of in "qo" for layer in (1, 0)]
    rewrite(folder, **off, **said, target_modules=full, init_lora_weights="gaussian", some_new_setting=None)
    after = load_adapter(folder, QWEN2)
    same_bits(after.weights, before.weights)
    assert adapted_paths(QWEN2, after.lora) == adapted_paths(QWEN2, before.lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', wanted 'LORA'"),
        ({"lora_dropout": 0.1}, "lora_dropout: got 0.1, .*set it to 0"),
        ({"use_dora": True}, "use_dora: got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: got"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: got True"),
        ({"layers_to_transform": [0]}, "layers_to_transform: got"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: got"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern: got"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"some_new_setting": 1}, "some_new_setting: got 1, which is not supported; merge"),
        ({"r": 0}, "rank: got 0"),
        ({"r": "3"}, "rank: got '3'"),
        ({"r": None}, "rank: got None"),
        ({"r": 4}, r"q_proj.lora_A.weight': got shape \[3, 16\], wanted \[4, 16\]|o_proj.lora_A"),
        ({"lora_alpha": None}, "alpha: got None"),
        ({"lora_alpha": 1e400}, "alpha: got inf"),
        ({"use_rslora": "yes"}, "use_rslora: got 'yes'"),
        ({"target_modules": None}, r"targets: got \(\)"),
        ({"target_modules": ".*(q|o)_proj"}, "target_modules: got .* wanted a list of names; spell"),
        ({"target_modules": [1]}, "target_modules: got"),
        ({"target_modules": ["q_proj", "o_proj", "nothing"]}, "targets: got 'nothing'"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor .*o_proj.lora_A.weight' .and 3 more"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, "missing tensor .*v_proj.lora_A.weight' .and 3 more"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(folder, QWEN2)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_damaged_folders_are_refused(folder):
    whole = load_file(folder / WEIGHTS)
    first, *_ = whole
    damage = {
        "NaN or infinite": whole | {first: np.full_like(whole[first], np.nan)},
        "unexpected tensor 'extra'": whole | {"extra": np.zeros(3, np.float32)},
        "missing tensor": {name: value for name, value in whole.items() if name != first},
        "got shape": whole | {first: np.zeros((3, 5), np.float32)},
        "got dtype I32": whole | {first: whole[first].astype(np.int32)},
    }
    for message, tensors in damage.items():
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, QWEN2)
    (folder / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(folder, QWEN2)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"no {WEIGHTS}; pickled"):
        load_adapter(folder, QWEN2)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="wanted an object"):
        load_adapter(folder, QWEN2)


def test_an_adapter_of_another_model_is_refused(folder):
    with pytest.raises(ValueError, match="targets: got 'q_proj', wanted"):
        load_adapter(folder, V3)
    with pytest.raises(ValueError, match="unexpected tensor"):
        load_adapter(folder, dataclasses.replace(QWEN2, num_hidden_layers=1))


# --- merged --------------------------------------------------------------------------------------


def test_the_tool_writes_the_merged_model(tmp_path, capsys):
    config = dataclasses.replace(V3, num_nextn_predict_layers=1)
    random_folder(tmp_path / "model", config, "bfloat16")
    lora = dataclasses.replace(ALL, targets=("o_proj", "down_proj"))
    adapter = trained(config, lora)
    save_adapter(adapter, lora, config, tmp_path / "adapter")
    merge_lora.main(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'}\n"
    wanted = merge(load_model(tmp_path / "model", dtype=None).weights, adapter, lora)
    found = load_model(tmp_path / "merged", dtype=None)
    same_bits(found.weights, wanted)
    before, after = (load_file(tmp_path / of / "model.safetensors") for of in ("model", "merged"))
    assert {name: (of.dtype, of.shape) for name, of in before.items()} == {
        n: (of.dtype, of.shape) for n, of in after.items()
    }
    changed = {name for name, value in before.items() if value.tobytes() != after[name].tobytes()}
    assert {name.split(".")[-2] for name in changed} == {"o_proj", "down_proj"}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        merge_lora.main(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
