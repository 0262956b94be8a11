"""config.json in and out: what is read comes back, and what is wrong is named in one line."""

import dataclasses

import pytest

from deepseek_jax.config import PRESETS, Llama3RopeConfig, RopeConfig, YarnConfig, from_hf, preset, to_hf

R1, QWEN, LLAMA = "r1-671b", "distill-qwen-1.5b", "distill-llama-8b"
MISSING = object()


def refusal(name: str, **changes) -> str:
    """What from_hf says of a preset's config.json with some keys changed, or left out by MISSING."""
    values = {key: value for key, value in (to_hf(preset(name)) | changes).items() if value is not MISSING}
    with pytest.raises(ValueError) as caught:
        from_hf(values)
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", PRESETS)
def test_reading_inverts_writing(name):
    assert from_hf(to_hf(preset(name))) == preset(name)


def test_several_end_tokens_come_back():
    config = dataclasses.replace(preset(LLAMA), eos_token_id=(128001, 128008), bos_token_id=None)
    assert from_hf(to_hf(config)) == config
    assert config.eos_token_ids == (128001, 128008)


@pytest.mark.parametrize("name", [R1, "v2-lite", QWEN, LLAMA])
def test_both_spellings_of_rope_give_one_configuration(name):
    values = to_hf(preset(name))
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    assert from_hf(values | {"rope_parameters": parameters}) == preset(name)
    parameters.pop("type", None)
    assert from_hf(values | {"rope_parameters": parameters}) == preset(name)


def test_rope_kinds():
    kinds = {name: type(preset(name).rope) for name in (R1, QWEN, LLAMA)}
    assert kinds == {R1: YarnConfig, QWEN: RopeConfig, LLAMA: Llama3RopeConfig}


def test_yarn_without_mscales_has_transformers_defaults():
    values = to_hf(preset(R1))
    del values["rope_scaling"]["mscale"], values["rope_scaling"]["mscale_all_dim"]
    rope = from_hf(values).rope
    assert (rope.mscale, rope.mscale_all_dim) == (1.0, 0.0)
    assert from_hf(values).attention_scale == 192**-0.5


def test_keys_without_effect_are_passed_over():
    harmless = {"torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True, "ep_size": 1}
    assert from_hf(to_hf(preset(R1)) | harmless) == preset(R1)


@pytest.mark.parametrize(
    "name, key", [(name, key) for name in (R1, QWEN) for key in ("hyper_factor", "sliding_window_pattern", "")]
)
def test_an_unknown_key_is_named(name, key):
    assert f"unknown key {key!r}" in refusal(name, **{key: 3})


@pytest.mark.parametrize(
    "name, key",
    [(R1, key) for key in ("kv_lora_rank", "q_lora_rank", "n_routed_experts", "norm_topk_prob", "rope_theta")]
    + [(QWEN, key) for key in ("hidden_size", "num_attention_heads", "rms_norm_eps", "vocab_size", "model_type")],
)
def test_a_missing_key_is_named(name, key):
    message = refusal(name, **{key: MISSING})
    assert key in message and "missing" in message


WHOLE = [
    *[(R1, key) for key in ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")],
    *[(R1, key) for key in ("num_hidden_layers", "max_position_embeddings", "kv_lora_rank", "qk_nope_head_dim")],
    *[(R1, key) for key in ("qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts")],
    *[(R1, key) for key in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")],
    *[(R1, key) for key in ("q_lora_rank", "first_k_dense_replace", "num_nextn_predict_layers")],
    *[(QWEN, key) for key in ("num_key_value_heads", "head_dim", "hidden_size", "num_attention_heads")],
]


@pytest.mark.parametrize("name, key", WHOLE, ids=lambda value: value)
@pytest.mark.parametrize("value", ["64", 64.0, -1, 2**70, True, [64], {}], ids=repr)
def test_a_width_or_count_must_be_a_whole_number(name, key, value):
    message = refusal(name, **{key: value})
    assert f"{key}: got {value!r}, wanted a whole number" in message


@pytest.mark.parametrize("name, key", [(R1, "hidden_size"), (R1, "n_group"), (QWEN, "head_dim"), (R1, "q_lora_rank")])
def test_a_width_must_not_be_zero(name, key):
    assert f"{key}: got 0, wanted a whole number from 1" in refusal(name, **{key: 0})


@pytest.mark.parametrize("key", ["rms_norm_eps", "routed_scaling_factor", "initializer_range", "rope_theta"])
@pytest.mark.parametrize(
    "value", ["1.0", -1.0, 0, float("nan"), float("inf"), 10**400, True, [], {}], ids=lambda v: repr(v)[:9]
)
def test_a_scale_must_be_a_positive_finite_number(key, value):
    message = refusal(R1, **{key: value})
    assert f"{key.removeprefix('rope_')}: got {value!r}, wanted a finite number above" in message


@pytest.mark.parametrize(
    "key", ["hidden_size", "rms_norm_eps", "routed_scaling_factor", "norm_topk_prob", "rope_theta"]
)
def test_null_is_no_number(key):
    assert key in refusal(R1, **{key: None})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "norm_topk_prob"])
@pytest.mark.parametrize("value", ["false", 1, []], ids=repr)
def test_a_flag_must_be_true_or_false(key, value):
    """The string "false" counts as true in Python."""
    assert f"{key}: got {value!r}, wanted true or false" in refusal(R1, **{key: value})


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["1", 1.5, -1, ["1"]], ids=repr)
def test_a_token_must_be_a_whole_number(key, value):
    assert f"{key}: got" in refusal(R1, **{key: value})


@pytest.mark.parametrize(
    "name, key, value",
    [
        (QWEN, "hidden_act", "gelu"),
        (LLAMA, "attention_bias", True),
        (R1, "attention_bias", True),
        (LLAMA, "mlp_bias", True),
        (QWEN, "use_sliding_window", True),
        (QWEN, "layer_types", ["full_attention", "sliding_attention"]),
        (R1, "rope_interleave", False),
        (R1, "moe_layer_freq", 2),
        (R1, "quantization_config", {"quant_method": "gptq"}),
        (R1, "scoring_func", "softmax"),
        ("v2-lite", "norm_topk_prob", True),
        (R1, "model_type", "gpt2"),
        (R1, "model_type", ["deepseek_v3"]),
    ],
)
def test_what_we_do_not_compute_is_refused(name, key, value):
    message = refusal(name, **{key: value})
    assert message.startswith(f"config.json: {key}: got") and "wanted" in message


@pytest.mark.parametrize(
    "scaling, says",
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope type: got 'longrope', wanted 'default', 'yarn' or 'llama3'"),
        ({"rope_type": ["yarn"]}, "rope type: got ['yarn']"),
        ("yarn", "rope_scaling: got 'yarn', wanted an object or null"),
        ([1], "rope_scaling: got [1], wanted an object or null"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 4096}, "'factor'"),
        ({"rope_type": "default", "factor": 4.0}, "'factor'"),
        ({"rope_type": "llama3", "theta": 1.0}, "theta"),
    ],
)
def test_rope_that_we_do_not_compute_is_refused(scaling, says):
    assert says in refusal(R1, rope_scaling=scaling)


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -2, "32", None, float("nan")], ids=repr)
def test_yarn_numbers_must_be_positive(key, value):
    rope = to_hf(preset(R1))["rope_scaling"] | {key: value}
    assert f"{key}: got {value!r}" in refusal(R1, rope_scaling=rope)


def test_llama3_bands_must_be_in_order():
    rope = to_hf(preset(LLAMA))["rope_scaling"] | {"low_freq_factor": 4.0}
    assert "high_freq_factor: got 4.0, wanted a finite number above 4" in refusal(LLAMA, rope_scaling=rope)


@pytest.mark.parametrize(
    "name, changes, says",
    [
        (R1, {"n_group": 7}, "n_routed_experts 256 is not divisible by n_group 7"),
        (R1, {"topk_group": 9}, "topk_group: got 9, wanted 1 to n_group 8"),
        (R1, {"num_experts_per_tok": 129}, "num_experts_per_tok: got 129, wanted 1 to 128"),
        (R1, {"n_group": 256, "topk_group": 8}, "a group has 1"),
        (R1, {"topk_method": "expert_choice", "scoring_func": "softmax"}, "topk_method: got 'expert_choice', wanted"),
        (R1, {"qk_rope_head_dim": 63}, "rotary dimensions: got 63, wanted an even number"),
        (QWEN, {"num_key_value_heads": 5}, "num_attention_heads 12 is not divisible by num_key_value_heads 5"),
        (QWEN, {"num_attention_heads": 10**6, "head_dim": MISSING}, "head_dim: got 0"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(name, changes, says):
    assert says in refusal(name, **changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset: got 'r2', wanted one of r1-671b, v3.2-671b, v2-lite"):
        preset("r2")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("distill-qwen-1.5b", {"attention": {"qk_norm": True}}, "attention.qk_norm: got True, which config.json"),
        ("distill-qwen-1.5b", {"model_type": "llama"}, "attention.qkv_bias: got True"),
        ("distill-llama-8b", {"attention": {"qkv_bias": True}}, "attention.qkv_bias: got True"),
    ],
)
def test_what_a_file_has_no_word_for_is_not_written(name, changes, message):
    changes = {
        part: dataclasses.replace(preset(name).attention, **value) if part == "attention" else value
        for part, value in changes.items()
    }
    with pytest.raises(ValueError, match=message) as told:
        to_hf(dataclasses.replace(preset(name), **changes))
    assert "\n" not in str(told.value)
