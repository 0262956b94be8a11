"""The command `deepseek-jax`: its first word names a file of `commands/`, which is imported when it is asked for."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from deepseek_jax import __version__
from deepseek_jax.compilation_cache import hush_loader
from deepseek_jax.interrupt import end_at_once

_PROGRAM = "deepseek-jax"


def main(command: str | None = None) -> None:
    """Run a command with the arguments of the command line; nothing heavy is imported before its name is known.

    Args:
        command: the launcher of one command names it; without it the first argument does.
    """
    end_at_once()
    hush_loader()
    if command is None:
        command = _named(sys.argv[1:2])
        sys.argv[:2] = [f"{_PROGRAM} {command}"]
    run = import_module("deepseek_jax.cli").run
    run(import_module(f"deepseek_jax.commands.{command}").main)


def commands() -> dict[str, str]:
    """The first line of what each command says of itself. The files are read and not imported, which takes seconds."""
    found = {}
    for file in sorted((Path(__file__).parent / "commands").glob("*.py")):
        module = ast.parse(file.read_bytes())
        if any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in module.body):
            found[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def _named(words: list[str]) -> str:
    """The command that is asked for, where it is one."""
    if words == ["--version"]:
        print(f"{_PROGRAM} {__version__}")
    elif words in ([], ["-h"], ["--help"], ["help"]):
        print(f"usage: {_PROGRAM} COMMAND ...\n")
        for name, line in commands().items():
            print(f"  {name:<15}{line}")
        print(f"\n{_PROGRAM} COMMAND --help explains a command.")
    elif words[0] in (known := commands()):
        return words[0]
    else:
        print(f"error: got command {words[0]!r}, wanted one of {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
