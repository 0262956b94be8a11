"""Compile a step of training or serving for a TPU pod or a GPU cluster that need not be there, with its cost."""

import dataclasses
from collections.abc import Callable, Mapping
from json import dumps
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from deepseek_jax.checkpoint.model_folder import named_config
from deepseek_jax.commands.compile_stage import StageName, StageStep, stage_step
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.plan import compiled
from deepseek_jax.plan.compiled import DTYPES, Compiled, Step, Task
from deepseek_jax.plan.topology import topology as device_topology
from deepseek_jax.report.progress import format_bytes
from deepseek_jax.sharding import Layout, Remat, Transport, lanes_of, make_mesh

_DOES_NOT_FIT = 3
_WIDTH = 120  # of a table that goes to a file


def main(
    *,
    preset: str,
    topology: str,
    step: Step | None = None,
    stage: StageName | None = None,
    batch: int | None = None,
    context: int | None = None,
    mesh: str | None = None,
    serve_mesh: str | None = None,
    dtype: str = "bf16",
    quantization: Quantization = "none",
    kv_cache_dtype: Literal["auto", "bf16", "f32", "fp8", "int8"] = "auto",
    moments: Literal["float32", "bfloat16"] = "float32",
    micro_batches: int = 1,
    transport: Transport = "ragged_all_to_all",
    capacity_factor: float = 1.1,
    remat: Remat = "all_but_attention",
    scan_layers: bool = True,
    json: bool = False,
) -> None:
    """Prove that a step compiles and fits, with the TPU's or the GPU's own compiler. Exit status 0: it fits, 3: not.

    Args:
        preset: name of a published configuration, such as r1-671b, a folder with config.json, or a name on the hub.
        topology: TPU and shape of the slice, such as v5p:4x4x4 or v7x:4x4x4, or a GPU (a100, h100, h200, b200) and
            hosts x GPUs of each, such as h200:2x8 or h100:8.
        step: prefill, decode, train (fine-tuning with the MTP loss, where there are modules), grpo (the update) or
            sync (trained weights laid out for sampling, as GRPO does it once a step). With a stage, one of its steps.
        stage: of R1's recipe, whose own batch, length and settings in the paper's preset are compiled: its update, or
            its decoding where it only samples. The mesh and the parts of an update are chosen here all the same.
        batch: sequences in all; by default the stage's, else eight a device to decode, else one for each part of the
            mesh that cuts them.
        context: tokens of a sequence, and slots of the cache to decode; by default the stage's most, else 4096.
        mesh: sizes of axes, such as expert=64,fsdp=8; by default one that suits the model and the step.
        serve_mesh: likewise expert and tensor of the mesh that a sync is for; by default as `train` chooses them.
        dtype: bf16 or f32, what is computed in; to serve, that of the weights too. An update's weights are float32.
        quantization: to serve from fp8, int8 or int4 weights, as `generate --quantization` does.
        kv_cache_dtype: of the cache, to serve; auto is dtype, and fp8 and int8 are codes with scales.
        moments: what the optimizer's are kept in.
        micro_batches: parts of an update, one after another.
        transport: of tokens to their experts.
        capacity_factor: room for an expert device in a round of it, as a multiple of the even share.
        remat: what an update's backward pass works out again.
        scan_layers: scan over stacks of layers; without, each layer is compiled by itself.
        json: print one JSON object, figures a device (half a v7x, else a chip) unless they say otherwise.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on an accelerator, even where there is one
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if step is None and stage is None:
        raise ValueError("step: got none, wanted one: --step STEP, or --stage STAGE of R1's recipe")
    of_stage = None if stage is None else stage_step(stage, step)
    step = step or of_stage.step
    of_model = _config(preset, step)
    of_chip, devices = device_topology(topology)
    sizes = compiled.default_mesh(of_model, step, len(devices)) if mesh is None else _parsed(mesh)
    options = {"transport": transport, "capacity_factor": capacity_factor, "scan_layers": scan_layers, "remat": remat}
    layout = _layout(step, make_mesh(devices, **sizes), options)
    serving = _serving(of_model, layout, step, serve_mesh)
    if batch is None:
        batch = _batch(of_stage, step, layout, micro_batches)
    if context is None:
        context = 4096 if of_stage is None else of_stage.context
    asked = {"batch": batch, "context": context, "dtype": dtype, "moments": moments, "micro_batches": micro_batches}
    asked["run"] = None if of_stage is None else of_stage.run
    asked["quantization"] = quantization
    asked["cache_dtype"] = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    task = Task(config=of_model, layout=layout, step=step, serving=serving, **asked)
    found = compiled.compile_step(task, of_chip)
    print(dumps(_as_json(found, sizes, task), indent=2)) if json else _show(found, task, topology, sizes)
    if not found.fits:
        raise SystemExit(_DOES_NOT_FIT)


def _layout(step: Step, mesh: jax.sharding.Mesh, options: Mapping[str, Any]) -> Layout:
    """Of a step; what serves has no backward pass to save memory in."""
    lanes = lanes_of(mesh.devices.flat[0].platform)
    if step in compiled.TRAINED:
        return Layout(mesh=mesh, workload="train", lanes=lanes, **options)
    return Layout(mesh=mesh, workload="serve", lanes=lanes, **{**options, "remat": "nothing"})


def _batch(of_stage: StageStep | None, step: Step, layout: Layout, micro_batches: int) -> int:
    """Where none is asked for; slots to decode come in whole shards, as the engine has them."""
    if step == "decode":
        shards = layout.parts("cache_batch")
        return 8 * layout.mesh.size if of_stage is None else -(-of_stage.batch // shards) * shards
    return layout.parts("batch") * micro_batches if of_stage is None else of_stage.batch


def _serving(config: ModelConfig, layout: Layout, step: Step, serve_mesh: str | None) -> Layout | None:
    """The layout that a sync moves weights to."""
    if step == "sync":
        return serving_layout(config, layout, **_of_serving(serve_mesh))
    if serve_mesh is not None:
        raise ValueError(f"serve_mesh: got {serve_mesh!r} to {step}, wanted it with --step sync alone; use --mesh")
    return None


def _config(name: str, step: Step) -> ModelConfig:
    found = named_config(name)
    # packed weights are unpacked to be computed with; sampling leaves the modules out, whose weights a run keeps
    modules = found.num_nextn_predict_layers if step in compiled.TRAINED else 0
    return dataclasses.replace(found, quantization=None, num_nextn_predict_layers=modules)


def _parsed(mesh: str) -> dict[str, int]:
    sizes = {}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if not size.isdecimal():
            raise ValueError(f"mesh: got {mesh!r}, wanted sizes of axes such as expert=64,fsdp=8")
        sizes[axis.strip()] = int(size)
    return sizes


def _of_serving(mesh: str | None) -> dict[str, int]:
    sizes = {} if mesh is None else _parsed(mesh)
    if unknown := sizes.keys() - {"expert", "tensor"}:
        raise ValueError(f"serve_mesh: got axis {min(unknown)!r}, wanted expert or tensor; what is left is data")
    return sizes


def _named(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _as_json(found: Compiled, sizes: dict[str, int], task: Task) -> dict[str, object]:
    asked = {"step": task.step, "batch": task.batch, "context": task.context, "dtype": task.dtype, "mesh": sizes}
    if task.quantization != "none":
        asked["quantization"] = task.quantization
    if task.step in ("train", "grpo"):
        asked |= {"moments": task.moments, "micro_batches": task.micro_batches}
    if task.serving is not None:
        asked["serve_mesh"] = dict(task.serving.mesh.shape)
    return dataclasses.asdict(found) | {"headroom": found.headroom} | asked


def _show(found: Compiled, task: Task, topology: str, sizes: dict[str, int]) -> None:
    console = Console(width=None if Console().is_terminal else _WIDTH)
    work = f"batch {task.batch}, context {task.context}"
    if task.serving is not None:
        work = f"to {_named(task.serving.mesh.shape)}"
    console.print(f"{task.step} on {topology}: {_named(sizes)}, {work}, {task.stored}")
    halves = found.devices // found.chips
    table = Table("a chip" if halves == 1 else f"a device, 1/{halves} of a chip", "", "beside theory")
    row = lambda name, value, beside="": table.add_row(name, value, beside)
    row("memory", format_bytes(found.hbm_bytes), "")
    row("  used", format_bytes(found.used_bytes), f"{found.headroom:.0%} left" if found.fits else "DOES NOT FIT")
    row("  planned", format_bytes(found.planned_bytes), f"{found.planned_bytes / found.used_bytes:.2f} of used")
    if found.flops is not None:
        _show_account(found, row)
    row("compiled in", f"{found.compile_seconds:.0f} s")
    console.print(table)


def _show_account(found: Compiled, row: Callable[..., None]) -> None:
    for name in ("weight", "optimizer", "cache", "serving", "temp"):
        if size := getattr(found, f"{name}_bytes"):
            row(f"  {name}", format_bytes(size))
    if found.analytic_flops:
        row("FLOPs", f"{found.flops:.4g}", f"{found.flops / found.analytic_flops:.3f} of {found.analytic_flops:.4g}")
    if found.masked_flops:
        row("  masked", f"{found.masked_flops:.4g}", "more, if they are not skipped")
    ratio = found.bytes_accessed / found.analytic_bytes
    row("bytes", format_bytes(found.bytes_accessed), f"{ratio:.2f} of {format_bytes(round(found.analytic_bytes))}")
    row("sent", format_bytes(found.collective_bytes), _beside_least(found))
    for of in found.collectives:
        row(f"  {of['op']}", format_bytes(of["bytes"]), f"{of['count']} over {of['axis']}")
    a_chip = (
        "" if found.tokens_per_second is None else f", {found.tokens_per_second / found.chips:,.0f} tokens/s a chip"
    )
    row("roofline", f"{found.seconds * 1e3:.3g} ms", f"{found.bound}{a_chip}")
    for name, seconds in found.bounds.items():
        row(f"  {name}", f"{seconds * 1e3:.3g} ms", "")
    if found.uncounted:
        row("not counted", str(len(found.uncounted)), ", ".join(sorted(set(found.uncounted))))


def _beside_least(found: Compiled) -> str:
    least = found.analytic_collective_bytes
    return f"{found.collective_bytes / least:.2f} of {format_bytes(round(least))}" if least else ""
