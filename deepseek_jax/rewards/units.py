r"""A value and its unit: `5\text{ cm}`, `$5`, `60^\circ`, `101_2`, `18 apples`, `9 米`."""

import re
from collections import Counter
from typing import NamedTuple

from deepseek_jax.rewards.notation import DOLLAR, letters
from deepseek_jax.rewards.numbers import scales_number

_DEGREES = re.compile(r"(.*[0-9)}])\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\circ)\s*([CFK]?)")
_BASE = re.compile(r"([0-9A-Za-z]+)_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))")
_CURRENCIES = {
    DOLLAR: "usd", "US" + DOLLAR: "usd", "USD": "usd", "€": "eur", "EUR": "eur", "£": "gbp", "GBP": "gbp", "¥": "yen",
    "₹": "rupee", "Rs": "rupee", "Rs.": "rupee", "INR": "rupee", "₽": "ruble", "₩": "won", "¢": "cent",
}  # fmt: skip
_SIGNS = "|".join(re.escape(sign) for sign in sorted(_CURRENCIES, key=len, reverse=True))
_MONEY_BEFORE = re.compile(rf"([+-]?)\s*({_SIGNS})\s*((?:-\s*)?(?:[0-9.(]|\\frac).*)")
_MONEY_AFTER = re.compile(rf"(.*[0-9)}}])\s*({_SIGNS})")
_MONEY_SCALE = re.compile(r"(.*[0-9])\s*(k|K|M|mn|B|bn|b)")
_MONEY_WORDS = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}

_POWER = r"\s*\^\s*(?:\{\s*-?\s*[1-9]\s*\}|-?[1-9])"
_WORD = rf"[^\W\d_]+\.?(?:{_POWER})?"
_WITH_WORDS = re.compile(
    rf"(.*?[0-9A-Za-z)}}%.])(?:\s*-(?=[a-z]{{4}})|\s+|(?<=[0-9)}}%.])(?=[^\x00-\x7f]))({_WORD}(?:\s*(?:/|\\cdot|\*|\s|-)\s*{_WORD}){{0,5}})"
)
_ATTACHED = re.compile(r"(.*[0-9])([A-Za-z]{2,}(?:/[A-Za-z]+)?(?:" + _POWER + r")?)")
_TOKEN = re.compile(rf"/|([^\W\d_]+)\.?({_POWER})?")
_SIGN = re.compile(r"(?<=[0-9] )\\(?:Omega|mu\s+(?=[A-Za-z]))")
_RATE = re.compile(r"\\frac\s*\{\s*([^\W\d_]+)\s*\}\s*\{\s*([^\W\d_]+(?:\^\d)?)\s*\}$")

_SHORT_UNITS = frozenset(
    "m g s h l cm mm km ft in yd mi lb lbs oz kg mg ml min sec hr hrs mph kph sq cu usd am pm day deg men cup per"
    " dm dl cl ha ac pt qt gal mol cal rad pa hz khz mhz ghz kw kwh kb mb gb tb kj mv ma cc ms ns nm um st nd rd th eur"
    " gbp inr rs cat dog car pen hat egg bag box cow pig hen bus van toy pie jar can boy way ton ohm rpm of".split()
)
_SI_LETTERS = frozenset("NJWV")
_NO_UNITS = frozenset("and but from give gives into not only then than that this when where which with".split())
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "pound": "lb", "ounce": "oz", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s",
    "minute": "min", "hour": "h", "hr": "h", "dollar": "usd", "buck": "usd", "liter": "l", "litre": "l",
    "degree": "deg", "milliliter": "ml", "millilitre": "ml", "milligram": "mg", "radian": "rad", "euro": "eur",
    "newton": "n", "joule": "j", "watt": "w", "volt": "v", "gallon": "gal",
    "people": "person", "men": "man", "women": "woman",
    "children": "child", "r": "rupee", "penny": "cent", "pennie": "cent",
    "米": "m", "公尺": "m", "厘米": "cm", "公分": "cm", "毫米": "mm", "千米": "km", "公里": "km", "克": "g",
    "千克": "kg", "公斤": "kg", "秒": "s", "分钟": "min", "小时": "h", "美元": "usd", "欧元": "eur", "元": "yuan",
    "块": "yuan", "平方米": "m2", "平方厘米": "cm2", "立方米": "m3", "立方厘米": "cm3",
    "度": "deg", "人民币": "yuan", "日元": "yen",
    "м": "m", "см": "cm", "мм": "mm", "км": "km", "г": "g", "кг": "kg", "с": "s", "сек": "s", "мин": "min", "ч": "h",
    "метр": "m", "метра": "m", "метров": "m", "руб": "ruble", "рубль": "ruble", "рубля": "ruble", "рублей": "ruble",
    "л": "l", "mètre": "m", "centimètre": "cm", "kilomètre": "km",
}  # fmt: skip
_PRODUCTS = {
    "mph": {"mi": 1, "h": -1}, "kph": {"km": 1, "h": -1}, "m2": {"m": 2}, "cm2": {"cm": 2}, "m3": {"m": 3},
    "cm3": {"cm": 3}, "cc": {"cm": 3},
}  # fmt: skip
_AREAS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_RAISED = {"squared": 2, "cubed": 3}


class Measured(NamedTuple):
    """A value and its unit, "" where it has none."""

    value: str
    unit: str


def measured(text: str) -> Measured:
    r"""Takes an answer apart into its value and its unit.

    Args:
      text: as `notation.canonical` writes it.

    Returns:
      The unit as one way of writing it: `m/s`, "metres per second" and `m s^{-1}` are the same, money is "usd" and
      the like, degrees are "deg", number bases are "base 2". Units are not converted into each other. Words that
      change the value ("million", "dozen") belong to the value.
    """
    if match := _DEGREES.fullmatch(text):
        return Measured(match[1], "deg" + match[2].casefold())
    if (match := _BASE.fullmatch(text)) and _is_in_base(match[1], int(match[2] or match[3])):
        return Measured(match[1], f"base {match[2] or match[3]}")
    if match := _MONEY_BEFORE.fullmatch(text):
        return _money(match[1] + match[3], _CURRENCIES[match[2]])
    if match := _MONEY_AFTER.fullmatch(text):
        return _money(match[1], _CURRENCIES[match[2]])
    if "\\" in text:
        text = _SIGN.sub(lambda sign: "ohm" if "Omega" in sign[0] else "u", text)
    text = _RATE.sub(r" \1/\2", text) if "\\frac" in text else text
    match = _WITH_WORDS.fullmatch(text) or _ATTACHED.fullmatch(text)
    if match is None or not re.search(r"[0-9\\]", match[1]):
        return Measured(text, "")
    return _worded(text, match[1], match[2])


def _money(value: str, currency: str) -> Measured:
    if match := _MONEY_SCALE.fullmatch(value):
        value = f"{match[1]} {_MONEY_WORDS[match[2].casefold()]}"
    rest = measured(value)
    unit = " ".join(sorted([currency, rest.unit])).strip() if rest.unit != currency else currency
    return Measured(rest.value, unit)


def _worded(text: str, value: str, words: str) -> Measured:
    # After a variable, the h of `2 \pi r h` is one too.
    variables = bool(letters(value))
    tokens = [(match[0], match[1] or "", match[2] or "") for match in _TOKEN.finditer(words)]
    while tokens and scales_number(tokens[0][1]):
        value += " " + tokens.pop(0)[1]
    names = [word for token, word, _ in tokens if token != "/"]
    units = [_is_unit(word, variables) for word in names]
    # Beside a longer word a short one is a word as well: red apples, cups of tea.
    known = all(units)
    if len(names) > 1 and not variables:
        known = any(units) and all(unit or _may_be_word(name) for unit, name in zip(units, names, strict=True))
    if not tokens or not known:
        return Measured(value if not tokens else text, "")
    return Measured(value, _product(tokens))


def _is_unit(word: str, variables: bool) -> bool:
    if not word.isascii():
        return True
    folded = word.casefold()
    if folded in _SHORT_UNITS or word in _SI_LETTERS:
        return not variables
    return len(word) > 3 and folded not in _NO_UNITS


def _may_be_word(word: str) -> bool:
    folded = word.casefold()
    return folded not in _NO_UNITS and (len(word) > 2 or folded in _SHORT_UNITS)


def _is_in_base(digits: str, base: int) -> bool:
    """101 is a number in base 2; x and A are names with an index."""
    written = digits.isdigit() or (len(digits) > 1 and digits.isupper())
    return written and all(int(digit, 36) < base for digit in digits)


def _product(tokens: list[tuple[str, str, str]]) -> str:
    """m^2, "square metres" and "metres squared" as m2; what follows "per" or a stroke with its power turned."""
    powers: Counter[str] = Counter()
    sign, raised, last = 1, 1, []
    for token, word, power in tokens:
        folded = word.casefold()
        if token == "/" or folded == "per":
            sign = -1
        elif folded in _AREAS:
            raised = _AREAS[folded]
        elif folded in _RAISED and last:
            powers.update({name: count * (_RAISED[folded] - 1) for name, count in last})
        elif folded != "of":
            exponent = int(re.sub(r"[^0-9-]", "", power) or 1) * sign * raised
            name = _unit_name(folded)
            last = [(part, count * exponent) for part, count in _PRODUCTS.get(name, {name: 1}).items()]
            powers.update(dict(last))
            sign, raised = 1, 1
    names = [f"{name}{'' if count == 1 else count}" for name, count in sorted(powers.items()) if count]
    return "degc" if names == ["celsiu", "deg"] else "degf" if names == ["deg", "fahrenheit"] else " ".join(names)


def _unit_name(word: str) -> str:
    if word in _UNIT_NAMES:
        return _UNIT_NAMES[word]
    singular = word.removesuffix("s") if len(word) > 1 else word
    return _UNIT_NAMES.get(singular, singular)
