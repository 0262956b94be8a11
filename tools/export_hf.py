"""Export a converted deepseek_jax folder as a Hugging Face checkpoint folder, every tensor as stored."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.export import main

if __name__ == "__main__":
    run(main)
