"""Which chips, mesh and batch a model wants, what memory they take, and what bounds their speed.

All of it is arithmetic: `plan.arithmetic` for the model, `sharding` for where its arrays lie, and the few estimates of
this file for what a program holds besides. Speeds are rooflines at the shares of the peak that `ASSUMED` states: what
is worth hoping for and comparing, not a measurement.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from deepseek_jax.config import PRESETS, GQAConfig, MLAConfig, ModelConfig, preset
from deepseek_jax.model.transfer import sampled_config, serving_sizes
from deepseek_jax.plan import arithmetic
from deepseek_jax.plan.arithmetic import DType, StateDTypes
from deepseek_jax.plan.chips import GB, Chip, Kind
from deepseek_jax.sharding import AXES, LOCAL, Layout

Workload = Literal["serve", "train", "grpo"]
Moments = Literal["float32", "bfloat16"]
USABLE = 0.9  # of a device's memory; the rest is headroom
TIGHT = 0.75  # weights that take more than this share of all memory leave little for anything else
ASSUMED = {
    "compute": 0.5,  # of the bfloat16 peak; products run in bfloat16 however weights are stored
    "bandwidth": 0.8,
    "link": 0.7,  # of one direction
}
PREFILL_TOKENS = 1024  # of one sequence that are prefilled at once
CAPACITY_FACTOR = LOCAL.capacity_factor  # room for experts' rows beyond an even load
LARGEST_BATCH = 4096
_SCORES = 2**27  # at once, `ops.attention.rows_at_once`
_LOGITS = 2**25  # at once, `ops.logprobs.positions_at_once`
_PER_DEVICE = (1, 2, 4, 8)  # sequences a batch shard that training tries
_LARGEST_INNER = 8  # size of `context` and of `tensor` that training tries
_LANES = 128  # to whose multiple TPUs pad the last dimension


class Sizes(NamedTuple):
    """Of the axes of a mesh."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def over(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def parts(self, workload: Workload, axis: str) -> int:
        """How many parts a logical axis is cut into."""
        return self.over(_layout(workload).cut(axis))


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
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


class Seconds(NamedTuple):
    """What a step takes if one thing alone bounds it; the largest is the roofline."""

    compute: float
    memory: float
    collective: float

    @property
    def bound(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def longest(self) -> float:
        return max(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one model runs on some chips.

    `memory`, `hbm` and `limit` are bytes a device (half a v7x, a whole chip of the others); `limit` is the usable part.
    `tokens_per_second` counts all chips: drawn when serving, trained on, or for GRPO drawn and trained on.
    `prefill_tokens_per_second` is for prompts, when serving. `rollout_mesh` is where GRPO samples, and `phases` what
    each phase of its step holds, of which `memory` is the fullest. `moments` are None when serving.
    """

    model: str
    workload: Workload
    dtype: DType
    moments: Moments | None
    chip: str
    chips: int
    slice: str
    mesh: dict[str, int]
    rollout_mesh: dict[str, int] | None
    batch: int
    context: int
    fits: bool
    tight: bool
    memory: Memory
    phases: dict[str, Memory] | None
    hbm: int
    limit: int
    seconds: Seconds
    bound: str
    tokens_per_second: float
    prefill_tokens_per_second: float | None

    def as_json(self) -> dict:
        """Everything as plain numbers; memory with its total, seconds by name."""
        found = dataclasses.asdict(self)
        found["memory"]["total"] = self.memory.total
        for name, memory in (self.phases or {}).items():
            found["phases"][name]["total"] = memory.total
        found["seconds"] = self.seconds._asdict()
        return found | {"assumed": ASSUMED | {"usable": USABLE}}


def plan(
    name: str,
    config: ModelConfig,
    chip: Chip,
    *,
    workload: Workload = "serve",
    context: int = 4096,
    chips: int | None = None,
    batch: int | None = None,
    dtype: DType | None = None,
    moments: Moments = "float32",
) -> Plan:
    """The fastest mesh and batch on the fewest chips that hold the model, or why it does not fit.

    Args:
        name: of the model, for the result.
        config: its architecture.
        chip: of `chips.chip`.
        workload: serve (decode from a full cache), train (all tokens count, with the MTP loss where there is a
            module), grpo (sampling, then an update, on the same chips).
        context: tokens of a sequence.
        chips: how many; None takes the smallest slice that fits, or the largest there is.
        batch: sequences at once; None takes as many as fit.
        dtype: of the weights to serve, None takes the checkpoint's; of what is computed in to train, None takes bf16.
        moments: what the optimizer's are kept in. What is trained is float32.

    Raises:
        ValueError: a number out of range, chips that cannot be had in that number, quantized weights to be trained,
            or no mesh of so many chips that divides model, batch and context.
    """
    if workload not in get_args(Workload):
        raise ValueError(f"workload: got {workload!r}, wanted one of {', '.join(get_args(Workload))}")
    if not 1 <= context <= config.max_position_embeddings:
        raise ValueError(f"context: got {context}, wanted 1 to {config.max_position_embeddings}, the model's")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: got {batch}, wanted at least 1")
    dtype = dtype or default_dtype(config, workload)
    arithmetic.weight_bytes(config, dtype)  # refuses an unknown one
    if workload != "serve" and dtype not in ("bf16", "f32"):
        raise ValueError(f"dtype: got {dtype!r} to train, wanted bf16; quantized weights are only served")
    if moments not in get_args(Moments):
        raise ValueError(f"moments: got {moments!r}, wanted one of {', '.join(get_args(Moments))}")
    if chips is not None:
        chip.check(chips)
    task = _Task(name, config, chip, workload, context, batch, dtype, moments)
    tried = chip.slices if chips is None else (chips,)
    best = None
    for count in tried:
        found = _on_slice(task, count)
        best = found or best
        if found is not None and found.fits:
            return found
    if best is None:
        raise ValueError(_no_mesh(task, tried))
    return best


def state_of(dtype: DType, moments: Moments) -> StateDTypes:
    """What training keeps, in the words of the programs' options."""
    return StateDTypes(compute=dtype, moments="f32" if moments == "float32" else "bf16")


def default_dtype(config: ModelConfig, workload: Workload) -> DType:
    """What a model is published in to serve it, bfloat16 to train it."""
    return "fp8" if workload == "serve" and config.quantization is not None else "bf16"


def weights_share(config: ModelConfig, chip: Chip, chips: int, dtype: DType) -> float:
    """The share of all chips' memory that the weights alone take, evenly spread."""
    return arithmetic.weight_bytes(config, dtype) / (chips * chip.hbm_bytes)


# --- what lies where -----------------------------------------------------------------------------


@lru_cache
def _layout(workload: Workload) -> Layout:
    return Layout(workload="serve" if workload == "serve" else "train")


class _Group(NamedTuple):
    """Weights that the same mesh axes cut: their bytes and how many numbers an optimizer trains."""

    routed: bool
    cut: tuple[str, ...]
    nbytes: int
    trained: int


@lru_cache(maxsize=1024)
def _groups(config: ModelConfig, dtype: DType, workload: Workload) -> tuple[_Group, ...]:
    """Of a model, MTP modules among it when it is trained."""
    found: dict[tuple, list[int]] = {}
    for weight in arithmetic.weights(config):
        if weight.module and workload == "serve":
            continue
        cut = tuple(axis for logical in weight.axes for axis in _layout(workload).cut(logical))
        sums = found.setdefault((weight.kind == "routed_experts", cut), [0, 0])
        sums[0] += arithmetic.stored_bytes(config, weight, dtype)
        sums[1] += 0 if weight.kind == "router_bias" else weight.size
    return tuple(_Group(*key, *sums) for key, sums in found.items())


def _weights_a_device(config: ModelConfig, dtype: DType, workload: Workload, sizes: Sizes) -> int:
    return math.ceil(sum(group.nbytes / sizes.over(group.cut) for group in _groups(config, dtype, workload)))


def _trained_a_device(config: ModelConfig, sizes: Sizes) -> int:
    """Numbers that an optimizer keeps moments for."""
    return math.ceil(sum(group.trained / sizes.over(group.cut) for group in _groups(config, "bf16", "train")))


@lru_cache(maxsize=1024)
def _divisibility(config: ModelConfig, workload: Workload) -> tuple[tuple[str, int, str], ...]:
    """Every number of a model that a mesh cuts: its name, itself, and its logical axis."""
    found = {("num_attention_heads", config.num_attention_heads, "heads")}
    a = config.attention
    if isinstance(a, GQAConfig):
        found.add(("num_key_value_heads", a.num_key_value_heads, "kv_heads"))
    elif a.indexer is not None:
        found.add(("index_n_heads", a.indexer.index_n_heads, "heads"))
    for weight in arithmetic.weights(config):
        for size, axis in zip(weight.shape, weight.axes, strict=True):
            if axis is not None and _layout(workload).cut(axis):
                found.add((weight.kind, size, axis))
    return tuple(sorted(found))


def divides(config: ModelConfig, workload: Workload, sizes: Sizes) -> bool:
    """Whether a mesh divides all that it cuts of a model."""
    if config.moe is None and sizes.expert > 1:
        return False
    return not any(n % sizes.parts(workload, axis) for _, n, axis in _divisibility(config, workload))


def meshes(config: ModelConfig, workload: Workload, devices: int) -> Iterator[Sizes]:
    """Every mesh of so many devices that divides the model, simple ones first.

    Serving replicates over `data` and cuts the rest by `expert` and `tensor`. Training tries `context` and `tensor`
    up to 8: further apart they cost more than they save.
    """
    for tensor in _divisors(devices):
        for context in _divisors(devices // tensor) if workload != "serve" else (1,):
            if workload != "serve" and max(tensor, context) > _LARGEST_INNER:
                continue
            rest = devices // (tensor * context)
            for expert in _divisors(rest) if config.moe is not None else (1,):
                for fsdp in _divisors(rest // expert) if workload != "serve" else (1,):
                    sizes = Sizes(rest // (expert * fsdp), fsdp, expert, context, tensor)
                    if divides(config, workload, sizes):
                        yield sizes


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


# --- memory --------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _widest_layer(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the weights of one layer: its routed experts', and the rest of the larger kind of layer."""
    main = [weight for weight in arithmetic.weights(config) if not weight.module]
    moe = arithmetic.moe_layers(config)
    total = lambda *kinds: sum(weight.size for weight in main if weight.kind in kinds)
    attention = total("attention", "indexer") // config.num_hidden_layers
    dense = total("dense_mlp") // max(1, config.num_hidden_layers - moe)
    return total("routed_experts") // max(1, moe), attention + max(
        dense, total("shared_experts", "router") // max(1, moe)
    )


def _largest_packed(config: ModelConfig) -> int:
    """Numbers in the largest array that quantization packs."""
    return max(math.prod(weight.shape) for weight in arithmetic.weights(config) if weight.packable)


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
        attention: queries, keys, values and output of all heads of this device; keys of the whole sequence.
        scores: a block's, float32, with the softmax beside them; V3.2's indexer has its own.
        experts: the rows that this device's experts compute, with SLACK: input, gate, up, their product, output.
        dense: the same of the dense or the shared feed-forward.
        states: the residual stream, its norm, and what is added.
    """
    a, D, N = config.attention, config.hidden_size, config.num_attention_heads / sizes.tensor
    if isinstance(a, MLAConfig):
        key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
        keys = tokens * sizes.context * N * (key + value)
    else:
        key = value = a.head_dim
        keys = tokens * sizes.context * a.num_key_value_heads / sizes.tensor * 2 * key
    scores = min(_SCORES, tokens * sizes.context * N * length) * (1 + _index_heads(config, length) / N / sizes.tensor)
    routed = 0.0
    inner = config.intermediate_size if arithmetic.moe_layers(config) < config.num_hidden_layers else 0
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
        "attention": math.ceil(twice * number * (tokens * N * (key + value) + keys)),
        "scores": math.ceil(twice * 2 * 4 * scores),
        "experts": math.ceil(twice * number * routed),
        "dense": math.ceil(twice * number * tokens * 3 * inner / sizes.tensor),
        "states": twice * number * 3 * tokens * D,
    }


def _index_heads(config: ModelConfig, keys: int) -> int:
    """Of V3.2's indexer, where there are so many keys that it chooses among them."""
    return config.attention.indexer.index_n_heads if arithmetic.kept_keys(config, keys) < keys else 0


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
    are added up: their sum is float32, and beside it there is no other. Activations are each layer's
    saved input and attention, and one layer at work. Workspace is one layer's weights gathered with their gradient,
    embedding and head gathered with their gradients, and a chunk of logits with softmax and gradient in float32.

    Differs by the compiler. XLA:GPU has the fuller of two moments: logits are worked on before the layers have a
    gradient; and while the layers are gone back through, the cast embedding and head are gone, and the embedding has no
    gradient yet. Of a dense model it has scores half as often, which it fuses. Where experts are gathered, it keeps a
    second copy of the saved attention, in the layout in which it sends it. `tests/tools/test_compile_gpus.py` and
    `tests/tools/test_compile_pod.py` hold both compilers.

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
    number = arithmetic.number_bytes(state.compute)
    tokens = math.ceil(batch / micro_batches * length / sizes.over(("data", "fsdp", "expert", "context")))
    a, layers = config.attention, config.num_hidden_layers + config.num_nextn_predict_layers * modules
    value = a.v_head_dim if isinstance(a, MLAConfig) else a.head_dim
    heads = layers * tokens * config.num_attention_heads * value / sizes.tensor * number
    saved = layers * tokens * config.hidden_size * number + heads
    trained = _trained_a_device(config, sizes)
    pieces = layer_activations(config, tokens, length, sizes, "train", number=number)
    layer, head = _gathered_to_train(config, sizes, number)
    head += 3 * 4 * min(_LOGITS, tokens * config.vocab_size / sizes.tensor)
    if kind == "gpu" and config.moe is None:
        pieces["scores"] //= 2
    elif kind == "gpu" and sizes.fsdp * sizes.context > 1:
        saved += heads
    copied = 0 if state.compute == state.weights else 1
    kept = Memory(
        weights=_weights_a_device(config, state.weights, "train", sizes),
        optimizer=2 * arithmetic.number_bytes(state.moments) * trained,
        gradient=(number if micro_batches == 1 else arithmetic.number_bytes(state.weights)) * trained,
        computed=copied * number * trained,
        activations=math.ceil(saved) + _live(pieces),
        workspace=math.ceil(layer + head),
    )
    if kind == "tpu":
        return kept
    table = number * config.hidden_size * config.vocab_size // sizes.over(("tensor", "fsdp", "context"))
    tables = 1 if config.tie_word_embeddings else 2
    parted = micro_batches > 1
    logits = {
        "gradient": kept.gradient if parted else table,
        "activations": math.ceil(saved),
        "workspace": math.ceil(head),
    }
    layers = {
        "gradient": kept.gradient if parted else kept.gradient - (tables - 1) * table,
        "computed": kept.computed - copied * tables * table,
        "workspace": math.ceil(layer),
    }
    return max((dataclasses.replace(kept, **of) for of in (logits, layers)), key=lambda memory: memory.total)


def _gathered_to_train(config: ModelConfig, sizes: Sizes, number: int) -> tuple[float, float]:
    """Bytes of a layer's and of the vocabulary's weights with their gradients, if any axis has to gather them."""
    if sizes.fsdp * sizes.context == 1:
        return 0.0, 0.0
    experts, rest = _widest_layer(config)
    tables = (1 if config.tie_word_embeddings else 2) * config.hidden_size * config.vocab_size
    layer = experts / (sizes.expert * sizes.tensor) + rest / sizes.tensor
    return 2 * number * layer, 2 * number * tables / sizes.tensor


def serve_memory(
    config: ModelConfig, dtype: DType, sizes: Sizes, batch: int, context: int, *, multiple: int = 1
) -> Memory:
    """Bytes a device of an engine with a bfloat16 cache of `batch` sequences of `context` tokens.

    Rows of the cache are padded to the mesh's parts. Activations are the larger of one sequence's prefill, at most
    PREFILL_TOKENS at once on a batch shard, and of decoding the whole batch. Workspace is the largest quantized weight
    unpacked, and the batch's logits twice in float32.

    Args:
        config: the architecture.
        dtype: of the weights.
        sizes: of the mesh.
        batch: sequences.
        context: slots of each in the cache.
        multiple: the cache's last dimension is padded to it.
    """
    latent = isinstance(config.attention, MLAConfig)
    shards = sizes.parts("serve", "cache_batch" if latent else "batch")
    cut = shards if latent else shards * sizes.parts("serve", "kv_heads")
    rows = math.ceil(batch / shards) * shards
    cache = rows * context * arithmetic.cache_bytes_per_token(config, "bf16", multiple=multiple) / cut
    tokens = min(PREFILL_TOKENS, context)
    prefill = _live(layer_activations(config, tokens, tokens, sizes, "serve"))
    across = sizes.expert * sizes.tensor
    unpacked = 0 if dtype in ("bf16", "f32") else 2 * _largest_packed(config) / across
    logits = 2 * 4 * math.ceil(batch / sizes.data) * config.vocab_size / across
    return Memory(
        weights=_weights_a_device(config, dtype, "serve", sizes),
        cache=math.ceil(cache),
        activations=max(prefill, _decode_activations(config, sizes, batch, context)),
        workspace=math.ceil(unpacked + logits),
    )


def prefill_memory(config: ModelConfig, dtype: DType, sizes: Sizes, batch: int, length: int) -> Memory:
    """Bytes a device of `batch` whole prompts that pass through the layers at once, and of the cache they leave."""
    shards = sizes.parts("serve", "batch")
    tokens = math.ceil(batch / shards) * length
    cut = shards if isinstance(config.attention, MLAConfig) else shards * sizes.parts("serve", "kv_heads")
    return Memory(
        weights=_weights_a_device(config, dtype, "serve", sizes),
        cache=math.ceil(batch * length * arithmetic.cache_bytes_per_token(config, "bf16") / cut),
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
    kept, ranking = arithmetic.kept_keys(config, context), _index_heads(config, context)
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
    cast = _weights_a_device(sampled_config(config), state.compute, "train", sizes)
    return Memory(
        weights=_weights_a_device(config, state.weights, "train", sizes),
        serving=_weights_a_device(config, state.compute, "serve", rollout),
        workspace=cast * (2 if kind == "gpu" else 1),
    )


def scoring_memory(config: ModelConfig, state: StateDTypes, sizes: Sizes, batch: int, length: int) -> Memory:
    """Bytes a device of the reference's log-probs of a batch: one forward pass, of which nothing is saved.

    The trained weights and their moments, which it does not read, are not among them.
    """
    number = arithmetic.number_bytes(state.compute)
    tokens = math.ceil(batch * length / sizes.over(("data", "fsdp", "expert", "context")))
    pieces = layer_activations(config, tokens, length, sizes, "train", number=number)
    layer, head = _gathered_to_train(config, sizes, number)
    logits = 2 * 4 * min(_LOGITS, tokens * config.vocab_size / sizes.tensor)
    return Memory(
        weights=0,
        reference=_weights_a_device(config, state.compute, "train", sizes),
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
        "reference": _weights_a_device(config, state.compute, "train", sizes),
    }
    serve = serve_memory(config, state.compute, rollout, batch, length, multiple=multiple)
    phases = {
        "transfer": transfer_memory(config, state, sizes, rollout, kind=kind),
        "rollout": dataclasses.replace(serve, serving=serve.weights),
        "scoring": scoring_memory(config, state, sizes, batch, length),
        "update": update,
    }
    return {name: dataclasses.replace(memory, **kept) for name, memory in phases.items()}


def rollout_sizes(config: ModelConfig, devices: int) -> Sizes:
    """The mesh that a run samples on unless it is told otherwise: `model.transfer.serving_layout`."""
    most = serving_sizes(config, devices)["tensor"]
    tried = (Sizes(**serving_sizes(config, devices, tensor=of)) for of in reversed(_divisors(most)))
    return next(sizes for sizes in tried if divides(config, "serve", sizes))


def memory_at(plan: Plan, config: ModelConfig, chip: Chip, batch: int, context: int) -> Memory:
    """What a plan's mesh holds a device with another batch and context; of GRPO's phases the fullest."""
    sizes, multiple = Sizes(**plan.mesh), _multiple(chip)
    if plan.workload == "serve":
        return serve_memory(config, plan.dtype, sizes, batch, context, multiple=multiple)
    if plan.workload == "train":
        return train_memory(config, state_of(plan.dtype, plan.moments), sizes, batch, context, kind=chip.kind)
    rollout = Sizes(**plan.rollout_mesh)
    state = state_of(plan.dtype, plan.moments)
    return _fullest(grpo_memory(config, state, sizes, rollout, batch, context, multiple=multiple, kind=chip.kind))


def _fullest(phases: dict[str, Memory]) -> Memory:
    return max(phases.values(), key=lambda memory: memory.total)


def _multiple(chip: Chip) -> int:
    """What the cache's last dimension is padded to."""
    return _LANES if chip.kind == "tpu" else 1


# --- speed ---------------------------------------------------------------------------------------


def _sending(chip: Chip, sizes: Sizes, *axes: str, exchange: bool = False) -> float:
    """Seconds a byte that a device sends along some axes of the mesh."""
    members = together = stride = 1
    for axis in reversed(AXES):
        size = getattr(sizes, axis)
        if axis in axes:
            members *= size
            together *= min(size, max(1, chip.island * chip.devices // stride))
        stride *= size
    return chip.seconds_a_byte(members, together, exchange=exchange) / ASSUMED["link"]


def _seconds(chip: Chip, devices: int, flops: float, nbytes: float, collective: float) -> Seconds:
    """flops over all devices, bytes a device, seconds of collectives."""
    return Seconds(
        flops / (devices * chip.bf16_flops / chip.devices * ASSUMED["compute"]),
        nbytes / (chip.bandwidth / chip.devices * ASSUMED["bandwidth"]),
        collective,
    )


def decode_seconds(config: ModelConfig, dtype: DType, chip: Chip, sizes: Sizes, batch: int, context: int) -> Seconds:
    """Of one token for each sequence. A layer's collectives are: states gathered over `tensor` for the projections of
    attention and feed-forward, and their sums scattered, rows to all experts and back, and MLA's queries to where
    their sequences' cache lies and back."""
    devices, across = math.prod(sizes), sizes.expert * sizes.tensor
    rows, own, D = batch / (sizes.data * sizes.expert), batch / devices, config.hidden_size
    touched = arithmetic.experts_touched(config, math.ceil(batch / sizes.data))
    weights = sum(
        group.nbytes / sizes.over(group.cut) * (touched if group.routed else 1)
        for group in _groups(config, dtype, "serve")
    )
    moved = arithmetic.decode_bytes(config, batch, context, dtype)
    nbytes = weights + (moved.cache_read + moved.cache_written) / devices
    share = (sizes.tensor - 1) / sizes.tensor
    sent = 4 * 2 * rows * D * share * config.num_hidden_layers + _dispatched(config, own, across)
    if isinstance(config.attention, MLAConfig):
        width = 2 * config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
        sent += 2 * own * config.num_attention_heads * width * share * config.num_hidden_layers
    flops = arithmetic.decode_flops(config, batch, context).total
    return _seconds(chip, devices, flops, nbytes, sent * _sending(chip, sizes, "expert", "tensor", exchange=True))


def prefill_seconds(config: ModelConfig, dtype: DType, chip: Chip, sizes: Sizes, length: int) -> Seconds:
    """Of one sequence of `length` tokens on every batch shard: sums over `tensor`, rows sent to experts."""
    devices = math.prod(sizes)
    sequences = sizes.parts("serve", "batch")
    nbytes = _weights_a_device(config, dtype, "serve", sizes)
    sent = _dispatched(config, length / sizes.tensor, sizes.expert * sizes.tensor) + _summed(config, length, sizes)
    flops = arithmetic.prefill_flops(config, sequences, length).total
    return _seconds(chip, devices, flops, nbytes, sent * _sending(chip, sizes, "expert", "tensor", exchange=True))


def _gathered(group: _Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes over which weights are gathered to be used on whole sequences, and those that still cut them then."""
    kept = tuple(axis for axis in group.cut if axis == "tensor" or (group.routed and axis == "expert"))
    return tuple(axis for axis in group.cut if axis not in kept), kept


def _dispatched(config: ModelConfig, tokens: float, over: int) -> float:
    """Bytes of rows to experts on so many devices and back in one forward pass, of a device's own tokens."""
    if config.moe is None:
        return 0.0
    away = (over - 1) / over
    rows = tokens * config.moe.num_experts_per_tok * away
    return 2 * 2 * rows * config.hidden_size * arithmetic.moe_layers(config)


def _summed(config: ModelConfig, tokens: float, sizes: Sizes) -> float:
    """Bytes of the two all-reduces over `tensor` in each layer of a forward pass, a device."""
    away = (sizes.tensor - 1) / sizes.tensor
    return 2 * 2 * 2 * tokens * config.hidden_size * away * config.num_hidden_layers


def update_seconds(
    config: ModelConfig,
    state: StateDTypes,
    chip: Chip,
    sizes: Sizes,
    batch: int,
    length: int,
    *,
    mtp: bool,
    scored: int = 0,
) -> Seconds:
    """Of one update with full remat: four forward passes' work, and `scored` more passes of a frozen model.

    Collectives: weights gathered forward and backward and their gradient scattered, rows to experts and back in three
    passes, sums over `tensor`, and the gradient's sum over the axes that hold copies of a weight.
    """
    devices, number = math.prod(sizes), arithmetic.number_bytes(state.compute)
    tokens = batch * length / sizes.over(("data", "fsdp", "expert", "context"))
    forward = arithmetic.prefill_flops(config, batch, length, logits=batch * length, mtp=mtp).total
    kept = train_memory(config, state, sizes, batch, length)
    passes = 3 + scored
    collective, whole = 0.0, 0.0
    for group in _groups(config, state.compute, "train"):
        gathered, cut = _gathered(group)
        used, mine = group.nbytes / sizes.over(cut), group.nbytes / sizes.over(group.cut)
        copies = tuple(axis for axis in ("data", "fsdp", "expert", "context") if axis not in group.cut)
        whole += used
        collective += passes * used * (1 - 1 / sizes.over(gathered)) * _sending(chip, sizes, *gathered)
        collective += 2 * mine * (1 - 1 / sizes.over(copies)) * _sending(chip, sizes, *copies)
    collective += passes * _dispatched(config, tokens, sizes.expert) * _sending(chip, sizes, "expert", exchange=True)
    collective += passes * _summed(config, tokens, sizes) * _sending(chip, sizes, "tensor")
    # gathered weights are written and read in each pass; the optimizer reads and writes what lies here
    nbytes = passes * 2 * whole + 2 * (kept.weights + kept.computed + kept.gradient + kept.optimizer)
    nbytes += 2 * passes * tokens * config.hidden_size * number * config.num_hidden_layers
    return _seconds(chip, devices, (4 + scored) * forward, nbytes, collective)


# --- the search ----------------------------------------------------------------------------------


class _Task(NamedTuple):
    name: str
    config: ModelConfig
    chip: Chip
    workload: Workload
    context: int
    batch: int | None
    dtype: DType
    moments: Moments

    @property
    def state(self) -> StateDTypes:
        return state_of(self.dtype, self.moments)

    @property
    def kept(self) -> DType:
        """Of the weights that lie there for good."""
        return self.dtype if self.workload == "serve" else self.state.weights

    @property
    def multiple(self) -> int:
        return _multiple(self.chip)

    @property
    def hbm(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def limit(self) -> int:
        return int(USABLE * self.hbm)


class _Option(NamedTuple):
    """One mesh with one batch."""

    sizes: Sizes
    rollout: Sizes | None
    batch: int
    memory: Memory
    phases: dict[str, Memory] | None = None


def _on_slice(task: _Task, chips: int) -> Plan | None:
    """The best plan on so many chips; None where no mesh divides."""
    of_workload = {"serve": _serve_options, "train": _train_options, "grpo": _grpo_options}[task.workload]
    best, best_plan = None, None
    for option in of_workload(task, chips * task.chip.devices):
        if option.memory.total > task.limit:
            speed, rank = None, (0, -option.memory.total)
        else:
            speed = _speed(task, option)
            # as if nothing overlapped: what lies below the roofline still counts for something
            alone = speed[1] * speed[0].longest / sum(speed[0])
            rank = (1, alone, -option.memory.total)
        if best is None or rank > best:
            best, best_plan = rank, (option, speed)
    if best_plan is None:
        return None
    option, speed = best_plan
    return _plan_of(task, chips, option, speed or _speed(task, option))


def _plan_of(task: _Task, chips: int, option: _Option, speed: tuple[Seconds, float]) -> Plan:
    seconds, tokens_per_second = speed
    prefill = None
    if task.workload == "serve":
        length = min(PREFILL_TOKENS, task.context)
        shards = option.sizes.parts("serve", "batch")
        longest = prefill_seconds(task.config, task.dtype, task.chip, option.sizes, length).longest
        prefill = shards * length / longest
    return Plan(
        model=task.name,
        workload=task.workload,
        dtype=task.dtype,
        moments=None if task.workload == "serve" else task.moments,
        chip=task.chip.name,
        chips=chips,
        slice=task.chip.slice_name(chips),
        mesh=option.sizes._asdict(),
        rollout_mesh=None if option.rollout is None else option.rollout._asdict(),
        batch=option.batch,
        context=task.context,
        fits=option.memory.total <= task.limit,
        tight=weights_share(task.config, task.chip, chips, task.kept) > TIGHT,
        memory=option.memory,
        phases=option.phases,
        hbm=task.hbm,
        limit=task.limit,
        seconds=seconds,
        bound=seconds.bound,
        tokens_per_second=tokens_per_second,
        prefill_tokens_per_second=prefill,
    )


def _serve_options(task: _Task, devices: int) -> Iterator[_Option]:
    for sizes in meshes(task.config, "serve", devices):
        memory_of = lambda batch, sizes=sizes: serve_memory(
            task.config, task.dtype, sizes, batch, task.context, multiple=task.multiple
        )
        if task.batch is not None:
            yield _Option(sizes, None, task.batch, memory_of(task.batch))
            continue
        least = sizes.parts("serve", "cache_batch" if isinstance(task.config.attention, MLAConfig) else "batch")
        yield _Option(sizes, None, *_largest(task, least, memory_of))


def _largest(task: _Task, least: int, memory_of) -> tuple[int, Memory]:
    """The largest batch that fits of `least`, twice that, and so on, and its memory; `least` if none does."""
    batch, memory = least, memory_of(least)
    while 2 * batch <= LARGEST_BATCH:
        more = memory_of(2 * batch)
        if more.total > task.limit:
            break
        batch, memory = 2 * batch, more
    return batch, memory


def _batches(task: _Task, sizes: Sizes) -> Iterator[int]:
    """Batches of training to try on a mesh, those that it divides."""
    shards = sizes.parts("train", "batch")
    if task.context % sizes.context:
        return
    if task.batch is None:
        yield from (shards * each for each in _PER_DEVICE)
    elif task.batch % shards == 0:
        yield task.batch


def _train_options(task: _Task, devices: int) -> Iterator[_Option]:
    for sizes in meshes(task.config, "train", devices):
        for batch in _batches(task, sizes):
            memory = train_memory(task.config, task.state, sizes, batch, task.context, kind=task.chip.kind)
            yield _Option(sizes, None, batch, memory)
            if memory.total > task.limit:
                break


def _grpo_options(task: _Task, devices: int) -> Iterator[_Option]:
    rollout = rollout_sizes(task.config, devices)
    for option in _train_options(task, devices):
        sizes, context = (option.sizes, rollout), task.context
        form = {"multiple": task.multiple, "kind": task.chip.kind}
        phases = grpo_memory(task.config, task.state, *sizes, option.batch, context, **form)
        yield option._replace(rollout=rollout, memory=_fullest(phases), phases=phases)


def _speed(task: _Task, option: _Option) -> tuple[Seconds, float]:
    """Of a step, and tokens/s of all chips."""
    config, chip, batch, context = task.config, task.chip, option.batch, task.context
    if task.workload == "serve":
        step = decode_seconds(config, task.dtype, chip, option.sizes, batch, context)
        return step, batch / step.longest
    if task.workload == "train":
        mtp = config.num_nextn_predict_layers > 0
        step = update_seconds(config, task.state, chip, option.sizes, batch, context, mtp=mtp)
        return step, batch * context / step.longest
    update = update_seconds(config, task.state, chip, option.sizes, batch, context, mtp=False, scored=1)
    # a token drawn sees half of the context on average
    token = decode_seconds(config, task.dtype, chip, option.rollout, batch, max(1, context // 2))
    both = Seconds(*(u + context * t for u, t in zip(update, token, strict=True)))
    return both, batch * context / (update.longest + context * token.longest)


def _no_mesh(task: _Task, tried: tuple[int, ...]) -> str:
    wanted = f"{task.chip.name} x {tried[0] if len(tried) == 1 else f'{tried[0]} to {tried[-1]}'}"
    asked = f"context {task.context}" + ("" if task.batch is None else f" and batch {task.batch}")
    numbers = {name: number for name, number, _ in _divisibility(task.config, task.workload) if "num" in name}
    listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return (
        f"mesh: no mesh of {wanted} divides {asked} and the numbers of {task.name} ({listed}); "
        "choose another number of chips, or a batch that is a multiple of it"
    )


# --- a given memory ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Advice:
    """How one model and dtype does with a given memory on one device.

    `needed`: bytes of one sequence of the context asked for. `context`: tokens of the longest sequence that fits, 0
    where none does. `devices`: how many such devices hold it, a power of two; None where no mesh of up to 1024 does.
    """

    model: str
    dtype: DType
    weights: int
    needed: int
    fits: bool
    context: int
    devices: int | None


def advise(name: str, config: ModelConfig, dtype: DType, memory: int, *, context: int) -> Advice:
    """What one device of this memory makes of a model, serving one sequence."""
    limit = int(USABLE * memory)
    context = min(context, config.max_position_embeddings)
    needs = lambda length: serve_memory(config, dtype, Sizes(), 1, length).total
    return Advice(
        model=name,
        dtype=dtype,
        weights=arithmetic.weight_bytes(config, dtype),
        needed=needs(context),
        fits=needs(context) <= limit,
        context=_longest(needs, limit, config.max_position_embeddings),
        devices=_devices(config, dtype, limit, context),
    )


def advise_all(memory: int, *, context: int) -> list[Advice]:
    """Every published model that this memory holds, in the best dtype that fits, the ablest first.

    Ability is guessed by size: the geometric mean of a model's parameters and of those active for a token.
    """
    found = []
    for name in PRESETS:
        if name == "tiny":
            continue
        tried = (advise(name, preset(name), dtype, memory, context=context) for dtype in ("bf16", "fp8", "int4"))
        fitting = next((advice for advice in tried if advice.fits), None)
        if fitting is not None:
            found.append(fitting)
    return sorted(found, key=lambda advice: -_ability(preset(advice.model)))


def _ability(config: ModelConfig) -> float:
    return math.sqrt(arithmetic.parameters(config).main * arithmetic.active_parameters(config))


def _longest(needs, limit: int, most: int) -> int:
    """The largest whole number up to `most` whose need is within the limit; `needs` never falls."""
    if needs(1) > limit:
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle - 1)
    return low


def _devices(config: ModelConfig, dtype: DType, limit: int, context: int) -> int | None:
    for devices in (1 << power for power in range(11)):
        for sizes in meshes(config, "serve", devices):
            if serve_memory(config, dtype, sizes, 1, context).total <= limit:
                return devices
    return None


# --- rules of thumb ------------------------------------------------------------------------------

_RULES = {1.5: "4 GB", 7: "8-16 GB", 32: "24-48 GB", 70: "48 GB", 671: "400-480 GB in 4 bits"}


def rule_of_thumb(config: ModelConfig) -> str | None:
    """The memory that deployment guides commonly name for a model of about this size; None between the sizes."""
    billions = arithmetic.parameters(config).main / 1e9
    for size, memory in _RULES.items():
        if abs(billions / size - 1) < 0.2:
            return memory
    return None


def thumb_tensor_parallel(memory: int) -> int:
    """The same guides' tensor-parallel size: memory of all devices over 24 GB, at most 8.

    >>> [thumb_tensor_parallel(gigabytes * 10**9) for gigabytes in (16, 48, 640)]
    [1, 2, 8]
    """
    return max(1, min(8, memory // (24 * GB)))
