"""Fields of a row by the names that public releases give them, each checked."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from deepseek_jax.data.sources import Row


def value(row: Row, *names: str) -> Any:
    """The first field there under one of these names, in any case of letters; None where there is none."""
    spelt = {key.casefold(): key for key in reversed(row)}
    for name in names:
        key = name if name in row else spelt.get(name.casefold())
        if key is not None and row[key] is not None:
            return row[key]
    return None


def text(row: Row, *names: str) -> str:
    """A field that is text or a number, as text; ValueError where it is neither or blank."""
    found = value(row, *names)
    wanted = " or ".join(map(repr, names))
    if found is None:
        raise ValueError(f"no field {wanted} among {', '.join(map(str, row))}")
    told = _as_text(found, wanted)
    if not told.strip():
        raise ValueError(f"{wanted}: got {found!r:.80}, which is blank, wanted text")
    return told


def maybe(row: Row, *names: str) -> str:
    """A field that is text or a number, as text, "" where there is none; ValueError where it is neither."""
    found = value(row, *names)
    return "" if found is None else _as_text(found, " or ".join(map(repr, names)))


def _as_text(found: Any, wanted: str) -> str:
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise ValueError(f"{wanted}: got {found!r:.80}, wanted text")
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{wanted}: got {found!r}, wanted a finite number or text")
    if isinstance(found, str) and re.search("[\ud800-\udfff]", found):
        raise ValueError(f"{wanted}: holds half a surrogate pair, which is no text; correct it")
    return str(found)


def amount(row: Row, name: str, default: float, *, most: float) -> float:
    """A field that is a number above 0, or what stands for it where there is none; ValueError where it is no such."""
    found = value(row, name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= most:
        raise ValueError(f"{name!r}: got {found!r:.80}, wanted a number above 0, {most:g} at most")
    return float(found)


def texts(row: Row, *names: str) -> tuple[str, ...]:
    """A field that is a list of texts, or JSON text of one."""
    found = parsed(value(row, *names), names[0])
    if not isinstance(found, list | tuple) or not found or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{names[0]!r}: got {found!r:.80}, wanted a list of texts")
    return tuple(_as_text(each, repr(names[0])) for each in found)


def objects(found: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects, or JSON text of one; [] where there is none."""
    given = parsed(found, name) if found else []
    if not isinstance(given, list | tuple) or not all(isinstance(each, dict) for each in given):
        raise ValueError(f"{name!r}: got {given!r:.80}, wanted a list of objects")
    return list(given)


def parsed(found: Any, name: str) -> Any:
    """A value, out of its JSON text where it is one."""
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{name!r}: got {found!r:.80}, wanted JSON ({problem})") from None


def letter(row: Row, count: int, *names: str) -> str:
    """A right option's letter, from a letter or its number from 0, which tables have as text."""
    found = value(row, *names)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    if isinstance(found, str) and re.fullmatch(r"\s*[0-9]{1,2}\s*", found):
        found = int(found)
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < count:
        return letters[found]
    if isinstance(found, str) and len(found.strip()) == 1 and found.strip().upper() in letters:
        return found.strip().upper()
    raise ValueError(f"{names[0]!r}: got {found!r:.80}, wanted a letter of {letters}, or a number below {count}")


def name_of(row: Row, number: int, *names: str) -> str:
    """What the data set calls a row, or its number."""
    found = value(row, *names)
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) else str(number)


def lines(*parts: str | None) -> str:
    """Parts of a prompt that are there, a blank line between two."""
    return "\n\n".join(part.strip("\n") for part in parts if part)


def joined(row: Row, names: Sequence[str]) -> str:
    """Texts of several fields, of which the last must be there, with a space between two."""
    return " ".join([*(part for name in names[:-1] if (part := maybe(row, name).strip())), text(row, names[-1])])
