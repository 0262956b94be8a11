"""Plan before renting: which chips, mesh and batch a model wants, what fits a given memory, and how fast it may be."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

from deepseek_jax.cli import run
from deepseek_jax.commands.plan import main

if __name__ == "__main__":
    run(main)
