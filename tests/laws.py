"""Laws that need several devices: functions of a test file, run together in a process that has them.

A law is a function that raises where it does not hold; it takes no arguments, or the folders that all of a call get.
One process runs all laws of a call, since importing jax and what the laws share cost more than most laws.
"""

import fcntl
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest

from tests import flags

ROOT = Path(__file__).resolve().parents[1]
CODE = "import sys; from tests.laws import run_laws; run_laws(*sys.argv[1:])"


def found_of(
    laws: Sequence[Callable], *folders: Path, devices: int = 8, seconds: float = 3000, **environment: str
) -> dict[str, str]:
    """What went wrong with each law, run one after another in one process of CPU devices; "" where it holds.

    Args:
        laws: functions of one module.
        folders: given to each law.
        devices: that the process has.
        seconds: after which it is killed.
        environment: variables that it has beside those of this process.
    """
    [module] = {law.__module__ for law in laws}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = flags.environment(devices) | {"PYTHONPATH": path}
    given = json.dumps([str(folder) for folder in folders])
    command = [sys.executable, "-c", CODE, module, str(devices), given, *(law.__name__ for law in laws)]
    environment = {**os.environ, **own, **environment}
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert child.returncode == 0, child.stderr
    print(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def found_once(
    factory: pytest.TempPathFactory, laws: Sequence[Callable], fill: Callable[[Path], None] | None = None, **options
) -> dict[str, str]:
    """`found_of`, run by one of the processes that pytest-xdist spreads a file's tests over, for all of them."""
    [module] = {law.__module__ for law in laws}
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept = shared / f"{module}.{laws[0].__name__}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folders = [factory.mktemp("folders")] if fill else []
            for folder in folders:
                fill(folder)
            kept.write_text(json.dumps(found_of(laws, *folders, **options)))
    return json.loads(kept.read_text())


def fixture_of(laws: Sequence[Callable], fill: Callable[[Path], None] | None = None, **options) -> Callable:
    """A module's fixture: what `found_once` gives of these laws, each of them given the folder that `fill` filled."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory) -> dict[str, str]:
        return found_once(tmp_path_factory, laws, fill, **options)

    return found


def run_laws(module: str, devices: str, folders: str, *laws: str) -> None:
    """In the process that `found_of` starts: prints what went wrong with each law, as JSON."""
    import jax

    assert jax.device_count() == int(devices)
    flags.collect_seldom()
    found, of = {}, import_module(module)
    given = [Path(folder) for folder in json.loads(folders)]
    for law in laws:
        try:
            getattr(of, law)(*given)
            found[law] = ""
        except (Exception, pytest.fail.Exception):  # the latter is what pytest.raises raises
            found[law] = traceback.format_exc()
    print(json.dumps(found))
