"""R1-Zero: does reinforcement learning with rule-based rewards teach a model to reason?

Without arguments: a small DeepSeek-architecture model (latent attention, grouped experts, a shared expert) is made
from nothing and imitates answers to chains of arithmetic (the cold start). Most of those answers only guess, some
work it out step by step. Then GRPO alone has to find out that thinking pays, and to do it right. With
`--model FOLDER --data FILE.jsonl` the same loop trains a Hugging Face checkpoint.

Cost: three to seven minutes on two CPU cores without arguments; `--quick` shows the whole path in one or two.
Expected: held-out accuracy rises by 20 points and more over the cold start; with `--control shuffled` it does not
(see LOG.md). A killed run goes on from its last checkpoint when the same command is given again, and a finished one
goes on when `--steps` is raised. Its folder may be moved; no second program is let into it. The `--mesh-*` flags
divide the model over several devices, and over those of several processes (docs/pods.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("train")
