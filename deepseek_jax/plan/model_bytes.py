"""What a model holds and moves beside its weights: caches, the state of training, and the traffic of steps.

Bytes are over all chips together; those that are moved are the least that must cross between memory and chip.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from deepseek_jax.config import GQAConfig, ModelConfig
from deepseek_jax.plan.model_flops import check_positive, kept_keys, ranks
from deepseek_jax.plan.weights import DType, Kind, parameters, weight_bytes, weight_bytes_by_kind

_CODES = ("fp8", "int8")
_WHOLE = {"f32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # bytes of a number that needs no scale beside it


def number_bytes(dtype: DType) -> int:
    """Bytes of a plain number: a cache's, a gradient's, a moment's. ValueError for int4, which needs scales."""
    if dtype not in _WHOLE:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(_WHOLE)}")
    return _WHOLE[dtype]


def cache_bytes_per_token(config: ModelConfig, dtype: DType = "bf16", *, multiple: int = 1, parts: int = 1) -> int:
    """What one token of one sequence takes in the cache, all layers: latents and indexer keys, or keys and values.

    Args:
        config: the architecture.
        dtype: of the cache; fp8 and int8 have bfloat16 scales, rotated keys and indexer keys beside them.
        multiple: the last dimension of every array is padded to it; 128 as TPUs lay arrays out.
        parts: of a mesh that cuts key-value heads; each pads a row of scales of its own.

    >>> from deepseek_jax.config import preset
    >>> [cache_bytes_per_token(preset("r1-671b"), multiple=m) for m in (1, 128)]
    [70272, 78080]
    >>> [cache_bytes_per_token(preset("r1-671b"), "fp8", multiple=m) for m in (1, 128)]
    [39162, 46848]
    """
    layer = sum(map(sum, _cache_bytes(config, dtype, multiple, parts)))
    return config.num_hidden_layers * layer


def _cache_bytes(
    config: ModelConfig, dtype: DType, multiple: int = 1, parts: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a token and layer, array by array: those that attention reads, and those that the indexer reads."""
    a, size, coded = config.attention, number_bytes(dtype), dtype in _CODES
    beside = number_bytes("bf16") if coded else size
    array = lambda width, size: math.ceil(width / multiple) * multiple * size
    if isinstance(a, GQAConfig):
        heads = (array(a.head_dim, size),) * (2 * a.num_key_value_heads)
        scales = (parts * array(2 * a.num_key_value_heads // parts, beside),) if coded else ()
        return heads + scales, ()
    index = () if a.indexer is None else (array(a.indexer.index_head_dim, beside),)
    return (array(a.kv_lora_rank, size), array(a.qk_rope_head_dim + coded, beside)), index


@dataclass(frozen=True, kw_only=True)
class StateDTypes:
    """What the parts of training are kept in: the one description that planner and compiler share.

    The program's are `train.step.StepConfig.dtype` (compute) and `train.optimizer.OptimizerConfig.moments`; its
    weights, and so their gradient, are float32 (docs/decisions/0010).

    Args:
        compute: of the weights as they are computed with, of activations, and of a frozen reference.
        moments: AdamW's.
        weights: what is trained, and its gradient.
    """

    compute: DType = "bf16"
    moments: DType = "f32"
    weights: DType = "f32"

    def __post_init__(self) -> None:
        for name, dtype in vars(self).items():
            if dtype not in ("f32", "bf16"):
                raise ValueError(f"{name}: got {dtype!r}, wanted f32 or bf16; quantized weights are not trained")


MASTERS = StateDTypes()
"""What a run on accelerators holds unless it is told otherwise."""


class StateBytes(NamedTuple):
    """What a training step keeps of every weight, over all chips: weights, their gradient, AdamW's two moments."""

    weights: int
    gradient: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def train_state_bytes(config: ModelConfig, state: StateDTypes = MASTERS, *, mtp: bool = True) -> StateBytes:
    """Bytes of training state. The gradient has the weights' dtype; router biases have no gradient and no moments."""
    p = parameters(config)
    trained = p.total if mtp else p.main
    gradient = trained * number_bytes(state.weights)
    weights = weight_bytes(config, state.weights, mtp=mtp)
    return StateBytes(weights, gradient, 2 * trained * number_bytes(state.moments))


# --- bytes that are moved ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes between memory and chips in one step, over all chips; activations are left out."""

    weights: float
    cache_read: float = 0.0
    cache_written: float = 0.0
    gradient: float = 0.0
    moments: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def experts_touched(config: ModelConfig, tokens: int) -> float:
    """The share of a layer's routed experts that `tokens` tokens meet, expected under uniform routing."""
    moe = config.moe
    return 0.0 if moe is None else 1 - (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens


def touched_weight_bytes(config: ModelConfig, dtype: DType, tokens: int) -> float:
    """Weights that a forward pass over so many tokens reads once: all but unmet experts and embedding rows."""
    found: dict[Kind, float] = dict(weight_bytes_by_kind(config, dtype))
    if "routed_experts" in found:
        found["routed_experts"] *= experts_touched(config, tokens)
    if not config.tie_word_embeddings:  # else the head reads the whole table anyway
        found["embedding"] *= min(1.0, tokens / config.vocab_size)
    return sum(found.values())


def decode_bytes(
    config: ModelConfig, sequences: int, context: int, dtype: DType, *, cache_dtype: DType = "bf16"
) -> Traffic:
    """One new token for each sequence: weights touched, the cache it sees, its own entry.

    Args:
        config: the architecture.
        sequences: B.
        context: S, keys that a new token sees. V3.2 reads all indexer keys, but the latents of index_topk alone.
        dtype: of the weights.
        cache_dtype: of the cache.
    """
    check_positive(sequences=sequences, context=context)
    latent, index = _cache_bytes(config, cache_dtype)
    ranked = context if ranks(config, context) else 0
    read = sum(latent) * kept_keys(config, context) + sum(index) * ranked
    read *= sequences * config.num_hidden_layers
    written = sequences * cache_bytes_per_token(config, cache_dtype)
    return Traffic(weights=touched_weight_bytes(config, dtype, sequences), cache_read=read, cache_written=written)


def prefill_bytes(
    config: ModelConfig, sequences: int, length: int, dtype: DType, *, cache_dtype: DType = "bf16"
) -> Traffic:
    """A forward pass over whole sequences: weights touched, read once, and the cache written."""
    check_positive(sequences=sequences, length=length)
    tokens = sequences * length
    written = tokens * cache_bytes_per_token(config, cache_dtype)
    return Traffic(weights=touched_weight_bytes(config, dtype, tokens), cache_written=written)


def train_bytes(config: ModelConfig, state: StateDTypes = MASTERS, *, mtp: bool = True) -> Traffic:
    """One update: weights read forward, backward and by the optimizer, and written; the rest written and read once."""
    kept = train_state_bytes(config, state, mtp=mtp)
    return Traffic(weights=4 * kept.weights, gradient=2 * kept.gradient, moments=2 * kept.moments)
