"""Model configurations: frozen dataclasses, published presets, and Hugging Face's config.json in and out.

Imports no jax: a configuration can be read, checked and planned with on any machine.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LARGEST = 2**31 - 1  # of any whole number in a configuration: what an int32 index reaches


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise ValueError(f"{name}: got {value!r}, wanted a whole number from {least} to {LARGEST}")
    return value


def _check_whole(owner: Any, *names: str, least: int = 1) -> None:
    for name in names:
        _whole(name, getattr(owner, name), least)


def _check_numbers(owner: Any, *names: str, above: float | None = None) -> None:
    for name in names:
        value = getattr(owner, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not number or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"{name}: got {value!r}, wanted a finite number{bound}")


def _check_flags(owner: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise ValueError(f"{name}: got {getattr(owner, name)!r}, wanted true or false")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding with plain frequencies."""

    theta: float

    def __post_init__(self) -> None:
        _check_numbers(self, "theta", above=1)


@dataclass(frozen=True, kw_only=True)
class YarnConfig(RopeConfig):
    """YaRN context extension as DeepSeek uses it. Source: arXiv 2309.00071; DeepSeek-V3 inference/model.py."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    mscale: float
    mscale_all_dim: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(self, "factor", "beta_fast", "beta_slow", above=0)
        _check_whole(self, "original_max_position_embeddings")
        _check_numbers(self, "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig(RopeConfig):
    """Llama 3.1's frequency smoothing. Source: transformers modeling_rope_utils.py, llama3."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(self, "factor", "low_freq_factor", above=0)
        _check_numbers(self, "high_freq_factor", above=self.low_freq_factor)
        _check_whole(self, "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: widths of the latents and of a head's parts.

    Source: arXiv 2412.19437 section 2.1.1. `q_lora_rank` None means one full-rank query projection.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        _check_whole(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _check_whole(self, "q_lora_rank")


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention of the distilled models; `qkv_bias` is Qwen2's."""

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool

    def __post_init__(self) -> None:
        _check_whole(self, "num_key_value_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers. Source: arXiv 2412.19437 section 2.1.2; arXiv 2405.04434 section 2.2.

    `topk_method` is "noaux_tc" (V3: sigmoid scores, a bias that selects but never weighs),
    "greedy" or "group_limited_greedy" (V2: softmax scores).
    """

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def __post_init__(self) -> None:
        _check_whole(self, "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
        _check_whole(self, "n_group", "topk_group")
        _check_whole(self, "first_k_dense_replace", least=0)
        _check_numbers(self, "routed_scaling_factor", above=0)
        _check_flags(self, "norm_topk_prob")
        if self.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise ValueError(
                f"topk_method: got {self.topk_method!r}, wanted 'noaux_tc', 'greedy' or 'group_limited_greedy'"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} is not divisible by n_group {self.n_group}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group: got {self.topk_group}, wanted 1 to n_group {self.n_group}")
        per_group = self.n_routed_experts // self.n_group
        selectable = self.topk_group * per_group if self.grouped else self.n_routed_experts
        if not 1 <= self.num_experts_per_tok <= selectable:
            raise ValueError(
                f"num_experts_per_tok: got {self.num_experts_per_tok}, wanted 1 to {selectable}, "
                "the experts that the kept groups hold"
            )
        if self.topk_method == "noaux_tc" and per_group < 2:
            raise ValueError(f"noaux_tc scores a group by its best two experts; a group has {per_group}")

    @property
    def grouped(self) -> bool:
        return self.topk_method != "greedy"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: DeepSeek V2/V3/R1 (MLA, mostly MoE layers) or a dense Qwen2 or Llama.

    Names are those of the papers and of config.json. `moe` None means that every layer is dense.
    Raises ValueError where numbers contradict each other.
    """

    model_type: Literal["deepseek_v3", "deepseek_v2", "qwen2", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    attention: MLAConfig | GQAConfig
    rope: RopeConfig
    moe: MoEConfig | None
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _check_whole(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_whole(self, "num_attention_heads", "max_position_embeddings")
        _check_whole(self, "num_nextn_predict_layers", least=0)
        _check_numbers(self, "rms_norm_eps", "initializer_range", above=0)
        _check_flags(self, "tie_word_embeddings")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else () if value is None else (value,):
                _whole(name, token, least=0)
        if isinstance(self.attention, GQAConfig) and self.num_attention_heads % self.attention.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.attention.num_key_value_heads}"
            )
        rotary = self.rotary_dim
        if rotary % 2:
            raise ValueError(f"rotary dimensions: got {rotary}, wanted an even number")

    @property
    def rotary_dim(self) -> int:
        a = self.attention
        return a.qk_rope_head_dim if isinstance(a, MLAConfig) else a.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_k_dense_replace

    @property
    def attention_scale(self) -> float:
        """The softmax scale s, with YaRN's mscale squared where mscale_all_dim asks for it (facts: R1 0.1352338)."""
        a = self.attention
        if isinstance(a, GQAConfig):
            return a.head_dim**-0.5
        scale = (a.qk_nope_head_dim + a.qk_rope_head_dim) ** -0.5
        if isinstance(self.rope, YarnConfig) and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(factor) + 1. Source: arXiv 2309.00071 section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# --- Hugging Face's config.json ------------------------------------------------------------------

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
    "quantization_config": (None,),
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


def _read_mla(reader: _Reader) -> MLAConfig:
    return MLAConfig(
        q_lora_rank=reader.take("q_lora_rank"),
        kv_lora_rank=reader.take("kv_lora_rank"),
        qk_nope_head_dim=reader.take("qk_nope_head_dim"),
        qk_rope_head_dim=reader.take("qk_rope_head_dim"),
        v_head_dim=reader.take("v_head_dim"),
    )


def _read_moe(reader: _Reader, model_type: str) -> MoEConfig:
    v3 = model_type == "deepseek_v3"
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
    if model_type not in ("deepseek_v3", "deepseek_v2", "qwen2", "llama"):
        raise ValueError(f"model_type: got {model_type!r}, wanted deepseek_v3, deepseek_v2, qwen2 or llama")
    deepseek = model_type.startswith("deepseek")
    heads, hidden = (_whole(name, reader.take(name)) for name in ("num_attention_heads", "hidden_size"))
    if deepseek:
        attention, moe = _read_mla(reader), _read_moe(reader, model_type)
        reader.take("num_key_value_heads", None)  # MLA has one latent for all heads; the key is vestigial
    else:
        attention, moe = _read_gqa(reader, model_type, heads, hidden), None
    kinds = reader.or_null("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types: got {kinds!r}, wanted 'full_attention' for every layer")
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
        num_nextn_predict_layers=reader.take("num_nextn_predict_layers", 0) if deepseek else 0,
        initializer_range=reader.take("initializer_range", 0.02),
    )
    reader.finish()
    return config


_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
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
        values |= {"attention_bias": False, "num_key_value_heads": config.num_attention_heads, **vars(a)}
        values |= {"num_nextn_predict_layers": config.num_nextn_predict_layers}
    else:
        values |= {"num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim}
    if m is not None:
        sigmoid = m.topk_method == "noaux_tc"
        values |= {**vars(m), "moe_layer_freq": 1, "scoring_func": "sigmoid" if sigmoid else "softmax"}
    return values


def _write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    kinds = {RopeConfig: None, YarnConfig: "yarn", Llama3RopeConfig: "llama3"}
    kind = kinds[type(rope)]
    rest = {name: value for name, value in vars(rope).items() if name != "theta"}
    return None if kind is None else {"type": kind, "rope_type": kind, **rest}


# --- published presets ---------------------------------------------------------------------------


def _r1_671b() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        attention=MLAConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        rope=_yarn(mscale=1.0),
        moe=MoEConfig(
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        num_nextn_predict_layers=1,
    )


def _yarn(mscale: float) -> YarnConfig:
    return YarnConfig(
        theta=10000.0,
        factor=40.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def _v2_lite() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=100000,
        eos_token_id=100001,
        attention=MLAConfig(
            q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        rope=_yarn(mscale=0.707),
        moe=MoEConfig(
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
        ),
    )


def _distill_qwen(hidden, intermediate, layers, heads, kv_heads, eps, theta, vocab) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=131072,
        rms_norm_eps=eps,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151643,
        attention=GQAConfig(num_key_value_heads=kv_heads, head_dim=hidden // heads, qkv_bias=True),
        rope=RopeConfig(theta=theta),
        moe=None,
    )


def _distill_llama(hidden, intermediate, layers, heads) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=128001,
        attention=GQAConfig(num_key_value_heads=8, head_dim=hidden // heads, qkv_bias=False),
        rope=Llama3RopeConfig(
            theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        moe=None,
    )


def _tiny() -> ModelConfig:
    """R1's architecture, every part of it, at 0.6 million parameters: what a laptop trains in minutes."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        attention=MLAConfig(q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24),
        rope=RopeConfig(theta=10000.0),
        initializer_range=0.08,  # about width**-0.5; the published 0.02 leaves so narrow a model standing still
        moe=MoEConfig(
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            topk_method="noaux_tc",
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        ),
    )


_PRESETS = {
    "r1-671b": _r1_671b,
    "v2-lite": _v2_lite,
    "distill-qwen-1.5b": lambda: _distill_qwen(1536, 8960, 28, 12, 2, 1e-6, 1e4, 151936),
    "distill-qwen-7b": lambda: _distill_qwen(3584, 18944, 28, 28, 4, 1e-6, 1e4, 152064),
    "distill-qwen-14b": lambda: _distill_qwen(5120, 13824, 48, 40, 8, 1e-5, 1e6, 152064),
    "distill-qwen-32b": lambda: _distill_qwen(5120, 27648, 64, 40, 8, 1e-5, 1e6, 152064),
    "distill-llama-8b": lambda: _distill_llama(4096, 14336, 32, 32),
    "distill-llama-70b": lambda: _distill_llama(8192, 28672, 80, 64),
    "tiny": _tiny,
}
PRESETS: tuple[str, ...] = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """A published configuration by name, one of `PRESETS`. Source: the hub's config.json of each model.

    >>> preset("r1-671b").attention_scale.__round__(7)
    0.1352338
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
    return _PRESETS[name]()
