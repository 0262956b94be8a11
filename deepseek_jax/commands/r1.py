"""The recipe of DeepSeek-R1, whole: cold start, RL, rejection sampling, SFT, RL or distillation, and one report."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.commands import distill, evaluate, rejection, sft, train_settings
from deepseek_jax.commands.options import command
from deepseek_jax.commands.r1_presets import KINDNESS, PRESETS, PUZZLES_ONLY
from deepseek_jax.commands.r1_stages import EVALUATION, Maker, read_rows
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.commands.settings_file import converted, options_of
from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.tasks import task_named
from deepseek_jax.train.runs import SUMMARY, held_folder, room_needed
from deepseek_jax.train.stages import Stage, run_stages

PUZZLES = "puzzles"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run; every stage has a folder in it, and the report is report.html and summary.json. The
            same command goes on where it was stopped.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
        seed: of weights, data and sampling.
        preset: numbers of the stages: "laptop", for a small model made from nothing, or "paper", R1's as published.
        last_stage: "rl" by rules and a scorer, or on-policy distillation ("distill") from the model of the first RL.
        model: base model to start from, a folder or a name on the hub; without it a small one is made from nothing,
            which reads equations and then learns puzzles.
        benchmark: how the rows of `data` and `held_out` are read and graded, by the names of `evaluate`.
        data: questions with answers, for RL and rejection sampling: a file, a folder or a name on the hub.
        held_out: questions that every model is scored on.
        cold_start: conversations to begin with, as `sft` reads them.
        general: conversations that are no reasoning, for the mixture of the second SFT; None leaves them out.
        general_questions: requests without an answer for the last RL, which `scorer` judges; None leaves them out.
        scorer: FILE.py:function, a reward function for rows without an answer, such as a preference model's.
        set: STAGE.OPTION=VALUE, a number of a stage by the name of its command's option, such as rl_1.lr=1e-5.
        show: print the stages with their settings, and run nothing.
    """

    output: Path = Path("runs/r1")
    config: Path | None = None
    seed: int = 0
    preset: Literal["laptop", "paper"] = "laptop"
    last_stage: Literal["rl", "distill"] = "rl"
    model: Path | None = None
    benchmark: str = PUZZLES
    data: Path | None = None
    held_out: Path | None = None
    cold_start: Path | None = None
    general: Path | None = None
    general_questions: Path | None = None
    scorer: str | None = None
    set: tuple[str, ...] = ()
    show: bool = False

    def __post_init__(self) -> None:
        task_named(self.benchmark)
        files = ("data", "held_out", "cold_start")
        if self.model is not None:
            missing = next((name for name in files if getattr(self, name) is None), None)
            if missing is not None:
                raise ValueError(f"{missing}: got none with --model, wanted a file: --{missing.replace('_', '-')} FILE")
            if self.general_questions is not None and self.scorer is None:
                raise ValueError(
                    "scorer: got none with --general-questions, wanted FILE.py:function, which judges them"
                )
            return
        given = next(
            (n for n in (*files, "general", "general_questions", "scorer") if getattr(self, n) is not None), None
        )
        if given is not None or self.benchmark != PUZZLES:
            name = given or "benchmark"
            raise ValueError(
                f"{name}: got {getattr(self, name)} without --model, wanted a model to start from beside it"
            )
        if self.preset == "paper":
            raise ValueError("model: got none with --preset paper, wanted the base model: --model FOLDER")


COMMON = (
    "output",
    "config",
    "preset",
    "last_stage",
    "model",
    "benchmark",
    "data",
    "held_out",
    "cold_start",
    "set",
    "show",
)
"""The options that the short help shows."""
_COMMANDS = {
    **dict.fromkeys(("base", "cold_start", "sft"), sft.Config),
    **dict.fromkeys(("rl_1", "rl_2"), train_settings.Config),
    "rejection": rejection.Config,
    "distill": distill.Config,
    EVALUATION: evaluate.Config,
}


@command(Config, common=COMMON, deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    """Run every stage that is not done, score the model after each, and write the report."""
    options = options_by_stage(config)
    found = stages(config, options)
    if config.show or config.preset == "paper":
        for stage in found:
            _say(f"[{stage.name}]", *(f"{name} = {value!r}" for name, value in options.get(stage.name, {}).items()))
        _say(f"[{EVALUATION}]", *(f"{name} = {value!r}" for name, value in options[EVALUATION].items()))
    if config.show:
        return
    _check_files(config)
    with room_needed(config.output), held_folder(config.output):
        run_stages(config.output, found)
        report = distributed.on_main(lambda: str(write_run_report(config.output)))
    for of in distributed.on_main(lambda: read_json(config.output / SUMMARY))["stages"]:
        _say(f"{of['name']:<12}{100 * of['accuracy']:5.1f} ± {100 * of['stderr']:.1f} %   {of['seconds']:.0f} s")
    _say(f"report: {report}")


def _check_files(config: Config) -> None:
    """Read the user's files before anything is trained on one of them, hours before the next.

    Raises:
        ValueError: there is no such file, or a row to ask or to score by is none of the benchmark's.
    """
    for name in ("cold_start", "data", "held_out", "general", "general_questions"):
        path = getattr(config, name)
        if path is None:
            continue
        try:
            if name in ("data", "held_out"):
                task_named(config.benchmark).problems(open_source(str(path)))
            else:
                read_rows(path)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None


def stages(config: Config, options: Mapping[str, Mapping[str, Any]]) -> list[Stage]:
    """The recipe, top to bottom."""
    small = config.model is None
    of = lambda name, own: ("questions", name) if small else own
    train, held_out = of("train", config.data), of("held_out", config.held_out)
    general, prompts = of("general", config.general), of("general_prompts", config.general_questions)
    base: str | Path = "base" if small else model_folder(config.model)
    make = Maker(options, held_out, config.benchmark, config.seed)
    begin = [make.questions("questions"), make.base("base", learn=("questions", "facts"))] if small else []
    if config.last_stage == "rl":
        scorer = KINDNESS if small else config.scorer
        last = make.rl("rl_2", model="sft", ask=train, late=prompts, scorer=scorer if prompts else None)
    else:
        last = make.distill("distill", model="sft", teachers=(("rl_1", "model"),), ask=train)
    return [
        *begin,
        make.sft("cold_start", model=base, learn=of("demonstrations", config.cold_start)),
        make.rl("rl_1", model="cold_start", ask=train),
        make.rejection("rejection", model="rl_1", ask=train),
        make.mixture("mixture", reasoning=("rejection", "accepted"), general=general),
        make.sft("sft", model=base, learn=("mixture", "rows")),
        last,
    ]


def options_by_stage(config: Config) -> dict[str, dict[str, Any]]:
    """The preset's numbers, and what --set says instead.

    Raises:
        ValueError: no such stage or option, or a value of another kind.
    """
    found = {name: dict(values) for name, values in PRESETS[config.preset].items()}
    if config.benchmark != PUZZLES:
        found = {name: {k: v for k, v in values.items() if k not in PUZZLES_ONLY} for name, values in found.items()}
    for text in config.set:
        name, equals, value = text.partition("=")
        stage, dot, option = name.strip().replace("-", "_").partition(".")
        if not (equals and dot):
            raise ValueError(f"set: got {text!r}, wanted STAGE.OPTION=VALUE, such as rl_1.lr=1e-5")
        if stage not in found:
            raise ValueError(f"set: got the stage {stage!r}, wanted one of {', '.join(found)}")
        found[stage][option] = _value(found, stage, option, value.strip())
    return found


def _value(found: Mapping[str, Mapping[str, Any]], stage: str, option: str, text: str) -> Any:
    """A value of the command line, as the option holds it."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # words need no quotation marks here
    if stage in _COMMANDS:
        known = options_of(_COMMANDS[stage])
        wanted = known[option].wanted if option in known else None
    else:
        known = found[stage]
        wanted = type(known[option]) if option in known else None
    if wanted is None:
        raise ValueError(
            f"set: {stage} has no option {option!r}, wanted one such as {', '.join(list(found[stage])[:6])}"
        )
    try:
        return value if wanted is list and isinstance(value, list) else converted(value, wanted)
    except TypeError as kind:
        raise ValueError(f"set: {stage}.{option}: got {text!r:.80}, wanted {kind}") from None


def _say(*lines: str) -> None:
    if distributed.is_main():
        print(distributed.printable("\n".join(lines)), flush=True)
