"""The recipe over seeds: what every stage comes to, and how far its first reinforcement is ahead of what it is held to.

    python experiments/r1.py --seed 0 --output runs/r1_0            # and other seeds, and their ablations
    python experiments/r1_seeds.py runs/r1_0 runs/r1_1 runs/r1_2

A seed is one observation: it draws the questions, the weights and the samples anew, and two runs of one setting differ
by more than the questions that they are scored on would have them. So the error here is that of the mean over seeds,
and of a difference that of the seeds' differences. What not all of the runs have done is given for those that have.

Cost: none, files are read. Expected: RL-1 ahead of the cold start and of its controls by more than twice the error.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.train.stages import marks

RL, LAST = "rl_1", ("sft", "rl_2", "distill")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        runs: folders of runs of `r1` of one setting and several seeds; controls are read from `controls` in each.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"runs: got {len(self.runs)}, wanted at least 2: one has no error over seeds")


def main(config: Config) -> None:
    """Print a line for every stage and for every difference."""
    for row in rows([accuracies(folder) for folder in config.runs]):
        print(json.dumps(row))


def accuracies(folder: Path) -> dict[str, float]:
    """Of a run's stages and controls, by name, as far as they are done.

    Raises:
        ValueError: the run has not done its first RL.
    """
    done = [mark for mark in (*marks(folder), *marks(folder / "controls")) if "accuracy" in mark.get("report", {})]
    found = {mark["name"]: mark["report"]["accuracy"] for mark in done}
    if RL not in found:
        raise ValueError(f"{folder}: got no stage {RL} that is done, wanted the folder of a run of r1 with it")
    return found


def rows(runs: Sequence[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Each stage and control, then RL-1 less the cold start and each control, and the later stages less RL-1."""
    names = list(dict.fromkeys(name for of in runs for name in of))
    for name in names:
        yield over_seeds(name, [of[name] for of in runs if name in of])
    for name in names:
        one, other = (name, RL) if name in LAST else (RL, name)
        if name not in ("base", RL):
            yield over_seeds(f"{one} less {other}", [of[one] - of[other] for of in runs if name in of])


def over_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The mean with its standard error, which one value has not."""
    error = round(stdev(values) / len(values) ** 0.5, 4) if len(values) > 1 else None
    return {"of": name, "mean": round(mean(values), 4), "stderr": error, "seeds": [round(of, 4) for of in values]}


if __name__ == "__main__":

    def command(config: Config) -> None:
        """Hold runs of several seeds together."""
        main(config)

    run(command)
