r"""When are two final answers the same? Numbers and strings exactly, structure by its parts, the rest by algebra.

What can be decided without a computer algebra system is decided here, and so is what such a system would get wrong or
let pass: units, words, tuples against sets, and answers that only repeat the question.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

Algebra = Callable[[str, str], bool]
"""(answer, gold) -> equal: decides two LaTeX expressions without top-level commas or units."""

TOLERANCE = Fraction(1, 10**6)
"""Absolute difference below or at which two numbers are equal."""
MAX_CHARS = 2_000
"""Characters beyond which an answer is only compared as a string."""
_MAX_NUMBER_CHARS = 400
_MAX_EXPONENT = 400
_MAX_PARTS = 50
_MAX_DEPTH = 4
_MAX_NESTING = 20

_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|textit|textnormal|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"(?<!\\)\\[,!;: ]|\\(?:left|right)(?![A-Za-z])|~")
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(rf"([+-]?)\s*\$?({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,9}}))?")
_POWER_OF_TEN = re.compile(
    rf"([+-]?)(?:({_DECIMAL})\s*(?:\\times|\\cdot|×|·|\*)\s*)?10\s*\^\s*(?:\{{\s*([+-]?[0-9]{{1,9}})\s*\}}|([+-]?[0-9]{{1,9}}))"
)
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_QUOTIENT = re.compile(r"([^/]+)/([^/]+)")
_MIXED = re.compile(
    r"([+-]?)([0-9]+)(?:\s+([0-9]+)\s*/\s*([0-9]+)"
    r"|\s*\\[dtc]?frac\s*(?:\{([0-9]+)\}\s*\{([0-9]+)\}|([0-9])\s*([0-9])))"
)
_LATEX_QUOTIENT = re.compile(r"([+-]?)\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)

_SYMBOLS = str.maketrans(
    {
        "∞": r"\infty ",
        "π": r"\pi ",
        "×": r"\times ",
        "·": r"\cdot ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "°": r"^\circ ",
    }
)
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![A-Za-z])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_PERCENT_WORD = re.compile(r"\s*(?:percent|per cent)$", re.IGNORECASE)
_CONJUNCTION = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_LOOSE_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_ASSIGNMENT = re.compile(r"([A-Za-z](?:_(?:\{\w+\}|\w)|\([A-Za-z]\))?)\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")

_DEGREES = re.compile(r"(.*[0-9)}])\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|\\circ)\s*([CF]?)")
_BASE = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))")
_WITH_WORDS = re.compile(r"(.*?[0-9A-Za-z)}%.])\s+([A-Za-z]+(?:[ /][A-Za-z]+){0,3})\s*(?:\^\s*\{?\s*([23])\s*\}?)?")
_SHORT_UNITS = frozenset(
    "m g s h l cm mm km ft in yd mi lb lbs oz kg mg ml min sec hr hrs mph sq cu usd am pm day deg men cup per".split()
)
_NO_UNITS = frozenset("and but from give gives into not only then than that this when where which with".split())
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "pound": "lb", "ounce": "oz", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s",
    "minute": "min", "hour": "h", "hr": "h", "dollar": "usd", "liter": "l", "litre": "l", "degree": "deg",
    "mph": "mi h",
}  # fmt: skip
_AREAS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}

_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z*]+\}(?:\{[lcr|]*\})?")
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\s?\{(?:[pb]?matrix|array)\}(?:\s?\{[lcr| ]*\})?(.*)\\end\s?\{(?:[pb]?matrix|array)\}\s*[)\]]?"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_LONG_WORD = re.compile(r"[A-Za-z]{4,}|[A-Z]{2,}")
_SHORT_WORDS = frozenset("yes no odd one two six ten".split())
# An answer may use an operation of these families only where the right answer does: `\int_0^1 x dx` is a question.
_FAMILIES = (
    *(frozenset({name}) for name in "int iint iiint oint sum prod lim det gcd lcm max min bmod pmod".split()),
    frozenset({"binom", "dbinom", "tbinom"}),
    frozenset({"log", "ln", "lg"}),
    frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh".split()),
)
_DERIVATIVE = re.compile(r"\\[dtc]?frac\s*\{\s*d(?:\^\d)?\s*\w?\s*\}|\\partial")


class _Measured(NamedTuple):
    """A value and its unit, "" where it has none."""

    value: str
    unit: str


class _Parts(NamedTuple):
    """A list of answers and what encloses it: "()", "[]", "[)", "(]", "{}" or, for a bare list, ""."""

    kind: str
    items: list[str]


def answers_equal(a: str, b: str) -> bool:
    r"""Compares two final answers as numbers, else as strings.

    Both are trimmed of whitespace, `$`, `\(...\)`, one trailing full stop and wrappers such as `\text{...}`.
    Two numbers are equal within an absolute 1e-6: decimals, scientific notation (`3\times10^{8}` too), thousands
    separators, `$12`, `10\%` (a tenth), `1/2` and `\frac{1}{2}`, mixed numbers (`1\frac{1}{2}`), repeating decimals
    (`0.\overline{3}`). Anything else is equal when the trimmed strings are. No expression is evaluated and no unit
    understood. "nan", "inf" and "infinity" equal nothing. A number of more than 400 characters, or with an exponent
    beyond 400, is compared as a string, so that no input is slow.

    Args:
      a: an answer.
      b: another; the order does not matter.

    Returns:
      Whether they are the same.

    Source: the project's design documents (numbers equal within 1e-6, else trimmed strings equal).
    """
    a, b = _clean(a), _clean(b)
    if _NOT_FINITE.fullmatch(a) or _NOT_FINITE.fullmatch(b):
        return False
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return abs(x - y) <= TOLERANCE
    return a == b


def answers_match(answer: str, gold: str, algebra: Algebra) -> bool:
    r"""Compares a final answer with the right one.

    What `answers_equal` calls equal is. Beyond that:

    - Units: an answer with a unit matches a number without, and the other way round; `5 m` is not `5 cm`. Degrees and
      number bases (`101_2`) are units. `10\%` is a tenth, never ten.
    - `x = 5` matches `5`, and `y = 5` only where the right answer names y or nothing.
    - Tuples and intervals match part by part, in order, with the same brackets; sets and bare lists in any order. A
      tuple is not a set. A bare list matches a set, and a tuple in the same order.
    - Words match as words, whatever their case; letters of a word are never factors of a product.
    - Where the right answer is a number, the answer has to be one as well, worked out: `2+2` is not 4, and a sum, an
      integral, a logarithm ... is an answer only where the right answer has one. Else repeating the question in the
      box would earn the reward.
    - Matrices match entry by entry, whatever their brackets; unions part by part, else by algebra.
    - What is left (radicals, polynomials, inequalities) is `algebra`'s.

    An answer or a right answer of more than 2,000 characters is only compared as a string; brackets nested more than
    20 deep are never parsed.

    Args:
      answer: what the model gave, LaTeX or plain.
      gold: the right answer; the order matters.
      algebra: decides two expressions. It may raise, to say that it would be needed.

    Returns:
      Whether the answer is right.

    Source: huggingface/math-verify for what counts as the same; hendrycks/math (trimming of units).
    Differs: math-verify takes (1,2) for {1,2}, 10% for 10, 5 m for 5 cm, 101_2 for 101_3, "no" for "on" and an
      unevaluated integral for its value (tests/rewards/test_grader_suite.py).
    """
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer.strip() == gold.strip() != ""
    return _match(_canonical(answer), _canonical(gold), algebra, _MAX_DEPTH)


def _match(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    answer, gold = _unwrapped(answer), _unwrapped(gold)
    if not answer or not gold or _NOT_FINITE.fullmatch(answer) or _NOT_FINITE.fullmatch(gold):
        return False
    x, y = _number(answer), _number(gold)
    if x is not None and y is not None:
        return abs(x - y) <= TOLERANCE
    if _LOOSE_SPACE.sub("", answer) == _LOOSE_SPACE.sub("", gold):
        return True
    assigned = _without_assignment(answer, gold)
    if assigned is not None:
        return _match(*assigned, algebra, depth)
    measured, wanted = _measured(answer), _measured(gold)
    if measured.unit or wanted.unit:
        same = not measured.unit or not wanted.unit or measured.unit == wanted.unit
        return same and _match(measured.value, wanted.value, algebra, depth)
    if _is_ratio(answer) or _is_ratio(gold):
        return False
    got, right = _parts(answer), _parts(gold)
    if got is not None and right is not None:
        return depth > 0 and _parts_match(got, right, algebra, depth - 1)
    got_rows, right_rows = _matrix(answer), _matrix(gold)
    if got_rows is not None and right_rows is not None:
        return depth > 0 and _rows_match(got_rows, right_rows, algebra, depth - 1)
    if depth > 0 and _unions_match(_UNION.split(answer), _UNION.split(gold), algebra, depth - 1):
        return True
    if y is not None or _repeats_the_question(answer, gold):
        return False
    if _is_text(answer) or _is_text(gold):
        return answer.casefold().split() == gold.casefold().split()
    if _differ_in_case(answer, gold) or _nesting(answer) > _MAX_NESTING:
        return False
    return algebra(answer, gold)


def _parts_match(got: _Parts, right: _Parts, algebra: Algebra, depth: int) -> bool:
    kinds = {got.kind, right.kind}
    if len(kinds) == 2 and kinds not in ({"", "{}"}, {"", "()"}):
        return False
    if max(len(got.items), len(right.items)) > _MAX_PARTS:
        return False
    if kinds <= {"", "{}"}:
        # Every part on each side has its like on the other: {1, 1, 2} is {1, 2}.
        covered = all(any(_match(a, g, algebra, depth) for g in right.items) for a in got.items)
        return covered and all(any(_match(a, g, algebra, depth) for a in got.items) for g in right.items)
    same_length = len(got.items) == len(right.items)
    return same_length and all(_match(a, g, algebra, depth) for a, g in zip(got.items, right.items, strict=True))


def _rows_match(got: list[list[str]], right: list[list[str]], algebra: Algebra, depth: int) -> bool:
    if [len(row) for row in got] != [len(row) for row in right]:
        return False
    pairs = zip(sum(got, []), sum(right, []), strict=True)
    return all(_match(a, g, algebra, depth) for a, g in pairs)


def _unions_match(got: list[str], right: list[str], algebra: Algebra, depth: int) -> bool:
    """The same parts in any order; where they are not, [1,2] and [2,3] may still be [1,3]."""
    if len(got) != len(right) or not 1 < len(got) <= _MAX_PARTS:
        return False
    return _parts_match(_Parts("", got), _Parts("", right), algebra, depth)


def _clean(text: str) -> str:
    text = _WRAPPER.sub(r"\1", _SPACING.sub("", text.strip()))
    return _trim(text)


def _trim(text: str) -> str:
    text = text.replace("{,}", ",").replace("\\$", "$").replace("−", "-").strip()
    text = text.removeprefix("\\(").removesuffix("\\)").strip().removesuffix(".")
    return text.strip().strip("$").strip()


def _canonical(text: str) -> str:
    """One way of writing: wrappers off but words kept apart, symbols as commands, money as a unit."""
    stripped = " ".join(text.split())
    money = stripped.startswith("\\$") or (stripped.startswith("$") and stripped.count("$") == 1)
    text = _WRAPPER.sub(
        r" \1 ", _SPACING.sub("", _BOX.sub("", stripped).replace("\\displaystyle", "").translate(_SYMBOLS))
    )
    text = _PLAIN_NAME.sub(r"\\\1", _PLAIN_ROOT.sub(r"\\sqrt{\1}", _trim(text)))
    text = _PERCENT_WORD.sub("%", _CONJUNCTION.sub(", ", text).strip(", "))
    text = " ".join(text.split())
    return f"{text} usd" if money and _number(text) is not None else text


def _unwrapped(text: str) -> str:
    r"""Without brackets around a single answer: {5}, (5) and \{5\} are 5."""
    while True:
        if text.startswith("{") and _closing(text) == len(text) - 1:
            text = text[1:-1].strip()
            continue
        opened, body, closed = _enclosed(text)
        if opened + closed not in ("()", "{}") or len(_split(body)) != 1:
            return text
        text = body.strip()


def _closing(text: str) -> int:
    """Where the bracket closes with which the text begins; -1 where it does not."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ")]}":
            return index
    return -1


def _nesting(text: str) -> int:
    """Depth of brackets; a parser's time may double with each."""
    return max(accumulate((c in "([{") - (c in ")]}") for c in text), default=0)


def _is_ratio(text: str) -> bool:
    """A ratio or a time of day: it is right as it is written or not at all."""
    return ":" in text and "\\" not in text


def _without_assignment(answer: str, gold: str) -> tuple[str, str] | None:
    """Both without "x =", where that may be left out; None where nothing is to be left out."""
    got, right = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(gold)
    if got and right:
        return (got[2], right[2]) if got[1] == right[1] else None
    if got and "=" not in gold and _parts(answer) is None:
        return got[2], gold
    if right and "=" not in answer and _parts(gold) is None:
        return answer, right[2]
    return None


def _measured(text: str) -> _Measured:
    if match := _DEGREES.fullmatch(text):
        return _Measured(match[1], "deg" + match[2])
    if match := _BASE.fullmatch(text):
        return _Measured(match[1], f"base {match[2] or match[3]}")
    match = _WITH_WORDS.fullmatch(text)
    if match is None or not re.search(r"[0-9\\]", match[1]):
        return _Measured(text, "")
    value, words, power = match.groups()
    words = re.split(r"[ /]", words.casefold())
    # After a variable, the h of `2 \pi r h` is one too.
    short = _SHORT_UNITS if not _letters(value) else frozenset()
    if not all(word in short or (len(word) > 3 and word not in _NO_UNITS) for word in words):
        return _Measured(text, "")
    powers = [_AREAS[word] for word in words if word in _AREAS]
    names = [_unit_name(word) for word in words if word not in _AREAS and word != "per"]
    return _Measured(value, " ".join(names) + "".join(powers) + (power or ""))


def _unit_name(word: str) -> str:
    singular = word.removesuffix("s") if len(word) > 1 else word
    return _UNIT_NAMES.get(singular, singular)


def _parts(text: str) -> _Parts | None:
    """The text as a tuple, interval, set or bare list; None where it is none of them."""
    opened, body, closed = _enclosed(text)
    if opened == "{":
        return _Parts("{}", _split(body))
    items = _split(body)
    if len(items) < 2:
        return None
    return _Parts(opened + closed, items)


def _enclosed(text: str) -> tuple[str, str, str]:
    """(opening bracket, what is inside, closing bracket); ("", text, "") where no pair encloses it all."""
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = text.replace("\\langle", "(").replace("\\rangle", ")").strip()
    if text.startswith("\\{") and text.endswith("\\}") and _closing(text[1:]) == len(text) - 2:
        return "{", text[2:-2], "}"
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closing(text) == len(text) - 1:
        return text[0], text[1:-1], text[-1]
    return "", text, ""


def _split(text: str) -> list[str]:
    """Parts between the commas and semicolons that stand in no bracket; in "1,000, 2" only the second separates."""
    if "\\begin" in text:
        return [text.strip()]
    text = re.sub(r"(?<![0-9])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])", _joined, text) if re.search(r",\s", text) else text
    parts, start, depth = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match[1]:
        return None
    rows = [row for row in match[1].split("\\\\") if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _repeats_the_question(answer: str, gold: str) -> bool:
    used, allowed = set(_COMMAND.findall(answer)), set(_COMMAND.findall(gold))
    operations = any(family & used and not family & allowed for family in _FAMILIES)
    factorial = "!" in answer and "!" not in gold
    return operations or factorial or bool(_DERIVATIVE.search(answer) and not _DERIVATIVE.search(gold))


def _is_text(text: str) -> bool:
    plain = _without_commands(text)
    return bool(_LONG_WORD.search(plain)) or plain.strip().casefold() in _SHORT_WORDS


def _without_commands(text: str) -> str:
    return _COMMAND.sub(" ", _ENVIRONMENT.sub(" ", text))


def _letters(text: str) -> frozenset[str]:
    return frozenset(filter(str.isalpha, _without_commands(text)))


def _differ_in_case(answer: str, gold: str) -> bool:
    """x is not X, which math-verify would take for the same."""
    a, g = _letters(answer), _letters(gold)
    return a != g and {letter.casefold() for letter in a} == {letter.casefold() for letter in g}


def _number(text: str) -> Fraction | None:
    """The number that the text writes, exactly; None when it writes none or an absurdly large one."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if text.endswith("%"):
        percent = text.removesuffix("%").removesuffix("\\").rstrip()
        value = _number(percent) if not percent.endswith("%") else None
        return None if value is None else value / 100
    if match := _LATEX_QUOTIENT.fullmatch(text):
        sign, top, short_top, bottom, short_bottom = match.groups()
        return _divide(sign + (top or short_top or ""), bottom or short_bottom or "")
    if match := _MIXED.fullmatch(text):
        sign, whole, *parts = match.groups()
        part = _divide(*[digits for digits in parts if digits is not None])
        return None if part is None else _signed(sign, int(whole) + part)
    if match := _REPEATING.fullmatch(text):
        return _repeating(*match.groups())
    if match := _QUOTIENT.fullmatch(text):
        return _divide(match[1], match[2])
    if match := _POWER_OF_TEN.fullmatch(text):
        sign, factor, power, digit = match.groups()
        return _decimal(f"{sign}{factor or '1'}e{power or digit}")
    return _decimal(text)


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    start = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return _signed(sign, start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed)))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _divide(top: str, bottom: str) -> Fraction | None:
    x, y = _decimal(top.strip()), _decimal(bottom.strip())
    return None if x is None or not y else x / y


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits, exponent = match.groups()
    power = int(exponent or 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    value = Fraction(digits.replace(",", "").replace(" ", "").rstrip(".") or "0") * Fraction(10) ** power
    return _signed(sign, value)
