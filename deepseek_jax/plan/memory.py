"""Bytes a device holds at its fullest, of training, serving and each phase of a GRPO step.

Weights by `plan.meshes`, and the few estimates of this file for what a program holds besides.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.transfer import sampled_config
from deepseek_jax.plan.chips import Kind
from deepseek_jax.plan.meshes import Sizes, Workload, divides_heads, trained_a_device, weights_a_device
from deepseek_jax.plan.model_bytes import StateDTypes, cache_bytes_per_token, number_bytes
from deepseek_jax.plan.model_flops import kept_keys
from deepseek_jax.plan.weights import DType, moe_layers, weights
from deepseek_jax.sharding import LOCAL

Moments = Literal["float32", "bfloat16"]
PREFILL_TOKENS = 1024  # of one sequence that are prefilled at once
CAPACITY_FACTOR = LOCAL.capacity_factor  # room for experts' rows beyond an even load
_SCORES = 2**27  # of a tile at most, `parallel.causal_attention`
_KEYS_SCORED = 1024  # at once, `ops.indexer`
_TILES = 8  # of scores along a sequence, `parallel.causal_attention`
_LOGITS = 2**25, 2**27  # at once, `ops.logprobs.positions_at_once`


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a device holds at its fullest.

    reference: the frozen model of GRPO. computed: what is trained once more, as it is computed with. serving: the same
    laid out to be sampled from. activations: what a pass through the layers keeps and works on. workspace: weights
    gathered or unpacked for a layer, or on their way to another layout, and logits.
    """

    weights: int
    reference: int = 0
    optimizer: int = 0
    gradient: int = 0
    computed: int = 0
    serving: int = 0
    cache: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def state_of(dtype: DType, moments: Moments) -> StateDTypes:
    """What training keeps, in the words of the programs' options."""
    return StateDTypes(compute=dtype, moments="f32" if moments == "float32" else "bf16")


@lru_cache(maxsize=1024)
def _widest_layer(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the weights of one layer: its routed experts', and the rest of the larger kind of layer."""
    main = [weight for weight in weights(config) if not weight.module]
    moe = moe_layers(config)
    total = lambda *kinds: sum(weight.size for weight in main if weight.kind in kinds)
    attention = total("attention", "indexer") // config.num_hidden_layers
    dense = total("dense_mlp") // max(1, config.num_hidden_layers - moe)
    return total("routed_experts") // max(1, moe), attention + max(
        dense, total("shared_experts", "router") // max(1, moe)
    )


def _largest_packed(config: ModelConfig, sizes: Sizes) -> int:
    """Numbers in the largest matrix of a device that a product makes whole: experts, which lie whole, go one by one."""
    across = lambda weight: 1 if weight.kind == "routed_experts" else sizes.tensor
    return max(math.prod(weight.shape[-2:]) // across(weight) for weight in weights(config) if weight.packable)


def layer_activations(
    config: ModelConfig, tokens: int, length: int, sizes: Sizes, workload: Workload, *, number: int = 2
) -> dict[str, int]:
    """Bytes a device needs while whole sequences pass through one layer, the layer of the largest kind.

    Args:
        config: the architecture.
        tokens: on this device, of sequences of `length` tokens.
        length: T of the whole sequence, which `context` may cut.
        sizes: of the mesh.
        workload: "serve" is the forward pass alone; else each piece is doubled by its gradient.
        number: bytes of an activation.

    Returns:
        attention: queries, keys, values and output; devices that share a sequence divide its heads, or, where that
            cannot be, each has the keys and values of all.
        scores: a tile's, float32, with the softmax beside them; and what V3.2's indexer works on where it chooses.
        experts: the rows that this device's experts compute, with SLACK: input, gate, up, their product, output.
        dense: the same of the dense or the shared feed-forward.
        states: the residual stream, its norm, and what is added.
    """
    a, D, N = config.attention, config.hidden_size, config.num_attention_heads / sizes.tensor
    if isinstance(a, MLAConfig):
        key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
        of_keys = N * (key + value)
    else:
        key = value = a.head_dim
        of_keys = a.num_key_value_heads / sizes.tensor * 2 * key
    tokens_of_head = tokens * (1 if divides_heads(config, sizes, length) else sizes.context)
    scores = min(_SCORES, tokens_of_head * length * N / _TILES**2)
    routed = 0.0
    inner = config.intermediate_size if moe_layers(config) < config.num_hidden_layers else 0
    if config.moe is not None:
        moe = config.moe
        rows = CAPACITY_FACTOR * tokens * moe.num_experts_per_tok
        if workload == "serve":  # there `tensor` cuts the rows, and experts are whole
            routed = rows / sizes.tensor * (2 * D + 3 * moe.moe_intermediate_size)
        else:
            routed = rows * (2 * D + 3 * moe.moe_intermediate_size / sizes.tensor)
        inner = max(inner, moe.n_shared_experts * moe.moe_intermediate_size)
    twice = 1 if workload == "serve" else 2
    return {
        "attention": math.ceil(twice * number * (tokens * N * (key + value) + tokens_of_head * of_keys)),
        "scores": math.ceil(twice * 2 * 4 * scores + _choice(config, tokens * sizes.context / length, length, N)),
        "experts": math.ceil(twice * number * routed),
        "dense": math.ceil(twice * number * tokens * 3 * inner / sizes.tensor),
        "states": twice * number * 3 * tokens * D,
    }


def _choice(config: ModelConfig, sequences: float, length: int, heads: float) -> float:
    """Bytes that V3.2's indexer works on: a tile of queries' scores in two forms, and all its heads' for some keys."""
    ranking = _index_heads(config, length)
    if not ranking:
        return 0
    side = min(length / _TILES, (_SCORES / sequences / heads) ** 0.5)
    return 4 * sequences * side * (2 * length + ranking * _KEYS_SCORED)


def _index_heads(config: ModelConfig, keys: int) -> int:
    """Of V3.2's indexer, where there are so many keys that it chooses among them."""
    return config.attention.indexer.index_n_heads if kept_keys(config, keys) < keys else 0


def _live(pieces: dict[str, int]) -> int:
    """Attention and feed-forward of a layer follow one another; the larger of the two counts."""
    return pieces["states"] + max(pieces["attention"] + pieces["scores"], pieces["experts"] + pieces["dense"])


def train_memory(
    config: ModelConfig,
    state: StateDTypes,
    sizes: Sizes,
    batch: int,
    length: int,
    *,
    kind: Kind = "tpu",
    modules: bool = True,
    micro_batches: int = 1,
) -> Memory:
    """Bytes a device of one update: AdamW, all of a layer worked out again but its attention.

    Weights are cast to what is computed in before anything else; this copy, and a gradient in the same dtype, are there
    at once. Only where the optimizer uses it is a number of the gradient made float32, or where those of micro-batches
    are added up: their sum is float32, and on a mesh so is the gradient that is added to it. Activations are each
    layer's saved input and attention, and one layer at work. Workspace is one layer's weights gathered with their
    gradient, embedding and head gathered with their gradients, and a chunk of logits with softmax and gradient in
    float32. MTP modules lie outside the loop over layers: each adds its layer's weights with their gradient, and the
    gradient that it gives embedding and head.

    Differs by the compiler, see `_of_xla_gpu`; `tests/tools/test_compile_gpus.py` and
    `tests/tools/test_compile_pod.py` hold both.

    Args:
        config: the architecture.
        state: dtypes.
        sizes: of the mesh.
        batch: sequences.
        length: tokens of each.
        kind: of chip.
        modules: whether MTP modules run; their weights, gradient and moments there are all the same.
        micro_batches: parts of the batch, one after another.
    """
    number = number_bytes(state.compute)
    ran = config.num_nextn_predict_layers if modules else 0
    tokens = math.ceil(batch / micro_batches * length / sizes.over(("data", "fsdp", "expert", "context")))
    trained, added = trained_a_device(config, sizes), 1 if math.prod(sizes) == 1 else 2
    held = _held_by_passes(config, sizes, tokens, length, number, ran)
    kept = Memory(
        weights=weights_a_device(config, state.weights, "train", sizes),
        optimizer=2 * number_bytes(state.moments) * trained,
        gradient=(number if micro_batches == 1 else added * number_bytes(state.weights)) * trained,
        computed=0 if state.compute == state.weights else number * trained,
        activations=held.saved + _live(held.pieces | _gradient_parts(config, tokens, length, sizes, number, kind)),
        workspace=math.ceil((1 + ran) * held.layer + (1 + ran / 2) * held.tables + held.logits),
    )
    if kind == "tpu":
        return kept
    return _of_xla_gpu(config, sizes, kept, held, number=number, ran=ran, parted=micro_batches > 1)


def _gradient_parts(
    config: ModelConfig, tokens: int, length: int, sizes: Sizes, number: int, kind: Kind
) -> dict[str, int]:
    """What a TPU's kernel works on instead of scores: the queries' gradient in parts, one a block of keys."""
    if kind != "tpu" or _index_heads(config, length):
        return {}
    a, parts = config.attention, min(_TILES, math.ceil(length / 512))
    key = a.qk_nope_head_dim + a.qk_rope_head_dim if isinstance(a, MLAConfig) else a.head_dim
    return {"scores": math.ceil(parts * tokens * config.num_attention_heads / sizes.tensor * key * number)}


class _Held(NamedTuple):
    """Bytes that forward and backward pass hold beside weights and gradient.

    saved: of all layers, `attention` among them. pieces: of the layer at work. layer, tables: weights gathered with
    their gradients, of a layer and of embedding and head. logits: of a chunk.
    """

    saved: int
    attention: int
    pieces: dict[str, int]
    layer: float
    tables: float
    logits: float


def _held_by_passes(config: ModelConfig, sizes: Sizes, tokens: int, length: int, number: int, ran: int) -> _Held:
    a, layers = config.attention, config.num_hidden_layers + ran
    value = a.v_head_dim if isinstance(a, MLAConfig) else a.head_dim
    attention = math.ceil(layers * tokens * config.num_attention_heads * value / sizes.tensor * number)
    layer, tables = gathered_to_train(config, sizes, number)
    pieces = layer_activations(config, tokens, length, sizes, "train", number=number)
    if config.moe is not None and sizes.expert > 1:
        # further rounds are gone back through beside the first one's rows, sent and come back
        rows = CAPACITY_FACTOR * tokens * config.moe.num_experts_per_tok
        pieces["experts"] += math.ceil(2 * number * rows * config.hidden_size)
    return _Held(
        saved=layers * tokens * config.hidden_size * number + attention,
        attention=attention,
        pieces=pieces,
        layer=layer,
        tables=tables,
        logits=3 * 4 * _logits(config, sizes, tokens),
    )


def _of_xla_gpu(
    config: ModelConfig, sizes: Sizes, kept: Memory, held: _Held, *, number: int, ran: int, parted: bool
) -> Memory:
    """The same by XLA:GPU: the fuller of two moments.

    Logits are worked on before the layers have a gradient; and while the layers are gone back through, the cast
    embedding and head are gone, and the embedding has no gradient yet but an MTP module's. Of a dense model it has
    scores half as often, which it fuses. Where experts are gathered, it keeps a second copy of the saved attention, in
    the layout in which it sends it.
    """
    pieces, saved = dict(held.pieces), held.saved
    if config.moe is None:
        pieces["scores"] //= 2
    elif sizes.fsdp * sizes.context > 1:
        saved += held.attention
    tables = 1 if config.tie_word_embeddings else 2
    table = number * config.hidden_size * config.vocab_size // sizes.over(("tensor", "fsdp", "context"))
    of_logits = dataclasses.replace(
        kept,
        gradient=kept.gradient if parted else table,
        activations=saved,
        workspace=math.ceil(ran * held.layer + (1 + ran / 2) * held.tables + held.logits),
    )
    of_layers = dataclasses.replace(
        kept,
        gradient=kept.gradient if parted else kept.gradient - (tables - 1) * table,
        computed=kept.computed and kept.computed - tables * table,
        activations=saved + _live(pieces),
        workspace=math.ceil((1 + ran) * held.layer + ran * held.tables / 2 / tables),
    )
    return max(of_logits, of_layers, key=lambda memory: memory.total)


def gathered_to_train(config: ModelConfig, sizes: Sizes, number: int) -> tuple[float, float]:
    """Bytes of a layer's and of the vocabulary's weights with their gradients, if any axis has to gather them."""
    if sizes.fsdp * sizes.context == 1:
        return 0.0, 0.0
    experts, rest = _widest_layer(config)
    tables = (1 if config.tie_word_embeddings else 2) * config.hidden_size * config.vocab_size
    layer = experts / (sizes.expert * sizes.tensor) + rest / sizes.tensor
    return 2 * number * layer, 2 * number * tables / sizes.tensor


def serve_memory(
    config: ModelConfig,
    dtype: DType,
    sizes: Sizes,
    batch: int,
    context: int,
    *,
    multiple: int = 1,
    cache_dtype: DType = "bf16",
) -> Memory:
    """Bytes a device of an engine with a cache of `batch` sequences of `context` tokens.

    Rows of the cache are padded to the mesh's parts. Activations are the larger of one sequence's prefill, at most
    PREFILL_TOKENS at once on a batch shard, and of decoding the whole batch. Workspace is the largest quantized matrix
    made whole, and the batch's logits twice in float32.

    Args:
        config: the architecture.
        dtype: of the weights.
        sizes: of the mesh.
        batch: sequences.
        context: slots of each in the cache.
        multiple: the cache's last dimension is padded to it.
        cache_dtype: of the cache.
    """
    latent = isinstance(config.attention, MLAConfig)
    shards = sizes.parts("serve", "cache_batch" if latent else "batch")
    parts = 1 if latent else sizes.parts("serve", "kv_heads")
    rows = math.ceil(batch / shards) * shards
    of_token = cache_bytes_per_token(config, cache_dtype, multiple=multiple, parts=parts)
    cache = rows * context * of_token / (shards * parts)
    tokens = min(PREFILL_TOKENS, context)
    prefill = _live(layer_activations(config, tokens, tokens, sizes, "serve"))
    across = sizes.expert * sizes.tensor
    unpacked = 0 if dtype in ("bf16", "f32") else 2 * _largest_packed(config, sizes)
    logits = 2 * 4 * math.ceil(batch / sizes.data) * config.vocab_size / across
    return Memory(
        weights=weights_a_device(config, dtype, "serve", sizes),
        cache=math.ceil(cache),
        activations=max(prefill, _decode_activations(config, sizes, batch, context)),
        workspace=math.ceil(unpacked + logits),
    )


def prefill_memory(
    config: ModelConfig, dtype: DType, sizes: Sizes, batch: int, length: int, *, cache_dtype: DType = "bf16"
) -> Memory:
    """Bytes a device of `batch` whole prompts that pass through the layers at once, and of the cache they leave."""
    shards = sizes.parts("serve", "batch")
    tokens = math.ceil(batch / shards) * length
    parts = 1 if isinstance(config.attention, MLAConfig) else sizes.parts("serve", "kv_heads")
    of_token = cache_bytes_per_token(config, cache_dtype, parts=parts)
    return Memory(
        weights=weights_a_device(config, dtype, "serve", sizes),
        cache=math.ceil(batch * length * of_token / (shards * parts)),
        activations=_live(layer_activations(config, tokens, length, sizes, "serve")),
        workspace=math.ceil(2 * 4 * batch / shards * config.vocab_size / sizes.tensor),
    )


def _decode_activations(config: ModelConfig, sizes: Sizes, batch: int, context: int) -> int:
    """One token a sequence: its heads' queries and sums, scores twice in float32, states and experts' rows.

    V3.2's indexer adds its scores and the latents it chose.
    """
    a = config.attention
    N, D = config.num_attention_heads, config.hidden_size
    rows = math.ceil(batch / (sizes.data * sizes.expert))  # whose states the devices along `tensor` gather
    width = 2 * (a.kv_lora_rank + a.qk_rope_head_dim) if isinstance(a, MLAConfig) else 2 * a.head_dim
    kept, ranking = kept_keys(config, context), _index_heads(config, context)
    scores = 2 * 4 * math.ceil(rows / sizes.tensor) * (N * kept + ranking * context)
    if ranking:
        scores += 2 * math.ceil(rows / sizes.tensor) * kept * (a.kv_lora_rank + a.qk_rope_head_dim)
    experts = 0.0
    if config.moe is not None:
        moe = config.moe
        taken = CAPACITY_FACTOR * rows * moe.num_experts_per_tok / sizes.tensor
        experts = 2 * taken * (2 * D + 3 * moe.moe_intermediate_size)
    return math.ceil(scores + 2 * rows * (3 * D + 2 * N * width / sizes.tensor) + experts)


def transfer_memory(
    config: ModelConfig, state: StateDTypes, sizes: Sizes, rollout: Sizes, *, kind: Kind = "tpu"
) -> Memory:
    """Bytes a device of the call that lays the trained weights out for sampling, beside what it is not given.

    Workspace is the cast weights in the layout that they come from; on GPUs, which start all exchanges before they
    wait for the first, what arrives in between as well.
    """
    cast = weights_a_device(sampled_config(config), state.compute, "train", sizes)
    return Memory(
        weights=weights_a_device(config, state.weights, "train", sizes),
        serving=weights_a_device(config, state.compute, "serve", rollout),
        workspace=cast * (2 if kind == "gpu" else 1),
    )


def _logits(config: ModelConfig, sizes: Sizes, tokens: int) -> float:
    """Numbers of them at once, of so many tokens."""
    columns, (least, most) = config.vocab_size / sizes.tensor, _LOGITS
    return min(tokens * columns, max(least, config.hidden_size * columns / 4), most)


def scoring_memory(config: ModelConfig, state: StateDTypes, sizes: Sizes, batch: int, length: int) -> Memory:
    """Bytes a device of the reference's log-probs of a batch: one forward pass, of which nothing is saved.

    The trained weights and their moments, which it does not read, are not among them.
    """
    number = number_bytes(state.compute)
    tokens = math.ceil(batch * length / sizes.over(("data", "fsdp", "expert", "context")))
    pieces = layer_activations(config, tokens, length, sizes, "train", number=number)
    layer, head = gathered_to_train(config, sizes, number)
    logits = 2 * 4 * _logits(config, sizes, tokens)
    return Memory(
        weights=0,
        reference=weights_a_device(config, state.compute, "train", sizes),
        activations=math.ceil(_live(pieces) / 2),
        workspace=math.ceil((layer + head) / 2 + logits),
    )


def grpo_memory(
    config: ModelConfig,
    state: StateDTypes,
    sizes: Sizes,
    rollout: Sizes,
    batch: int,
    length: int,
    *,
    multiple: int = 1,
    kind: Kind = "tpu",
) -> dict[str, Memory]:
    """Bytes a device of each phase of a step: transfer, rollout, scoring, update.

    Trained weights, moments and the reference's weights, these as they are computed with, stay through all. A rollout
    has a copy of the weights laid out for serving, which the transfer makes and which is gone when samples are scored,
    the cache and what serving works on; the update gradient and activations.
    """
    update = train_memory(config, state, sizes, batch, length, kind=kind, modules=False)
    kept = {
        "weights": update.weights,
        "optimizer": update.optimizer,
        "reference": weights_a_device(config, state.compute, "train", sizes),
    }
    serve = serve_memory(config, state.compute, rollout, batch, length, multiple=multiple)
    phases = {
        "transfer": transfer_memory(config, state, sizes, rollout, kind=kind),
        "rollout": dataclasses.replace(serve, serving=serve.weights),
        "scoring": scoring_memory(config, state, sizes, batch, length),
        "update": update,
    }
    return {name: dataclasses.replace(memory, **kept) for name, memory in phases.items()}


def fullest(phases: dict[str, Memory]) -> Memory:
    return max(phases.values(), key=lambda memory: memory.total)
