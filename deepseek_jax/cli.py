"""What every command line shares: arguments by tyro, and one line instead of a traceback for a user's mistake."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro


def run(main: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Call `main`, or the one of several commands that the first argument names, with the command line's arguments.

    Positional-only parameters of `main` are positional arguments, the others are options.
    A ValueError or a missing file is the user's to mend: its message goes to stderr in one line, exit status 1.
    Ctrl-C exits with 130. Anything else is our own mistake and keeps its traceback.
    Set DEEPSEEK_JAX_TRACEBACK=1 to see the traceback of a ValueError as well.
    """
    try:
        call = tyro.extras.subcommand_cli_from_dict if isinstance(main, dict) else tyro.cli
        call(main, config=(tyro.conf.OmitArgPrefixes,))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as problem:
        if os.environ.get("DEEPSEEK_JAX_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        raise SystemExit(1) from None
