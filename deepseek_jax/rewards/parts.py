r"""What an answer is made of: brackets and what they hold, lists, unions, matrices, `\pm`."""

import re
from typing import NamedTuple

from deepseek_jax.rewards.notation import depths, pieces

_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\s?\{(?:[pb]?matrix|smallmatrix|array)\}(?:\s?\{[lcr| ]*\})?(.*)"
    r"\\end\s?\{(?:[pb]?matrix|smallmatrix|array)\}\s*[)\]]?"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_EMPTY = frozenset([r"\emptyset", r"\{\}", r"\{ \}"])
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_MINUS_PLUS = re.compile(r"\\mp(?![A-Za-z])")
_GROUPED = re.compile(r"(?<![0-9])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])")
_OPENED_OUTWARDS = re.compile(r"([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])")


class Parts(NamedTuple):
    """A list of answers and what encloses it: "()", "[]", "[)", "(]", "{}" or, for a bare list, ""."""

    kind: str
    items: list[str]


def closing(text: str) -> int:
    """Where the bracket closes with which the text begins; -1 where it does not."""
    ends = (place for place, depth in enumerate(depths(text)) if depth == 0 and text[place] in ")]}")
    return next(ends, -1)


def unwrapped(text: str) -> str:
    r"""Without brackets around a single answer: {5}, (5) and \{5\} are 5."""
    while text[:1] in ("{", "(", "\\"):
        if text.startswith("{") and closing(text) == len(text) - 1:
            text = text[1:-1].strip()
            continue
        opened, body, closed = enclosed(text)
        if opened + closed not in ("()", "{}") or len(split(body)) != 1:
            return text
        text = body.strip()
    return text


def enclosed(text: str) -> tuple[str, str, str]:
    """(opening bracket, what is inside, closing bracket); ("", text, "") where no pair encloses it all."""
    if text.startswith("\\{") and text.endswith("\\}") and closing(text[1:]) == len(text) - 2:
        return "{", text[2:-2], "}"
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and closing(text) == len(text) - 1:
        return text[0], text[1:-1], text[-1]
    if match := _OPENED_OUTWARDS.fullmatch(text):
        return "[" if match[1] == "[" else "(", match[2], "]" if match[3] == "]" else ")"
    return "", text, ""


def split(text: str) -> list[str]:
    """Parts between the commas and semicolons that stand in no bracket; in "1,000, 2" only the second separates."""
    if "\\begin" in text:
        return [text.strip()]
    text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text) if re.search(r",\s", text) else text
    return [part.strip() for part in pieces(text, ",;") if part.strip()]


def parts_of(text: str) -> Parts | None:
    r"""The text as a tuple, interval, set or bare list, of which `1 \pm 2` is one; None where it is none of them."""
    if text in _EMPTY:
        return Parts("{}", [])
    opened, body, closed = enclosed(text)
    items = split(body)
    if opened + closed in ("", "{}"):
        items = [sign for item in items for sign in _both_signs(item)]
    if opened == "{":
        return Parts("{}", items)
    return None if len(items) < 2 else Parts(opened + closed, items)


def union_of(text: str) -> list[str]:
    """What a union is of; the text alone where it is none."""
    return [part.strip() for part in _UNION.split(text)]


def matrix_of(text: str) -> list[list[str]] | None:
    """A matrix by rows; None where the text is none."""
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match[1]:
        return None
    rows = [row for row in match[1].split("\\\\") if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _both_signs(item: str) -> list[str]:
    if not _PLUS_MINUS.search(item):
        return [item]
    upper = _MINUS_PLUS.sub("-", _PLUS_MINUS.sub("+", item))
    lower = _MINUS_PLUS.sub("+", _PLUS_MINUS.sub("-", item))
    return [upper.strip().removeprefix("+").strip(), lower.strip()]
