"""What can be told of a chain of thought by rule: false sums, claims that clash, answers it does not come to, loops.

Each rule looks at text alone, and has a precision and a recall on labelled samples (tests/rl/test_semantics.py). They
are for completions whose answer is right by the grader: what they find is a right answer by wrong reasoning.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from deepseek_jax.rewards.answers import answers_equal
from deepseek_jax.rewards.lengths import repeated_share

_MOST = 200_000  # characters that are looked at
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
# What a sum is said to come to, where nothing follows that would be a part of it.
_SAID = re.compile(rf"[ \t]{{0,2}}(\$?-?{_NUMBER})(?![A-Za-z0-9_^]|[ \t]{{0,2}}[-+*/×÷·%(^°]|\.\d)")
_OF_SUM = frozenset("0123456789+-*/×÷·().,$ \t")
_LONGEST_SUM = 80  # characters
_GAP = re.compile(r"[.,][ \t]+|(?<=[\d)])[ \t]+(?=[\d(])")  # between what is no part of a sum and the sum
_TOKEN = re.compile(rf"{_NUMBER}|[-+*/()]")
_DOUBT = re.compile(
    r"\s{0,2}(?:\?|\(?mod|(?:[.,;!]\s{0,2})?"
    r"(?:no\b|not\b|wait|wrong|hmm|oops|is false|that is wrong|incorrect|不对|错|等等|吗))",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|≠|\bif|\bsuppose|\bassume|不是|并非|如果|假设)\s{0,2}$", re.IGNORECASE)
_CLAIM = re.compile(
    r"(?:(?:final |right |correct )?answer\s{0,2}(?:is|:|=|would be)|答案\s{0,2}(?:是|为|:|：)|\\boxed\s{0,2}\{)"
    rf"[\s$*\\(\[:：]{{0,6}}(-?{_NUMBER}(?:/\d+)?)",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\bwait\b|\bactually\b|\bno,|\bmistake|\bcheck\b|\bcorrect(?:ion|ed)\b|\bre-?do\b|\brather\b|\bwrong\b|\binstead\b"
    r"|\bhmm\b|\boops\b|\bif\b|不对|等等|错|重新|其实|检查",
    re.IGNORECASE,
)
_LINE = re.compile(r"[\n.!?。！？;；]+")
_RESULT = re.compile(rf"=[ \t]{{0,2}}\$?-?{_NUMBER}")
# What stands before an equation that is no result, in the same sentence.
_ASIDE = re.compile(
    r"(?:\bcheck|\bverif|\bbecause\b|\bsince\b|,\s?(?:for|as)\b|检查|验证|因为)[^.!?。\n;]*$", re.IGNORECASE
)
_NUMBERS = re.compile(rf"-?{_NUMBER}(?:/\d+)?")
_LEAST_LINE = 12  # characters of a sentence whose return is a loop
_NGRAM = 6


def false_equations(text: str) -> list[str]:
    """Equations between numbers that do not hold, each as it stands.

    Sums, products and quotients are looked at, with brackets and in decimals; a quotient may be rounded to the digits
    that are shown. What is asked, supposed, denied, taken modulo something, or called wrong right behind is none.

    >>> false_equations("7+8=15, so 15 - 6 = 8. Is 3*4=11? No.")
    ['15 - 6 = 8']
    """
    text, found = text[:_MOST], []
    for equals in re.finditer("=", text):
        said = _SAID.match(text, equals.end())
        left, start = _sum_before(text, equals.start())
        if (
            said is None
            or not left
            or _DOUBT.match(text, said.end())
            or _DENIED.search(text[max(0, start - 16) : start])
        ):
            continue
        value = value_of(left)
        if value is not None and _operates(left) and not _shown(value, said[1]):
            found.append(text[start : said.end()].strip())
    return found


def _sum_before(text: str, end: int) -> tuple[str, int]:
    """The sum of numbers that ends there, and where it begins; "" where there is none, or one that begins before."""
    start = end
    while start > 0 and text[start - 1] in _OF_SUM:
        start -= 1
        if end - start > _LONGEST_SUM:
            return "", start
    start = max((start + gap.end() for gap in _GAP.finditer(text[start:end])), default=start)
    start += len(text[start:end]) - len(text[start:end].lstrip())
    before, left = text[max(0, start - 2) : start], text[start:end].strip()
    joined = before[-1:] and (before[-1].isascii() and (before[-1].isalnum() or before[-1] in ":^_%}])\\!"))
    term = left[:1] == "-" and before.strip()[-1:].isalnum()  # of something else, as in "x - 3 + 5"
    return (
        ("", start)
        if joined or term or left[:1] in ("", "+", "*", "/", "×", "÷", "·", ".", ",", ")")
        else (left, start)
    )


def clashing_claims(text: str) -> tuple[str, str] | None:
    """Two different numbers that are both said to be the answer, with no correction between them; None without such.

    >>> clashing_claims("The answer is 5. So the answer is 6.")
    ('5', '6')
    """
    claims = list(_CLAIM.finditer(text[:_MOST]))
    for one, other in zip(claims, claims[1:], strict=False):
        between = text[one.end() : other.start()]
        if not answers_equal(one[1], other[1]) and not _CORRECTION.search(between):
            return one[1], other[1]
    return None


def comes_to(thought: str, answer: str) -> bool:
    """Whether a thought arrives at its answer, as far as can be told: True where it states no results.

    The answer has to be among the numbers from the last equation or claim on; an equation that checks or gives a reason
    is passed over. An answer that is a sum counts by its value; one that is no number is not looked at.

    >>> comes_to("7+8=15, then 15-6=9", "9"), comes_to("7+8=15, then 15-6=9", "12")
    (True, False)
    """
    value = value_of(answer.replace("$", "").strip().rstrip("."))
    if value is None:
        return True
    thought = thought[-_MOST:]
    results = [
        of.start()
        for of in _RESULT.finditer(thought)
        if not _ASIDE.search(thought[max(0, of.start() - 60) : of.start()])
    ]
    last = max([*results, *(of.start() for of in _CLAIM.finditer(thought))], default=None)
    if last is None:
        return True
    stated = [found for text in _NUMBERS.findall(thought[last:]) if (found := value_of(text)) is not None]
    return any(abs(found) == abs(value) or _shown(found, answer) for found in stated)


def loops(text: str, *, share: float = 0.35, times: int = 4) -> bool:
    """Whether a text goes round: so large a share of runs of six words was there before, or a sentence so many times.

    >>> loops("Let me think about it. " * 5), loops("Let me think about it.")
    (True, False)
    """
    text = text[:_MOST]
    lines = Counter(line.strip().casefold() for line in _LINE.split(text) if len(line.strip()) >= _LEAST_LINE)
    return max(lines.values(), default=0) >= times or repeated_share(text, _NGRAM) > share


def agreement(answers: Sequence[str | None], same: Sequence[Sequence[bool]]) -> list[float]:
    """Of every sample of a prompt the share of all samples that give the same answer.

    Args:
        answers: of the samples, None where there is none.
        same: [sample][sample] whether two answers are one.
    """
    count = len(answers)
    return [
        0.0 if answer is None else sum(same[place][other] for other in range(count)) / count
        for place, answer in enumerate(answers)
    ]


def value_of(text: str) -> Fraction | None:
    """The value of a sum of numbers; None where it is none, or divides by 0.

    >>> value_of("(1,000 - 4) / 2"), value_of("2 +"), value_of("x")
    (Fraction(498, 1), None, None)
    """
    plain = text.translate(_SIGNS).replace(" ", "").replace("\t", "")
    tokens = _TOKEN.findall(plain)
    if not tokens or "".join(tokens) != plain or len(tokens) > 200:
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except (ValueError, ZeroDivisionError, IndexError, RecursionError):
        return None
    return value if reader.done else None


_SIGNS = str.maketrans({"×": "*", "÷": "/", "·": "*", "$": None})


class _Reader:
    """Recursive descent over the tokens of a sum."""

    def __init__(self, tokens: Sequence[str]):
        self._tokens, self._at = [*tokens, ""], 0

    @property
    def done(self) -> bool:
        return self._tokens[self._at] == ""

    def sum(self) -> Fraction:
        value = self._product()
        while self._tokens[self._at] in ("+", "-") and not self.done:
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._tokens[self._at] in ("*", "/") and not self.done:
            value = value * self._factor() if self._take() == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        token = self._take()
        if token == "-":
            return -self._factor()
        if token == "(":
            value = self.sum()
            if self._take() != ")":
                raise ValueError
            return value
        return Fraction(token.replace(",", ""))

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]


def _operates(left: str) -> bool:
    return len(_TOKEN.findall(left.translate(_SIGNS))) > 2


def _shown(value: Fraction, said: str) -> bool:
    """Whether a number as it is said is the value, or the value rounded or cut to its digits."""
    plain = said.replace(",", "").replace("$", "").strip()
    try:
        told = Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return False
    digits = len(plain.partition(".")[2])
    return told == value or (digits > 0 and abs(told - value) < Fraction(1, 10**digits))
