"""Published config.json files: each of an architecture we read gives its numbers, every other its reason.

`../shared/data/configs` holds some seventy; where it is not there, the kinds among them are tested by the small copies
of this file and by those of test_keys.py and test_rope_hf.py.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.config import FP8Config, ModelConfig, RopeConfig, YarnConfig, from_hf, preset, to_hf

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "configs"
RESAVED = FOLDER / "resaved-transformers-5.24"
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"needs published configurations in {FOLDER}")


def like(name: str, **changes) -> ModelConfig:
    """A preset with other numbers; `attention`, `rope` and `moe` take a mapping of what differs in them."""
    config = preset(name)
    inner = {key: value for key, value in changes.items() if isinstance(value, Mapping)}
    changes |= {key: dataclasses.replace(getattr(config, key), **value) for key, value in inner.items()}
    return dataclasses.replace(config, **changes)


R1, V32, LITE, KIMI = "r1-671b", "v3.2-671b", "v2-lite", "kimi-k2"
LLAMA_8B, LLAMA_70B, ENDS = "distill-llama-8b", "distill-llama-70b", (128001, 128008, 128009)
V31 = like(R1, quantization=FP8Config(scale_fmt="ue8m0"))
V2 = like(
    LITE,
    hidden_size=5120,
    intermediate_size=12288,
    num_hidden_layers=60,
    num_attention_heads=128,
    attention={"q_lora_rank": 1536},
    moe={
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
)
MOONLIGHT = like(
    LITE,
    model_type="deepseek_v3",
    vocab_size=163840,
    intermediate_size=11264,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163586,
    rope=RopeConfig(theta=50000.0),
    moe={"topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.446},
)
PROVER_7B = like(
    LLAMA_8B,
    vocab_size=102400,
    intermediate_size=11008,
    num_hidden_layers=30,
    max_position_embeddings=65536,
    rms_norm_eps=1e-6,
    bos_token_id=100000,
    eos_token_id=100001,
    attention={"num_key_value_heads": 32},
    rope=dataclasses.replace(preset(R1).rope, factor=16.0),
)
QWEN_BASE = {"rope": {"theta": 1e6}}
QWEN_CHAT = QWEN_BASE | {"max_position_embeddings": 32768, "eos_token_id": 151645}
QWEN_HALF = QWEN_BASE | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "attention": {"head_dim": 64},
}
BF16 = {"quantization": None}
Q15, Q7 = "distill-qwen-1.5b", "distill-qwen-7b"
OPENS = {
    **dict.fromkeys(
        [f"deepseek-ai-DeepSeek-{of}" for of in ("R1", "R1-0528", "R1-Zero", "R1-first-upload", "Prover-V2-671B")]
        + [f"deepseek-ai-DeepSeek-{of}" for of in ("V3", "V3-0324", "V3-Base", "V3-first-upload")]
        + ["DeepSeek-R1-fp8-as-transformers-FineGrainedFP8Config", "DeepSeek-V3-resaved-transformers-4.48"]
        + [f"DeepSeek-R1-resaved-transformers-5.7-{of}" for of in ("native", "remote-code")],
        like(R1),
    ),
    **dict.fromkeys([f"deepseek-ai-DeepSeek-{of}" for of in ("V3.1", "V3.1-Base", "V3.1-Terminus")], V31),
    **dict.fromkeys([f"deepseek-ai-DeepSeek-{of}" for of in ("V3.2", "V3.2-Exp", "V3.2-Speciale")], like(V32)),
    **dict.fromkeys(["opensourcerelease-DeepSeek-R1-bf16", "unsloth-DeepSeek-R1-BF16"], like(R1, **BF16)),
    "moonshotai-Kimi-K2-Instruct": like(KIMI),
    "Kimi-K2-Instruct-resaved-transformers-5.7": like(KIMI, model_type="deepseek_v3"),
    "moonshotai-Moonlight-16B-A3B": dataclasses.replace(MOONLIGHT, eos_token_id=163585),
    "moonshotai-Moonlight-16B-A3B-Instruct": MOONLIGHT,
    **dict.fromkeys([f"deepseek-ai-DeepSeek-{of}" for of in ("V2", "V2-Chat", "Coder-V2-Instruct")], V2),
    "deepseek-ai-DeepSeek-V2.5": dataclasses.replace(V2, rope=preset(R1).rope),
    **dict.fromkeys(
        [f"deepseek-ai-DeepSeek-{of}" for of in ("V2-Lite", "V2-Lite-Chat", "Coder-V2-Lite-Instruct")]
        + ["DeepSeek-V2-Lite-Chat-resaved-transformers-5.7", "DeepSeek-V2-Lite-maxtext-form"],
        like(LITE),
    ),
    "deepseek-ai-DeepSeek-Prover-V2-7B": PROVER_7B,
    "deepseek-ai-DeepSeek-R1-0528-Qwen3-8B": like("distill-qwen3-8b"),
    **{f"deepseek-ai-DeepSeek-R1-Distill-Qwen-{of}": like(f"distill-qwen-{of.lower()}") for of in ("7B", "14B", "32B")},
    **dict.fromkeys(
        ["deepseek-ai-DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B-Captainphiora"]
        + ["DeepSeek-R1-Distill-Qwen-1.5B-resaved-transformers-4.48"],
        like(Q15),
    ),
    "DeepSeek-R1-Distill-Qwen-7B-resaved-transformers-5.7": like(Q7),
    "Qwen-QwQ-32B": like("distill-qwen-32b", eos_token_id=151645),
    "Qwen-Qwen2.5-0.5B": like(Q15, **QWEN_HALF),
    "Qwen2.5-0.5B-resaved-transformers-5.7": like(Q15, **QWEN_HALF),
    "Qwen-Qwen2.5-0.5B-Instruct": like(Q15, **QWEN_HALF | {"eos_token_id": 151645}),
    "Qwen-Qwen2.5-1.5B": like(Q15, **QWEN_BASE, tie_word_embeddings=True),
    "Qwen-Qwen2.5-1.5B-Instruct": like(Q15, **QWEN_CHAT, tie_word_embeddings=True),
    "Qwen-Qwen2.5-Math-1.5B": like(Q15, max_position_embeddings=4096, tie_word_embeddings=True),
    "Qwen-Qwen2.5-7B": like(Q7, **QWEN_BASE),
    "Qwen-Qwen2.5-7B-Instruct": like(Q7, **QWEN_CHAT),
    "Qwen2.5-7B-Instruct-resaved-transformers-5.7": like(Q7, **QWEN_CHAT),
    **dict.fromkeys(
        ["deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1-Distill-Llama-8B-resaved-transformers-4.48"]
        + ["meta-llama-Llama-3.1-8B", "unsloth-DeepSeek-R1-Distill-Llama-8B"],
        like(LLAMA_8B),
    ),
    "Llama-3.1-8B-Instruct-resaved-transformers-5.7": like(LLAMA_8B, eos_token_id=ENDS),
    "meta-llama-Llama-3.1-8B-Instruct": like(LLAMA_8B, eos_token_id=ENDS),
    **dict.fromkeys(
        ["deepseek-ai-DeepSeek-R1-Distill-Llama-70B", "meta-llama-Llama-3.3-70B-Instruct"], like(LLAMA_70B)
    ),
    # files that do not say that the weights are quantised; their folders are refused, see below
    "nvidia-DeepSeek-R1-FP4": like(R1, **BF16),
    "nvidia-DeepSeek-V3.1-NVFP4": like(R1, **BF16),
    "nvidia-DeepSeek-V3.2-NVFP4": like(V32, **BF16),
    "nvidia-Llama-3.1-70B-Instruct-FP8": like(LLAMA_70B),
}
REFUSED = {
    **dict.fromkeys(
        ["DeepSeek-Coder-V2-Lite-Instruct-as-in-llm-engine-test", "DeepSeek-V2-Lite-as-in-mlc-llm"],
        "key 'q_lora_rank' is missing; transformers would take 1536 for it; write null if queries have no latent",
    ),
    **dict.fromkeys(
        ["QuantTrio-DeepSeek-V3.2-Exp-AWQ", "cognitivecomputations-DeepSeek-R1-AWQ"],
        "quantization_config: got quant_method 'awq', wanted 'fp8'",
    ),
    **dict.fromkeys(
        ["RedHatAI-DeepSeek-R1-Distill-Llama-8B-quantized.w8a8", "RedHatAI-DeepSeek-R1-quantized.w4a16"],
        "quantization_config: got quant_method 'compressed-tensors', wanted 'fp8'",
    ),
    "nvidia-DeepSeek-R1-0528-FP4-v2-like": "quantization_config: got quant_method 'modelopt', wanted 'fp8'",
    "Qwen-QwQ-32B-first-upload": "use_sliding_window: got True, wanted False",
}


def read(file: Path) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attn_factor, which test_rope_hf.py tests
        return from_hf(json.loads(file.read_text(encoding="utf-8")))


@needs_files
def test_every_file_has_its_place_in_the_tables():
    assert {file.stem for file in FOLDER.glob("*.json")} == OPENS.keys() | REFUSED.keys()
    assert not OPENS.keys() & REFUSED.keys()


@needs_files
@pytest.mark.parametrize("name", OPENS)
def test_a_published_file_gives_its_numbers(name):
    assert read(FOLDER / f"{name}.json") == OPENS[name]


@needs_files
@pytest.mark.parametrize("name", OPENS)
def test_no_number_of_a_published_file_is_lost(name):
    """Every number that the file gives under a name of ours is the configuration's."""
    values, config = json.loads((FOLDER / f"{name}.json").read_text()), read(FOLDER / f"{name}.json")
    rope = (values.get("rope_scaling") or {}) | (values.get("rope_parameters") or {})
    compared = 0
    for part, given in ((config, values), (config.attention, values), (config.moe, values), (config.rope, rope)):
        for key, value in () if part is None else vars(part).items():
            if key in given and key not in ("attention", "rope", "moe", "quantization"):
                wanted = 1 if key in ("n_group", "topk_group") and given[key] is None else given[key]  # V2-Lite's null
                if part is config.attention and key == "head_dim" and wanted is None:
                    continue
                assert value == (tuple(wanted) if isinstance(wanted, list) else wanted), key
                compared += 1
    assert compared >= 12


@needs_files
@pytest.mark.parametrize("name", REFUSED)
def test_a_published_file_that_is_not_read_says_why(name):
    with pytest.raises(ValueError) as caught:
        read(FOLDER / f"{name}.json")
    assert str(caught.value).startswith(f"config.json: {REFUSED[name]}") and "\n" not in str(caught.value)


# --- presets -------------------------------------------------------------------------------------

PUBLISHED_AS = {
    R1: "deepseek-ai-DeepSeek-R1",
    V32: "deepseek-ai-DeepSeek-V3.2",
    LITE: "deepseek-ai-DeepSeek-V2-Lite",
    KIMI: "moonshotai-Kimi-K2-Instruct",
    Q15: "deepseek-ai-DeepSeek-R1-Distill-Qwen-1.5B",
    Q7: "deepseek-ai-DeepSeek-R1-Distill-Qwen-7B",
    "distill-qwen-14b": "deepseek-ai-DeepSeek-R1-Distill-Qwen-14B",
    "distill-qwen-32b": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "distill-qwen3-8b": "deepseek-ai-DeepSeek-R1-0528-Qwen3-8B",
    LLAMA_8B: "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    LLAMA_70B: "deepseek-ai-DeepSeek-R1-Distill-Llama-70B",
}
TOKENS = {  # bos and eos, as the files have them
    R1: (0, 1),
    V32: (0, 1),
    LITE: (100000, 100001),
    KIMI: (163584, 163585),
    **dict.fromkeys([Q15, Q7, "distill-qwen-14b", "distill-qwen-32b"], (151643, 151643)),
    "distill-qwen3-8b": (151643, 151645),
    LLAMA_8B: (128000, 128001),
    LLAMA_70B: (128000, ENDS),
}


@needs_files
@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_a_preset_is_its_published_file(name):
    assert preset(name) == read(FOLDER / f"{PUBLISHED_AS[name]}.json")


@pytest.mark.parametrize("name", TOKENS)
def test_a_preset_has_the_tokens_of_its_published_file(name):
    assert (preset(name).bos_token_id, preset(name).eos_token_id) == TOKENS[name]
    assert all(token < preset(name).vocab_size for token in preset(name).eos_token_ids)


# --- what transformers makes of them -------------------------------------------------------------


def own(config: ModelConfig) -> ModelConfig:
    """By the model_type that transformers has for it."""
    return dataclasses.replace(config, model_type="deepseek_v3") if config.model_type == "kimi_k2" else config


@pytest.mark.skipif(not RESAVED.is_dir(), reason=f"needs re-saved configurations in {RESAVED}")
@pytest.mark.parametrize("name", OPENS)
def test_a_file_that_transformers_saved_again_gives_the_same(name):
    if not (RESAVED / f"{name}.json").is_file():
        pytest.skip("was not saved again")
    assert own(read(RESAVED / f"{name}.json")) == own(OPENS[name])


@needs_files
@pytest.mark.oracle
@pytest.mark.parametrize("name", OPENS)
def test_a_file_that_transformers_saves_again_now_gives_the_same(name):
    from transformers import AutoConfig

    values = json.loads((FOLDER / f"{name}.json").read_text())
    kind = own(OPENS[name]).model_type
    again = json.loads(AutoConfig.for_model(**values | {"model_type": kind}).to_json_string())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert own(from_hf(again)) == own(OPENS[name])


# --- the kinds, in small copies ------------------------------------------------------------------

QWEN_FILE = {  # R1-Distill-Qwen-7B's form
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 11,
    "eos_token_id": 12,
    "hidden_act": "silu",
    "hidden_size": 56,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 7,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 99,
}
QWEN3_FILE = QWEN_FILE | {  # R1-0528-Qwen3-8B's form, the heads wider than they would be
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "model_type": "qwen3",
    "rope_theta": 1000000,
    "sliding_window": None,
}
KIMI_FILE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 7,
    "eos_token_id": 8,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "kv_lora_rank": 20,
    "max_position_embeddings": 2048,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0}
    | {"mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 16,
    "vocab_size": 99,
}


def as_transformers_5_saves(values: dict, **added) -> dict:
    """rope_parameters for rope_theta and rope_scaling, and the keys that a re-save adds."""
    kept = {key: value for key, value in values.items() if not key.startswith("rope_") and key != "torch_dtype"}
    rope = dict(values.get("rope_scaling") or {"rope_type": "default"})
    rope = {"rope_type": rope.get("type", "default"), **rope, "rope_theta": float(values["rope_theta"])}
    return (
        kept
        | {"dtype": "bfloat16", "pad_token_id": None, "rope_parameters": rope, "transformers_version": "5.24.0"}
        | added
    )


@pytest.mark.parametrize(
    "values, added",
    [
        (QWEN_FILE, {"layer_types": ["full_attention"] * 3}),
        (QWEN3_FILE, {"layer_types": ["full_attention"] * 3}),
        (KIMI_FILE, {"head_dim": 8, "qk_head_dim": 24, "rope_interleave": True, "output_router_logits": False}),
    ],
    ids=["qwen2", "qwen3", "kimi_k2"],
)
def test_small_copies_give_their_numbers_in_both_forms(values, added):
    config = from_hf(values)
    assert from_hf(as_transformers_5_saves(values, **added)) == config == from_hf(to_hf(config))
    assert from_hf(values | {"unsloth_fixed": True, "pad_token_id": 98, "unsloth_version": "2025.1"}) == config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, key) == values[key]


def test_what_the_small_copies_say():
    qwen2, qwen3, kimi = from_hf(QWEN_FILE), from_hf(QWEN3_FILE), from_hf(KIMI_FILE)
    assert (qwen2.attention.head_dim, qwen2.attention.qkv_bias, qwen2.attention.qk_norm) == (8, True, False)
    assert (qwen3.attention.head_dim, qwen3.attention.qkv_bias, qwen3.attention.qk_norm) == (16, False, True)
    assert kimi.quantization == FP8Config(weight_block_size=(16, 16)) and kimi.moe.routed_scaling_factor == 2.827
    assert isinstance(kimi.rope, YarnConfig) and (kimi.rope.beta_fast, kimi.rope.theta) == (1.0, 50000.0)
    assert to_hf(kimi)["architectures"] == ["DeepseekV3ForCausalLM"] and to_hf(kimi)["model_type"] == "kimi_k2"
    assert to_hf(qwen3)["architectures"] == ["Qwen3ForCausalLM"]


# --- quantisation that config.json does not name -------------------------------------------------

MODELOPT = {  # as nvidia's exporter writes it
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}


def folder_with(tmp_path: Path, name: str, content: dict | list | str) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_FILE))
    assert load_config(tmp_path) == from_hf(QWEN_FILE)  # nothing else is the matter
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("hf_quant_config.json", MODELOPT, "the weights are quantised ('NVFP4' and 'FP8'); DeepSeek's FP8 in blocks"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "the weights are quantised ('FP8'); "),
        ("hf_quant_config.json", {"quantization": {"kv_cache_quant_algo": "FP8"}}, "are quantised ('FP8'); "),
        ("hf_quant_config.json", {"quantization": {"quant_algo": ["FP8"]}}, "are quantised (['FP8']); "),
        ("hf_quant_config.json", {"producer": {}}, "quantization: got None, wanted an object"),
        ("hf_quant_config.json", "{", "not JSON"),
        ("hf_quant_config.json", [1], "got a JSON list, wanted an object"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "(in the form of AutoGPTQ or AutoAWQ)"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "(in the form of AutoGPTQ or AutoAWQ)"),
    ],
)
def test_a_folder_whose_quantisation_another_file_names_is_refused(name, content, says, tmp_path: Path):
    folder = folder_with(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        load_config(folder)
    assert str(caught.value).startswith(f"{folder / name}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_says_that_nothing_is_quantised_is_passed_over(tmp_path: Path):
    nothing = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}
    assert load_config(folder_with(tmp_path, "hf_quant_config.json", nothing)) == from_hf(QWEN_FILE)
