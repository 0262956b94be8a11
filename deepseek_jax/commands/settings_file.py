"""Settings in a file, by the names of the options: TOML or YAML is read, and TOML is written that reads as the same."""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

NONE = "None"
"""How a file says None, as the command line does: TOML has no word for it."""


class Option(NamedTuple):
    """An option of a command: the group that it is shown in, from the outermost, the type of its values, and other
    names that it has."""

    group: tuple[str, ...]
    wanted: Any
    others: tuple[str, ...] = ()


def options_of(settings: type | Callable[..., Any], group: tuple[str, ...] = ()) -> dict[str, Option]:
    """Every option of a tree of dataclasses, or of a function's parameters. A dataclass in a field is a group; the
    field's name, or the one that `tyro.conf.arg` gives it, is the group's."""
    found: dict[str, Option] = {}
    hints = get_type_hints(settings, include_extras=True)
    names = [f.name for f in dataclasses.fields(settings)] if dataclasses.is_dataclass(settings) else hints
    for field in (name for name in names if name != "return"):
        inner, notes = bare(hints[field])
        if dataclasses.is_dataclass(inner):
            name = next((note.name for note in notes if getattr(note, "name", None)), field)
            below = options_of(inner, (*group, name))
        else:
            others = [other for note in notes for other in getattr(note, "aliases", None) or ()]
            below = {field: Option(group, inner, tuple(other.strip("-").replace("-", "_") for other in others))}
        assert not found.keys() & below.keys(), f"{settings.__name__}: two options of one name"
        found |= below
    return found


def bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what it is annotated with, and that."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """The same settings with other values of some options, in whatever group they are."""
    changes = {}
    for field in dataclasses.fields(settings):
        held = getattr(settings, field.name)
        if dataclasses.is_dataclass(held):
            changes[field.name] = with_values(held, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(settings, **changes)


# --- reading -------------------------------------------------------------------------------------


def read_settings(path: Path, settings: type) -> dict[str, Any]:
    """The settings that a file names, by the names of their options.

    Keys stand by themselves or in the table of their group, `[algorithm.loss]` for one inside another. Paths are those
    of the command line: from the folder in which the command runs.

    Args:
        path: a .toml, .yaml or .yml file.
        settings: the command's dataclass.

    Raises:
        ValueError: no such file, another form, an option that there is not, or a value of another type; the message
            names the file, the key and what is wanted.
    """
    options = options_of(settings)
    others = {other: name for name, option in options.items() for other in option.others}
    found: dict[str, Any] = {}
    for group, key, value in _pairs(_parsed(path), (), {option.group for option in options.values()}, path):
        name, table = key.replace("-", "_"), f"[{'.'.join(group)}] " if group else ""
        name = others.get(name, name)
        option = options.get(name)
        if option is None:
            near = difflib.get_close_matches(name, options, 1)
            advice = f"did you mean {near[0]!r}?" if near else "--help-all shows all"
            raise ValueError(f"{path}: {table}{key}: no such option; {advice}")
        if group and group != option.group:
            place = f"[{'.'.join(option.group)}]" if option.group else "no table"
            raise ValueError(f"{path}: {table}{key}: got it in that table, wanted it in {place}, or before all tables")
        if name in found:
            raise ValueError(f"{path}: {table}{key}: is there twice; leave one out")
        try:
            found[name] = converted(value, option.wanted)
        except TypeError as wanted:
            raise ValueError(f"{path}: {table}{key}: got {value!r:.80}, wanted {wanted}") from None
    return found


def _pairs(
    table: Mapping[str, Any], group: tuple[str, ...], groups: set[tuple[str, ...]], path: Path
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    for key, value in table.items():
        below = (*group, str(key))
        if not isinstance(value, dict):
            yield group, str(key), value
        elif below in groups:
            yield from _pairs(value, below, groups, path)
        else:
            names = ", ".join(sorted(".".join(known) for known in groups if known))
            raise ValueError(f"{path}: [{'.'.join(below)}]: no such group of options; wanted one of {names}")


def _parsed(path: Path) -> Mapping[str, Any]:
    readers = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise ValueError(f"{path}: got settings as {path.suffix or 'no suffix'!r}, wanted .toml or .yaml")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted settings as .toml or .yaml")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as problem:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()}: {problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, wanted names of options with their values")
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number, as in every later version of it; PyYAML reads text where there is no dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _yaml(text: str) -> Any:
    values = yaml.load(text, _Loader)  # a SafeLoader: plain values alone
    return {} if values is None else values


def converted(value: Any, wanted: Any) -> Any:
    """The value of a file as an option of that type holds it. TypeError says what is wanted."""
    kind = get_origin(wanted)
    if kind in (Union, UnionType):
        (inner,) = (choice for choice in get_args(wanted) if choice is not NoneType)
        return None if value in (None, NONE) else converted(value, inner)
    if kind is Literal:
        if value in get_args(wanted):
            return value
    elif kind is tuple and isinstance(value, list):
        return tuple(converted(each, get_args(wanted)[0]) for each in value)
    elif wanted is float and type(value) in (int, float):
        return float(value)
    elif wanted is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is wanted:
        return value
    raise TypeError(_described(wanted))


def _described(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, get_args(wanted)))}"
    if get_origin(wanted) is tuple:
        return f"a list, each {_described(get_args(wanted)[0])}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path as text"}
    return words[wanted]


# --- writing -------------------------------------------------------------------------------------


def settings_text(settings: Any, defaults: Any) -> str:
    """All settings as TOML, a table a group, which `read_settings` reads as the same values.

    Args:
        settings: a tree of dataclasses.
        defaults: the command's; what is None in both is left out, because TOML has no None.

    Raises:
        ValueError: text that is no Unicode, such as half a surrogate pair in the name of a file.
    """
    tables: dict[tuple[str, ...], dict[str, Any]] = {}
    held, plain = values_of(settings), values_of(defaults)
    for name, option in options_of(type(settings)).items():
        if held[name] is not None or plain[name] is not None:
            tables.setdefault(option.group, {})[name] = NONE if held[name] is None else held[name]
    return toml_text({".".join(group): table for group, table in tables.items()})


def values_of(settings: Any) -> dict[str, Any]:
    """Every option's value by its name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        held = getattr(settings, field.name)
        found |= values_of(held) if dataclasses.is_dataclass(held) else {field.name: held}
    return found


def toml_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of plain values as TOML, the one without a name first.

    Text, whole numbers, fractions, truth values and lists of these are all that there is; a writer for the rest of
    TOML would be a library's.

    Raises:
        ValueError: text that UTF-8 cannot hold.
    """
    lines: list[str] = []
    for name in sorted(tables, key=bool):
        lines += [f"[{name}]"] if name else []
        lines += [f"{key} = {_toml(value)}" for key, value in tables[name].items()] + [""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        text = str(value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{text!a}: no Unicode text, which a file of settings could hold; rename it")
        # JSON's escapes are TOML's; the one character that JSON may hold as it is and TOML not is this
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    assert isinstance(value, Sequence), value
    return f"[{', '.join(map(_toml, value))}]"
