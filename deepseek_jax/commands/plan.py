"""Plan before renting: which chips, mesh and batch a model wants, what fits a given memory, and how fast it may be."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from deepseek_jax.checkpoint.model_folder import named_config
from deepseek_jax.config import PRESETS, ModelConfig
from deepseek_jax.plan.advice import Advice, advise, advise_all, rule_of_thumb, thumb_tensor_parallel
from deepseek_jax.plan.chart import check_path, title, write_chart
from deepseek_jax.plan.chips import CHIPS, Chip
from deepseek_jax.plan.chips import chip as chip_of
from deepseek_jax.plan.commands import commands
from deepseek_jax.plan.memory import Moments, state_of
from deepseek_jax.plan.meshes import Workload
from deepseek_jax.plan.planner import USABLE, Plan, plan, weights_share
from deepseek_jax.plan.roofline import ASSUMED
from deepseek_jax.plan.weights import DType
from deepseek_jax.report.progress import format_bytes

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
_WIDTH = 165  # of tables that go to a file
_DTYPES: tuple[DType, ...] = ("bf16", "fp8", "int8", "int4")
_PUBLISHED = tuple(name for name in PRESETS if name != "tiny")
_DOES_NOT_FIT = 3


def main(
    model: str | None = None,
    /,
    *,
    chip: str | None = None,
    chips: int | None = None,
    memory: str | None = None,
    workload: Workload = "serve",
    context: int | None = None,
    batch: int | None = None,
    dtype: DType | None = None,
    kv_cache_dtype: Literal["bf16", "fp8", "int8"] = "bf16",
    moments: Moments = "float32",
    json: bool = False,
    chart: Path | None = None,
) -> None:
    """Plan MODEL on a chip; without --chip on all, without MODEL all models. Exit status 3 if it does not fit.

    Args:
        model: name of a published configuration, such as r1-671b, a folder with config.json, or a name on the hub.
        chip: v4, v5e, v5p, v6e, v7x, a100, h100, h200, b200, gb200, mi300x, l4, l40s, a10g, rtx4090 or rtx5090.
        chips: how many; by default the smallest slice that fits.
        memory: of one device, such as 24GB, in place of a chip: says what it holds.
        workload: serve, train or grpo.
        context: tokens of a sequence; by default 4096, or the model's if that is less.
        batch: sequences at once; by default as many as fit.
        dtype: of the weights to serve, to train what is computed in; by default bf16, to which FP8 files are unpacked.
        kv_cache_dtype: of the cache to serve with; fp8 and int8 are codes with scales.
        moments: what the optimizer's are kept in; what is trained is float32.
        json: print one JSON object: a plan's figures, or a list of them under "plans", or "advice" on a memory.
        chart: PNG or HTML file for a plan's memory against the context.
    """
    if model is None and chip is None and memory is None:
        raise ValueError("wanted a model, --chip or --memory; for example r1-671b --chip v5e, or --memory 24GB")
    if memory is not None:
        if (
            chip is not None
            or chips is not None
            or chart is not None
            or workload != "serve"
            or batch is not None
            or kv_cache_dtype != "bf16"
        ):
            raise ValueError("--memory goes with a model, --context, --dtype and --json, and with nothing else")
        return _advise(model, read_memory(memory), context, dtype, json)
    if chips is not None and chip is None:
        raise ValueError("--chips wants --chip")
    one = model is not None and chip is not None
    if chart is not None:
        check_path(chart)
        if not one:
            raise ValueError("--chart wants one model and one --chip")
    asked = {"workload": workload, "chips": chips, "batch": batch, "dtype": dtype, "moments": moments}
    asked["kv_cache_dtype"] = kv_cache_dtype
    names = _PUBLISHED if model is None else (model,)
    which = CHIPS if chip is None else (chip_of(chip),)
    found = [each for name in names for each in _plans(name, which, context, asked)]
    if one:
        _print_one(*found[0], json, chart)
    elif json:
        print(dumps({"plans": [_as_json(*each) for each in found]}, indent=2))
    else:
        configs = [config for _, config, _ in found]
        _console().print(_many(found), *_precision(configs, found[0][2]), *_notes(), sep="\n")


_Found = tuple[str, ModelConfig, Plan]  # name as given, architecture, plan


def _plans(name: str, which: Sequence[Chip], context: int | None, asked: Mapping[str, Any]) -> Iterator[_Found]:
    config = named_config(name)
    length = min(4096, config.max_position_embeddings) if context is None else context
    for each in which:
        yield name, config, plan(_label(name), config, each, context=length, **asked)


def read_memory(text: str) -> int:
    """Bytes of "24GB" (10^9 a GB) or "22.5 GiB" (2^30).

    >>> read_memory("24GB"), read_memory("1.5 GiB")
    (24000000000, 1610612736)
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", text.strip())
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise ValueError(f"memory: got {text!r}, wanted a number and a unit, such as 24GB or 22.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _label(name: str) -> str:
    return name if name in PRESETS else Path(name).resolve().name


# --- one plan ------------------------------------------------------------------------------------


def _as_json(name: str, config: ModelConfig, found: Plan) -> dict:
    kept = found.dtype if found.workload == "serve" else state_of(found.dtype, found.moments).weights
    share = weights_share(config, chip_of(found.chip), found.chips, kept)
    whole = found.chips * chip_of(found.chip).hbm_bytes
    thumb = {"memory": rule_of_thumb(config), "tensor_parallel": thumb_tensor_parallel(whole)}
    known = dataclasses.asdict(commands(found, name))
    return found.as_json() | {"weights_share": share, "rule_of_thumb": thumb, "commands": known}


def _print_one(name: str, config: ModelConfig, found: Plan, json: bool, chart: Path | None) -> None:
    """Figures, as a table or as JSON, and the chart; ends with a status of its own where the model does not fit."""
    if chart is not None:
        write_chart(chart, found, config, chip_of(found.chip))
    facts = _as_json(name, config, found)
    if json:
        print(dumps(facts, indent=2))
    else:
        _console().print(_memory(found) if found.phases is None else _phases(found))
        lines = _lines(config, found, facts)
        _console().print(*lines, sep="\n", highlight=False, soft_wrap=True)  # commands are to be copied
    if not found.fits:
        raise SystemExit(_DOES_NOT_FIT)


def _lines(config: ModelConfig, found: Plan, facts: dict) -> list[str]:
    return [
        f"fits          {_verdict(found)}; the weights alone are {100 * facts['weights_share']:.1f} % of all memory",
        f"chips         {found.chips} x {found.chip} ({found.slice})",
        f"mesh          {_mesh(found.mesh)}",
        *([f"to sample     {_mesh(found.rollout_mesh)}"] if found.rollout_mesh is not None else []),
        f"batch         {found.batch} sequences of {found.context} tokens",
        *(_speeds(found) if found.fits else []),
        *_commands(facts["commands"]),
        *_precision([config], found),
        *_notes(),
        _thumb(facts["rule_of_thumb"]),
    ]


def _precision(configs: Sequence[ModelConfig], found: Plan) -> list[str]:
    """What is planned for where a published checkpoint has fewer bits."""
    if found.workload != "serve" or found.dtype not in ("bf16", "f32"):
        return []
    if not any(config.quantization for config in configs):
        return []
    return [f"FP8 checkpoints are unpacked to {found.dtype}; --dtype fp8 plans to serve them as they are stored."]


def _memory(found: Plan) -> Table:
    table = Table("memory a device", "bytes", "of its memory", title=title(found), title_justify="left")
    for kind, size in found.as_json()["memory"].items():
        if size:
            table.add_row(kind, format_bytes(size), f"{100 * size / found.hbm:.1f} %", end_section=kind == "workspace")
    table.add_row("usable", format_bytes(found.limit), f"{100 * USABLE:.0f} %")
    return table


def _phases(found: Plan) -> Table:
    """A column for each phase of a GRPO step."""
    phases = found.as_json()["phases"]
    table = Table("memory a device", *phases, title=title(found), title_justify="left")
    for kind in next(iter(phases.values())):
        sizes = [memory[kind] for memory in phases.values()]
        if any(sizes):
            cells = (format_bytes(size) if size else "" for size in sizes)
            table.add_row(kind, *cells, end_section=kind == "workspace")
    table.add_row("of its memory", *(f"{100 * memory['total'] / found.hbm:.1f} %" for memory in phases.values()))
    return table


def _commands(known: dict) -> list[str]:
    lines = [f"run by        {known['run'] or 'no command yet: an estimate'}"]
    lines += [f"missing       {what}" for what in known["missing"]]
    compiled = [known["compile"], *known["compile_also"]] if known["compile"] else []
    return lines + [f"compiled by   {line}" for line in compiled]


def _verdict(found: Plan) -> str:
    return "no" if not found.fits else "yes, tight" if found.tight else "yes"


def _mesh(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _speeds(found: Plan) -> list[str]:
    a_chip = found.tokens_per_second / found.chips
    lines = [f"speed         {found.tokens_per_second:,.0f} tokens/s, {a_chip:,.0f} a chip, bound by {found.bound}"]
    if found.prefill_tokens_per_second is not None:
        lines.append(f"prefill       {found.prefill_tokens_per_second:,.0f} tokens/s")
    milliseconds = [f"{1000 * seconds:.1f} ms {name}" for name, seconds in found.seconds._asdict().items()]
    return [*lines, f"a step        {', '.join(milliseconds)}"]


def _notes() -> list[str]:
    shares = ", ".join(f"{100 * share:.0f} % of the peak {name}" for name, share in ASSUMED.items())
    return [f"Speeds are rooflines at {shares}; {100 * USABLE:.0f} % of a device's memory is used."]


def _thumb(rule: dict) -> str:
    memory = rule["memory"] or "nothing for this size"
    return f"Rule of thumb: {memory}; tensor parallel min(8, VRAM / 24 GB) = {rule['tensor_parallel']}."


# --- many plans, and a given memory --------------------------------------------------------------


def _many(found: list[_Found]) -> Table:
    columns = (
        "model",
        "dtype",
        "chips",
        "fits",
        "mesh",
        "batch",
        "memory a device",
        "tokens/s",
        "bound",
        "thumb",
        "run by",
    )
    first = found[0][2]
    table = Table(*columns, title=f"{first.workload}, {first.context} tokens", title_justify="left")
    for name, config, each in found:
        memory = f"{format_bytes(each.memory.total)} of {format_bytes(each.hbm)}"
        speed = f"{each.tokens_per_second:,.0f}" if each.fits else "-"
        chips = f"{each.chips} x {each.chip}"
        cells = (each.model, each.dtype, chips, _verdict(each), _mesh(each.mesh), str(each.batch))
        run = commands(each, name).run
        by = "nothing yet" if run is None else run.split()[1]
        table.add_row(*cells, memory, speed, each.bound, rule_of_thumb(config) or "-", by)
    return table


def _advise(model: str | None, memory: int, context: int | None, dtype: DType | None, json: bool) -> None:
    length = 4096 if context is None else context
    if length < 1:
        raise ValueError(f"context: got {length}, wanted at least 1")
    if model is None:
        if dtype is not None:
            raise ValueError("--dtype with --memory wants a model")
        found = advise_all(memory, context=length)
    else:
        config = named_config(model)
        dtypes = _DTYPES if dtype is None else (dtype,)
        found = [advise(_label(model), config, each, memory, context=length) for each in dtypes]
    if json:
        print(dumps({"memory": memory, "context": length, "advice": list(map(dataclasses.asdict, found))}, indent=2))
        return
    if not found:
        print(f"No published model fits in {format_bytes(memory)} with {length} tokens of context.")
        return
    packed = "Weights in fp8, int8 and int4 are served with --quantization; products are computed in bf16 all the same."
    lines = [
        f"{100 * USABLE:.0f} % of the memory is used; the cache is bfloat16.",
        packed,
        _recommendation(model, found),
    ]
    thumbs = {advice.model: rule_of_thumb(named_config(model or advice.model)) for advice in found}
    _console().print(_advice(found, thumbs, memory, length), *lines, sep="\n", highlight=False)


def _advice(found: list[Advice], thumbs: dict[str, str | None], memory: int, length: int) -> Table:
    columns = ("model", "dtype", "weights", f"with {length} tokens", "fits", "longest context", "devices", "thumb")
    table = Table(*columns, title=f"{format_bytes(memory)} on one device", title_justify="left")
    for each in found:
        sizes = (format_bytes(each.weights), format_bytes(each.needed))
        devices = "-" if each.devices is None else str(each.devices)
        verdict = "yes" if each.fits else "no"
        table.add_row(each.model, each.dtype, *sizes, verdict, f"{each.context:,}", devices, thumbs[each.model] or "-")
    return table


def _recommendation(model: str | None, found: list[Advice]) -> str:
    best = next((advice for advice in found if advice.fits), None)
    if best is not None:
        return f"Recommended: {best.model} in {best.dtype}, up to {best.context:,} tokens."
    many = [advice for advice in found if advice.devices is not None]
    if not many:
        return f"{model} does not fit, nor on up to 1024 such devices."
    fewest = min(many, key=lambda advice: advice.devices)
    return f"{model} does not fit; {fewest.devices} such devices hold it in {fewest.dtype}."


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
