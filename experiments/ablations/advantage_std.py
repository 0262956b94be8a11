"""Does it matter what advantages are divided by: a deviation, as in R1, or nothing, as in DeepSeek-V3.2?

    python experiments/ablations/advantage_std.py runs/r1

RL-1 again from the run's own cold start, advantages as they are; those of the run are divided by the batch's deviation.
Cost: one RL-1. Expected: choices among equals at this size.
Found: that: without a deviation 58.8 % where RL-1 has 57.3 %, 1.5 points ± 2.2 (seed 3).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again
from deepseek_jax.train.stages import Stage


def stages(run: Path) -> list[Stage]:
    """RL-1 with advantages of reward less mean."""
    return [again(run, RL, "no_std", scale_rewards="none")]


if __name__ == "__main__":
    run(ablation(stages, __doc__))
