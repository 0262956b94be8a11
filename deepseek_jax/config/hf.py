"""Hugging Face's config.json, read and written: every key is used, known to be harmless, or refused."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from deepseek_jax.config.keys import Reader
from deepseek_jax.config.model import (
    FP8Config,
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    check_whole,
    shown,
)
from deepseek_jax.config.rope_hf import read_rope, write_rope_scaling


def _read_mla(reader: Reader, model_type: str) -> MLAConfig:
    names = ("index_n_heads", "index_head_dim", "index_topk")
    sparse = model_type == "deepseek_v32"
    for name in ("num_key_value_heads", "head_dim"):
        reader.take(name, None)  # MLA has one latent for all heads, and the widths below
    return MLAConfig(
        indexer=IndexerConfig(**{name: reader.take(name) for name in names}) if sparse else None,
        q_lora_rank=reader.take("q_lora_rank", why=_NO_RANK),
        kv_lora_rank=reader.take("kv_lora_rank"),
        qk_nope_head_dim=reader.take("qk_nope_head_dim"),
        qk_rope_head_dim=reader.take("qk_rope_head_dim"),
        v_head_dim=reader.take("v_head_dim"),
    )


def _read_moe(reader: Reader, model_type: str) -> MoEConfig:
    v3 = model_type != "deepseek_v2"
    method = reader.take("topk_method", "noaux_tc" if v3 else "greedy")
    scoring = reader.take("scoring_func", "sigmoid" if v3 else "softmax")
    wanted = "sigmoid" if method == "noaux_tc" else "softmax"
    if scoring != wanted:
        raise ValueError(f"scoring_func: got {shown(scoring)}, wanted {wanted!r} with topk_method {shown(method)}")
    normalise = reader.take("norm_topk_prob")
    if normalise and not v3:
        raise ValueError("norm_topk_prob: got true, wanted false; DeepSeek V2 does not renormalise")
    return MoEConfig(
        n_routed_experts=reader.take("n_routed_experts"),
        n_shared_experts=reader.take("n_shared_experts"),
        num_experts_per_tok=reader.take("num_experts_per_tok"),
        moe_intermediate_size=reader.take("moe_intermediate_size"),
        first_k_dense_replace=reader.take("first_k_dense_replace"),
        topk_method=method,
        n_group=_read_groups(reader, "n_group", v3),
        topk_group=_read_groups(reader, "topk_group", v3),
        norm_topk_prob=normalise,
        routed_scaling_factor=reader.take("routed_scaling_factor"),
    )


def _read_groups(reader: Reader, name: str, v3: bool) -> int:
    """Null is one group. Missing is one in V2 alone: transformers' class of V3 has 8, and keeps 4."""
    if v3 and name not in reader.values:
        reader.take(name)
    return reader.or_null(name, 1)


def _read_gqa(reader: Reader, model_type: str, heads: int, hidden: int) -> GQAConfig:
    if model_type != "llama" and "num_key_value_heads" not in reader.values:
        reader.take("num_key_value_heads")  # transformers takes 32 for it, not as many as there are heads
    if model_type == "qwen2":
        reader.take("attention_bias", None)  # its biases are no option
    return GQAConfig(
        num_key_value_heads=reader.or_null("num_key_value_heads", heads),
        head_dim=reader.take("head_dim") if model_type == "qwen3" else reader.or_null("head_dim", hidden // heads),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
    )


def _read_quantization(reader: Reader) -> FP8Config | None:
    values = reader.or_null("quantization_config", None)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config: got {shown(values)}, wanted an object or null")
    # which modules are quantised is read from the tensors themselves; what a program did with them is its own affair
    fixed = {"quant_method": ("fp8",), "fmt": ("e4m3", "float8_e4m3fn"), "activation_scheme": ("dynamic",)}
    known = {*fixed, "weight_block_size", "scale_fmt", "modules_to_not_convert", "dequantize"}
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"quantization_config: got {name} {shown(values[name])}, wanted {allowed[0]!r}; "
                "DeepSeek's FP8 in blocks is the one quantisation that is read"
            )
    if set(values) - known:
        raise ValueError(f"quantization_config: unknown key {shown(min(set(values) - known))}")
    if "quant_method" not in values:
        raise ValueError("quantization_config: key 'quant_method' is missing; wanted 'fp8'")
    size = values.get("weight_block_size")
    if not isinstance(size, list):
        raise ValueError(
            f"quantization_config: weight_block_size: got {shown(size)}, wanted rows and columns of a block"
        )
    scales = values.get("scale_fmt")
    return FP8Config(weight_block_size=tuple(size), scale_fmt=None if scales == "float" else scales)


def _check_layer_kinds(reader: Reader, moe: MoEConfig | None, sparse: bool) -> None:
    """transformers 5 spells out what follows from the rest; it must say the same."""
    known = ("indexed_attention", "deepseek_sparse_attention") if sparse else ("full_attention",)
    kinds = reader.or_null("layer_types", [])
    if not isinstance(kinds, list) or any(found not in known for found in kinds):
        raise ValueError(f"layer_types: got {shown(kinds)}, wanted {known[0]!r} for every layer")
    kinds = reader.or_null("mlp_layer_types", [])
    first = "every one" if moe is None else f"{moe.first_k_dense_replace} times"
    dense = len(kinds) if moe is None else moe.first_k_dense_replace
    if not isinstance(kinds, list) or kinds != ["dense"] * min(dense, len(kinds)) + ["sparse"] * (len(kinds) - dense):
        raise ValueError(f"mlp_layer_types: got {shown(kinds)}, wanted {first} 'dense', and 'sparse' after them")


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Hugging Face config.json describes.

    Args:
        values: the parsed file. rope may be spelled as on the hub (`rope_theta`, `rope_scaling`) or as
            transformers 5 writes it (`rope_parameters`).

    Raises:
        ValueError: an unknown model_type, a missing key, a key that is neither used nor known to be harmless,
            or values that contradict each other; the message names the key.
    """
    try:
        return _from_hf(Reader(values))
    except ValueError as problem:
        raise ValueError(f"config.json: {problem}") from None
    except RecursionError:  # from showing or comparing a value
        raise ValueError(
            "config.json: a value is nested too deeply, wanted lists and objects of plain values"
        ) from None


def _from_hf(reader: Reader) -> ModelConfig:
    model_type = reader.take("model_type")
    if model_type not in tuple(_ARCHITECTURES):
        *most, last = _ARCHITECTURES
        raise ValueError(f"model_type: got {shown(model_type)}, wanted {', '.join(most)} or {last}")
    latent = model_type not in _GROUPED
    wholes = ("num_attention_heads", "hidden_size", "max_position_embeddings")
    heads, hidden, longest = (check_whole(name, reader.take(name)) for name in wholes)
    if latent:
        attention, moe = _read_mla(reader, model_type), _read_moe(reader, model_type)
    else:
        attention, moe = _read_gqa(reader, model_type, heads, hidden), None
    _check_layer_kinds(reader, moe, model_type == "deepseek_v32")
    eos = reader.take("eos_token_id", None)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=reader.take("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.take("intermediate_size"),
        num_hidden_layers=reader.take("num_hidden_layers"),
        num_attention_heads=heads,
        max_position_embeddings=longest,
        rms_norm_eps=reader.take("rms_norm_eps"),
        tie_word_embeddings=reader.or_null("tie_word_embeddings", False),
        bos_token_id=reader.take("bos_token_id", None),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        attention=attention,
        rope=read_rope(reader, longest),
        moe=moe,
        num_nextn_predict_layers=_read_mtp(reader) if latent else 0,
        initializer_range=reader.take("initializer_range", 0.02),
        quantization=_read_quantization(reader),
    )
    reader.finish()
    _check_tokens(config)
    return config


def _check_tokens(config: ModelConfig) -> None:
    """A token that is not in the vocabulary is never drawn: nothing would end, and what is fed in its place is another.

    Only a file's tokens are held to this; one may make a smaller model of a preset.
    """
    for name, tokens in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        for token in tokens:
            if token is not None and token >= config.vocab_size:
                raise ValueError(f"{name}: got {token}, wanted less than the vocab_size of {config.vocab_size}")


def _read_mtp(reader: Reader) -> int:
    """The hub's key, or transformers 5's name for it."""
    return reader.or_null("num_nextn_predict_layers", reader.or_null("num_mtp_layers", 0))


_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",  # V3's in other sizes, by a name of its own
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_GROUPED = ("qwen2", "qwen3", "llama")  # the rest have latent attention and experts
# Files that leave nulls out mean null, transformers' classes mean 1536, and there are models of both kinds.
_NO_RANK = "transformers would take 1536 for it; write null if queries have no latent, else its rank"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json as the hub has it, for a model that was not loaded from one. `from_hf(to_hf(c)) == c`.

    Raises:
        ValueError: a setting that config.json has no word for, such as biases of a Llama's queries.
    """
    eos = config.eos_token_id
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope_scaling(config.rope),
    }
    a, m = config.attention, config.moe
    if isinstance(a, MLAConfig):
        values |= {"attention_bias": False, "num_key_value_heads": config.num_attention_heads}
        values |= {name: value for name, value in vars(a).items() if name != "indexer"}
        values |= {} if a.indexer is None else vars(a.indexer)
        values |= {"num_nextn_predict_layers": config.num_nextn_predict_layers}
    else:
        values |= {"num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim}
    if m is not None:
        sigmoid = m.topk_method == "noaux_tc"
        values |= {**vars(m), "moe_layer_freq": 1, "scoring_func": "sigmoid" if sigmoid else "softmax"}
    if config.quantization is not None:
        values |= {"quantization_config": write_quantization(config.quantization)}
    _check_read_back(config, from_hf(values))
    return values


def _check_read_back(config: Any, found: Any, where: str = "") -> None:
    """Refuse what would be another model when it is read."""
    if config == found:
        return
    if not (is_dataclass(config) and type(config) is type(found)):
        raise ValueError(
            f"{where}: got {shown(config)}, which config.json of this model_type has no word for and would be read as "
            f"{shown(found)}; choose that, or another model_type"
        )
    for field in fields(config):
        name = f"{where}.{field.name}" if where else field.name
        _check_read_back(getattr(config, field.name), getattr(found, field.name), name)


def write_quantization(quantization: FP8Config) -> dict[str, Any]:
    """config.json's quantization_config."""
    scales = {} if quantization.scale_fmt is None else {"scale_fmt": quantization.scale_fmt}
    size = list(quantization.weight_block_size)
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": size, **scales}
