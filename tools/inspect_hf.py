"""Say what a checkpoint is, or should be, from its configuration and headers alone; no weight is read."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("inspect")
