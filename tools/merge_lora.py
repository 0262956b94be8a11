"""Merge a LoRA adapter, PEFT's or our own, into its model, and write the whole as a Hugging Face folder."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.merge import main

if __name__ == "__main__":
    run(main)
