"""Logits of a model for given tokens, float32, from one full forward pass."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.logits import main

if __name__ == "__main__":
    run(main)
