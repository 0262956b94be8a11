"""What the workers of `rewards.math` run: equality by computer algebra, through math-verify. Slow to import."""

import logging
import re
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Rational

from deepseek_jax.rewards.answers import answers_match
from deepseek_jax.rewards.numbers import TOLERANCE

# Units are `answers_match`'s: math-verify would strip the last letter of `2 \pi r h` as one.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
)
# Only LaTeX: what math-verify reads as a plain expression goes through Python's `eval`.
_LATEX = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION),)
_PARSED = 4096
_DIGITS = 20
_WIDELY = 1e-3  # more than any rounding of an answer's numbers
# Powers of numbers and brackets, negative and long powers, long numbers.
_MAY_BE_SMALL = re.compile(r"[0-9)}]\s*\^|\^\s*\{?\s*(?:-|[0-9]{2})|0\.000|[0-9]{6}")

logging.getLogger("math_verify").setLevel(logging.ERROR)


def algebra_equal(answer: str, gold: str) -> bool:
    r"""Compares two LaTeX expressions by computer algebra.

    May take any time and memory: call it where it can be killed.

    Args:
      answer: LaTeX without dollars or a box.
      gold: the right answer; the order matters to equations.

    Returns:
      Whether math-verify takes them for the same; False where either cannot be parsed, and where two expressions have
      values that differ by more than 1e-6 of them: math-verify takes small numbers for zero.

    Source: huggingface/math-verify 0.9.
    """
    right, got = _parsed(gold), _parsed(answer)
    if _apart(got, right, _WIDELY):
        return False  # as `verify` would say, after it has tried to simplify their difference
    if not verify(right, got, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not (_MAY_BE_SMALL.search(answer) or _MAY_BE_SMALL.search(gold)) or not _apart(got, right, float(TOLERANCE))


def _apart(got: list, right: list, tolerance: float) -> bool:
    """Whether the first expressions have values, at one point of their variables, that differ by this share of them."""
    if not (got and right and isinstance(got[0], Expr) and isinstance(right[0], Expr)):
        return False
    variables = sorted(got[0].free_symbols | right[0].free_symbols, key=str)
    point = {name: Rational(17 + 2 * place, 13) for place, name in enumerate(variables)}
    x, y = (expression.subs(point).evalf(_DIGITS) for expression in (got[0], right[0]))
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return False
    return bool(abs(x - y) > tolerance * max(abs(x), abs(y)))


def grade(pair: list[str]) -> bool:
    """`answers_match` with `algebra_equal`, of [answer, right answer]."""
    answer, gold = pair
    return answers_match(answer, gold, algebra_equal)


@lru_cache(maxsize=_PARSED)
def _parsed(text: str) -> list:
    """Expressions only: what cannot be parsed comes as a string, and strings are compared before this."""
    found = parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None)
    return [expression for expression in found if not isinstance(expression, str)]
