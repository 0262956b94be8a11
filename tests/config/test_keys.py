"""Keys of config.json: what changes nothing is passed over, what changes something is refused with its reason."""

import json

import pytest

from deepseek_jax.config import from_hf, preset, to_hf

R1, LITE, KIMI = "r1-671b", "v2-lite", "kimi-k2"
QWEN, QWEN3, LLAMA = "distill-qwen-1.5b", "distill-qwen3-8b", "distill-llama-8b"
FAMILIES = (R1, "v3.2-671b", LITE, KIMI, QWEN, QWEN3, LLAMA)

# Every public key of transformers 4's PretrainedConfig and its defaults of generation, with a value it may have.
TRANSFORMERS_4 = {
    "name_or_path": "",
    "_name_or_path": "/data/models/mine",
    "_commit_hash": "a5e3c9b",
    "_attn_implementation_autoset": True,
    "attn_implementation": None,
    "architectures": ["AForCausalLM"],
    "auto_map": {"AutoConfig": "configuration.Config"},
    "transformers_version": "4.48.3",
    "torch_dtype": "float16",
    "torchscript": False,
    "use_bfloat16": True,
    "tf_legacy_loss": False,
    "xla_device": None,
    "use_cache": False,
    "gradient_checkpointing": True,
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "chunk_size_feed_forward": 4,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "num_labels": 2,
    "problem_type": "regression",
    "finetuning_task": "sst2",
    "task_specific_params": {"summarise": {}},
    "tokenizer_class": "LlamaTokenizer",
    "prefix": "",
    "pad_token_id": 151643,
    "sep_token_id": None,
    "decoder_start_token_id": 3,
    "max_length": 20,
    "min_length": 0,
    "do_sample": True,
    "early_stopping": False,
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.95,
    "typical_p": 1.0,
    "repetition_penalty": 1.1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [[3]],
    "num_return_sequences": 2,
    "forced_bos_token_id": None,
    "forced_eos_token_id": 2,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": [1],
    "begin_suppress_tokens": None,
}
# What programs and other libraries write beside them.
OTHERS = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.19",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "pretraining_tp": 2,
    "ep_size": 4,
    "attention_dropout": 0.1,
    "router_aux_loss_coef": 0.001,
    "sliding_window": 4096,
    "max_window_layers": 21,
    "use_sliding_window": False,
    "use_mrope": False,
    "mrope_section": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "hidden_act": "silu",
    "experts_implementation": "grouped_mm",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_changes_nothing_is_passed_over(name):
    values = to_hf(preset(name))
    assert from_hf(values | TRANSFORMERS_4 | OTHERS) == preset(name)
    for key, value in (TRANSFORMERS_4 | OTHERS).items():  # each by itself too: none leans on another
        assert from_hf(values | {key: value}) == preset(name), key


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_mrope", True),
        ("use_mrope", 1.5),
        ("mrope_section", [16, 24, 24]),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("cross_attention_hidden_size", 64),
        ("tie_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("mlp_bias", True),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("per_layer_config", {"3": {"hidden_size": 5}}),
        ("per_layer_config", [{}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [R1, KIMI, QWEN, QWEN3, LLAMA])
def test_a_key_that_is_harmless_at_one_value_is_refused_at_another(name, key, value):
    with pytest.raises(ValueError) as caught:
        from_hf(to_hf(preset(name)) | {key: value})
    message = str(caught.value)
    assert message.startswith(f"config.json: {key}: got {value!r}, wanted ") and "; " in message
    assert "\n" not in message


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", ["attn_logit_softcapping", "logit_scale", "use_mrope2", "unsloth", "no_rope_layers"])
@pytest.mark.parametrize("value", [None, False, 0, {}], ids=repr)
def test_an_unknown_key_is_refused_even_where_it_looks_off(name, key, value):
    with pytest.raises(ValueError, match=f"config.json: unknown key '{key}'; it may change the forward pass"):
        from_hf(to_hf(preset(name)) | {key: value})


def test_a_long_or_deep_value_is_shown_in_part():
    with pytest.raises(ValueError) as caught:
        from_hf(to_hf(preset(QWEN)) | {"hidden_act": "x" * 10**6})
    assert len(str(caught.value)) < 700
    deep = json.loads("[" * 900 + "]" * 900)
    for changes in ({"hidden_size": deep}, {"layer_types": deep}, {"eos_token_id": deep}, {"rope_scaling": deep}):
        with pytest.raises(ValueError, match="^config.json: ") as caught:
            from_hf(to_hf(preset(QWEN)) | changes)
        assert len(str(caught.value)) < 1200


# --- keys that must not be guessed ---------------------------------------------------------------


def without(name: str, *keys: str) -> dict:
    return {key: value for key, value in to_hf(preset(name)).items() if key not in keys}


@pytest.mark.parametrize(
    "name, key",
    [
        *[(R1, key) for key in ("q_lora_rank", "n_group", "topk_group")],
        *[(KIMI, key) for key in ("q_lora_rank", "n_group", "topk_group")],
        (LITE, "q_lora_rank"),  # transformers takes 1536, a file that leaves nulls out means null
        (QWEN, "num_key_value_heads"),  # transformers takes 32
        (QWEN3, "num_key_value_heads"),
        (QWEN3, "head_dim"),  # transformers takes 128, and not hidden_size / num_attention_heads
    ],
)
def test_a_key_that_programs_fill_in_differently_must_be_there(name, key):
    with pytest.raises(ValueError, match=f"config.json: key '{key}' is missing; "):
        from_hf(without(name, key))


def test_what_a_null_means():
    assert from_hf(to_hf(preset(LITE)) | {"q_lora_rank": None, "n_group": None, "topk_group": None}) == preset(LITE)
    assert from_hf(without(LITE, "n_group", "topk_group")) == preset(LITE)
    assert from_hf(to_hf(preset(LLAMA)) | {"head_dim": None}) == preset(LLAMA)
    assert from_hf(without(LLAMA, "head_dim")) == preset(LLAMA)
    assert from_hf(without(LLAMA, "num_key_value_heads")).attention.num_key_value_heads == 32
    with pytest.raises(ValueError, match="config.json: head_dim: got None, wanted a whole number"):
        from_hf(to_hf(preset(QWEN3)) | {"head_dim": None})


# --- options of the architectures ----------------------------------------------------------------


@pytest.mark.parametrize("name", [R1, LITE, KIMI, QWEN3, LLAMA])
def test_attention_biases_are_refused_where_they_would_be_an_option(name):
    with pytest.raises(ValueError, match="config.json: attention_bias: got True, wanted False; biases of q, k and v"):
        from_hf(to_hf(preset(name)) | {"attention_bias": True})


@pytest.mark.parametrize("value", [True, False])
def test_qwen2_has_its_biases_whatever_the_key_says(value):
    assert from_hf(to_hf(preset(QWEN)) | {"attention_bias": value}) == preset(QWEN)


@pytest.mark.parametrize("name", [QWEN, QWEN3])
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types: got ['full_attention', "),
        ({"layer_types": "full_attention"}, "layer_types: got 'full_attention', wanted 'full_attention' for every"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3}, "use_sliding_window: got True"),
        ({"use_sliding_window": True, "sliding_window": None}, "use_sliding_window: got True, wanted False"),
        (
            {"mlp_layer_types": ["dense", "sparse"]},
            "mlp_layer_types: got ['dense', 'sparse'], wanted every one 'dense'",
        ),
    ],
)
def test_windows_and_experts_of_other_models_are_refused(name, changes, says):
    with pytest.raises(ValueError) as caught:
        from_hf(to_hf(preset(name)) | changes)
    assert str(caught.value).startswith(f"config.json: {says}")


def test_what_transformers_5_spells_out_is_read():
    dense = {"layer_types": ["full_attention"] * 36, "mlp_layer_types": ["dense"] * 36}
    assert from_hf(to_hf(preset(QWEN3)) | dense) == preset(QWEN3)
    for kind in ("indexed_attention", "deepseek_sparse_attention"):  # its older name for the same
        sparse = {"layer_types": [kind] * 61, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58}
        assert from_hf(to_hf(preset("v3.2-671b")) | sparse) == preset("v3.2-671b")
    with pytest.raises(ValueError, match="wanted 1 times 'dense', and 'sparse' after them"):
        from_hf(to_hf(preset(KIMI)) | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58})


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "modelopt", "awq", "compressed-tensors", "mxfp4", 3, []])
def test_a_quantisation_that_is_not_read_is_named(method):
    with pytest.raises(ValueError) as caught:
        from_hf(to_hf(preset(KIMI)) | {"quantization_config": {"quant_method": method, "bits": 4}})
    assert f"quantization_config: got quant_method {method!r}, wanted 'fp8'; DeepSeek's FP8 in blocks" in str(
        caught.value
    )
