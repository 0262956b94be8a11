"""The package as users have it: a wheel built from the tree."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def child(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, on one CPU device, with nothing of the tree on its path."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**plain, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def wheel(folder: Path) -> Path:
    """Builds it below a folder, from a copy of what belongs to it; the tree itself stays clean."""
    there = [int(found.version.split(".")[0]) for found in distributions(name="setuptools")]
    if max(there, default=0) < 77:
        pytest.skip("needs setuptools 77 or newer, to build a wheel: pip install -e '.[test]'")
    ours = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "deepseek_jax", folder / "tree" / "deepseek_jax", ignore=ours)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist"]
    built = child(*build, folder / "tree", cwd=folder)
    assert built.returncode == 0, built.stderr
    (made,) = (folder / "dist").glob("*.whl")
    return made
