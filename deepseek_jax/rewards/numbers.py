r"""The number that a text writes, exactly, and when two numbers are the same."""

import re
from fractions import Fraction
from typing import NamedTuple

from deepseek_jax.rewards.notation import DOLLAR

TOLERANCE = Fraction(1, 10**6)
"""Difference, absolute and relative, up to which a decimal is a rounding of another number."""
_MAX_NUMBER_CHARS = 400
_MAX_EXPONENT = 400
_MAX_WORDS = 4

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?:[ '][0-9]{3})+|[0-9]+"
_DECIMAL = rf"(?:{_DIGITS})(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(rf"([+-]?)\s*{DOLLAR}?({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,9}}))?")
_POINTS_BETWEEN = re.compile(
    r"([+-]?)([0-9]{1,3}(?:\.[0-9]{3}){2,})(?:,([0-9]+))?|([+-]?)([0-9]{1,3}(?:\.[0-9]{3})+),([0-9]+)"
)
_POWER_OF_TEN = re.compile(
    rf"([+-]?)\s*(?:({_DECIMAL})\s*(?:\\times|\\cdot|x|\*)\s*)?"
    r"10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,9})\s*\}|([+-]?[0-9]{1,9}))"
)
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))")
_GOES_ON = re.compile(r"([+-]?)([0-9]*)\.([0-9]*?)([0-9]{1,6}?)(\4{2,})\s*(?:\.{2,3}|\\ldots)")
_QUOTIENT = re.compile(r"([^/]+)/([^/]+)")
_MIXED = re.compile(
    r"([+-]?)\s*([0-9]+)(?:\s+([0-9]+)\s*/\s*([0-9]+)"
    r"|\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9])))"
)
_LATEX_QUOTIENT = re.compile(r"([+-]?)\s*\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_BRACKETED = re.compile(r"([+-]?)\s*[({]\s*([^(){},]+?)\s*[)}]")
_MINUS = re.compile(r"(?:negative|minus)\s+(?=[0-9\\.])", re.IGNORECASE)

_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "mil": 3, "mille": 3, "millones": 6,
    "millón": 6, "milliard": 9, "milliarde": 9, "milliarden": 9, "tausend": 3, "millionen": 6, "lakh": 5, "crore": 7,
    "тысяча": 3, "тысячи": 3, "тысяч": 3, "тыс": 3, "миллион": 6, "миллиона": 6, "миллионов": 6, "млн": 6,
    "миллиард": 9, "миллиарда": 9, "миллиардов": 9, "млрд": 9,
    "百": 2, "千": 3, "万": 4, "萬": 4, "百万": 6, "百萬": 6, "千万": 7, "千萬": 7, "亿": 8, "億": 8,
}  # fmt: skip
_WORDS = (
    {word: Fraction(10**power) for word, power in _SCALES.items()}
    | {word + "s": Fraction(10 ** _SCALES[word]) for word in "hundred thousand million billion trillion".split()}
    | {"dozen": Fraction(12), "dozens": Fraction(12), "score": Fraction(20), "打": Fraction(12)}
    | {
        "tens": Fraction(10),
        "half": Fraction(1, 2),
        "halves": Fraction(1, 2),
        "percent": Fraction(1, 100),
        "pct": Fraction(1, 100),
    }
)
_PARTS = (
    "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(),
    "hundredth thousandth millionth billionth".split(),
)
for _size, _word in [*enumerate(_PARTS[0], 3), *zip((10**2, 10**3, 10**6, 10**9), _PARTS[1], strict=True)]:
    _WORDS |= {_word: Fraction(1, _size), _word + "s": Fraction(1, _size)}
_POWERS = {"squared": 2, "cubed": 3}
# Quarters are coins as well, and time; three of them are a fraction, as one is.
_QUARTERS = re.compile(r"([+-]?\s*[13])[\s-]+quarters?", re.IGNORECASE)
# Other scripts write no space before the word, and some people do not either.
_WITH_WORD = re.compile(r"(.*\S)[\s-]+([^\W\d_]+)\.?|(.*[0-9}%)])((?=[^\x00-\x7f])[^\W\d_]+|[A-Za-z]{5,})\.?")


class Number(NamedTuple):
    """A value, and whether it may be rounded: whether its text has a decimal point."""

    value: Fraction
    rounded: bool


def same_number(x: Number, y: Number) -> bool:
    """Whether they are equal: exactly, or within 1e-6, absolute and relative, where one may be rounded."""
    difference = abs(x.value - y.value)
    if not difference or not (x.rounded or y.rounded):
        return not difference
    return difference <= TOLERANCE * min(1, max(abs(x.value), abs(y.value)))


def scales_number(word: str) -> bool:
    """Whether a word after a number changes its value: "million", "dozen", "halves", "squared"."""
    return word.casefold() in _WORDS or word.casefold() in _POWERS


def number(text: str) -> Number | None:
    r"""The number that the text writes, exactly; None when it writes none or an absurdly large one.

    Args:
      text: plain or LaTeX, as `notation.canonical` writes it.

    Returns:
      Of decimals with thousands apart by commas, spaces or apostrophes (points too, where there are two or a comma
      follows), `1e5`, `3\times10^{8}`, `10\%` (a tenth), `1/2`, `\frac{1}{2}`, `1\frac{1}{2}`, `0.\overline{3}`,
      and these before "million", "dozen", "halves", "squared" and the like. No expression is evaluated. None beyond
      400 characters or an exponent of 400, so that no input is slow.
    """
    if len(text) > _MAX_NUMBER_CHARS or not any(character.isdigit() for character in text):
        return None
    value = _value(_MINUS.sub("-", text), _MAX_WORDS)
    return None if value is None else Number(value, "." in text)


def _value(text: str, words: int) -> Fraction | None:
    if text.endswith("%"):
        percent = text.removesuffix("%").removesuffix("\\").rstrip()
        value = _value(percent, 0) if not percent.endswith("%") else None
        return None if value is None else value / 100
    if text.endswith("‰"):
        value = _decimal(text[:-1].rstrip())
        return None if value is None else value / 1000
    for read in (_decimal, _quotient, _mixed, _repeating, _power_of_ten, _points_between, _bracketed):
        value = read(text)
        if value is not None:
            return value
    return _worded(text, words) if words else None


def _worded(text: str, words: int) -> Fraction | None:
    if match := _QUARTERS.fullmatch(text):
        value = _decimal(match[1])
        return None if value is None else value / 4
    match = _WITH_WORD.fullmatch(text)
    rest, word = (match[1] or match[3], (match[2] or match[4]).casefold()) if match else ("", "")
    value = _value(rest.strip(), words - 1) if scales_number(word) else None
    if value is None:
        return None
    return value ** _POWERS[word] if word in _POWERS else value * _WORDS[word]


def _quotient(text: str) -> Fraction | None:
    if match := _LATEX_QUOTIENT.fullmatch(text):
        sign, top, short_top, bottom, short_bottom = match.groups()
        value = _divide(top or short_top or "", bottom or short_bottom or "")
        return None if value is None else _signed(sign, value)
    match = _QUOTIENT.fullmatch(text)
    return _divide(match[1], match[2]) if match else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    sign, whole, *parts = match.groups()
    part = _divide(*[digits for digits in parts if digits is not None])
    return None if part is None else _signed(sign, int(whole) + part)


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text) or (_GOES_ON.fullmatch(text) if text[-1:] in ".s" else None)
    if match is None:
        return None
    sign, whole, fixed, period, digit = match.groups()
    period = period or digit
    start = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return _signed(sign, start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed)))


def _power_of_ten(text: str) -> Fraction | None:
    match = _POWER_OF_TEN.fullmatch(text)
    if match is None:
        return None
    sign, factor, power, digits = match.groups()
    return _decimal(f"{sign}{factor or '1'}e{power or digits}")


def _points_between(text: str) -> Fraction | None:
    match = _POINTS_BETWEEN.fullmatch(text)
    if match is None:
        return None
    sign, whole, part = match.groups()[:3] if match[2] else match.groups()[3:]
    return _decimal(f"{sign}{whole.replace('.', '')}.{part or '0'}")


def _bracketed(text: str) -> Fraction | None:
    match = _BRACKETED.fullmatch(text)
    value = _value(match[2], 0) if match else None
    return None if value is None else _signed(match[1], value)


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
    value = Fraction(re.sub("[, ']", "", digits).rstrip(".") or "0") * Fraction(10) ** power
    return _signed(sign, value)
