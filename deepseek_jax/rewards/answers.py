r"""When are two final answers the same? Numbers and strings exactly, structure by its parts, the rest by algebra.

What can be decided without a computer algebra system is decided here, and so is what such a system would get wrong or
let pass: units, words, tuples against sets, and answers that only repeat the question.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from deepseek_jax.rewards.assignments import alternatives, chain_of
from deepseek_jax.rewards.notation import MAX_NESTING, canonical, letters, nesting
from deepseek_jax.rewards.numbers import number, same_number
from deepseek_jax.rewards.parts import Parts, matrix_of, parts_of, union_of, unwrapped
from deepseek_jax.rewards.units import measured
from deepseek_jax.rewards.wording import worded
from deepseek_jax.text.answers import not_finite

Algebra = Callable[[str, str], bool]
"""(answer, gold) -> equal: decides two LaTeX expressions without top-level commas or units."""

MAX_CHARS = 2_000
"""Characters beyond which an answer is only compared as a string."""
_MAX_PARTS = 50
_MAX_DEPTH = 4
_REMEMBERED = 4096

_SIMPLE = re.compile(r"-?[0-9]{1,15}")
_DECIMAL = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
# Without two letters in a row and a command that leads or encloses, there is nothing to prepare.
_WORD = re.compile(r"[^\W\d_]{2}|[A-Za-z]\.|[|:\\%]")
_LEAD = re.compile(
    r"(?:(?:so\s+|thus,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b\s*:?|\s*:)"
    r"|\\approx(?![A-Za-z])|(?:approximately|about|roughly|approx\.?)(?![A-Za-z]))\s*",
    re.IGNORECASE,
)
_TITLE = re.compile(r"([A-Za-z]{3,}[A-Za-z '-]*?)(?::\s+|\s+(?:is|equals)\s+)(.+)")
_OPTION = re.compile(r"(?:option|choice)\s+(?=[(\[]?[A-J][)\]]?$)", re.IGNORECASE)
_NOON = re.compile(r"(?<=[0-9] )([ap])\.\s?m\.?", re.IGNORECASE)
_AND_A_HALF = re.compile(r"([0-9])\s+and\s+(?:a|one|1)[ -]+half(?![A-Za-z])")
_PERCENT_WORD = re.compile(r"\s*(?:percent|per cent|percentage points?|pct|процент[а-я]*)$", re.IGNORECASE)
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^\s*\{\s*(st|nd|rd|th)\s*\}")
_CONJUNCTION = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_ORDER = re.compile(r"[<>]|\\(?:le|ge)(?![A-Za-z])")
_CASES = re.compile(
    r"(?:\\\{)?\s*\\begin\{(?:cases|aligned|array)\}(?:\{[lcr]\})?([^&]*)\\end\{(?:cases|aligned|array)\}"
)
_BUILDER = re.compile(r"\\\{\s*(\w)(?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]\s*(.*\1.*)\\\}")
_LOOSE_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_CHOICE = re.compile(r"([(\[]?)\s*([A-Ja-j])\s*([)\]]?)\.?")
_CHOSEN = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])[.):])\s+(\S.*)")

_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z*]+\}(?:\{[lcr|]*\})?")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_LONG_WORD = re.compile(r"[^\W\d_]{4,}|[A-Z]{2,}")
_SHORT_WORDS = frozenset("yes no odd one two six ten".split())
# An answer may use an operation of these families only where the right answer does: `\int_0^1 x dx` is a question.
_FAMILIES = (
    *(frozenset({name}) for name in "int iint iiint oint sum prod lim det gcd lcm max min bmod pmod".split()),
    frozenset({"binom", "dbinom", "tbinom"}),
    frozenset({"log", "ln", "lg"}),
    frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh".split()),
)
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*d(?:\^\d)?\s*\w?\s*\}|\\partial")
_PRIMED = re.compile(r"([A-Za-z])('+)")
# What math-verify drops without a word.
_DROPPED = re.compile(r"\^\s*\{?\s*(?:T|\\top|\\intercal|\\dagger|\*)|\\ldots|:")


def answers_equal(a: str, b: str) -> bool:
    r"""Compares two final answers as numbers, else as strings.

    Both are written in one way first (`notation.canonical`): fonts, spacing, dollars, full-width digits and a trailing
    full stop do not count. Two numbers, as `numbers.number` reads them, are equal exactly; where one has a decimal
    point, within 1e-6, absolute and relative. Anything else is equal when the strings are. No expression is evaluated
    and no unit understood. "nan", "inf" and "infinity" equal nothing. Beyond 2,000 characters, or brackets nested more
    than 20 deep, only equal strings are equal, so that no input is slow.

    Args:
      a: an answer.
      b: another; the order does not matter.

    Returns:
      Whether they are the same.

    Source: the project's design documents (numbers equal within 1e-6, else trimmed strings equal).
    """
    if not (_is_short(a) and _is_short(b)):
        return a.strip() == b.strip()
    a, b = canonical(a.strip()), canonical(b.strip())
    if not_finite(a) or not_finite(b):
        return False
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return same_number(x, y)
    return a == b


def answers_match(answer: str, gold: str, algebra: Algebra) -> bool:
    r"""Compares a final answer with the right one.

    What `answers_equal` calls equal is. Beyond that:

    - Units: an answer with a unit matches a number without, and the other way round; `5 m` is not `5 cm`. Degrees and
      number bases (`101_2`) are units. `5\text{ million}` is 5000000, never 5. `10\%` is a tenth, never ten.
    - `x = 5`, `AB = 5`, `\angle ABC = 5^\circ`, `m + n = 5` match `5`; `y = 5` only where the right answer names y or
      nothing (see `assignments.alternatives`).
    - Tuples and intervals match part by part, in order, with the same brackets; sets and bare lists in any order. A
      tuple is not a set. A bare list matches a set, and a tuple in the same order. `1 \pm 2` is a list.
    - Words match as words, whatever their case; letters of a word are never factors of a product. A letter in brackets
      is a choice, whatever its case.
    - Where the right answer is a number, the answer has to be one as well, worked out: `2+2` is not 4, and a sum, an
      integral, a logarithm ... is an answer only where the right answer has one. Else repeating the question in the
      box would earn the reward.
    - Matrices match entry by entry, whatever their brackets; unions part by part, else by algebra.
    - What is left (radicals, polynomials, inequalities) is `algebra`'s; but never x for X, nor f for f'.

    An answer or a right answer of more than 2,000 characters, or with brackets nested more than 20 deep, is only
    compared as a string.

    Args:
      answer: what the model gave, LaTeX or plain.
      gold: the right answer; the order matters.
      algebra: decides two expressions. It may raise, to say that it would be needed.

    Returns:
      Whether the answer is right.

    Source: huggingface/math-verify for what counts as the same; hendrycks/math (trimming of units).
    Differs: math-verify takes (1,2) for {1,2}, 10% for 10, 5 m for 5 cm, 101_2 for 101_3, "no" for "on", f' for f and
      an unevaluated integral for its value (tests/rewards/test_grader_suite.py, tests/rewards/test_grader_pairs.py).
    """
    if _SIMPLE.fullmatch(answer) and _SIMPLE.fullmatch(gold):
        return int(answer) == int(gold)
    if not (_is_short(answer) and _is_short(gold)):
        return answer.strip() == gold.strip() != ""
    return _match(_prepared(answer), _prepared(gold), algebra, _MAX_DEPTH)


def without_percent(answer: str, gold: str) -> tuple[str, str]:
    """Both without a percent sign where only one has it and they differ: as published benchmarks compare."""
    if not (_is_short(answer) and _is_short(gold)):
        return answer, gold
    got, right = _prepared(answer), _prepared(gold)
    x, y = number(got), number(right)
    if ("%" in got) == ("%" in right) or (x is not None and y is not None and same_number(x, y)):
        return answer, gold
    return got.replace("\\%", "").replace("%", "").strip(), right.replace("\\%", "").replace("%", "").strip()


def _match(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    chosen = _choice_matches(answer, gold)
    if chosen is not None:
        return chosen
    if (lettered := _CHOSEN.fullmatch(answer)) and not _CHOSEN.fullmatch(gold):
        answer = lettered[3]
    answer, gold = unwrapped(answer), unwrapped(gold)
    if not answer or not gold or not_finite(answer) or not_finite(gold):
        return False
    x, y = number(answer), number(gold)
    if x is not None and y is not None:
        return same_number(x, y)
    if _LOOSE_SPACE.sub("", answer) == _LOOSE_SPACE.sub("", gold):
        return True
    if (found := _named(answer, gold, algebra, depth)) is not None:
        return found
    got, wanted = measured(answer), measured(gold)
    if got.unit or wanted.unit:
        same = not got.unit or not wanted.unit or got.unit == wanted.unit
        return same and _match(got.value, wanted.value, algebra, depth)
    if _is_ratio(answer) or _is_ratio(gold):
        return False
    if depth > 0 and (structured := _by_structure(answer, gold, algebra, depth - 1)) is not None:
        return structured
    if y is not None or _repeats_the_question(answer, gold):
        return False
    if _is_text(answer) or _is_text(gold):
        return answer.casefold().split() == gold.casefold().split()
    return _by_algebra(answer, gold, algebra)


def _named(answer: str, gold: str, algebra: Algebra, depth: int) -> bool | None:
    """The verdict where one of them names its value, None where none does."""
    chain = chain_of(answer)
    if chain is not None:
        last, *others = chain
        return _match(last, gold, algebra, depth) and all(_worked_out(other, last, algebra) for other in others)
    found = alternatives(answer, gold)
    return None if found is None else any(_match(a, g, algebra, depth) for a, g in found)


def _worked_out(side: str, value: str, algebra: Algebra) -> bool:
    x, y = number(side), number(value)
    return same_number(x, y) if x is not None and y is not None else _by_algebra(side, value, algebra)


def _by_structure(answer: str, gold: str, algebra: Algebra, depth: int) -> bool | None:
    """The verdict on two lists, matrices or unions; None where they have no structure to compare by."""
    got, right = parts_of(answer), parts_of(gold)
    if got is not None and right is not None:
        return _parts_match(got, right, algebra, depth)
    got_rows, right_rows = matrix_of(answer), matrix_of(gold)
    if got_rows is not None and right_rows is not None:
        return _rows_match(got_rows, right_rows, algebra, depth)
    return _unions_match(union_of(answer), union_of(gold), algebra, depth) or None


def _by_algebra(answer: str, gold: str, algebra: Algebra) -> bool:
    if _differ_in_case(answer, gold) or _dropped(answer) != _dropped(gold):
        return False
    # An equation is no expression, though its right side may be; an inequality may be an interval.
    if ("=" in answer) != ("=" in gold) and not (_ORDER.search(answer) or _ORDER.search(gold)):
        return False
    return algebra(_without_primes(answer), _without_primes(gold))


def _parts_match(got: Parts, right: Parts, algebra: Algebra, depth: int) -> bool:
    kinds = {got.kind, right.kind}
    if len(kinds) == 2 and kinds not in ({"", "{}"}, {"", "()"}):
        return False
    if max(len(got.items), len(right.items)) > _MAX_PARTS:
        return False
    if kinds == {""} and len(got.items) == len(right.items):
        return _same_in_any_order(got.items, right.items, algebra, depth)
    if kinds <= {"", "{}"}:
        # Every part on each side has its like on the other: {1, 1, 2} is {1, 2}.
        covered = all(any(_match(a, g, algebra, depth) for g in right.items) for a in got.items)
        return covered and all(any(_match(a, g, algebra, depth) for a in got.items) for g in right.items)
    same_length = len(got.items) == len(right.items)
    return same_length and all(_match(a, g, algebra, depth) for a, g in zip(got.items, right.items, strict=True))


def _same_in_any_order(got: list[str], right: list[str], algebra: Algebra, depth: int) -> bool:
    """Each part has a like of its own: 2, 2, 3 is not 2, 3, 3."""
    left = list(right)
    for answer in got:
        like = next((index for index, gold in enumerate(left) if _match(answer, gold, algebra, depth)), None)
        if like is None:
            return False
        del left[like]
    return True


def _rows_match(got: list[list[str]], right: list[list[str]], algebra: Algebra, depth: int) -> bool:
    if [len(row) for row in got] != [len(row) for row in right]:
        return False
    pairs = zip(sum(got, []), sum(right, []), strict=True)
    return all(_match(a, g, algebra, depth) for a, g in pairs)


def _unions_match(got: list[str], right: list[str], algebra: Algebra, depth: int) -> bool:
    """The same parts in any order; where they are not, [1,2] and [2,3] may still be [1,3]."""
    if len(got) != len(right) or not 1 < len(got) <= _MAX_PARTS:
        return False
    return _parts_match(Parts("", got), Parts("", right), algebra, depth)


@lru_cache(maxsize=_REMEMBERED)
def _prepared(text: str) -> str:
    """An answer as `_match` takes it: canonical, without what leads to it, conjunctions as commas."""
    if _DECIMAL.fullmatch(text):
        return text
    text = canonical(text)
    if not _WORD.search(text):
        return text
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    text = worded(text)
    text = _TITLE.sub(r"\1 = \2", text, count=1) if _TITLE.fullmatch(text) else text
    if match := _CASES.fullmatch(text):
        text = ", ".join(row.strip(" ,;") for row in match[1].split("\\\\") if row.strip(" ,;"))
    if (match := _BUILDER.fullmatch(text)) and (_ORDER.search(match[2]) or "=" in match[2]):
        text = match[2].strip()
    text = _NOON.sub(r"\1m", _OPTION.sub("", text))
    text = _ORDINAL.sub(r" \1", _AND_A_HALF.sub(r"\1 1/2", text))
    # Of inequalities, both hold or one does.
    text = _CONJUNCTION.sub(_joined if _ORDER.search(text) else ", ", text).strip(", ")
    return " ".join(_PERCENT_WORD.sub("%", text).split())


def _joined(conjunction: re.Match[str]) -> str:
    return r" \cup " if "or" in conjunction[0] else r" \cap "


def _is_short(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) <= MAX_CHARS and nesting(stripped) <= MAX_NESTING


def _choice_matches(answer: str, gold: str) -> bool | None:
    """The verdict where a letter in brackets is a choice, None where none is."""
    a, g = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if a and g and (a[1] or a[3] or g[1] or g[3]):
        return a[2].casefold() == g[2].casefold()
    chosen = _CHOSEN.fullmatch(answer)
    return (chosen[1] or chosen[2]) == g[2].upper() if chosen and g else None


def _is_ratio(text: str) -> bool:
    """A ratio or a time of day: it is right as it is written or not at all."""
    return ":" in text and "\\" not in text


def _repeats_the_question(answer: str, gold: str) -> bool:
    used, allowed = set(_COMMAND.findall(answer)), set(_COMMAND.findall(gold))
    operations = any(family & used and not family & allowed for family in _FAMILIES)
    factorial = "!" in answer and "!" not in gold
    return operations or factorial or bool(_DERIVATIVE.search(answer) and not _DERIVATIVE.search(gold))


def _is_text(text: str) -> bool:
    plain_text = _COMMAND.sub(" ", _ENVIRONMENT.sub(" ", text))
    return bool(_LONG_WORD.search(plain_text)) or plain_text.strip().casefold() in _SHORT_WORDS


def _differ_in_case(answer: str, gold: str) -> bool:
    """x is not X, nor is a small delta a capital one, which math-verify would take for the same."""
    a, g = (letters(_ENVIRONMENT.sub(" ", text)) for text in (answer, gold))
    return a != g and {letter.casefold() for letter in a} == {letter.casefold() for letter in g}


def _dropped(text: str) -> tuple[frozenset[str], frozenset[str]]:
    primed = frozenset(match[0] for match in _PRIMED.finditer(text))
    return primed, frozenset(re.sub(r"[\s{^]", "", match) for match in _DROPPED.findall(text))


def _without_primes(text: str) -> str:
    """f' as a letter of its own, with an index."""
    return _PRIMED.sub(lambda match: f"{match[1]}_{{9{len(match[2])}}}", text)
