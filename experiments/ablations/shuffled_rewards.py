"""Do the rewards teach, or do as many updates of the same kind with rewards that say nothing?

    python experiments/ablations/shuffled_rewards.py runs/r1

RL-1 again from the run's own cold start; each group's rewards go to random samples of it.
Cost: one RL-1. Expected: nothing is gained.
Found: that: 7.8, 6.0 and 10.5 % where RL-1 has 57.3, 47.0 and 36.8 % (seeds 3, 4 and 5), less than before it (LOG.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again
from deepseek_jax.train.stages import Stage


def stages(run: Path) -> list[Stage]:
    """RL-1 with the rewards of every group in random order."""
    return [again(run, RL, "shuffled", control="shuffled")]


if __name__ == "__main__":
    run(ablation(stages, __doc__))
