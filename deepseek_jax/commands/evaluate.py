"""Score a model on benchmarks: every sample kept, with error bars; a model here or one on a server."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, write_whole
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.lock import locked
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.evaluate_settings import COMMON, Config
from deepseek_jax.commands.generate import engine_layout
from deepseek_jax.commands.options import command
from deepseek_jax.data.sources import open_source
from deepseek_jax.distributed import say
from deepseek_jax.evals.budgets import curve, cut_by, draw_curves
from deepseek_jax.evals.drawing import Drawer, EngineDrawer
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.outer import language_here
from deepseek_jax.evals.run import Benchmark, check, draw, run
from deepseek_jax.evals.samples import Samples
from deepseek_jax.evals.server import ServerDrawer
from deepseek_jax.evals.summary import records, summary
from deepseek_jax.evals.task import Answered, Task
from deepseek_jax.evals.tasks.patches import PATCHES, prediction
from deepseek_jax.evals.tasks.port import PORT, for_language
from deepseek_jax.generation.generator import BATCHES, Generator
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.report.progress import Progress
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import write_json

SETTINGS, SUMMARY, CURVES, PREDICTIONS = "config.json", "summary.json", "thinking.png", "predictions.jsonl"


@command(Config, common=COMMON, deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    """Score MODEL, or the one of --server, on --benchmark; the same command goes on where it was stopped."""
    _check(config)
    asked = config.asked
    benchmarks, settings = [], {}
    for task in asked.tasks:
        if task is PORT and config.grading.language is not None:
            task = for_language(config.grading.language)
        benchmark, told = _benchmark(config, task)
        benchmarks.append(benchmark)
        settings[task.name] = told
    for benchmark in benchmarks:
        benchmark.task.ready(Graders(config.grading))
    drawer, of_model = _drawer(config)
    for benchmark in benchmarks:
        check(benchmark, drawer)
    with locked(config.output, advice="wait for it or stop it, or choose another --output"):
        held = Samples(config.output)
        _enter(config, of_model, settings, held)
        with Graders(config.grading) as graders:
            found = {of.task.name: _evaluated(config, of, drawer, graders, held) for of in benchmarks}
        held.put_in_order([task.name for task in asked.tasks])
        for benchmark in benchmarks:
            if benchmark.task is PATCHES:
                _write_predictions(config, benchmark, held, of_model["model"])
        before = read_json(config.output / SUMMARY) if (config.output / SUMMARY).exists() else {}
        known = {**before, **found}
        if curves := {name: values["thinking"] for name, values in known.items() if "thinking" in values}:
            draw_curves(curves, config.output / CURVES)
        write_json(config.output / SUMMARY, known)
    for name, values in found.items():
        print(distributed.printable(_line(name, values)))
    print(distributed.printable(f"summary: {config.output / SUMMARY}   samples: {held.path}"))


def _check(config: Config) -> None:
    """Refuse what contradicts itself."""
    if not config.asked.benchmark:
        raise ValueError("benchmark: got none, wanted a name such as --benchmark gsm8k; --help lists them")
    if config.model is None and config.serving.server is None:
        raise ValueError("model: got none, wanted MODEL, or the address of a server by --server URL")
    if config.serving.server is not None and config.asked.budgets:
        raise ValueError("thinking_budgets: got some with --server, wanted a MODEL here: a server closes no thought")
    if config.serving.server is None:
        load_config(model_folder(config.model, weights=False))  # a mistyped one is told before any data is fetched
    if distributed.process_count() > 1:
        raise ValueError("evaluate: got several processes, wanted one; it uses all devices by --serve-tensor")


def _benchmark(config: Config, task: Task) -> tuple[Benchmark, dict[str, Any]]:
    """What is asked of a benchmark, and what a folder keeps of it."""
    asked = config.asked
    name = asked.source(task)
    try:
        source = open_source(name)
    except ValueError as problem:
        if name != task.hub:
            raise
        raise ValueError(
            f"{task.name}: its data is not here ({problem}); it is at {task.hub} on the Hugging Face hub: give a file "
            "of it by --data FILE"
        ) from None
    problems = task.problems(source, asked.limit)
    graded = {"seconds": config.grading.seconds, "checker": list(config.grading.checker)}
    if task.name == PORT.name:
        graded["language"] = language_here(config.grading.language)  # it is asked for, too
    told = {"digest": source.digest, **{name: of for name, of in graded.items() if of}}
    return Benchmark(task, problems, asked.prompt_style, asked.samples, config.drawing.seed), told


def _drawer(config: Config) -> tuple[Drawer, dict[str, Any]]:
    """Where samples come from, and what a folder keeps of it."""
    batch, system, drawing = config.engine.batch, config.asked.system, config.drawing
    if config.serving.server is not None:
        given = {"temperature": drawing.temperature, "top_p": drawing.top_p, "max_tokens": drawing.max_tokens}
        name = None if config.model is None else str(config.model)
        drawer = ServerDrawer(
            config.serving.server, name, given, batch=batch, system=system, key_variable=config.serving.server_key
        )
        return drawer, {"server": config.serving.server, "model": drawer.model}
    folder = model_folder(config.model)
    tokenizer, architecture = Tokenizer.from_folder(folder), load_config(folder)
    if not tokenizer.eos_ids:
        say(f"{config.model}: names no end-of-sequence token; sampling ends at --max-tokens alone", kind="warning")
    layout, dtype = engine_layout(architecture, config.engine), dtype_of(config.engine.dtype)
    settings = dataclasses.replace(BATCHES, max_num_seqs=config.engine.batch, **config.engine.of_engine)
    settings.of_scheduler(architecture, layout, dtype)  # refuses what the model cannot do
    loaded = load_model(folder, dtype=dtype, layout=layout, quantization=config.engine.quantization)
    drawer = EngineDrawer(
        Generator(loaded.config, loaded.graphdef, settings=settings),
        loaded.weights,
        tokenizer,
        config.sampling(tokenizer.eos_ids),
        batch=batch,
        system=system,
        chat=config.asked.chat,
    )
    told = {"dtype": dtype.name, "quantization": config.engine.quantization, "chat": config.asked.chat}
    told |= {"kv_cache_dtype": config.engine.kv_cache_dtype}
    return drawer, {"model": fingerprint(folder), **told}


def _enter(config: Config, of_model: Mapping[str, Any], benchmarks: Mapping[str, Any], held: Samples) -> None:
    """Refuse a folder that holds samples of other settings; write what it holds now."""
    path = config.output / SETTINGS
    if len(held) and not path.exists():
        raise ValueError(
            f"{path}: is missing, so that nobody knows of what settings {held.path} is; choose another --output"
        )
    style = {"prompt_style": config.asked.prompt_style, "system": config.asked.system}
    now = {**of_model, **dataclasses.asdict(config.drawing), **style}
    before = read_json(path) if path.exists() and len(held) else {"benchmarks": {}}  # no samples have no settings
    if not isinstance(before.get("benchmarks"), dict):
        raise ValueError(f"{path}: got no benchmarks, wanted what `evaluate` wrote; choose another --output")
    names = before.keys() - {"benchmarks"}
    for name in sorted(names):
        if before[name] != now.get(name):
            raise ValueError(
                f"{path}: the samples there have {name} {before[name]!r}, not {now.get(name)!r}; give the same "
                "settings to go on with them, or another --output"
            )
    for name, told in benchmarks.items():
        then = before["benchmarks"].get(name, told)
        if held.of(name) and then != told:
            known = isinstance(then, dict) and then.get("digest") == told["digest"]
            what = "settings of grading" if known else "data"
            raise ValueError(
                f"{path}: the samples of {name} there are of other {what}; give the same, or another --output"
            )
    write_json(path, {**now, "benchmarks": {**before["benchmarks"], **benchmarks}})


def _evaluated(config: Config, benchmark: Benchmark, drawer: Drawer, graders: Graders, held: Samples) -> dict[str, Any]:
    """The figures of one benchmark, its samples drawn."""
    name = benchmark.task.name
    with _progress(benchmark, held, name) as progress:
        run(benchmark, drawer, graders, held, progress)
    settings = dataclasses.asdict(config.drawing)
    values = summary(benchmark, held, graders, settings)
    if not config.asked.budgets:
        return values
    found = {"none": values}
    for budget in config.asked.budgets:
        missing = cut_by(benchmark, held, budget)
        if missing:
            with Progress(len(missing), f"{name}, {budget} tokens") as progress:
                draw(benchmark, missing, drawer, graders, held, progress)
        found[str(budget)] = summary(benchmark, held, graders, settings, budget)
    if not values["mean_thinking_tokens"]:
        say(f"{name}: no sample thinks, so that no budget changes any", kind="warning")
    return values | {"thinking": curve(found)}


def _write_predictions(config: Config, benchmark: Benchmark, held: Samples, model: str) -> None:
    """predictions.jsonl as SWE-bench's own harness reads it: the first sample of each problem."""
    lines = []
    for (record, *_), problem in zip(records(benchmark, held), benchmark.problems, strict=True):
        opened = "<think>" if record["opened"] else ""
        row = Answered(problem, benchmark.task.style(benchmark.style), opened, record["completion"])
        lines.append(json.dumps(prediction(row, model)) + "\n")
    write_whole(config.output / PREDICTIONS, "".join(lines).encode())


@contextmanager
def _progress(benchmark: Benchmark, held: Samples, name: str) -> Iterator[Progress]:
    keys = benchmark.keys()
    done = sum(held.get(key) is not None for key in keys)
    with Progress(len(keys), name, start=done) as progress:
        yield progress


def _line(name: str, values: Mapping[str, Any]) -> str:
    """A benchmark's figures in one line."""
    if values["pass@1"] is None:
        return f"{name}: none of {values['ungraded']} samples was graded: {json.dumps(values['ungraded_reasons'])}"
    low, high = values["interval"]
    parts = [
        f"{name}: {100 * values['pass@1']:.2f} ± {100 * values['stderr']:.2f} %",
        f"95 % from {100 * low:.1f} to {100 * high:.1f}, {values['n']} problems x {values['samples']}",
    ]
    if values["lenient"] is not None:
        parts.append(f"lenient {100 * values['lenient']:.2f}")
    if values["ungraded"]:
        parts.append(f"{values['ungraded']} samples not graded")
    parts.append(f"{100 * (values['truncated'] or 0):.1f} % cut off")
    if values["tokens_per_second"]:
        parts.append(f"{values['tokens_per_second']:.1f} tokens/s")
    return ", ".join(parts)
