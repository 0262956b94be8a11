"""Does RL-1 teach what as much time of imitating the same demonstrations would not?

    python experiments/ablations/imitation.py runs/r1

The cold start from the base on, for as many more updates as RL-1 took seconds, by the median of either's updates.
Cost: that of a cold start and an RL-1. Expected: far less is gained than by RL-1.
Found: that: 19.3, 22.8 and 20.0 % where RL-1 has 57.3, 47.0 and 36.8 % (seeds 3, 4 and 5, LOG.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again, done, seconds
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.train.stages import Stage


def stages(run: Path) -> list[Stage]:
    """The cold start, longer."""
    done(run, RL)
    return [again(run, "cold_start", "imitation", steps=updates_of_equal_seconds(run))]


def updates_of_equal_seconds(run: Path) -> int:
    """Updates of the cold start that take as long as it and RL-1 together took."""
    updates = len(read_metrics(run / "cold_start"))
    return updates + round(seconds(run / RL) / seconds(run / "cold_start", 1))


if __name__ == "__main__":
    run(ablation(stages, __doc__))
