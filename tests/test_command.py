"""The command `deepseek-jax`, from a tree and from an installed wheel, and its launchers in tools/ and experiments/."""

import re
import sys
import sysconfig
import zipfile
from importlib import import_module

import pytest

import deepseek_jax
from deepseek_jax.__main__ import commands
from deepseek_jax.cli import run
from tests.checkpoint.folders import QWEN2, random_folder
from tests.wheel import ROOT, child, wheel

LAUNCHERS = {
    "tools/check_kernels.py": "kernels",
    "tools/compare.py": "compare",
    "tools/compile_pod.py": "compile",
    "tools/contamination.py": "contamination",
    "tools/convert_hf.py": "convert",
    "tools/evaluate.py": "evaluate",
    "tools/export_hf.py": "export",
    "tools/generate.py": "generate",
    "tools/inspect_hf.py": "inspect",
    "tools/logits.py": "logits",
    "tools/merge_lora.py": "merge",
    "tools/plan.py": "plan",
    "experiments/distill.py": "distill",
    "tools/serve.py": "serve",
    "experiments/r1_zero.py": "train",
    "experiments/sft.py": "sft",
    "experiments/r1.py": "r1",
    "experiments/rejection.py": "rejection",
    "tools/report.py": "report",
}
LAUNCHER = """

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("{}")
"""
POSITIONAL = {
    "compare": "[RUNS]",
    "compile": "",
    "contamination": "[DATA]",
    "convert": "MODEL OUT",
    "evaluate": "[MODEL]",
    "export": "MODEL OUT",
    "generate": "MODEL",
    "inspect": "[MODEL]",
    "logits": "MODEL TOKENS LOGITS",
    "merge": "MODEL ADAPTER OUT",
    "plan": "[MODEL]",
    "rejection": "[MODEL]",
    "report": "RUN",
    "serve": "[MODEL]",
}


def test_what_is_asked_of_the_command_itself_loads_nothing(tmp_path):
    """Help, version and an unknown name."""
    code = (
        "import sys; from deepseek_jax.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'jax', 'numpy', 'tyro'} & set(sys.modules)"
    )
    ask = lambda *words: child(sys.executable, "-c", code, *words, cwd=tmp_path, PYTHONPATH=str(ROOT))
    shown = ask("--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: deepseek-jax COMMAND")
    assert ask().stdout == ask("-h").stdout == shown.stdout
    for name, line in commands().items():
        assert f"  {name:<15}{line}\n" in shown.stdout and line.endswith(".") and len(line) < 120
    assert ask("--version").stdout == f"deepseek-jax {deepseek_jax.__version__}\n"
    refused = ask("fine-tune\x1b[2J", "--help")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    wanted = f"error: got command 'fine-tune\\x1b[2J', wanted one of {', '.join(commands())}\n"
    assert refused.stderr == wanted


def test_every_command_is_a_file_with_a_main():
    assert set(LAUNCHERS.values()) <= set(commands())
    for name in commands():
        assert callable(import_module(f"deepseek_jax.commands.{name}").main)


@pytest.mark.parametrize("name", commands())
def test_help_names_what_is_given_by_position_and_no_none(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", [f"deepseek-jax {name}", "--help"])
    with pytest.raises(SystemExit) as end:
        run(import_module(f"deepseek_jax.commands.{name}").main)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "{None" not in shown and "|INT" not in shown and "None}" not in shown
    listed = shown.partition("positional arguments")[2].partition(" options ")[0]
    found = re.findall(r"^. (\[?[A-Z_]+\]?)\s", listed, re.MULTILINE)
    assert found == POSITIONAL.get(name, "").split()


def test_what_may_be_none_is_still_none_by_that_word(monkeypatch):
    seen = []

    def main(*, count: int | None = 3, how: bool | None = None, name: str | None = "x") -> None:
        seen.append((count, how, name))

    for words in ([], ["--count", "None", "--name", "None"], ["--count", "7", "--how", "True", "--name", "y"]):
        monkeypatch.setattr("sys.argv", ["tool", *words])
        run(main)
    assert seen == [(3, None, "x"), (None, None, None), (7, True, "y")]


@pytest.mark.parametrize("file", LAUNCHERS)
def test_a_launcher_is_its_command(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.split('"""', 2)[2] == LAUNCHER.format(LAUNCHERS[file])


def test_a_launcher_works_from_any_folder(tmp_path):
    """Without an install, and with the package beside it rather than another."""
    (tmp_path / "other" / "deepseek_jax").mkdir(parents=True)
    (tmp_path / "other" / "deepseek_jax" / "__init__.py").write_text("raise SystemExit('the other package')")
    launcher = ROOT / "tools/inspect_hf.py"
    done = child(sys.executable, launcher, "--preset", "tiny", cwd=tmp_path, PYTHONPATH=str(tmp_path / "other"))
    assert done.returncode == 0 and done.stdout.startswith("architecture"), done.stderr


@pytest.mark.slow
def test_an_installed_wheel_is_whole(tmp_path):
    """Built from the tree, installed into an environment of its own, run from an empty folder."""
    made = wheel(tmp_path)
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "deepseek_jax").rglob("*") if path.is_file()}
    assert {name for name in source if "__pycache__" not in name} <= set(zipfile.ZipFile(made).namelist())

    done = child(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # this Python may be of an environment itself, whose packages are no system's
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    python, command = tmp_path / "env/bin/python", tmp_path / "env/bin/deepseek-jax"
    done = child(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", made, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    empty = tmp_path / "empty"
    empty.mkdir()
    place = child(python, "-c", "import deepseek_jax; print(deepseek_jax.__file__)", cwd=empty)
    assert place.stdout.startswith(str(packages)), place
    assert child(command, "--version", cwd=empty).stdout == f"deepseek-jax {deepseek_jax.__version__}\n"
    assert child(command, "--help", cwd=empty).stdout.count("\n  ") == len(commands())
    random_folder(empty / "MODEL", QWEN2, "float32")
    for words, said in [
        (("convert", "MODEL", "CONVERTED", "--verify"), "wrote CONVERTED\n"),
        (("export", "CONVERTED", "BACK"), "wrote BACK\n"),
        (("inspect", "BACK"), "architecture  qwen2\n"),
    ]:
        done = child(command, *words, cwd=empty)
        assert done.returncode == 0 and said in done.stdout, done
    kept = [(empty / name / "model.safetensors").read_bytes() for name in ("MODEL", "BACK")]
    assert kept[0] == kept[1]
    missing = child(command, "inspect", "nowhere", cwd=empty)
    assert missing.returncode == 1 and missing.stderr.startswith("error: nowhere: no such folder")
    assert child(command, "logits", cwd=empty).returncode == 2
