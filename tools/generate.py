"""Complete a prompt with a model: a Hugging Face folder or a converted one."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.generate import main

if __name__ == "__main__":
    run(main)
