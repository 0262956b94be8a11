"""What a model computes, in closed form: pure functions of its configuration.

FLOPs are those of matrix products, two a multiply-add, as the algorithm needs them: causal attention is counted by
its visible pairs.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from deepseek_jax.config import GQAConfig, MLAConfig, ModelConfig
from deepseek_jax.plan.weights import moe_layers, weights


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
    check_positive(sequences=sequences, length=length)
    logits = sequences if logits is None else logits
    pairs = sequences * length * (length + 1) // 2
    seen = sequences * _kept_pairs(config, length)
    load = _Load(tokens=sequences * length, seen=seen, ranked=pairs if ranks(config, length) else 0, absorbed=False)
    return _forward(config, load, logits, mtp)


def decode_flops(config: ModelConfig, sequences: int, context: int) -> Flops:
    """One new token for each sequence, attention absorbed.

    Args:
        config: the architecture.
        sequences: B, as many tokens as the head reads.
        context: S, keys that a new token sees, itself included. Of these V3.2 reads index_topk at most.
    """
    check_positive(sequences=sequences, context=context)
    ranked = sequences * context if ranks(config, context) else 0
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
    modules, sparse = config.num_nextn_predict_layers, moe_layers(config, modules=True) - moe
    of_modules = sum(_layers(config, load, modules, sparse).values()) + modules * (4 * D * D * load.tokens + head)
    return Flops(**main, head=head, mtp=of_modules)


def _layers(config: ModelConfig, load: _Load, layers: int, sparse: int) -> dict[str, int]:
    """FLOPs by kind of `layers` layers, `sparse` of them with experts."""
    D, tokens = config.hidden_size, load.tokens
    swiglu = lambda inner: 6 * D * inner * tokens
    moe = config.moe
    done = {
        "projections": layers * 2 * _projections(config) * tokens,
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


def _projections(config: ModelConfig) -> int:
    """Numbers in the matrices of one layer's attention."""
    of_layers = (w for w in weights(config) if w.kind == "attention" and len(w.shape) == 2 and not w.module)
    return sum(w.size for w in of_layers) // config.num_hidden_layers


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
    return min(context, config.attention.indexer.index_topk) if ranks(config, context) else context


def ranks(config: ModelConfig, keys: int) -> bool:
    a = config.attention
    return isinstance(a, MLAConfig) and a.indexer is not None and keys > a.indexer.index_topk


def _kept_pairs(config: ModelConfig, length: int) -> int:
    """Pairs of a query and a key it attends to in one causal sequence."""
    kept = kept_keys(config, length)
    return kept * (kept + 1) // 2 + (length - kept) * kept


def check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: got {number}, wanted at least 1")
