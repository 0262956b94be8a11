r"""What an answer names before it gives it: `x = 5`, `\angle ABC = 60^\circ`, `m + n = 7`, `x \approx 3.14`."""

import re

from deepseek_jax.rewards.notation import GREEK, depths, letters, pieces
from deepseek_jax.rewards.numbers import number

_RELATION = re.compile(r":=|(?<![<>!=:])=(?!=)|\\approx(?![A-Za-z])|\\in(?![A-Za-z])")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|neq|notin|subset)(?![A-Za-z])")

_GREEK_LETTER = rf"\\(?:{'|'.join(sorted(GREEK, key=len, reverse=True))}|ell)(?![A-Za-z])"
_POINTS = r"[A-Z](?:\s?[A-Z]){0,4}"
_OVER = r"\\(?:angle|triangle|overline|vec|hat|bar|widehat|tilde|overrightarrow|square|min|max)(?![A-Za-z])\s*"
_SYMBOL = (
    rf"(?:{_OVER})*(?:\{{\s*(?:{_POINTS}|[a-z])\s*\}}|{_POINTS}|[a-z]|{_GREEK_LETTER})'*"
    r"(?:\s*_\s*(?:\{[^{}]*\}|\w|\\[A-Za-z]+))?(?:\^\*)?'*(?:\s*\([^()=]*\))?"
)
_NAME = re.compile(
    rf"\|?\s*{_SYMBOL}\s*\|?|\[{_POINTS}\]|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)"
    rf"|[A-Za-z]{{3,}}(?:[ '-]+[A-Za-z]+){{0,7}}"
)


def alternatives(answer: str, gold: str) -> list[tuple[str, str]] | None:
    r"""What is left to compare where an answer or the right one names its value; any of it will do.

    The answer may name what it likes, `AB`, `f(2)`, `m + n`, "Area", for its value still has to be right; but not an
    equation in one unknown (`x^2 - 4x = 5` repeats the question) nor a sum of numbers (`2 + 3 = 5`). The right answer
    is taken apart only where it names one thing: `x + y = 7` may be a line. Where both do, the names must be the same.
    Of `\sqrt{2} \approx 1.41` either side is the answer, the decimals only where the right answer is a number.

    Args:
      answer: as `notation.canonical` writes it.
      gold: the right one, likewise.

    Returns:
      Pairs of an answer and a right answer; [] where the answer contradicts itself; None where nothing is to be left
      out.
    """
    got, signs = _sides(answer)
    right, _ = _sides(gold)
    if len(got) == len(right) == 1:
        return None
    if len(got) == len(right) == 2:
        return [(got[1], right[1])] if _bare(got[0]) == _bare(right[0]) else None
    if len(right) > 1:
        return [(answer, right[1])] if len(got) == 1 and len(right) == 2 and is_name(right[0]) else None
    if len(got) == 2 and signs == ["\\approx"] and not _is_quantity(got[0]):
        return _rounded(*got, gold)
    if len(got) == 2 and is_name(got[1]) and not _is_quantity(got[0]):
        got.reverse()
    return [(got[1], gold)] if len(got) == 2 and _is_quantity(got[0]) else None


def chain_of(text: str) -> list[str] | None:
    """The sides of `A = 3 * 4 = 12` that have to be equal, the last one first; None where there is no such chain."""
    sides, signs = _sides(text)
    if len(sides) < 3 or set(signs) - {"=", "\\approx"} or not _is_quantity(sides[0]):
        return None
    return [sides[-1], *(side for side in sides[1:-1] if not _is_quantity(side))]


def is_name(text: str) -> bool:
    r"""Whether the text names one thing: a variable, `AB`, `|AB|`, `\angle ABC`, `f(2)`, `(x, y)`, words."""
    return _NAME.fullmatch(text.strip()) is not None and text.strip() not in ("e", "i")


def _is_quantity(text: str) -> bool:
    """Whether the text says what is asked for: a name, or an expression of names."""
    if is_name(text):
        return True
    named = letters(text) - {"e", "i"}
    terms = [term for term in pieces(text, "+-") if term.strip()]
    if not named or not terms or any(not letters(term) for term in terms):
        return False
    return len(terms) == 1 or len(named) > 1


def _sides(text: str) -> tuple[list[str], list[str]]:
    """What stands between relation signs outside brackets, and the signs; the text alone where one side is empty, where
    there are several answers, or where it is an inequality."""
    found = list(_RELATION.finditer(text))
    if not found or _ORDER.search(text):
        return [text], []
    if len(pieces(text, ",;")) > 1:
        return [text], []
    depth = depths(text)
    cuts = [match for match in found if depth[match.start()] == 0]
    starts, ends = [0, *(cut.end() for cut in cuts)], [*(cut.start() for cut in cuts), len(text)]
    sides = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return (sides, [cut[0] for cut in cuts]) if all(sides) else ([text], [])


def _rounded(exact: str, decimals: str, gold: str) -> list[tuple[str, str]] | None:
    value, rounding = number(exact), number(decimals)
    if rounding is None:
        return None
    if value is not None:
        near = abs(value.value - rounding.value) <= abs(value.value) / 20
        return [(exact, gold), (decimals, gold)] if near else []
    if "\\" not in exact:
        return []
    return [(exact if number(gold) is None else decimals, gold)]


def _bare(text: str) -> str:
    return text.replace(" ", "").replace("{", "").replace("}", "")
