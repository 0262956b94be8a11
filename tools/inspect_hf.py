"""Say what a checkpoint is, or should be, from its configuration and headers alone; no weight is read."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.inspect import main

if __name__ == "__main__":
    run(main)
