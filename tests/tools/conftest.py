"""What the tests of command lines share."""

import sys
from collections.abc import Callable

import pytest

from deepseek_jax.cli import run


@pytest.fixture
def command_line(monkeypatch, capsys) -> Callable[..., Callable[..., tuple[int, str, str]]]:
    """A tool's `main` as a call with the words of a command line: exit status, stdout, stderr."""

    def of(main: Callable) -> Callable[..., tuple[int, str, str]]:
        def call(*words: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, words)])
            status = 0
            try:
                run(main)
            except SystemExit as stop:
                status = stop.code
            printed = capsys.readouterr()
            return status, printed.out, printed.err

        return call

    return of
