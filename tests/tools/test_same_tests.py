"""Tests whose names change from one collection to the next are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check, same_tests

CHANGING = {
    "clock": "import time\nVALUES = [int(time.time())]",
    "packed": "import gzip\nVALUES = [gzip.compress(b'x'), b'y']",
    "chance": "import random\nVALUES = [random.random()]",
    "order": "VALUES = list({'some', 'words', 'in', 'a', 'set', 'of', 'them'})",
    "hash": "VALUES = [hash('a word')]",
    "address": "VALUES = [repr(object())]",
    "path": "import tempfile\nVALUES = [tempfile.gettempdir()]",
    "process": "import os\nVALUES = [os.getpid()]",
    "number": "import time\nVALUES = ['a'] * (1 + time.time_ns() % 97)",
}
SAME = {
    "plain": "VALUES = ['a', 2, 2.5, None, b'x', lambda: 0, object()]",
    "sorted": "VALUES = sorted({'some', 'words'})",
    "named": "import pytest\nimport time\nVALUES = [pytest.param(time.time(), id='now')]",
}


def collected_twice(folder: Path, cases: dict[str, str]) -> subprocess.CompletedProcess:
    for name, values in cases.items():
        test = f"{values}\nimport pytest\n\n@pytest.mark.parametrize('value', VALUES)\ndef test_it(value):\n    pass\n"
        (folder / f"test_{name}.py").write_text(test)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of which none is needed, and each is imported twice
    command = [sys.executable, same_tests.__file__, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_every_kind_of_changing_name_is_found(tmp_path):
    done = collected_twice(tmp_path, CHANGING)
    assert done.returncode == 1, done.stderr
    assert "differ; give their values plain ids, by pytest.param" in done.stdout
    found = {name for name in CHANGING if f"test_{name}.py" in done.stdout}
    # a set may come out in the same order twice, and a count may be the same by chance
    assert found >= CHANGING.keys() - {"order", "number"}, done.stdout


def test_names_that_stay_pass(tmp_path):
    done = collected_twice(tmp_path, SAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "10 tests collected twice: the same\n"


@pytest.mark.parametrize("content", ["import no_such_module", "VALUES = ["])
def test_tests_that_cannot_be_collected_fail(tmp_path, content):
    done = collected_twice(tmp_path, {"broken": content})
    assert done.returncode == 1 and done.stderr.startswith("error: the tests cannot be collected")


def test_the_one_command_makes_this_check():
    names = [step.name for step in check.steps(sys.executable, fix=False, skip_tests=True)]
    assert "test names" in names
