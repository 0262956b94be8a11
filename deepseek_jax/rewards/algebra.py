"""What the workers of `rewards.math` run: equality by computer algebra, through math-verify. Slow to import."""

import logging
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from deepseek_jax.rewards.answers import answers_match

# Units are `answers_match`'s: math-verify would strip the last letter of `2 \pi r h` as one.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
)
# Only LaTeX: what math-verify reads as a plain expression goes through Python's `eval`.
_LATEX = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION),)
_PARSED = 4096

logging.getLogger("math_verify").setLevel(logging.ERROR)


def algebra_equal(answer: str, gold: str) -> bool:
    r"""Compares two LaTeX expressions by computer algebra.

    May take any time and memory: call it where it can be killed.

    Args:
      answer: LaTeX without dollars or a box.
      gold: the right answer; the order matters to equations.

    Returns:
      Whether math-verify takes them for the same; False where either cannot be parsed.

    Source: huggingface/math-verify 0.9.
    """
    return verify(_parsed(gold), _parsed(answer), timeout_seconds=None, allow_set_relation_comp=True)


def grade(pair: list[str]) -> bool:
    """`answers_match` with `algebra_equal`, of [answer, right answer]."""
    answer, gold = pair
    return answers_match(answer, gold, algebra_equal)


@lru_cache(maxsize=_PARSED)
def _parsed(text: str) -> list:
    """Expressions only: what cannot be parsed comes as a string, and strings are compared before this."""
    found = parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None)
    return [expression for expression in found if not isinstance(expression, str)]
