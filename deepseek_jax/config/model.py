"""The architecture in numbers: frozen dataclasses that refuse what contradicts itself."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

LARGEST = 2**31 - 1  # of any whole number in a configuration: what an int32 index reaches


def shown(value: Any) -> str:
    """A value of a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 500 else text[:500] + "..."


def check_whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise ValueError(f"{name}: got {shown(value)}, wanted a whole number from {least} to {LARGEST}")
    return value


def _check_wholes(owner: Any, *names: str, least: int = 1) -> None:
    for name in names:
        check_whole(name, getattr(owner, name), least)


def _check_numbers(owner: Any, *names: str, above: float | None = None) -> None:
    for name in names:
        value = getattr(owner, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not number or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"{name}: got {shown(value)}, wanted a finite number{bound}")


def _check_flags(owner: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise ValueError(f"{name}: got {shown(getattr(owner, name))}, wanted true or false")


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
        _check_wholes(self, "original_max_position_embeddings")
        _check_numbers(self, "mscale", "mscale_all_dim")
        for name in ("mscale", "mscale_all_dim"):
            if not 0 <= getattr(self, name) <= 100:  # published ones lie between 0 and 1
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted a number from 0 to 100")

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: mscale's temperature over mscale_all_dim's, 1 for R1.

        Where either is 0, that of mscale 1. Source: transformers modeling_rope_utils.py, yarn.
        """
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


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
        _check_wholes(self, "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention: each query sees its index_topk best keys alone.

    Source: DeepSeek-V3.2-Exp inference/model.py, Indexer.
    """

    index_n_heads: int
    index_head_dim: int
    index_topk: int

    def __post_init__(self) -> None:
        _check_wholes(self, "index_n_heads", "index_head_dim", "index_topk")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: widths of the latents and of a head's parts, and V3.2's indexer.

    Source: arXiv 2412.19437 section 2.1.1. `q_lora_rank` None means one full-rank query projection; `indexer` None
    means that every query sees all keys before it.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    indexer: IndexerConfig | None = None

    def __post_init__(self) -> None:
        _check_wholes(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _check_wholes(self, "q_lora_rank")
        if self.indexer is None:
            return
        if self.q_lora_rank is None:
            raise ValueError("q_lora_rank: got null, wanted a number; the indexer reads the query latent")
        if self.indexer.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim: got {self.indexer.index_head_dim}, wanted at least qk_rope_head_dim "
                f"{self.qk_rope_head_dim}, which the indexer rotates"
            )


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention of the distilled models.

    `qkv_bias` is Qwen2's; `qk_norm`, an RMS norm of each head's query and key before they are rotated, is Qwen3's.
    """

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool = False

    def __post_init__(self) -> None:
        _check_wholes(self, "num_key_value_heads", "head_dim")
        _check_flags(self, "qkv_bias", "qk_norm")


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
        _check_wholes(self, "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
        _check_wholes(self, "n_group", "topk_group")
        if self.n_routed_experts > 65536:
            raise ValueError(f"n_routed_experts: got {self.n_routed_experts}, wanted at most 65536")
        _check_wholes(self, "first_k_dense_replace", least=0)
        _check_numbers(self, "routed_scaling_factor", above=0)
        _check_flags(self, "norm_topk_prob")
        if self.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise ValueError(
                f"topk_method: got {shown(self.topk_method)}, wanted 'noaux_tc', 'greedy' or 'group_limited_greedy'"
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
class FP8Config:
    """How a checkpoint stores its projections: float8_e4m3fn with one scale a block of weights.

    `weight_block_size` is (rows, columns) of a block as the file lies, [out, in]; blocks at the edges are smaller.
    `scale_fmt` "ue8m0" says that scales are powers of two (V3.1 and later); they are stored as float32 all the same.
    Source: DeepSeek-V3 README_WEIGHTS.md; arXiv 2412.19437 section 3.3.
    """

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None

    def __post_init__(self) -> None:
        size = self.weight_block_size
        if not isinstance(size, tuple) or len(size) != 2:
            raise ValueError(f"weight_block_size: got {shown(size)}, wanted rows and columns of a block")
        for number in size:
            check_whole("weight_block_size", number)
        if self.scale_fmt not in (None, "ue8m0"):
            raise ValueError(f"scale_fmt: got {shown(self.scale_fmt)}, wanted 'ue8m0' or nothing")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: DeepSeek V2/V3/R1/V3.2 or Kimi K2 (MLA, mostly MoE layers), or a dense Qwen2, Qwen3 or Llama.

    Names are those of the papers and of config.json. `moe` None means that every layer is dense;
    `num_nextn_predict_layers` counts the multi-token-prediction modules after the last layer; `quantization` None
    means that weights are stored in the dtype they are used in.
    Raises ValueError where numbers contradict each other.
    """

    model_type: Literal["deepseek_v3", "deepseek_v32", "deepseek_v2", "kimi_k2", "qwen2", "qwen3", "llama"]
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
    quantization: FP8Config | None = None

    def __post_init__(self) -> None:
        _check_wholes(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_wholes(self, "num_attention_heads", "max_position_embeddings")
        _check_wholes(self, "num_nextn_predict_layers", least=0)
        for name, most in (("num_hidden_layers", 4096), ("num_nextn_predict_layers", 64)):
            if getattr(self, name) > most:  # far beyond any model; a table of its tensors would take minutes
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at most {most}")
        _check_numbers(self, "rms_norm_eps", "initializer_range", above=0)
        _check_flags(self, "tie_word_embeddings")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else () if value is None else (value,):
                check_whole(name, token, least=0)
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
