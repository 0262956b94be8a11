"""Property-test kernels beside their plain twins in float64, and compile them for accelerators."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("kernels")
