"""How much memory something takes: measured in a fresh interpreter, for a peak that others left behind hides it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peaks(setup: str, work: str) -> tuple[int, int]:
    """KiB by which `work` raises the interpreter's own peak after `setup`, and the peak of the processes it started."""
    code = "\n".join(
        [
            "import json; from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage",
            setup,
            "before = getrusage(RUSAGE_SELF).ru_maxrss",
            work,
            "from deepseek_jax.text import confined",
            "confined.end()  # only those that have ended are counted",
            "own, others = (getrusage(of).ru_maxrss for of in (RUSAGE_SELF, RUSAGE_CHILDREN))",
            "print(json.dumps([own - before, others]))",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    own, others = json.loads(ran.stdout.splitlines()[-1])
    return own, others
