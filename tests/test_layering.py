"""Imports run downhill only: a file imports from its own room and the rooms above it in `ROOMS`."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "deepseek_jax"
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# DESIGN's order, from what knows nothing to what strings everything together.
ROOMS = (
    "interrupt compilation_cache own_code config distributed sharding ops parallel model checkpoint text data "
    "generation rewards rl report train evals plan testing serve commands cli __main__"
).split()
OUTSIDE = {"experiments", "tools", "tests"}
FORBIDDEN_MODULES = {"torch", "transformers", "pickle"}
FORBIDDEN_CALLS = {"eval", "exec"}


def room_of(path: Path) -> str:
    """The room a file of the package belongs to; the package's own `__init__` is the empty room."""
    first = path.relative_to(ROOT / PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def package_of(path: Path) -> str:
    """The dotted package that relative imports in a file start from."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Every module that a source names in an import, at any depth, as (line, absolute dotted name).

    `from a import b` gives `a.b`: whether b is a module or a value, its room can be read from the name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def upward_imports(source: str, room: str, package: str | None = None) -> list[str]:
    """Names the imports of a source that its room may not make.

    Args:
        source: Python text.
        room: The room it stands in, one of `ROOMS`, or "" for the package's own `__init__`, which imports nothing but
            what it lists for type checkers; tests/test_front_door.py holds each of those names to what it stands for.
        package: Where its relative imports start; by default the room as a folder.

    Returns:
        One line for each breach, empty when all imports run downhill.
    """
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) if room else set()
    breaches = []
    listed = _for_type_checkers(source) if room == "" else range(0)
    for line, module in imported_modules(source, package or f"{PACKAGE}.{room}".rstrip(".")):
        if line in listed:
            continue
        top, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if top in OUTSIDE:
            breaches.append(f"line {line}: {room or PACKAGE} imports {module}, outside the package")
        elif top == PACKAGE and target and not target.startswith("__") and target not in allowed:
            where = "is below it" if target in ROOMS else "is not a room"
            breaches.append(f"line {line}: {room or PACKAGE} imports {module}, but {target} {where}")
    return breaches


def _for_type_checkers(source: str) -> range:
    """The lines of the first `if TYPE_CHECKING:` of a module, which are never run."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse:
            return range(node.lineno, node.end_lineno + 1)
    return range(0)


def forbidden_uses(source: str, package: str = PACKAGE) -> list[str]:
    """Names the imports and calls that no file of the package may make."""
    uses = [
        f"line {line}: imports {module}"
        for line, module in imported_modules(source, package)
        if module.split(".")[0] in FORBIDDEN_MODULES
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("builtins.") in FORBIDDEN_CALLS:
            uses.append(f"line {node.lineno}: calls {ast.unparse(node.func)}")
    return uses


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downhill(path: Path):
    room = room_of(path)
    assert room == "" or room in ROOMS, f"{room} is not a room: add it to ROOMS where it belongs"
    assert upward_imports(path.read_text(), room, package_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_uses_nothing_forbidden(path: Path):
    assert forbidden_uses(path.read_text(), package_of(path)) == []


@pytest.mark.parametrize(
    ("source", "room", "package"),
    [
        ("import deepseek_jax.train", "ops", None),
        ("import numpy, deepseek_jax.report.metrics as m", "ops", None),
        ("from deepseek_jax.rl.loss import grpo_loss", "model", None),
        ("from deepseek_jax import rl", "model", None),
        ("from ..generation import sample", "text", None),
        ("from .. import generation", "text", None),
        ("from ...model import cache", "ops", "deepseek_jax.ops.kernels"),
        ("from .ops import norm", "config", "deepseek_jax"),
        ("def f():\n    from deepseek_jax import serve", "plan", None),
        ("if TYPE_CHECKING:\n    import deepseek_jax.serve", "plan", None),
        ("import importlib\nimportlib.import_module('deepseek_jax.serve.app')", "plan", None),
        ("from deepseek_jax.ops import norm", "", None),
        ("if TYPE_CHECKING:\n    pass\nfrom deepseek_jax.ops import norm", "", None),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from deepseek_jax.ops import norm", "", None),
        ("import experiments.r1_zero", "serve", None),
        ("from tools import check", "serve", None),
        ("from deepseek_jax.cellar import wine", "serve", None),
    ],
)
def test_an_upward_import_is_caught(source: str, room: str, package: str | None):
    assert len(upward_imports(source, room, package)) == 1


@pytest.mark.parametrize(
    ("source", "room", "package"),
    [
        ("from deepseek_jax import config\nfrom deepseek_jax.ops.norm import rms_norm", "model", None),
        ("from . import norm\nfrom .rope import rotate", "ops", None),
        ("from ..attention import attend", "ops", "deepseek_jax.ops.kernels"),
        ("from .config import Config", "sharding", "deepseek_jax"),
        ("from deepseek_jax import __version__", "config", "deepseek_jax"),
        ("if TYPE_CHECKING:\n    from deepseek_jax.ops import norm", "", None),
        ("import jax\nfrom train import loop\nimport deepseek_jax_extras.serve", "config", "deepseek_jax"),
    ],
)
def test_a_downhill_import_passes(source: str, room: str, package: str | None):
    assert upward_imports(source, room, package) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn as nn",
        "def f():\n    from transformers import AutoModel",
        "import pickle",
        "from pickle import loads",
        "eval('1 + 1')",
        "import builtins\nbuiltins.exec('x = 1')",
    ],
)
def test_a_forbidden_use_is_caught(source: str):
    assert len(forbidden_uses(source)) == 1


def test_a_name_that_only_looks_forbidden_passes():
    assert forbidden_uses("from .torch import x\nmodel.eval()\njax.eval_shape(f)") == []


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

def refuse(event, args):
    if event == "socket.connect":
        raise RuntimeError(f"importing deepseek_jax opened a connection to {args[1]}")

sys.addaudithook(refuse)
import deepseek_jax
assert "jax" not in sys.modules and "numpy" not in sys.modules, "the package's root loads an array library"
names = [m.name for m in pkgutil.walk_packages(deepseek_jax.__path__, "deepseek_jax.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def run_without_devices(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where jax knows no platform, so that whatever asks for a device fails."""
    env = os.environ | {"JAX_PLATFORMS": "none_such", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)


def test_importing_every_module_touches_no_device():
    modules = [path for path in FILES if path != ROOT / PACKAGE / "__init__.py"]
    result = run_without_devices(IMPORT_EVERYTHING)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) == len(modules)


def test_touching_a_device_would_be_noticed():
    result = run_without_devices("import jax.numpy as jnp; jnp.zeros(1)")
    assert result.returncode != 0
    assert "none_such" in result.stderr
