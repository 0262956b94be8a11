"""Convert a Hugging Face checkpoint folder (safetensors) to a deepseek_jax folder (Orbax), every tensor as stored."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.convert import main

if __name__ == "__main__":
    run(main)
