"""Where a command's settings come from, defaults, a file and the command line, and its short and its whole help."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import tyro

from deepseek_jax import distributed
from deepseek_jax.commands.settings_file import bare, options_of, read_settings, with_values
from deepseek_jax.compilation_cache import keep_compiled

HELPS = {"-h", "--help", "--help-all"}
_KEPT = "keep what is compiled for the next start, in ~/.cache/deepseek_jax/compiled or JAX_COMPILATION_CACHE_DIR"


class Command(NamedTuple):
    """What is known of a command beside its function.

    settings: the dataclass of its options, with a field `config`; dataclasses in it are groups of the help.
    common: names of the options that the short help shows.
    deciding: names of those that its defaults depend on.
    defaults: their values, as text or bool, as far as they are given, to the settings to begin with.
    """

    settings: type
    common: Collection[str]
    deciding: Collection[str]
    defaults: Callable[[Mapping[str, Any]], Any]


def command(
    settings: type, *, common: Collection[str], deciding: Collection[str], defaults: Callable[[Mapping[str, Any]], Any]
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Marks a function of the settings as a command with a short help, `--config` and defaults by circumstance."""

    def mark(main: Callable[[Any], None]) -> Callable[[Any], None]:
        main.command = Command(settings, common, deciding, defaults)
        return main

    return mark


def prepared(main: Callable[..., Any], arguments: Sequence[str]) -> tuple[Callable[..., Any], list[str]]:
    """What to hand to tyro: a function whose defaults, and whose help, are as the arguments want them.

    Settings of the command line count before those of the file, and these before the defaults.

    Args:
        main: one that `command` marked, or any other, which is left as it is.
        arguments: of the command line.

    Raises:
        ValueError: a file of settings that cannot be read, or whose settings contradict each other.
    """
    plain = ["--help" if word == "--help-all" else word for word in arguments]
    of: Command | None = getattr(main, "command", None)
    if of is None:
        return main, plain
    if not HELPS & set(arguments):
        return _calling(main, _begun(of, arguments), main.__doc__), plain
    given = {name: value for name, value in _given(of, arguments).items() if name in of.deciding}
    first = of.defaults(given)
    deciding = ", ".join(f"--{name.replace('_', '-')}" for name in of.deciding)
    theirs = [f"Defaults depend on {deciding}: given beside --help, they show theirs."] if deciding else []
    does = inspect.cleandoc(main.__doc__)
    if "--help-all" in arguments:
        return _calling(main, first, "\n\n".join([does, *theirs])), plain
    more = len(options_of(of.settings)) - len(of.common) + 1  # --compilation-cache is of every command
    short = [f"These are the options that most runs need; --help-all shows {more} more.", *theirs]
    return _calling(main, _with_common(first, of.common), f"{does}\n\n{' '.join(short)}", short=True), plain


def _calling(main: Callable[[Any], Any], first: Any, text: str | None, *, short: bool = False) -> Callable[..., Any]:
    def called(config: Any = first, compilation_cache: bool = True) -> Any:
        # of several processes one that has a program does not wait for another that compiles it
        if compilation_cache and distributed.process_count() == 1:
            keep_compiled()
        return main(config)

    shown = tyro.conf.Suppress if short else tyro.conf.arg(help=_KEPT)
    called.__annotations__["config"] = Annotated[type(first), tyro.conf.arg(name="")]
    called.__annotations__["compilation_cache"] = Annotated[bool, shown]
    called.__doc__ = text
    return called


def _begun(of: Command, arguments: Sequence[str]) -> Any:
    """The settings before those of the command line."""
    given = _given(of, arguments)
    file = given.pop("config", None)
    if file is None:
        return of.defaults(given)
    values = read_settings(Path(file), of.settings)
    if "config" in values:
        raise ValueError(f"{file}: config: got a file in a file, wanted it on the command line; leave it out")
    first = of.defaults({name: values[name] for name in of.deciding if name in values} | given)
    try:
        return with_values(first, values)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None


def _given(of: Command, arguments: Sequence[str]) -> dict[str, Any]:
    """The file and the options that defaults depend on; what is wrong with them, tyro says later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", *of.deciding):
        switch = {"action": argparse.BooleanOptionalAction} if options_of(of.settings)[name].wanted is bool else {}
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **switch)
    try:
        return vars(parser.parse_known_args(list(arguments))[0])
    except argparse.ArgumentError:
        return {}


def _with_common(settings: Any, common: Collection[str]) -> Any:
    """The same settings as an object of classes in whose help the other options are left out."""
    hints = get_type_hints(type(settings), include_extras=True)
    annotations, values = {}, {}
    for field in dataclasses.fields(settings):
        values[field.name] = held = getattr(settings, field.name)
        annotations[field.name] = hints[field.name]
        if dataclasses.is_dataclass(held):
            values[field.name] = _with_common(held, common)
            notes = (*bare(hints[field.name])[1], tyro.conf.arg(help=""))
            annotations[field.name] = Annotated[(type(values[field.name]), *notes)]
        elif field.name in common:
            said = tyro.conf.arg(help=_first_words(type(settings), field.name))
            annotations[field.name] = Annotated[hints[field.name], said]
        else:
            annotations[field.name] = Annotated[hints[field.name], tyro.conf.Suppress]
    made = dataclasses.make_dataclass(
        type(settings).__name__,
        [(name, annotation, dataclasses.field(default=values[name])) for name, annotation in annotations.items()],
        frozen=True,
        kw_only=True,
    )
    return made()


def _first_words(settings: type, name: str) -> str:
    """What a dataclass says of a field, to the end of its first clause."""
    said = "\n".join(inspect.getdoc(of) or "" for of in settings.__mro__)
    found = re.search(rf"^    {name}: (.*(?:\n        .*)*)", said, re.MULTILINE)
    assert found is not None, f"{settings.__name__}: says nothing of {name}"
    return re.split(r"[.;](?:\s|$)|: \"", " ".join(found[1].split()), maxsplit=1)[0]
