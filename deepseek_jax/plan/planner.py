"""Which chips, mesh and batch a model wants, what memory they take, and what bounds their speed.

All of it is arithmetic: `plan.memory` for what a device holds, `plan.roofline` for how fast it may be.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.transfer import serving_sizes
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.memory import (
    PREFILL_TOKENS,
    Memory,
    Moments,
    fullest,
    grpo_memory,
    serve_memory,
    state_of,
    train_memory,
)
from deepseek_jax.plan.meshes import Sizes, Workload, meshes
from deepseek_jax.plan.model_bytes import StateDTypes, number_bytes
from deepseek_jax.plan.roofline import ASSUMED, Seconds, decode_seconds, prefill_seconds, update_seconds
from deepseek_jax.plan.weights import DType, weight_bytes
from deepseek_jax.sharding import cut_numbers, lanes_of

USABLE = 0.9  # of a device's memory; the rest is headroom
TIGHT = 0.75  # weights that take more than this share of all memory leave little for anything else
LARGEST_BATCH = 4096
_PER_DEVICE = (1, 2, 4, 8)  # sequences a batch shard that training tries


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
    kv_cache_dtype: DType
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
    kv_cache_dtype: DType = "bf16",
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
        dtype: of the weights to serve, of what is computed in to train. None takes bf16, to which
            `load_model` unpacks an FP8 checkpoint unless it is told to keep it. Products run in bf16 with all of them.
        kv_cache_dtype: of the cache, to serve; fp8 and int8 are codes with scales. Samples to train on take bf16.
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
    dtype = dtype or "bf16"
    weight_bytes(config, dtype)  # refuses an unknown one
    if workload != "serve" and dtype not in ("bf16", "f32"):
        raise ValueError(f"dtype: got {dtype!r} to train, wanted bf16; quantized weights are only served")
    number_bytes(kv_cache_dtype)  # refuses an unknown one
    if workload != "serve" and kv_cache_dtype != "bf16":
        raise ValueError(f"kv_cache_dtype: got {kv_cache_dtype!r} to {workload}, wanted bf16: it is to serve alone")
    if moments not in get_args(Moments):
        raise ValueError(f"moments: got {moments!r}, wanted one of {', '.join(get_args(Moments))}")
    if chips is not None:
        chip.check(chips)
    task = _Task(name, config, chip, workload, context, batch, dtype, kv_cache_dtype, moments)
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


def weights_share(config: ModelConfig, chip: Chip, chips: int, dtype: DType) -> float:
    """The share of all chips' memory that the weights alone take, evenly spread."""
    return weight_bytes(config, dtype) / (chips * chip.hbm_bytes)


def memory_at(plan: Plan, config: ModelConfig, chip: Chip, batch: int, context: int) -> Memory:
    """What a plan's mesh holds a device with another batch and context; of GRPO's phases the fullest."""
    sizes, multiple = Sizes(**plan.mesh), lanes_of(chip.kind)
    if plan.workload == "serve":
        form = {"multiple": multiple, "cache_dtype": plan.kv_cache_dtype}
        return serve_memory(config, plan.dtype, sizes, batch, context, **form)
    if plan.workload == "train":
        return train_memory(config, state_of(plan.dtype, plan.moments), sizes, batch, context, kind=chip.kind)
    rollout = Sizes(**plan.rollout_mesh)
    state = state_of(plan.dtype, plan.moments)
    return fullest(grpo_memory(config, state, sizes, rollout, batch, context, multiple=multiple, kind=chip.kind))


# --- the search ----------------------------------------------------------------------------------


class _Task(NamedTuple):
    name: str
    config: ModelConfig
    chip: Chip
    workload: Workload
    context: int
    batch: int | None
    dtype: DType
    kv_cache_dtype: DType
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
        return lanes_of(self.chip.kind)

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
        kv_cache_dtype=task.kv_cache_dtype,
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
            task.config,
            task.dtype,
            sizes,
            batch,
            task.context,
            multiple=task.multiple,
            cache_dtype=task.kv_cache_dtype,
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
    rollout = Sizes(**serving_sizes(task.config, devices))
    for option in _train_options(task, devices):
        sizes, context = (option.sizes, rollout), task.context
        form = {"multiple": task.multiple, "kind": task.chip.kind}
        phases = grpo_memory(task.config, task.state, *sizes, option.batch, context, **form)
        yield option._replace(rollout=rollout, memory=fullest(phases), phases=phases)


def _speed(task: _Task, option: _Option) -> tuple[Seconds, float]:
    """Of a step, and tokens/s of all chips."""
    config, chip, batch, context = task.config, task.chip, option.batch, task.context
    if task.workload == "serve":
        given = config, task.dtype, chip, option.sizes, batch, context
        step = decode_seconds(*given, cache_dtype=task.kv_cache_dtype)
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
    numbers = [
        f"{name} {number}" for name, number, _ in cut_numbers(task.config) if name.endswith(("heads", "experts"))
    ]
    return (
        f"mesh: no mesh of {wanted} divides {asked} and the numbers of {task.name} ({', '.join(numbers)}); "
        "choose another number of chips, or a batch that is a multiple of it"
    )
