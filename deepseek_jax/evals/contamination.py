"""Training data that holds problems of a benchmark, found by runs of words that both have.

Words are compared without case, punctuation, markup and the forms of Unicode. A run alone is often a formula of its
field ("where m and n are relatively prime positive integers"); what tells is how much of a problem runs cover.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.evals.task import Problem

LEAST, MOST = 8, 13
SHARE = 0.5
"""Of a problem's words, from which on a row is said to hold it."""
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces: a character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

Gram = tuple[str, ...]


class Overlap(NamedTuple):
    """A training row and a problem that have words in common.

    row: its number. problem: number in the benchmark. share: of the problem's words those that stand in a run which the
    row has. shared: the longest passage that both have, as compared.
    """

    row: int
    problem: int
    share: float
    shared: str


def words(text: str) -> list[str]:
    """The words that are compared.

    >>> words(r"What is $\\frac{1}{2}$ of 1,000 Äpfel?")
    ['what', 'is', 'frac', '1', '2', 'of', '1', '000', 'äpfel']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlaps(rows: Iterable[Any], problems: Sequence[Problem], *, ngram: int = LEAST) -> list[Overlap]:
    """Every pair of a row and a problem that have a run of words in common, by row, the largest share first.

    Args:
        rows: training data; all text of a row counts, the solution too.
        problems: of the benchmark; their questions count. One that is shorter than a run is sought in whole, and one of
            fewer than 8 words only where it is all of a text.
        ngram: words of a run, 8 to 13; longer ones miss more problems that were told in other words.

    Raises:
        ValueError: another number of words.

    Source: Brown et al., Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C (words and runs).
        Differs: there a document with one run of 13 is dropped (tests/evals/test_contamination.py).
    """
    if not LEAST <= ngram <= MOST:
        raise ValueError(f"ngram: got {ngram}, wanted {LEAST} to {MOST} words")
    asked = [words(problem.question) for problem in problems]
    index = _Index(asked, ngram)
    found = []
    for number, row in enumerate(rows):
        shared: dict[int, set[Gram]] = defaultdict(set)
        for text in texts_of(row):
            for gram in index.within(words(text)):
                for problem in index.problems[gram]:
                    shared[problem].add(gram)
        of_row = [_overlap(number, problem, asked[problem], grams) for problem, grams in shared.items()]
        found += sorted(of_row, key=lambda of: (-of.share, of.problem))
    return found


def _overlap(row: int, problem: int, said: Sequence[str], grams: set[Gram]) -> Overlap:
    passages = _passages(said, grams)
    share = sum(end - start for start, end in passages) / len(said)
    start, end = max(passages, key=lambda span: span[1] - span[0])
    return Overlap(row, problem, share, " ".join(said[start:end]))


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for part in value:
            yield from texts_of(part)


class _Index:
    """The runs of a benchmark. problems: that have a run; lengths: of runs, in words."""

    def __init__(self, asked: Sequence[Sequence[str]], ngram: int):
        self.problems: dict[Gram, list[int]] = defaultdict(list)
        for problem, said in enumerate(asked):
            for gram in set(_grams(said, min(ngram, len(said)))):
                self.problems[gram].append(problem)
        self.lengths = sorted({len(gram) for gram in self.problems if len(gram) >= LEAST})

    def within(self, said: Sequence[str]) -> Iterator[Gram]:
        """The runs in a text."""
        for length in self.lengths:
            yield from (gram for gram in _grams(said, length) if gram in self.problems)
        if 0 < len(said) < LEAST and tuple(said) in self.problems:
            yield tuple(said)


def _grams(said: Sequence[str], count: int) -> Iterable[Gram]:
    return zip(*(said[start:] for start in range(count)), strict=False)


def _passages(said: Sequence[str], grams: set[Gram]) -> list[tuple[int, int]]:
    """The places of a problem that its shared runs cover, each from its first word to the one after its last."""
    count = len(next(iter(grams)))
    found: list[tuple[int, int]] = []
    for place, gram in enumerate(_grams(said, count)):
        if gram in grams:
            joins = bool(found) and place <= found[-1][1]
            found[-1:] = [(found[-1][0], place + count)] if joins else [*found[-1:], (place, place + count)]
    return found
