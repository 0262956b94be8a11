"""What a model weighs, computes and moves, in closed form: pure functions of its configuration, without jax.

FLOPs are those of matrix products, two a multiply-add, as the algorithm needs them: causal attention is counted by
its visible pairs. Bytes are the least that must cross between memory and chip, over all chips together.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from deepseek_jax.config import FP8Config, GQAConfig, MLAConfig, ModelConfig

DType = Literal["f32", "bf16", "fp8", "int8", "int4"]
DTYPES: tuple[str, ...] = get_args(DType)
_WHOLE = {"f32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # bytes of a number that needs no scale beside it
GROUP = 128  # weights along the input that share an int4 scale

Kind = Literal[
    "embedding",
    "head",
    "attention",
    "dense_mlp",
    "router",
    "router_bias",
    "shared_experts",
    "routed_experts",
    "norms",
    "indexer",
    "mtp_projection",
]


class Weight(NamedTuple):
    """`count` arrays of one shape, [in, out] where they are matrices ([V, D] for the embedding, [E, in, out] experts).

    axes: logical ones as the model gives them, which `sharding` knows. packable: an FP8 checkpoint stores it in FP8.
    module: it belongs to an MTP module.
    """

    kind: Kind
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    count: int
    packable: bool = True
    module: bool = False

    @property
    def size(self) -> int:
        return self.count * math.prod(self.shape)


@lru_cache(maxsize=256)
def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of a model in memory, its MTP modules' and the router biases among them."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    found = [Weight("embedding", (V, D), ("vocab", "embed"), 1, packable=False)]
    if not config.tie_word_embeddings:
        found.append(Weight("head", (D, V), ("embed", "vocab"), 1, packable=False))
    found.append(_vector("norms", D, 1))
    moe = moe_layers(config)
    found += [*_attention(config, L), *_dense(config, L - moe), *_experts(config, moe)]
    modules = config.num_nextn_predict_layers
    if modules:
        sparse = sum(config.is_moe_layer(L + depth) for depth in range(modules))
        own = [*_attention(config, modules), *_dense(config, modules - sparse), *_experts(config, sparse)]
        own.append(Weight("mtp_projection", (2 * D, D), ("embed", None), modules, packable=False))
        own.append(_vector("norms", D, 3 * modules))
        found += [weight._replace(module=True) for weight in own]
    return tuple(weight for weight in found if weight.count)


def moe_layers(config: ModelConfig) -> int:
    """How many of the model's layers, MTP modules aside, are mixtures of experts."""
    return sum(map(config.is_moe_layer, range(config.num_hidden_layers)))


def _vector(kind: Kind, size: int, count: int, axis: str | None = None) -> Weight:
    return Weight(kind, (size,), (axis,), count, packable=False)


def _attention(config: ModelConfig, layers: int) -> list[Weight]:
    a, D, N = config.attention, config.hidden_size, config.num_attention_heads
    matrix = lambda rows, columns, *axes: Weight("attention", (rows, columns), axes, layers)
    norms = _vector("norms", D, 2 * layers)
    if isinstance(a, GQAConfig):
        K, G = a.head_dim, a.num_key_value_heads
        keys = matrix(D, G * K, "embed", "kv_heads")
        found = [norms, matrix(D, N * K, "embed", "heads"), keys, keys, matrix(N * K, D, "heads", "embed")]
        if a.qkv_bias:
            found.append(_vector("attention", N * K, layers, "heads"))
            found.append(_vector("attention", G * K, 2 * layers, "kv_heads"))
        if a.qk_norm:
            found.append(_vector("norms", K, 2 * layers))
        return found
    Q, C, R = a.q_lora_rank, a.kv_lora_rank, a.qk_rope_head_dim
    queries, values = N * (a.qk_nope_head_dim + R), N * a.v_head_dim
    if Q is None:
        found = [norms, matrix(D, queries, "embed", "heads")]
    else:
        found = [norms, matrix(D, Q, "embed", "latent"), matrix(Q, queries, "rank", "heads")]
        found.append(_vector("norms", Q, layers))
    found += [matrix(D, C + R, "embed", "latent"), _vector("norms", C, layers)]
    found.append(matrix(C, N * a.qk_nope_head_dim + values, "rank", "heads"))
    found.append(matrix(values, D, "heads", "embed"))
    if a.indexer is not None:
        J, Z = a.indexer.index_n_heads, a.indexer.index_head_dim
        found.append(Weight("indexer", (Q, J * Z), ("rank", "heads"), layers))
        found.append(Weight("indexer", (D, Z), ("embed", None), layers))
        found.append(Weight("indexer", (D, J), ("embed", None), layers, packable=False))
        found.append(_vector("indexer", Z, 2 * layers))
    return found


def _swiglu(kind: Kind, width: int, inner: int, layers: int) -> list[Weight]:
    up = Weight(kind, (width, inner), ("embed", "mlp"), 2 * layers)
    return [up, Weight(kind, (inner, width), ("mlp", "embed"), layers)]


def _dense(config: ModelConfig, layers: int) -> list[Weight]:
    return _swiglu("dense_mlp", config.hidden_size, config.intermediate_size, layers)


def _experts(config: ModelConfig, layers: int) -> list[Weight]:
    moe, D = config.moe, config.hidden_size
    if moe is None:
        return []
    E, M = moe.n_routed_experts, moe.moe_intermediate_size
    found = [Weight("router", (D, E), ("embed", None), layers, packable=False)]
    if moe.topk_method == "noaux_tc":
        found.append(_vector("router_bias", E, layers))
    found += _swiglu("shared_experts", D, moe.n_shared_experts * M, layers)
    found.append(Weight("routed_experts", (E, D, M), ("expert", "expert_embed", "expert_mlp"), 2 * layers))
    found.append(Weight("routed_experts", (E, M, D), ("expert", "expert_mlp", "expert_embed"), layers))
    return found


# --- parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trained numbers by kind; `mtp` is all that the MTP modules have of their own. Router biases are not trained."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    norms: int
    indexer: int
    mtp: int

    @property
    def main(self) -> int:
        """Without the MTP modules: what a published size counts."""
        return self.total - self.mtp

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def parameters(config: ModelConfig) -> Parameters:
    """Every trained number of a model.

    >>> from deepseek_jax.config import preset
    >>> parameters(preset("r1-671b")).main
    671026404352
    """
    counts = dict.fromkeys((field.name for field in fields(Parameters)), 0)
    for weight in weights(config):
        if weight.kind != "router_bias":
            counts["mtp" if weight.module else weight.kind] += weight.size
    return Parameters(**counts)


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token meets: its own experts alone, and one row of the embedding."""
    p = parameters(config)
    idle = 0
    if config.moe is not None:
        idle = p.routed_experts // config.moe.n_routed_experts * inactive_experts(config)
    rows = 0 if config.tie_word_embeddings else p.embedding - config.hidden_size
    return p.main - idle - rows


def inactive_experts(config: ModelConfig) -> int:
    """Routed experts of a layer that a token does not meet."""
    return 0 if config.moe is None else config.moe.n_routed_experts - config.moe.num_experts_per_tok


# --- FLOPs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of matrix products by kind, over all chips.

    `projections`: of attention, in and out, kv_b or its absorption among them. `attention`: scores and weighted sums.
    `indexer`: V3.2's projections, scores and their sum over heads. `mtp`: all that the modules do, their passes
    through the head among it.
    """

    projections: int
    attention: int
    indexer: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    head: int
    mtp: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: int) -> "Flops":
        return Flops(**{f.name: getattr(self, f.name) * times for f in fields(self)})


def prefill_flops(
    config: ModelConfig, sequences: int, length: int, *, logits: int | None = None, mtp: bool = False
) -> Flops:
    """A forward pass over whole sequences from position 0, attention expanded: every head's keys and values.

    Args:
        config: the architecture.
        sequences: B.
        length: T, tokens of each.
        logits: positions that the head reads, in all; None: the last of each sequence.
        mtp: whether the MTP modules run too, over as many positions, the head reading as many states of each.

    A query of V3.2 attends to min(position, index_topk) keys; the model here computes all pairs and masks them.
    """
    _check_positive(sequences=sequences, length=length)
    logits = sequences if logits is None else logits
    pairs = sequences * length * (length + 1) // 2
    seen = sequences * _kept_pairs(config, length)
    load = _Load(tokens=sequences * length, seen=seen, ranked=pairs if _ranks(config, length) else 0, absorbed=False)
    return _forward(config, load, logits, mtp)


def decode_flops(config: ModelConfig, sequences: int, context: int) -> Flops:
    """One new token for each sequence, attention absorbed.

    Args:
        config: the architecture.
        sequences: B, as many tokens as the head reads.
        context: S, keys that a new token sees, itself included. Of these V3.2 reads index_topk at most.
    """
    _check_positive(sequences=sequences, context=context)
    ranked = sequences * context if _ranks(config, context) else 0
    load = _Load(tokens=sequences, seen=sequences * kept_keys(config, context), ranked=ranked, absorbed=True)
    return _forward(config, load, sequences, mtp=False)


def train_flops(config: ModelConfig, sequences: int, length: int, *, mtp: bool) -> Flops:
    """Three forward passes' worth, one of them forward; recomputation is not counted. The head reads all positions."""
    return prefill_flops(config, sequences, length, logits=sequences * length, mtp=mtp) * 3


class _Load(NamedTuple):
    """Tokens; pairs of query and key that attention weighs and that the indexer ranks; absorbed or expanded."""

    tokens: int
    seen: int
    ranked: int
    absorbed: bool


def _forward(config: ModelConfig, load: _Load, logits: int, mtp: bool) -> Flops:
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    moe, head = moe_layers(config), 2 * D * V * logits
    main = _layers(config, load, L, moe)
    done = Flops(**main, head=head)
    if not mtp:
        return done
    modules = config.num_nextn_predict_layers
    sparse = sum(config.is_moe_layer(L + depth) for depth in range(modules))
    of_modules = sum(_layers(config, load, modules, sparse).values()) + modules * (4 * D * D * load.tokens + head)
    return Flops(**main, head=head, mtp=of_modules)


def _layers(config: ModelConfig, load: _Load, layers: int, sparse: int) -> dict[str, int]:
    """FLOPs by kind of `layers` layers, `sparse` of them with experts."""
    D, tokens = config.hidden_size, load.tokens
    matrices = [w for w in _attention(config, layers) if len(w.shape) == 2]
    projected = sum(w.size for w in matrices if w.kind == "attention")
    swiglu = lambda inner: 6 * D * inner * tokens
    moe = config.moe
    done = {
        "projections": 2 * projected * tokens,
        "attention": layers * load.seen * _pair_flops(config, load.absorbed),
        "indexer": layers * _indexer_flops(config, load),
        "dense_mlp": (layers - sparse) * swiglu(config.intermediate_size),
        "router": 0,
        "shared_experts": 0,
        "routed_experts": 0,
    }
    if moe is not None:
        done["router"] = sparse * 2 * D * moe.n_routed_experts * tokens
        done["shared_experts"] = sparse * swiglu(moe.n_shared_experts * moe.moe_intermediate_size)
        done["routed_experts"] = sparse * swiglu(moe.num_experts_per_tok * moe.moe_intermediate_size)
    return done


def _pair_flops(config: ModelConfig, absorbed: bool) -> int:
    """Of one query and one key of one layer, all heads: the score and the weighted sum."""
    a, N = config.attention, config.num_attention_heads
    if isinstance(a, GQAConfig):
        return 2 * N * 2 * a.head_dim
    if absorbed:
        return 2 * N * (a.kv_lora_rank + a.qk_rope_head_dim + a.kv_lora_rank)
    return 2 * N * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)


def _indexer_flops(config: ModelConfig, load: _Load) -> int:
    """Of one layer. Keys are made always; queries and scores only where there is something to choose."""
    a = config.attention
    if not isinstance(a, MLAConfig) or a.indexer is None:
        return 0
    D, Q, J, Z = config.hidden_size, a.q_lora_rank, a.indexer.index_n_heads, a.indexer.index_head_dim
    done = 2 * D * Z * load.tokens
    if load.ranked:
        done += 2 * (Q * J * Z + D * J) * load.tokens + 2 * (J * Z + J) * load.ranked
    return done


def kept_keys(config: ModelConfig, context: int) -> int:
    """How many of `context` keys a query's attention reads: all, or V3.2's index_topk."""
    return min(context, config.attention.indexer.index_topk) if _ranks(config, context) else context


def _ranks(config: ModelConfig, keys: int) -> bool:
    a = config.attention
    return isinstance(a, MLAConfig) and a.indexer is not None and keys > a.indexer.index_topk


def _kept_pairs(config: ModelConfig, length: int) -> int:
    """Pairs of a query and a key it attends to in one causal sequence."""
    kept = kept_keys(config, length)
    return kept * (kept + 1) // 2 + (length - kept) * kept


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: got {number}, wanted at least 1")


# --- bytes that are held -------------------------------------------------------------------------


def weight_bytes(config: ModelConfig, dtype: DType, *, mtp: bool = False) -> int:
    """Bytes of a model's weights in memory, over all chips, nothing held twice.

    Args:
        config: the architecture.
        dtype: "bf16" and "f32": all in it but router biases, which are float32. "fp8": as the published checkpoints,
            projections in e4m3 with a float32 scale a block, the rest bfloat16. "int8": the same projections with a
            float32 scale an output. "int4": routed experts (every projection, in a model without) in 4 bits with a
            bfloat16 scale for 128 weights, the other projections in FP8.
        mtp: with the MTP modules' own weights. Embedding and head are the model's.

    >>> from deepseek_jax.config import preset
    >>> weight_bytes(preset("r1-671b"), "fp8")
    673150611808
    """
    return sum(weight_bytes_by_kind(config, dtype, mtp=mtp).values())


def weight_bytes_by_kind(config: ModelConfig, dtype: DType, *, mtp: bool = False) -> dict[Kind, int]:
    """The same by kind; a module's weights are counted with their kind."""
    found: dict[Kind, int] = {}
    for weight in weights(config):
        if mtp or not weight.module:
            found[weight.kind] = found.get(weight.kind, 0) + stored_bytes(config, weight, dtype)
    return found


def checkpoint_bytes(config: ModelConfig, dtype: DType) -> int:
    """Bytes of tensors in a published checkpoint: MTP modules bring copies of embedding and head.

    >>> from deepseek_jax.config import preset
    >>> checkpoint_bytes(preset("r1-671b"), "fp8")
    688574839360
    """
    copies = 2 * config.num_nextn_predict_layers * config.vocab_size * config.hidden_size * _rest_bytes(dtype)
    return weight_bytes(config, dtype, mtp=True) + copies


def stored_bytes(config: ModelConfig, weight: Weight, dtype: DType) -> int:
    """Bytes of one entry of `weights`, scales among them."""
    _check_dtype(dtype)
    if weight.kind == "router_bias" or (len(weight.shape) == 1 and config.model_type == "deepseek_v32"):
        return 4 * weight.size  # float32 in the files; names.tensors has the same rule
    if not weight.packable or dtype in ("f32", "bf16"):
        return _rest_bytes(dtype) * weight.size
    *stack, inputs, outputs = weight.shape
    count = weight.count * math.prod(stack)
    if dtype == "int8":
        return count * (inputs * outputs + 4 * outputs)
    if dtype == "int4" and (weight.kind == "routed_experts" or config.moe is None):
        return count * (math.ceil(inputs * outputs / 2) + 2 * outputs * math.ceil(inputs / GROUP))
    rows, columns = (config.quantization or FP8Config()).weight_block_size
    return count * (inputs * outputs + 4 * math.ceil(outputs / rows) * math.ceil(inputs / columns))


def _rest_bytes(dtype: DType) -> int:
    return 4 if dtype == "f32" else 2


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")


def number_bytes(dtype: DType) -> int:
    """Bytes of a plain number: a cache's, a gradient's, a moment's. ValueError for int4, which needs scales."""
    if dtype not in _WHOLE:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(_WHOLE)}")
    return _WHOLE[dtype]


def cache_bytes_per_token(config: ModelConfig, dtype: DType = "bf16", *, multiple: int = 1) -> int:
    """What one token of one sequence takes in the cache, all layers: latents and indexer keys, or keys and values.

    Args:
        config: the architecture.
        dtype: of the cache.
        multiple: the last dimension of every array is padded to it; 128 as TPUs lay arrays out.

    >>> from deepseek_jax.config import preset
    >>> [cache_bytes_per_token(preset("r1-671b"), multiple=m) for m in (1, 128)]
    [70272, 78080]
    """
    latent, index = _cache_widths(config)
    padded = sum(math.ceil(width / multiple) * multiple for width in (*latent, *index))
    return config.num_hidden_layers * padded * number_bytes(dtype)


def _cache_widths(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers a token and layer: those that attention reads, and those that the indexer reads."""
    a = config.attention
    if isinstance(a, GQAConfig):
        return (a.head_dim,) * (2 * a.num_key_value_heads), ()
    return (a.kv_lora_rank, a.qk_rope_head_dim), () if a.indexer is None else (a.indexer.index_head_dim,)


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
    _check_positive(sequences=sequences, context=context)
    latent, index = _cache_widths(config)
    size = config.num_hidden_layers * number_bytes(cache_dtype)
    ranked = context if _ranks(config, context) else 0
    read = sequences * size * (sum(latent) * kept_keys(config, context) + sum(index) * ranked)
    written = sequences * cache_bytes_per_token(config, cache_dtype)
    return Traffic(weights=touched_weight_bytes(config, dtype, sequences), cache_read=read, cache_written=written)


def prefill_bytes(
    config: ModelConfig, sequences: int, length: int, dtype: DType, *, cache_dtype: DType = "bf16"
) -> Traffic:
    """A forward pass over whole sequences: weights touched, read once, and the cache written."""
    _check_positive(sequences=sequences, length=length)
    tokens = sequences * length
    written = tokens * cache_bytes_per_token(config, cache_dtype)
    return Traffic(weights=touched_weight_bytes(config, dtype, tokens), cache_written=written)


def train_bytes(config: ModelConfig, state: StateDTypes = MASTERS, *, mtp: bool = True) -> Traffic:
    """One update: weights read forward, backward and by the optimizer, and written; the rest written and read once."""
    kept = train_state_bytes(config, state, mtp=mtp)
    return Traffic(weights=4 * kept.weights, gradient=2 * kept.gradient, moments=2 * kept.moments)
