"""Compile a step of training or serving for a TPU pod or a GPU cluster that need not be there, with its cost."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.compile import main

if __name__ == "__main__":
    run(main)
