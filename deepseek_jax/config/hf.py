"""Hugging Face's config.json, read and written: every key is used, known to be harmless, or refused."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config.model import (
    FP8Config,
    GQAConfig,
    IndexerConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
    check_whole,
)

# Keys that say nothing about the forward pass, or restate what another key fixes.
_IGNORED = {
    *(
        "_name_or_path",
        "_model_name_or_path",
        "unk_token_id",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ),
    *("attention_dropout", "pad_token_id", "pretraining_tp", "output_router_logits"),
    *("head_dim", "qk_head_dim", "max_window_layers", "sliding_window"),
    *("aux_loss_alpha", "seq_aux", "ep_size", "num_mtp_layers", "router_aux_loss_coef"),
    *("is_llama_config", "rope_interleaved", "return_dict", "output_hidden_states", "output_attentions"),
}
# Keys of options that we do not compute; a checkpoint may carry them only with the value that turns them off.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
}


class _Reader:
    """config.json's keys, each taken once; what is left over is an error."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.read: set[str] = set()

    def take(self, name: str, *default: Any) -> Any:
        self.read.add(name)
        if name in self.values:
            return self.values[name]
        if default:
            return default[0]
        raise ValueError(f"key {name!r} is missing; the architecture needs it")

    def or_null(self, name: str, default: Any) -> Any:
        """A key that may be missing or null."""
        value = self.take(name, None)
        return default if value is None else value

    def finish(self) -> None:
        for name, allowed in _ONLY.items():
            if self.values.get(name, allowed[0]) not in allowed and name not in self.read:
                raise ValueError(
                    f"{name}: got {self.values[name]!r}, wanted {allowed[0]!r}; nothing here computes another value"
                )
        unknown = set(self.values) - self.read - _IGNORED - set(_ONLY)
        if unknown:
            raise ValueError(
                f"unknown key {sorted(unknown)[0]!r}"
                + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
                + "; it may change the forward pass, so it is not passed over in silence"
            )


def _read_rope(reader: _Reader) -> RopeConfig:
    """Both spellings: the hub's rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    merged = {}
    for name in ("rope_scaling", "rope_parameters"):
        values = reader.or_null(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"{name}: got {values!r}, wanted an object or null")
        merged |= values
    theta = merged.pop("rope_theta", reader.take("rope_theta", None))
    if theta is None:
        raise ValueError("rope_theta is missing, at the top or in rope_parameters")
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    try:
        if kind == "default":
            return RopeConfig(theta=theta, **merged)
        if kind == "yarn":
            # transformers' and DeepSeek's own defaults for the two keys that older files leave out
            return YarnConfig(theta=theta, **{"mscale": 1.0, "mscale_all_dim": 0.0, **merged})
        if kind == "llama3":
            return Llama3RopeConfig(theta=theta, **merged)
    except TypeError as problem:
        raise ValueError(f"rope parameters of type {kind!r}: {str(problem).split('() ')[-1]}") from None
    raise ValueError(f"rope type: got {kind!r}, wanted 'default', 'yarn' or 'llama3'")


def _read_mla(reader: _Reader, model_type: str) -> MLAConfig:
    names = ("index_n_heads", "index_head_dim", "index_topk")
    sparse = model_type == "deepseek_v32"
    return MLAConfig(
        indexer=IndexerConfig(**{name: reader.take(name) for name in names}) if sparse else None,
        q_lora_rank=reader.take("q_lora_rank"),
        kv_lora_rank=reader.take("kv_lora_rank"),
        qk_nope_head_dim=reader.take("qk_nope_head_dim"),
        qk_rope_head_dim=reader.take("qk_rope_head_dim"),
        v_head_dim=reader.take("v_head_dim"),
    )


def _read_moe(reader: _Reader, model_type: str) -> MoEConfig:
    v3 = model_type != "deepseek_v2"
    method = reader.take("topk_method", "noaux_tc" if v3 else "greedy")
    scoring = reader.take("scoring_func", "sigmoid" if v3 else "softmax")
    wanted = "sigmoid" if method == "noaux_tc" else "softmax"
    if scoring != wanted:
        raise ValueError(f"scoring_func: got {scoring!r}, wanted {wanted!r} with topk_method {method!r}")
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
        n_group=reader.or_null("n_group", 1),
        topk_group=reader.or_null("topk_group", 1),
        norm_topk_prob=normalise,
        routed_scaling_factor=reader.take("routed_scaling_factor"),
    )


def _read_gqa(reader: _Reader, model_type: str, heads: int, hidden: int) -> GQAConfig:
    return GQAConfig(
        num_key_value_heads=reader.or_null("num_key_value_heads", heads),
        head_dim=reader.or_null("head_dim", hidden // heads),
        qkv_bias=model_type == "qwen2",
    )


def _read_quantization(reader: _Reader) -> FP8Config | None:
    values = reader.or_null("quantization_config", None)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config: got {values!r}, wanted an object or null")
    # which modules are quantised is read from the tensors themselves; what a program did with them is its own affair
    fixed = {"quant_method": ("fp8",), "fmt": ("e4m3", "float8_e4m3fn"), "activation_scheme": ("dynamic",)}
    known = {*fixed, "weight_block_size", "scale_fmt", "modules_to_not_convert", "dequantize"}
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"quantization_config: got {name} {values[name]!r}, wanted {allowed[0]!r}")
    if set(values) - known:
        raise ValueError(f"quantization_config: unknown key {min(set(values) - known)!r}")
    if "quant_method" not in values:
        raise ValueError("quantization_config: key 'quant_method' is missing; wanted 'fp8'")
    size = values.get("weight_block_size")
    if not isinstance(size, list):
        raise ValueError(f"quantization_config: weight_block_size: got {size!r}, wanted rows and columns of a block")
    scales = values.get("scale_fmt")
    return FP8Config(weight_block_size=tuple(size), scale_fmt=None if scales == "float" else scales)


def _check_layer_kinds(reader: _Reader, moe: MoEConfig | None, sparse: bool) -> None:
    """transformers 5 spells out what follows from the rest; it must say the same."""
    kind = "indexed_attention" if sparse else "full_attention"
    kinds = reader.or_null("layer_types", [])
    if not isinstance(kinds, list) or any(found != kind for found in kinds):
        raise ValueError(f"layer_types: got {kinds!r}, wanted {kind!r} for every layer")
    kinds = reader.or_null("mlp_layer_types", [])
    dense = 0 if moe is None else moe.first_k_dense_replace
    if not isinstance(kinds, list) or kinds != ["dense"] * min(dense, len(kinds)) + ["sparse"] * (len(kinds) - dense):
        raise ValueError(f"mlp_layer_types: got {kinds!r}, wanted {dense} times 'dense', then 'sparse'")


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
        return _from_hf(_Reader(values))
    except ValueError as problem:
        raise ValueError(f"config.json: {problem}") from None


def _from_hf(reader: _Reader) -> ModelConfig:
    model_type = reader.take("model_type")
    if model_type not in tuple(_ARCHITECTURES):
        *most, last = _ARCHITECTURES
        raise ValueError(f"model_type: got {model_type!r}, wanted {', '.join(most)} or {last}")
    deepseek = model_type.startswith("deepseek")
    heads, hidden = (check_whole(name, reader.take(name)) for name in ("num_attention_heads", "hidden_size"))
    if deepseek:
        attention, moe = _read_mla(reader, model_type), _read_moe(reader, model_type)
        reader.take("num_key_value_heads", None)  # MLA has one latent for all heads; the key is vestigial
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
        max_position_embeddings=reader.take("max_position_embeddings"),
        rms_norm_eps=reader.take("rms_norm_eps"),
        tie_word_embeddings=reader.or_null("tie_word_embeddings", False),
        bos_token_id=reader.take("bos_token_id", None),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        attention=attention,
        rope=_read_rope(reader),
        moe=moe,
        num_nextn_predict_layers=_read_mtp(reader) if deepseek else 0,
        initializer_range=reader.take("initializer_range", 0.02),
        quantization=_read_quantization(reader),
    )
    reader.finish()
    return config


def _read_mtp(reader: _Reader) -> int:
    """The hub's key, or transformers 5's name for it."""
    return reader.or_null("num_nextn_predict_layers", reader.or_null("num_mtp_layers", 0))


_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json as the hub has it, for a model that was not loaded from one. `from_hf(to_hf(c)) == c`."""
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
        "rope_scaling": _write_rope_scaling(config.rope),
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
    return values


def write_quantization(quantization: FP8Config) -> dict[str, Any]:
    """config.json's quantization_config."""
    scales = {} if quantization.scale_fmt is None else {"scale_fmt": quantization.scale_fmt}
    size = list(quantization.weight_block_size)
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": size, **scales}


def _write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    kinds = {RopeConfig: None, YarnConfig: "yarn", Llama3RopeConfig: "llama3"}
    kind = kinds[type(rope)]
    rest = {name: value for name, value in vars(rope).items() if name != "theta"}
    return None if kind is None else {"type": kind, "rope_type": kind, **rest}
