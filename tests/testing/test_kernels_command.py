"""`deepseek-jax kernels`, and the example of docs/kernels.md."""

import json
import re
import shlex
from pathlib import Path

import pytest

from deepseek_jax.commands import kernels

pytestmark = pytest.mark.usefixtures("quick_compilation")

DOC = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
EXAMPLE, _ = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture
def command(command_line):
    return command_line(kernels.main)


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE)
    return file


def test_the_example_of_the_documentation_has_no_fault(command, mine):
    status, out, err = command("--module", mine, "--examples", 30, "--no-compile", "--json")
    found = json.loads(out)["masked_sum"]
    assert (status, found["examples"], found["fault"], found["reproduce"]) == (0, 30, None, None), err
    assert 0 < found["worst_error"] <= 1


def test_a_fault_is_told_with_the_command_that_has_it_again(command, mine):
    """As the documentation shows it."""
    mine.write_text(EXAMPLE.replace("< length[0, 0]", "<= length[0, 0]"))
    status, out, _ = command("--module", mine, "--examples", 30, "--no-compile")
    assert status == 3 and "FAULTY" in out
    told, again = out.splitlines()[-2:]
    assert told == "masked_sum: finite: at [0, 0]: got nan, wanted 0" and told in DOC
    words = shlex.split(again.strip())
    assert words[:2] == ["python", "tool.py"]
    assert shlex.join(words[words.index("--case") :]) in DOC
    status, out, _ = command(*words[2:])
    assert status == 3 and out.splitlines()[-2] == told


def test_its_own_kernels_by_name(command):
    status, out, err = command("--kernel", "keep_min_p", "sample", "--examples", 5, "--no-compile", "--seed", 7)
    assert status == 0 and re.search(r"keep_min_p\s+│ 5 .*no fault", out) and "sample" in out, err
    assert "keep_min_p 5/5" in err  # progress


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kernel", "nothing"), "kernel: got 'nothing', wanted one of attend, attend_partial, "),
        (("--examples", "0"), "examples: got 0, wanted 1 or more"),
        (("--case", "{}"), "case: got it with "),
        (("--module", "nowhere.py"), "module: nowhere.py: no such .py file"),
        (("--kernel", "sample", "--case", "[]"), "case: "),
    ],
)
def test_what_cannot_be_is_one_line(command, words, says):
    status, out, err = command(*words)
    assert status == 1 and err.startswith(f"error: {says}") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "no kernel, wanted a deepseek_jax.testing.Kernel at its top level"),
        ("\n1 / 0", "raised ZeroDivisionError: division by zero; mend the file"),
        (
            EXAMPLE + "\nimport dataclasses\nOTHER = dataclasses.replace(MASKED_SUM)",
            "got two kernels named 'masked_sum'",
        ),
    ],
)
def test_a_file_that_declares_none_is_one_line(command, tmp_path, text, says):
    file = tmp_path / "wrong.py"
    file.write_text(text)
    status, _, err = command("--module", file)
    assert status == 1 and says in err and err.count("\n") == 1


def test_without_hypothesis_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    status, _, err = command()
    assert status == 1 and err == "error: kernels: hypothesis is not installed; pip install 'deepseek_jax[test]'\n"


def test_too_few_devices_are_refused(command):
    """The tests' process has one, which is there before the command."""
    status, _, err = command("--kernel", "transports", "--examples", 1)
    assert status == 1 and err.startswith("error: kernel: got 1 cpu devices, wanted 8 for transports"), err
