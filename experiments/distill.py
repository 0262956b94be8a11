"""Distillation: how much of a teacher does a smaller student learn from its text, its logits, or on-policy?

`python experiments/distill.py --teacher FOLDER --student FOLDER --data PROMPTS` samples the teacher on every prompt
and fine-tunes the student on what it wrote (DeepSeek-R1's way, `--loss sequence`); `--loss forward-kl` learns the
teacher's whole distribution at every token of that text, softened by temperature 3; `--loss reverse-kl` lets the
student sample and learns what one or several teachers would have said at every token of it. A server's address may
stand for a teacher's folder, and `--teacher-samples FILE` for what one wrote, where its text is all that is learnt.
Samples are kept as they come: a killed run goes on with them, and refuses to where settings have changed.

Cost: a pass of the teacher over every sample, twice where it writes them, and the student's updates.
Expected: a held-out loss (`eval/loss`, and `eval/kl` with logits) that falls; on-policy, a `kl` that falls.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("distill")
