"""Is a reward for the format that can be gamed gamed, and does a strict one close that?

    python experiments/r1.py --output runs/r1
    python experiments/reward_hacking.py runs/r1

From the run's own cold start a model is reinforced as in RL-1 but for one reward: in place of the strict format (the
template exactly, weight 0.3) stands a weak one, which pays 0.2 for every `=` that a completion writes, wherever it
stands, and asks for nothing else: it means "show your steps". Accuracy and language are paid as before. Beside it are
the first steps of the run's own RL-1, whose format is strict. Hacked is a reward that rises while accuracy does not.

Cost: two thirds of an RL-1, some minutes. Expected: with the weak reward completions grow to the limit of tokens, full
of equations that nobody asked for, and accuracy falls to nothing; with the strict one it rises. Found: that (LOG.md,
one seed).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands import r1
from deepseek_jax.commands.r1_stages import Maker
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.train.runs import held_folder
from deepseek_jax.train.stages import Stage, run_stages

WEAK = "weak_format"
_PAID = 0.2  # an equation
_AT_ONCE = 8  # steps whose mean is told
_TOLD = ("reward", "rewards/accuracy/mean", "completions/mean_length", "completions/clipped_ratio")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        run: folder of a run of `r1` that has done its first RL.
        output: folder of the hacked run; None is `hacking` beside the run's stages.
        steps: of it; the run's own RL-1 wants at least as many.
        seed: that of the run.
        set: as the run was given it.
    """

    run: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path | None = None
    steps: int = 40
    seed: int = 0
    set: tuple[str, ...] = ()


def equations_written(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    """The weak format: so much for every equation, be it right, wanted, or inside a thought."""
    return [_PAID * text.count("=") for text in completions]


def main(config: Config) -> None:
    """Run what is not done, and print both courses."""
    keep_compiled()
    strict = read_metrics(config.run / "rl_1")[: config.steps]
    if len(strict) < config.steps:
        raise ValueError(f"{config.run / 'rl_1'}: got {len(strict)} steps, wanted {config.steps}; give fewer --steps")
    output = config.output or config.run / "hacking"
    output.mkdir(exist_ok=True)
    with held_folder(output):
        done = run_stages(output, [stage(config)])
        write_run_report(output)
    for name, course in {"strict": strict, "weak": read_metrics(output / WEAK)}.items():
        for row in told(course):
            print(json.dumps({"format": name, **row}))
    print(json.dumps({"format": "weak", "held out": done[WEAK].report}))


def stage(config: Config) -> Stage:
    """RL-1 with the weak format."""
    options = r1.options_by_stage(r1.Config(seed=config.seed, set=config.set))
    options[WEAK] = options["rl_1"] | {"steps": config.steps, "weight_format": 0.0}
    questions = config.run / "questions"
    make = Maker(options, questions / "held_out.jsonl", r1.PUZZLES, config.seed)
    reward = f"{Path(__file__).resolve()}:{equations_written.__name__}"
    asked = questions / "train.jsonl"
    return make.rl(WEAK, model=config.run / "cold_start" / "model", ask=asked, scorer=reward)


def told(course: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Means of eight steps at a time."""
    parts = [course[start : start + _AT_ONCE] for start in range(0, len(course), _AT_ONCE)]
    means = [{name: round(mean(row[name] for row in part), 3) for name in _TOLD} for part in parts]
    return [{"step": part[-1]["step"], **of} for part, of in zip(parts, means, strict=True)]


if __name__ == "__main__":

    def command(config: Config) -> None:
        """Reinforce a run's cold start by a reward that can be gamed."""
        main(config)

    run(command)
