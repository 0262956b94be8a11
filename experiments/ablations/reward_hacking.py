"""Is a reward for the format that can be gamed gamed, and does a strict one close that?

    python experiments/ablations/reward_hacking.py runs/r1

RL-1 again from the run's own cold start, 40 steps of it, but for one reward: in place of the strict format (the
template exactly, weight 0.3) stands a weak one, which pays 0.2 for every `=` that a completion writes, wherever it
stands, and asks for nothing else: it means "show your steps". Hacked is a reward that rises while accuracy does not.
Cost: two thirds of an RL-1. Expected: with the weak reward completions grow to the limit of tokens, full of equations
that nobody asked for, and accuracy falls to nothing.
Found: that, with one seed: the reward trebles, and none of 400 held-out puzzles is solved (LOG.md).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import CONTROLS, RL, Config, ablation, again
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.train.stages import Stage

WEAK, STEPS = "weak_format", 40
_PAID = 0.2  # an equation
_AT_ONCE = 8  # steps whose mean is told
_TOLD = ("reward", "rewards/accuracy/mean", "completions/mean_length", "completions/clipped_ratio")


def equations_written(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    """The weak format: so much for every equation, be it right, wanted, or inside a thought."""
    return [_PAID * text.count("=") for text in completions]


def stages(run: Path) -> list[Stage]:
    """RL-1 with the weak format."""
    reward = f"{Path(__file__).resolve()}:{equations_written.__name__}"
    return [again(run, RL, WEAK, scorer=reward, steps=STEPS, weight_format=0.0)]


def told(course: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Means of eight steps at a time."""
    parts = [course[start : start + _AT_ONCE] for start in range(0, len(course), _AT_ONCE)]
    means = [{name: round(mean(row[name] for row in part), 3) for name in _TOLD} for part in parts]
    return [{"step": part[-1]["step"], **of} for part, of in zip(parts, means, strict=True)]


if __name__ == "__main__":
    hacked = ablation(stages, __doc__)

    def command(config: Config) -> None:
        hacked(config)
        for folder in (config.run / RL, (config.output or config.run / CONTROLS) / WEAK):
            for row in told(read_metrics(folder)[:STEPS]):
                print(json.dumps({"of": folder.name, **row}))

    command.__doc__ = hacked.__doc__
    run(command)
