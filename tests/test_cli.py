"""What every command line shares: one line for a user's mistake, one start of several processes."""

import io
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import pytest

from deepseek_jax.cli import run


def refuse() -> None:
    raise ValueError("steps: got 0,\n wanted at least 1")


def test_a_users_mistake_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run(refuse)
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "error: steps: got 0, wanted at least 1\n")


@dataclass(frozen=True)
class Settings:
    """Of a tool.

    Args:
        steps: how many there are in all.
        form: of them.
        lr: of each.
    """

    steps: int = 3
    form: Literal["a", "b"] = "a"
    lr: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, wanted at least 1; {'a word ' * 30}and an end")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m --stepss 4", "Unrecognized options: --stepss, 4; did you mean --steps?"),
        ("m --\x1b[2J", r"Unrecognized options: --\x1b[2J"),
        ("m other.jsonl", "Unrecognized options: other.jsonl"),
        ("", "Missing from tool: MODEL folder of it. (required)"),
        ("m --steps many", "--steps: got 'many', wanted a whole number"),
        ("m --lr many", "--lr: got 'many', wanted a number"),
        ("m --steps", "Missing value for argument '--steps'. Expected 1 values"),
        ("m --form c", "invalid choice 'c' for argument '--form'. Expected one of ('a', 'b')"),
        ("m --steps 0", f"steps: got 0, wanted at least 1; {'a word ' * 30}and an end"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_arguments_that_cannot_be_are_one_line_at_any_width(words, said, encoding, capsys, monkeypatch):
    def main(model: str, /, *, settings: Settings = Settings()) -> None:
        """A tool.

        Args:
            model: folder of it.
            settings: its own.
        """
        raise AssertionError("it began")

    monkeypatch.setattr("sys.argv", ["tool", *words.split()])
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2 and os.environ["COLUMNS"] == "40"
    assert capsys.readouterr() == ("", f"error: {said}; --help explains the options\n")


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("words", ["--of a --of b", "--of a --of=b c", "--of a --many 1 --of b"])
def test_values_are_not_dropped_where_their_option_stands_twice(words, several, capsys, monkeypatch):
    def main(*, of: tuple[str, ...] = (), many: list[int] | None = None) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr("sys.argv", ["tool", *(["part"] if several else []), *words.split()])
    with pytest.raises(SystemExit) as end:
        run({"part": main, "other": main} if several else main)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: --of: got it 2 times, wanted it once with all its values: --of A B\n")


@pytest.mark.parametrize("words", ["--steps 4 --steps 5 --of a b", "--steps 5"])
def test_one_value_is_that_of_the_last(words, monkeypatch):
    found = []

    def main(*, steps: int = 5, of: tuple[str, ...] = ()) -> None:
        found.append(steps)

    monkeypatch.setattr("sys.argv", ["tool", *words.split()])
    run(main)
    assert found == [5]


def test_what_the_system_refuses_begins_with_the_name(capsys, monkeypatch, tmp_path):
    def main() -> None:
        (tmp_path / "file").mkdir()

    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: file exists\n"


def test_what_begins_has_its_own_stderr_and_width(capsys, monkeypatch):
    def main() -> int:
        assert os.environ["COLUMNS"] == "40"
        print("note", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr("sys.argv", ["tool", "one"])
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        run({"one": main, "two": main})
    assert capsys.readouterr() == ("", "note\n")


def test_a_half_set_environment_is_refused_before_the_tool_begins(capsys, monkeypatch):
    called = []
    monkeypatch.setattr("sys.argv", ["tool"])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(SystemExit) as end:
        run(lambda: called.append(True))
    assert end.value.code == 1 and called == []
    wanted = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID together; set all three, or none"
    assert capsys.readouterr().err == f"error: JAX_COORDINATOR_ADDRESS: not set, wanted {wanted}\n"


@pytest.mark.parametrize(
    "said, shown",
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("title \x1b]0;x\x07, csi \x9b2J", r"title \x1b]0;x\x07, csi \x9b2J"),
        ("bell \x07 back \x08 del \x7f nul \0", r"bell \x07 back \x08 del \x7f nul \x00"),
        ("turned \u202etxt.exe", r"turned \u202etxt.exe"),
        ("half \ud800, byte \udcff", r"half \ud800, byte \udcff"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("next\u2028line \u200b\u2066", r"next line \u200b\u2066"),
        ("ü 漢 ½ [bold]m[/bold] \\", "ü 漢 ½ [bold]m[/bold] \\"),
    ],
)
def test_control_characters_do_not_reach_the_terminal(said, shown, capsys, monkeypatch):
    def refuse() -> None:
        raise ValueError(said)

    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit):
        run(refuse)
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_a_warning_is_one_line_without_source(capsys, monkeypatch):
    def careful() -> None:
        for _ in range(2):
            warnings.warn("a file\nof \x1b[2Jothers", stacklevel=1)
        print("done")

    monkeypatch.setattr("sys.argv", ["tool"])
    shown = warnings.showwarning
    run(careful)
    assert capsys.readouterr() == ("done\n", "warning: a file of \\x1b[2Jothers\n")
    assert warnings.showwarning is shown


@pytest.mark.parametrize("pid, status", [(1, 128 + signal.SIGTERM), (2, -signal.SIGTERM)])
def test_a_containers_first_process_hears_of_a_sigterm(pid, status):
    """The kernel gives process 1 no signal that it has no handler for, so that a container would not stop."""
    code = (
        f"import os, signal; os.getpid = lambda: {pid}; from deepseek_jax.interrupt import end_at_once; end_at_once(); "
    )
    assert subprocess.run([sys.executable, "-c", code + "signal.raise_signal(signal.SIGTERM)"]).returncode == status
