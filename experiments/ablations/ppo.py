"""Does a critic teach as much as comparing samples of one question does, in as much time?

    python experiments/ablations/ppo.py runs/r1

RL-1 again from the run's own cold start by PPO: the same questions, samples, rewards, rate, KL and one update a
rollout, but advantages are a critic's (lambda 0.95, whitened), which starts from the policy's trunk and learns at ten
times the rate. The critic reads a sample a row, so that updates are not packed; a step takes longer, and there are
fewer. The seconds of either are printed, by the median of its steps.
Cost: one RL-1. Expected: less in as many seconds, as R1's authors say of a critic (arXiv 2402.03300, section 4.1.1).
Found: 33.3 % where RL-1 has 57.3 % (seed 3, LOG.md); its critic hardly learnt in so few steps.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, ablation, again
from deepseek_jax.commands.train import train_with
from deepseek_jax.train.stages import Stage
from experiments.ppo.trainer import CRITIC_LR, PPO, PPOTrainer

STEPS = 30
"""Of PPO, in the seconds of RL-1's 60."""


def stages(run: Path) -> list[Stage]:
    """RL-1 by another trainer."""
    changed = {"steps": STEPS, "pack": False, "share_prompts": False}
    found = again(run, RL, "ppo", command=partial(train_with, PPOTrainer), **changed)
    return [found._replace(settings={**found.settings, "ppo": asdict(PPO), "critic_lr": CRITIC_LR})]


if __name__ == "__main__":
    run(ablation(stages, __doc__))
