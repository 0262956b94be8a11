"""Whether a program printed what it should have."""

import re
from decimal import Decimal, InvalidOperation


def outputs_equal(got: str, wanted: str, *, tolerance: float = 1e-6) -> bool:
    """Compares what a program printed with what it should have.

    Both are stripped and split into lines, each line stripped. There must be as many lines, and each pair must be the
    same text or, word for word, the same finite numbers. Two decimal fractions, numbers that both have a point or an
    exponent, may differ by `tolerance` times the larger of 1 and the wanted number, also among words; whole numbers
    may not.

    Args:
      got: the program's standard output.
      wanted: the test's.
      tolerance: 0 wants equal numbers.

    Returns:
      Whether they agree.

    Source: LiveCodeBench, lcb_runner/evaluation/testing_util.py.
    Differs: infinities and NaN are compared as text; decimal fractions may differ as for Codeforces' checkers.
    """
    lines, wanted_lines = got.strip().split("\n"), wanted.strip().split("\n")
    if len(lines) != len(wanted_lines):
        return False
    return all(_same_line(*pair, Decimal(tolerance)) for pair in zip(lines, wanted_lines, strict=True))


def _same_line(line: str, wanted: str, tolerance: Decimal) -> bool:
    line, wanted = line.strip(), wanted.strip()
    if line == wanted:
        return True
    words, wanted_words = line.split(), wanted.split()
    if len(words) != len(wanted_words):
        return False
    numbers = [_number(word) for word in words]
    wanted_numbers = [_number(word) for word in wanted_words]
    if None not in numbers and None not in wanted_numbers:
        rows = zip(words, wanted_words, numbers, wanted_numbers, strict=True)
        return all(a == b or _near(word, other, a, b, tolerance) for word, other, a, b in rows)
    if re.split(r"\S+", line) != re.split(r"\S+", wanted):
        return False
    rows = zip(words, wanted_words, numbers, wanted_numbers, strict=True)
    return all(word == other or _near(word, other, a, b, tolerance) for word, other, a, b in rows)


def _near(word: str, wanted: str, got: Decimal | None, number: Decimal | None, tolerance: Decimal) -> bool:
    if got is None or number is None or not (_is_fraction(word) and _is_fraction(wanted)):
        return False
    if max(got.adjusted(), number.adjusted()) > 400:  # beyond any float
        return False
    return abs(got - number) <= tolerance * max(Decimal(1), abs(number))


def _is_fraction(word: str) -> bool:
    return "." in word or "e" in word or "E" in word


def _number(word: str) -> Decimal | None:
    try:
        number = Decimal(word)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
