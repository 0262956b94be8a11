"""What does it cost to stay near the model before: a KL weight of 0, 0.001 (the run's, as in R1) or 0.01?

    python experiments/ablations/kl.py runs/r1

RL-1 again from the run's own cold start, with two other weights.
Cost: two RL-1s. Expected: choices among equals at this size.
Found: that, over three seeds: RL-1 is 1.0 points ± 1.3 above no KL and 1.0 ± 0.5 below 0.01 (LOG.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again
from deepseek_jax.train.stages import Stage


def stages(run: Path) -> list[Stage]:
    """RL-1 without the KL term, and with ten times as much."""
    return [again(run, RL, "no_kl", beta=0.0), again(run, RL, "kl", beta=0.01)]


if __name__ == "__main__":
    run(ablation(stages, __doc__))
