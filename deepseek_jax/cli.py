"""What every command line shares: arguments by tyro, one line instead of a traceback for a user's mistake, and the
start and end of several processes."""

import io
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial, wraps
from itertools import groupby
from types import NoneType
from typing import Any, get_args, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo, UnsupportedTypeAnnotationError

from deepseek_jax import distributed, interrupt
from deepseek_jax.commands.options import HELPS, prepared
from deepseek_jax.commands.settings_file import options_of


def run(main: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Call `main`, or the one of several commands that the first argument names, with the command line's arguments.

    Positional-only parameters of `main` are positional arguments, the others are options.
    A ValueError or a missing file is the user's to mend: its message goes to stderr in one line, exit status 1.
    Arguments that cannot be are a line too, and status 2. Ctrl-C exits with 130. Anything else is our own mistake and
    keeps its traceback.
    A warning is one line on stderr as well, without the line of source that Python shows.
    Set DEEPSEEK_JAX_TRACEBACK=1 to see the traceback of a ValueError as well.

    Where the environment says that there are several processes, they are joined first (`distributed.start`): the main
    one alone prints; an error is printed by the process that has it, with its number, and ends all of them.
    """
    program = interrupt.raise_from_here()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            if distributed.start():
                _call_in_one_of_several(main)
            else:
                _call(main)
    except KeyboardInterrupt:
        interrupt.end(program=program)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as problem:
        if os.environ.get("DEEPSEEK_JAX_TRACEBACK"):
            raise
        distributed.say(" ".join(_said_by(problem).split()))
        raise SystemExit(1) from None


def _said_by(problem: ValueError | OSError) -> str:
    """Its message; the system's has the number of an error and the name last, which is turned round."""
    if isinstance(problem, OSError) and problem.filename is not None and problem.strerror:
        name = os.fsdecode(problem.filename) if isinstance(problem.filename, str | bytes) else problem.filename
        return f"{name}: {problem.strerror.lower()}"
    return str(problem)


def _warn(message: Warning | str, *of_source: Any) -> None:
    """In the place of `warnings.showwarning`."""
    distributed.say(" ".join(str(message).split()), kind="warning")


_SHOWN = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
_NUMBERS = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}
_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _optional(of: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """`INT` in the help for `int | None`, whose default says that there may be none; the word None is still taken."""
    some = [kind for kind in get_args(of.type) if kind is not NoneType]
    if len(some) + 1 != len(get_args(of.type)) or len(some) != 1:
        return None
    spec = _REGISTRY.get_primitive_spec(PrimitiveTypeInfo.make(some[0], of.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    return replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


def _call(main: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    with _refusals_in_one_line():
        if isinstance(main, dict):
            parts = {name: _later(part) for name, part in main.items()}
            if sys.argv[1:2] and sys.argv[1] in main:
                _refuse_repeated(main[sys.argv[1]], sys.argv[2:])
            begin = tyro.extras.subcommand_cli_from_dict(parts, config=_SHOWN, registry=_REGISTRY)
        else:
            function, arguments = prepared(main, sys.argv[1:])
            _refuse_repeated(function, arguments)
            begin = tyro.cli(_later(function), args=arguments, config=_SHOWN, registry=_REGISTRY)
    begin()


def _refuse_repeated(function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """An option of several values that stands there twice: the last would count, and the first be dropped unsaid."""
    words = (word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments if word[:2] == "--")
    for name, count in Counter(words).items():
        if count > 1 and name in (options := options_of(function)) and _of_several(options[name].wanted):
            shown = f"--{name.replace('_', '-')}"
            print(f"{shown}: got it {count} times, wanted it once with all its values: {shown} A B", file=sys.stderr)
            raise SystemExit(2)


def _of_several(kind: Any) -> bool:
    return any(get_origin(of) in (tuple, list, Sequence) for of in (kind, *get_args(kind)))


def _later(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """The same command line, but what is called with its arguments is called when they are known to be right."""
    return wraps(function)(lambda *given, **named: partial(function, *given, **named))


@contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    """Around tyro, which says what is wrong with arguments in a box of several lines, and ends with status 2."""
    said = io.StringIO()
    columns = os.environ.get("COLUMNS")
    if not HELPS & set(sys.argv[1:]):
        os.environ["COLUMNS"] = "100000"  # so that no line is broken, nor a word in it
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code == 2:
            distributed.say(_of_box(said.getvalue()))
            said = io.StringIO()
        raise
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns
        sys.stderr.write(said.getvalue())


def _of_box(box: str) -> str:
    """What is in the first part of a box, drawn in Unicode or in ASCII, and the names of options in the others."""
    rows = [row.strip("│") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]  # without its title
    parts = [list(part) for rule, part in groupby(rows, lambda row: not row.strip("─-╰╯ ")) if not rule]
    if not parts:
        return " ".join(box.split())
    said = re.sub(r"^Error parsing (?!-)[^:]*: ", "", " ".join(" ".join(parts[0]).split())).removesuffix(".")
    for pattern, wanted in _NUMBERS.items():
        said = re.sub(rf"^Error parsing (\S+): {pattern}: (.*)", rf"\1: got \2, wanted {wanted}", said)
    if said.startswith("Unrecognized"):
        near = re.findall(r"^ +(--[\w-]+)", "\n".join(row for part in parts[1:] for row in part), re.MULTILINE)
        said += f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    return f"{said}; --help explains the options"


def _call_in_one_of_several(main: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """As `_call`; every end but one of all alike leaves at once, because the others may be waiting for this process."""
    try:
        _call(main)
    except SystemExit as end:
        if end.code not in (None, 0, distributed.PREEMPTED):
            distributed.leave(end.code if isinstance(end.code, int) else 1)
        distributed.finish()
        raise
    except KeyboardInterrupt:
        distributed.say("interrupted")
        distributed.leave(130)
    except Exception as problem:
        plain = isinstance(problem, ValueError | OSError) and not os.environ.get("DEEPSEEK_JAX_TRACEBACK")
        distributed.fail(problem, plain=plain)
    distributed.finish()
