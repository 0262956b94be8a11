"""A stage of a run of `r1` once more with something changed, held against the run's own: controls and ablations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json
from deepseek_jax.commands import sft, train, train_settings
from deepseek_jax.commands.r1_stages import EVALUATION, Maker
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.commands.settings_file import converted, options_of
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.evals.comparison import read_runs
from deepseek_jax.evals.paired import difference
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.train.runs import held_folder, write_json
from deepseek_jax.train.stages import MARK, Stage, marks, run_stages

RL, CONTROLS = "rl_1", "controls"
_SCORED = f"{EVALUATION} "


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        run: folder of a run of `r1` that has done its first RL. Its settings and its seed are those of the new stages.
        output: folder of these; None is `controls` beside the run's stages, where all that was held against them is.
    """

    run: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path | None = None


def ablation(stages: Callable[[Path], Sequence[Stage]], text: str) -> Callable[[Config], None]:
    """The command of a file of experiments/ablations: it runs what is not done, and prints each beside RL-1.

    Args:
        stages: of the run's folder; those that are run.
        text: the file's docstring, whose first line is the command's help.
    """

    def command(config: Config) -> None:
        keep_compiled()
        found = stages(config.run)
        output = config.output or config.run / CONTROLS
        output.mkdir(exist_ok=True, parents=True)
        with held_folder(output):
            run_stages(output, found)
            write_run_report(output)
            rows = {mark["folder"]: beside(config.run / RL, output / mark["folder"]) for mark in _done(output)}
            distributed.on_main(lambda: write_json(output / "controls.json", list(rows.values())))
        for stage in found:
            print(json.dumps(rows[stage.name]))

    command.__doc__ = text.splitlines()[0]
    return command


def again(
    run: Path,
    of: str,
    name: str,
    *,
    scorer: str | None = None,
    command: Callable[[train_settings.Config], None] = train.main,
    **changed: Any,
) -> Stage:
    """A stage of a run again, from the same model and data, with some options changed.

    Args:
        run: its folder.
        of: the stage that it is like, of RL or of supervised fine-tuning.
        name: of the new one.
        scorer, command: as for `Maker.rl`.
        changed: options by the names of the stage's command.

    Raises:
        ValueError: the run has not done that stage, it is of another kind or takes what only a scorer judges, or it has
            an option that there is no longer.
    """
    mark = done(run, of)
    model, data = mark["from"]["model"], mark["from"]["data"]
    if "late" in data or not ("learn" in data or "tasks" in mark["settings"]):
        raise ValueError(
            f"{run / of / MARK}: got a stage of other data, wanted fine-tuning or RL by rules alone, as {RL}"
        )
    start, files = model and given(run, model), {key: given(run, where) for key, where in data.items()}
    (benchmark,) = done(run, RL)["settings"]["tasks"]
    scores = {key.removeprefix(_SCORED): of for key, of in mark["settings"].items() if key.startswith(_SCORED)}
    make = lambda options: Maker(
        {name: options | changed, EVALUATION: scores}, files["held_out"], benchmark, options["seed"]
    )
    if "learn" in files:
        options = _options(run / of / MARK, mark, sft.Config) | {"save_every": 200}
        return make(options).sft(name, model=start, learn=files["learn"])
    options = _options(run / of / MARK, mark, train_settings.Config) | {"save_every": 25, "eval_every": 10_000}
    return make(options).rl(name, model=start, ask=files["ask"], scorer=scorer, command=command)


def done(run: Path, stage: str) -> dict[str, Any]:
    """The mark of a stage that is done.

    Raises:
        ValueError: it is not.
    """
    path = run / stage / MARK
    mark = read_json(path) if path.exists() else {}
    if "outputs" not in mark:
        raise ValueError(
            f"{path}: got no stage that is done, wanted the folder of a run of r1 that has done its {stage}"
        )
    return mark


def given(run: Path, where: str) -> Path:
    """What a mark says that a stage took: another stage's model, its file as STAGE/NAME, or a path of the user's."""
    stage, _, file = where.partition("/")
    if not (run / stage / MARK).is_file():
        return Path(where)
    outputs = done(run, stage)["outputs"]
    return run / stage / (outputs["data"][file] if file not in ("", "model") else outputs["model"])


def seconds(stage: Path, updates: int | None = None) -> float:
    """What a stage's updates took, or so many, by their median: compilations and a pause do not count in it."""
    of = [row["step_time"] for row in read_metrics(stage)]
    return (len(of) if updates is None else updates) * median(of)


def beside(first: Path, second: Path) -> dict[str, Any]:
    """Two stages' accuracies on the same questions, and their difference, first less second, paired by question."""
    one, other = read_runs([first / EVALUATION, second / EVALUATION])
    (benchmark,) = one.summary.keys() & other.summary.keys()
    scores, others = one.scores(benchmark), other.scores(benchmark)
    found = difference([others[key] for key in scores], list(scores.values()))
    rounded = {name: round(getattr(found, name), 4) for name in ("mean", "stderr", "low", "high", "p")}
    accuracy = lambda of: of.summary[benchmark]["pass@1"]
    took = {"seconds": round(seconds(first)), "its seconds": round(seconds(second))}
    return {"control": second.name, first.name: accuracy(one), "it": accuracy(other), **rounded, **took}


def _options(path: Path, mark: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """Of a stage's command, as its mark has them; how often it saves and evaluates is no part of a mark."""
    known = options_of(settings)
    held = {key: of for key, of in mark["settings"].items() if key != "scorer" and not key.startswith(_SCORED)}
    if gone := [key for key in held if key not in known]:
        raise ValueError(f"{path}: {gone[0]}: no such option any more; wanted a run of this version of r1")
    return {key: converted(of, known[key].wanted) for key, of in held.items()}


def _done(folder: Path) -> list[Mapping[str, Any]]:
    return [mark for mark in marks(folder) if "accuracy" in mark.get("report", {})]
