"""What every command line shares: one line for a user's mistake, one start of several processes."""

import warnings

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
