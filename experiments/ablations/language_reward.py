"""Does the reward for the language of the question keep thoughts in it, and what does it cost in accuracy?

    python experiments/ablations/language_reward.py runs/r1

RL-1 again from the run's own cold start, without that reward. In 30 % of the demonstrations the thought is in the other
language than the question. The share in the right one is in the report of either (`parts/language`).
Cost: one RL-1. Expected: more thoughts in the other language, at about the same accuracy.
Found: as many thoughts in the right language, 96.4 %, with it and without it: greedy answers had it before (91.0 %
after the cold start). Accuracy 53.0 % without it, 57.3 % with it, 4.3 points ± 2.4 (seed 3, LOG.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again
from deepseek_jax.train.stages import Stage


def stages(run: Path) -> list[Stage]:
    """RL-1 whose rewards are accuracy and format."""
    return [again(run, RL, "no_language", weight_language=0.0)]


if __name__ == "__main__":
    run(ablation(stages, __doc__))
