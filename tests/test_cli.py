"""What every command line shares: one line for a user's mistake, one start of several processes."""

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
