"""A command's help, short and whole, and what its settings come from."""

import sys

import pytest

from deepseek_jax.cli import run
from deepseek_jax.commands.options import command
from deepseek_jax.commands.settings_file import options_of, with_values
from tests.commands.test_settings_file import Outer, Settings

DOCUMENTED = """Settings.

    Args:
        config: a file.
        steps: how many; all of them.
        flag: whether.
        name: of it: "a" is one, "b" another.
        least: bound. And more.
        outer: The outer ones.
"""


def main_of(seen: list):
    def defaults(given):
        seen.append(dict(given))
        return with_values(Settings(), {"beta": 0.25} if given.get("name") == "x" else {})

    @command(Settings, common=("steps", "name", "lr"), deciding=("name", "flag"), defaults=defaults)
    def main(config: Settings) -> None:
        """Do it."""
        seen.append(config)

    return main


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setattr(Settings, "__doc__", DOCUMENTED)
    monkeypatch.setattr(
        Outer, "__doc__", "Outer.\n\n    Args:\n        lr: rate.\n        files: names.\n        inner: x.\n"
    )
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str):
        seen: list = []
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        try:
            run(main_of(seen))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, seen, capsys.readouterr()

    return call


def test_the_short_help_shows_the_common_options_by_group_and_the_whole_one_all(call):
    status, seen, shown = call("--help")
    assert status in (0, None) and seen == [{}]
    assert [option for option in options_of(Settings) if f"--{option} " in shown.out] == ["steps", "name", "lr"]
    assert "how many (default: 3)" in shown.out and "of it (default" in shown.out and "outer options" in shown.out
    assert "--help-all shows 7 more" in " ".join(shown.out.split())
    assert call("-h")[2].out == shown.out
    whole = call("--help-all")[2].out
    assert [option for option in options_of(Settings) if f"--{option}" in whole] == list(options_of(Settings))
    assert "--no-compilation-cache" in whole and "compilation-cache" not in shown.out
    assert "how many; all of them." in whole and "outer.inner options" in whole
    assert "Defaults depend on --name, --flag: given beside" in " ".join(shown.out.split())
    status, seen, shown = call("--help-all", "--name", "x")
    assert seen == [{"name": "x"}] and "default: 0.25" in shown.out and "default: 0.25" not in whole


def test_help_all_is_help_for_a_command_without_a_short_one(monkeypatch, capsys):
    def plain(*, steps: int = 3) -> None:
        """Do it."""

    monkeypatch.setattr(sys, "argv", ["tool", "--help-all"])
    with pytest.raises(SystemExit):
        run(plain)
    assert "--steps" in capsys.readouterr().out


def test_compiled_programs_are_kept_unless_one_says_no_or_there_are_several_processes(call, monkeypatch):
    kept: list[None] = []
    monkeypatch.setattr("deepseek_jax.commands.options.keep_compiled", lambda: kept.append(None))
    call("--steps", "2")
    assert len(kept) == 1
    call("--steps", "2", "--no-compilation-cache")
    call("--help")
    monkeypatch.setattr("deepseek_jax.distributed.process_count", lambda: 2)
    call("--steps", "2")
    assert len(kept) == 1


def test_the_command_line_counts_before_the_file_and_the_file_before_the_defaults(call, tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('steps = 5\nleast = 6\nname = "x"\n[outer]\nlr = 2\n')
    _, seen, _ = call("--config", file, "--lr", "4", f"--steps={7}")
    assert seen[0] == {"name": "x"}  # what defaults depend on is found in the file
    assert seen[1] == with_values(
        Settings(), {"config": file, "steps": 7, "least": 6, "name": "x", "lr": 4, "beta": 0.25}
    )
    _, seen, _ = call("--config", file, "--name", "y", "--flag")
    assert seen[0] == {"name": "y", "flag": True} and seen[1].outer.inner.beta == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 'b.toml'", "config: got a file in a file"),
        ("stepz = 1", "stepz: no such option"),
        ("steps = 'x'", "steps: got 'x', wanted a whole number"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(call, tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    status, seen, shown = call("--config", tmp_path / "a.toml")
    assert status == 1 and not [each for each in seen if isinstance(each, Settings)]
    assert shown.err.startswith(f"error: {tmp_path / 'a.toml'}: {message}") and shown.err.count("\n") == 1


def test_an_option_without_its_value_is_refused_as_ever(call):
    assert call("--name")[0] == 2
    assert call("--nope", "3")[0] == 2
