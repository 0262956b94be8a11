"""What the compiler of an accelerator says of a step: memory, arithmetic, traffic and collectives, beside theory.

Figures are a device's, which is what JAX calls one: half a v7x, a whole chip of all others.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.transfer import sampled_config, serving_sizes
from deepseek_jax.ops.packed import nbytes
from deepseek_jax.plan import model_bytes, model_flops, pod
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.communication import comm_lower_bound, reshard_lower_bound
from deepseek_jax.plan.cost_analysis import Collective, StepCost, cost_analysis
from deepseek_jax.plan.memory import (
    Memory,
    Moments,
    prefill_memory,
    serve_memory,
    state_of,
    train_memory,
    transfer_memory,
)
from deepseek_jax.plan.meshes import Sizes
from deepseek_jax.plan.model_bytes import StateDTypes
from deepseek_jax.plan.topology import GPU_OPTIONS
from deepseek_jax.plan.weights import DType
from deepseek_jax.sharding import Layout
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.sft_config import SFTConfig

Step = Literal["prefill", "decode", "train", "grpo", "sync"]
TRAINED: tuple[Step, ...] = ("train", "grpo", "sync")  # that begin where weights lie to be trained
DTYPES: Mapping[str, Any] = {"bf16": jnp.bfloat16, "f32": jnp.float32}
CACHE_DTYPES: Mapping[str, Any] = {**DTYPES, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
_USED = re.compile(r"Used ([0-9.]+)([KMGT]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A step to compile.

    Args:
        config: architecture.
        layout: with a mesh of the topology's chips.
        step: which; the function that experiments and servers call. "sync" lays trained weights out for sampling.
        serving: the layout to sample in, for a sync, on the devices of `layout`.
        batch: sequences in all; a sync has none.
        context: tokens of each; for decode, slots of the cache.
        dtype: what is computed in; to serve, also that of weights. What is trained is float32.
        quantization: of what is served, prefill and decode: see `model.packing`.
        cache_dtype: of the cache, to serve; fp8 and int8 are codes.
        moments: what the optimizer's are kept in.
        micro_batches: parts of an update, one after another.
        run: the settings of the run whose update this is, a stage's say, but for the three above; None takes the
            program's defaults.
    """

    config: ModelConfig
    layout: Layout
    step: Step
    batch: int
    context: int
    serving: Layout | None = None
    dtype: Literal["bf16", "f32"] = "bf16"
    quantization: Quantization = "none"
    cache_dtype: Literal["bf16", "f32", "fp8", "int8"] = "bf16"
    moments: Moments = "float32"
    micro_batches: int = 1
    run: SFTConfig | GRPOConfig | None = None

    @property
    def stored(self) -> DType:
        """What the planner calls the weights' dtype."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def settings(self) -> SFTConfig | GRPOConfig:
        """Of the run whose update this is: what they leave out has the program's own defaults."""
        dtype = DTYPES[self.dtype].__name__
        asked = {"micro_batches": self.micro_batches, "dtype": dtype, "moments": self.moments}
        if self.run is not None:
            return dataclasses.replace(self.run, **asked)
        if self.step == "train":
            return SFTConfig(batch_size=self.batch, **asked)
        return GRPOConfig(prompts_per_step=self.micro_batches, **asked)  # which then divide a rollout

    @property
    def state(self) -> StateDTypes:
        """The same for the planner."""
        return state_of(self.dtype, self.moments)

    def check(self) -> None:
        """Refuse what the mesh does not divide, before anything is compiled. Raises ValueError with the numbers."""
        if self.quantization != "none" and self.step not in ("prefill", "decode"):
            got = f"quantization: got {self.quantization!r} to {self.step}"
            raise ValueError(f"{got}, wanted --step prefill or decode; what is trained is not quantized")
        self.layout.check(self.config)
        if self.step == "sync":
            self.serving.check(sampled_config(self.config))
        elif self.step == "decode":
            parts = self.layout.parts("cache_batch")
            if self.batch % parts:
                raise ValueError(f"batch {self.batch} is not divisible by the {parts} parts that the mesh cuts it into")
        else:
            self.layout.check_batch(self.batch // self.micro_batches, self.context)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Figures of a compiled step, a device's where nothing else is said; None where the compiler gave up.

    Attributes:
        fits: whether arguments, results and temporaries fit the device's memory.
        chips: of the mesh, whole ones.
        devices: of the mesh, one or two a chip.
        hbm_bytes: memory of a device.
        used_bytes: of it, arguments and temporaries and results that take no argument's place.
        planned_bytes: what `plan.memory` says of the same mesh and batch.
        argument_bytes, temp_bytes: as the compiler reports them.
        weight_bytes, optimizer_bytes, cache_bytes: parts of the arguments.
        serving_bytes: of the weights that a sync gives.
        flops: of matrix products, loops counted as often as they turn.
        masked_flops: of dense forms of ragged products, whose empty tiles the compiler marks to be skipped; not in
            `flops`, and none in what this project compiles.
        analytic_flops: the algorithm's.
        bytes_accessed: read from and written to memory.
        analytic_bytes: weights touched, cache, gradients and moments, once each; what a sync reads and writes.
        collectives: op, mesh axis and bytes sent.
        collective_bytes, analytic_collective_bytes: their sum, and the least of `plan.communication`.
        uncounted: op names of loops that are counted once, since only the data know their length, and of kernels
            whose arithmetic nothing tells.
        compile_seconds: lowering included.
        bounds: seconds of the step if "compute", "memory" or "links" were all there is, at the peaks.
        seconds: the longest of them, a lower bound of the step's time.
        bound: which that is.
        tokens_per_second: of all chips, in that time; None of a sync, which has no tokens.
    """

    fits: bool
    chips: int
    devices: int
    hbm_bytes: int
    used_bytes: int
    planned_bytes: int
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    weight_bytes: int | None = None
    optimizer_bytes: int | None = None
    cache_bytes: int | None = None
    serving_bytes: int | None = None
    flops: int | None = None
    masked_flops: int | None = None
    analytic_flops: float
    bytes_accessed: int | None = None
    analytic_bytes: float
    collectives: tuple[Mapping[str, Any], ...] | None = None
    collective_bytes: int | None = None
    analytic_collective_bytes: float
    uncounted: tuple[str, ...] = ()
    compile_seconds: float
    bounds: Mapping[str, float] | None = None
    seconds: float | None = None
    bound: str | None = None
    tokens_per_second: float | None = None

    @property
    def headroom(self) -> float:
        """Share of the memory that is left."""
        return 1 - self.used_bytes / self.hbm_bytes


def compile_step(task: Task, of_chip: Chip) -> Compiled:
    """Lower and compile a step from shapes alone.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    task.check()
    devices = task.layout.mesh.size
    start = time.perf_counter()
    program = trace(task)
    common = dict(
        chips=devices // of_chip.devices,
        devices=devices,
        hbm_bytes=of_chip.hbm_bytes // of_chip.devices,
        planned_bytes=planned_memory(task).total,
        analytic_flops=analytic_flops(task) / devices,
        analytic_bytes=analytic_bytes(task) / devices,
        analytic_collective_bytes=_least(task),
    )
    try:
        compiled = program.lower().compile(GPU_OPTIONS if of_chip.kind == "gpu" else None)
    except jax.errors.JaxRuntimeError as problem:
        used = _USED.search(str(problem))
        if "RESOURCE_EXHAUSTED" not in str(problem) or used is None:
            raise
        spent = time.perf_counter() - start
        used_bytes = int(float(used[1]) * _UNITS[used[2]])
        return Compiled(fits=False, used_bytes=used_bytes, compile_seconds=spent, **common)
    spent = time.perf_counter() - start
    memory = compiled.memory_analysis()
    used_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used_bytes += memory.output_size_in_bytes - memory.alias_size_in_bytes
    # of decoding one token a sequence is the step, without what the loop prepares once for all of them
    loop = "jit(_decode_loop)/while" if task.step == "decode" else None
    sums = cost_analysis(compiled.as_text(), task.layout.mesh.shape, loop=loop)
    times = _times(sums, of_chip, task)
    bound = max(times, key=times.get)
    return Compiled(
        fits=used_bytes <= common["hbm_bytes"],
        used_bytes=used_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        weight_bytes=_on_a_chip(program.weights),
        optimizer_bytes=_on_a_chip(program.moments),
        cache_bytes=_on_a_chip(program.cache),
        serving_bytes=_on_a_chip(program.serving),
        flops=sums.flops,
        masked_flops=sums.masked_flops,
        bytes_accessed=sums.bytes_accessed,
        collectives=tuple(dataclasses.asdict(of) for of in sums.collectives),
        collective_bytes=sum(of.bytes for of in sums.collectives),
        uncounted=sums.unknown_loops + sums.unknown_kernels,
        compile_seconds=spent,
        bounds=times,
        seconds=times[bound],
        bound=bound,
        tokens_per_second=_tokens(task) / times[bound] if _tokens(task) else None,
        **common,
    )


def default_mesh(config: ModelConfig, step: Step, chips: int) -> dict[str, int]:
    """Sizes of the axes of a mesh of so many chips that suits a model and a step."""
    moe = config.moe
    if step in TRAINED:
        # dense weights are gathered over fsdp alone, and want to be cut by more than a few
        if moe is None:  # halves the vocabulary's tables, which every chip gathers
            tensor = math.gcd(2, chips, config.attention.num_key_value_heads)
            return {"fsdp": chips // tensor, "tensor": tensor}
        expert = math.gcd(2 ** (2 * int(math.log2(chips)) // 3), moe.n_routed_experts)
        return {"expert": expert, "fsdp": chips // expert}
    # prefill would send more for dense weights that are cut than it saves
    return serving_sizes(config, chips, tensor=1 if step == "prefill" and moe is not None else None)


def trace(task: Task) -> pod.Program:
    """The function that experiments or the engine call, traced for a task's mesh."""
    arguments = task.config, task.layout, task.batch, task.context
    if task.step in ("prefill", "decode"):
        of_step = {"prefill": pod.trace_prefill, "decode": pod.trace_decode}[task.step]
        return of_step(*arguments, DTYPES[task.dtype], CACHE_DTYPES[task.cache_dtype], task.quantization)
    if task.step == "sync":
        return pod.trace_sync(task.config, task.layout, task.serving, DTYPES[task.dtype])
    return {"train": pod.trace_train, "grpo": pod.trace_grpo}[task.step](*arguments, task.settings)


def analytic_flops(task: Task) -> int:
    """What the algorithm needs, over all chips; an update is three forward passes."""
    config, batch, context = task.config, task.batch, task.context
    if task.step == "sync":
        return 0
    if task.step == "prefill":
        return model_flops.prefill_flops(config, batch, context).total
    if task.step == "decode":
        return model_flops.decode_flops(config, batch, context).total
    return model_flops.train_flops(config, batch, context, mtp=task.step == "train").total


def analytic_bytes(task: Task) -> float:
    """What has to move between memory and chips, over all chips, activations left out."""
    config = task.config
    if task.step == "sync":
        memory = planned_memory(task)
        return task.layout.mesh.size * (memory.weights + memory.serving)
    if task.step == "prefill":
        return model_bytes.prefill_bytes(
            config, task.batch, task.context, task.stored, cache_dtype=task.cache_dtype
        ).total
    if task.step == "decode":
        return model_bytes.decode_bytes(
            config, task.batch, task.context, task.stored, cache_dtype=task.cache_dtype
        ).total
    return model_bytes.train_bytes(config, task.state).total


def _least(task: Task) -> float:
    if task.step == "sync":
        return reshard_lower_bound(sampled_config(task.config), task.layout, task.serving, DTYPES[task.dtype])
    return comm_lower_bound(task.config, Sizes(**task.layout.mesh.shape), task.step, task.batch, task.context)


def _tokens(task: Task) -> int:
    if task.step == "sync":
        return 0
    return task.batch * (1 if task.step == "decode" else task.context)


def planned_memory(task: Task) -> Memory:
    """What the planner says that a device holds of the step, on the task's own mesh."""
    sizes = Sizes(**task.layout.mesh.shape)
    kind = "tpu" if task.layout.mesh.devices.flat[0].platform == "tpu" else "gpu"
    if task.step == "sync":
        return transfer_memory(task.config, task.state, sizes, Sizes(**task.serving.mesh.shape), kind=kind)
    if task.step in TRAINED:
        form = {"kind": kind, "modules": task.step == "train", "micro_batches": task.micro_batches}
        return train_memory(task.config, task.state, sizes, task.batch, task.context, **form)
    given = task.config, task.stored, sizes, task.batch, task.context
    if task.step == "decode":
        return serve_memory(*given, multiple=task.layout.lanes, cache_dtype=task.cache_dtype)
    return prefill_memory(*given, cache_dtype=task.cache_dtype)


def _times(sums: StepCost, of_chip: Chip, task: Task) -> dict[str, float]:
    """Seconds of a step if arithmetic, memory or links were all there is, at the peaks."""
    peak = of_chip.bf16_flops if task.dtype == "bf16" else of_chip.bf16_flops / 4
    return {
        "compute": sums.flops / (peak / of_chip.devices),
        "memory": sums.bytes_accessed / (of_chip.bandwidth / of_chip.devices),
        "links": sum(_link_seconds(of, of_chip, task.layout.mesh) for of in sums.collectives),
    }


def _link_seconds(of: Collective, of_chip: Chip, mesh: jax.sharding.Mesh) -> float:
    """At the peaks, what leaves a host of GPUs over the network; a TPU's slice is one island."""
    along = [mesh.axis_names.index(axis) for axis in of.axis.split("+")]
    group = np.moveaxis(mesh.devices, along, range(len(along)))
    group = group.reshape(
        -1, math.prod(mesh.devices.shape[axis] for axis in set(range(mesh.devices.ndim)) - set(along))
    )
    hosts = [device.process_index if of_chip.kind == "gpu" else 0 for device in group[:, 0]]
    exchange = of.op in ("all-to-all", "ragged-all-to-all", "collective-permute")
    return of.bytes * of_chip.seconds_a_byte(len(hosts), hosts.count(hosts[0]), exchange=exchange)


def _on_a_chip(tree: Any) -> int:
    """Bytes of a chip's parts, tiles not padded."""
    size = lambda leaf: nbytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
    return sum(map(size, jax.tree.leaves(tree)))
