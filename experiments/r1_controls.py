"""What in the recipe's first reinforcement teaches: the rewards, or only that a model is trained for longer?

    python experiments/r1.py --output runs/r1
    python experiments/r1_controls.py runs/r1

From the run's own cold start RL-1 is done again with one thing changed: `shuffled` hands each group's rewards to random
samples of it; `no_kl` has beta 0, `kl` 0.01; `no_std` does not divide advantages by the group's deviation;
`no_language` has no reward for the language of the question. `imitation` is the cold start instead, from the base on,
for as many more updates as RL-1 took seconds. All are scored on the run's held-out questions; each difference to RL-1
is paired by question. `--seed` and `--set` are those of the run.

Cost: one RL-1 each. Expected: shuffled rewards and imitation gain nothing, or by far less than RL-1; the others are
choices among equals at this size. A killed run goes on when the same command is given again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands import r1
from deepseek_jax.commands.r1_stages import EVALUATION, Maker
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.evals.comparison import read_runs
from deepseek_jax.evals.paired import difference
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.train.runs import held_folder, write_json
from deepseek_jax.train.stages import MARK, Stage, run_stages

IMITATION = "imitation"
VARIANTS: dict[str, dict[str, Any]] = {
    "shuffled": {"control": "shuffled"},
    "no_kl": {"beta": 0.0},
    "kl": {"beta": 0.01},
    "no_std": {"scale_rewards": "none"},
    "no_language": {"weight_language": 0.0},
}
"""What each changes in RL-1's options."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        run: folder of a run of `r1` that has done its first RL.
        output: folder of the controls; None is `controls` beside the run's stages.
        only: which to run.
        seed: that of the run.
        set: as the run was given it.
    """

    run: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path | None = None
    only: tuple[str, ...] = ("shuffled", IMITATION, "no_kl")
    seed: int = 0
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in (*VARIANTS, IMITATION)]:
            raise ValueError(f"only: got {unknown[0]!r}, wanted some of {', '.join((*VARIANTS, IMITATION))}")


def main(config: Config) -> None:
    """Run what is not done, and print each beside RL-1."""
    keep_compiled()
    output = config.output or config.run / "controls"
    found = stages(config)
    output.mkdir(exist_ok=True)
    with held_folder(output):
        run_stages(output, found)
        write_run_report(output)
        rows = [beside(config.run / "rl_1", output / name) for name in config.only]
        write_json(output / "controls.json", rows)
    for row in rows:
        print(json.dumps(row))


def stages(config: Config) -> list[Stage]:
    """The controls, each a stage of its own from what the run left.

    Raises:
        ValueError: the run has not done its first RL.
    """
    mark = config.run / "rl_1" / MARK
    if not mark.exists() or "outputs" not in json.loads(mark.read_text(encoding="utf-8")):
        raise ValueError(f"{mark}: got no stage that is done, wanted the folder of a run of r1 with its first RL done")
    options = r1.options_by_stage(r1.Config(seed=config.seed, set=config.set))
    options |= {name: options["rl_1"] | changed for name, changed in VARIANTS.items()}
    options[IMITATION] = options["cold_start"] | {"steps": updates_of_equal_seconds(config.run)}
    questions = config.run / "questions"
    make = Maker(options, questions / "held_out.jsonl", r1.PUZZLES, config.seed)
    of = {
        name: make.rl(name, model=config.run / "cold_start" / "model", ask=questions / "train.jsonl")
        for name in VARIANTS
    }
    of[IMITATION] = make.sft(IMITATION, model=config.run / "base" / "model", learn=questions / "demonstrations.jsonl")
    return [of[name] for name in config.only]


def updates_of_equal_seconds(run: Path) -> int:
    """Updates of the cold start that take as long as it and RL-1 together took, by the median of either's steps, which
    compilations and a pause do not count in."""
    seconds = {name: [row["step_time"] for row in read_metrics(run / name)] for name in ("cold_start", "rl_1")}
    of_imitation, of_rl = (median(of) for of in seconds.values())
    return len(seconds["cold_start"]) + round(len(seconds["rl_1"]) * of_rl / of_imitation)


def beside(first: Path, second: Path) -> dict[str, Any]:
    """Two stages' accuracies and their difference, first less second."""
    one, other = read_runs([first / EVALUATION, second / EVALUATION])
    scores, others = one.scores(r1.PUZZLES), other.scores(r1.PUZZLES)
    found = difference([others[key] for key in scores], list(scores.values()))
    rounded = {name: round(getattr(found, name), 4) for name in ("mean", "stderr", "low", "high", "p")}
    accuracies = {of.name: of.summary[r1.PUZZLES]["pass@1"] for of in (one, other)}
    return {"control": second.name, first.name: accuracies[one.name], "it": accuracies[other.name], **rounded}


if __name__ == "__main__":

    def command(config: Config) -> None:
        """Run RL-1 again with one thing changed, and hold each against it."""
        main(config)

    run(command)
