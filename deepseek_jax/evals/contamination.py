"""Training data that holds problems of a benchmark, found by runs of words that both have.

Words are compared without case, punctuation, markup and the forms of Unicode. A run that stands in many surroundings in
the training data is a phrase of its field ("where m and n are relatively prime positive integers") and tells nothing.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.evals.task import Problem

LEAST, MOST = 8, 13
SHARE = 0.5
"""Of a problem's words, from which on a row is said to hold it: a formula of its field alone is less."""
_COMMON = 10  # surroundings from which on a run is a phrase
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


class Found(NamedTuple):
    """What a comparison came to.

    ngram: words of a run. overlaps: by row, the largest share first. phrases: runs that were set aside.
    """

    ngram: int
    overlaps: list[Overlap]
    phrases: int


def words(text: str) -> list[str]:
    """The words that are compared.

    >>> words(r"What is $\\frac{1}{2}$ of 1,000 Äpfel?")
    ['what', 'is', 'frac', '1', '2', 'of', '1', '000', 'äpfel']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngram_of(problems: Sequence[Problem]) -> int:
    """Words of a run that suit a benchmark: as many as its shortest problems but 5 % have, 8 to 13.

    Source: Brown et al., Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C.
    """
    lengths = sorted(len(words(problem.question)) for problem in problems)
    return min(MOST, max(LEAST, lengths[len(lengths) // 20]))


def overlaps(rows: Iterable[Any], problems: Sequence[Problem], *, ngram: int | None = None) -> Found:
    """Every pair of a row and a problem that have a run of words in common.

    Args:
        rows: training data; all text of a row counts, the solution too.
        problems: of the benchmark; their questions count. One that is shorter than a run is sought in whole, and one of
            fewer than 8 words only where it is all of a text.
        ngram: words of a run, 8 to 13; None takes what suits the benchmark.

    Raises:
        ValueError: another number of words.

    Source: Brown et al. (arXiv 2005.14165), appendix C. Differs: there a run in more than ten documents is set aside;
        here one in more than ten surroundings, so that a problem which the data holds many times is still found
        (tests/evals/test_contamination.py).
    """
    count = ngram_of(problems) if ngram is None else ngram
    if not LEAST <= count <= MOST:
        raise ValueError(f"ngram: got {count}, wanted {LEAST} to {MOST} words")
    asked = [words(problem.question) for problem in problems]
    index = _Index(asked, count)
    around: dict[Gram, set[int]] = defaultdict(set)
    hits: dict[int, dict[int, set[Gram]]] = {}
    for number, row in enumerate(rows):
        of_row: dict[int, set[Gram]] = defaultdict(set)
        for text in texts_of(row):
            for gram, place, said in index.within(words(text)):
                around[gram].add(hash((tuple(said[max(0, place - count) : place]),
                                       tuple(said[place + len(gram) : place + len(gram) + count]))))  # fmt: skip
                for problem in index.problems[gram]:
                    of_row[problem].add(gram)
        if of_row:
            hits[number] = of_row
    phrases = {gram for gram, places in around.items() if len(places) > _COMMON}
    found = []
    for number, of_row in hits.items():
        for problem, grams in of_row.items():
            if left := grams - phrases:
                passages = _passages(asked[problem], left)
                share = sum(end - start for start, end in passages) / len(asked[problem])
                start, end = max(passages, key=lambda span: span[1] - span[0])
                found.append(Overlap(number, problem, share, " ".join(asked[problem][start:end])))
    return Found(count, sorted(found, key=lambda of: (of.row, -of.share, of.problem)), len(phrases))


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
    """The runs of a benchmark. grams: of each problem; problems: of each run; lengths: of runs, in words."""

    def __init__(self, asked: Sequence[Sequence[str]], count: int):
        self.grams = [set(_grams(said, min(count, len(said)))) for said in asked]
        self.problems: dict[Gram, list[int]] = defaultdict(list)
        for problem, grams in enumerate(self.grams):
            for gram in grams:
                self.problems[gram].append(problem)
        self.lengths = sorted({len(gram) for gram in self.problems if len(gram) >= LEAST})

    def within(self, said: Sequence[str]) -> Iterator[tuple[Gram, int, Sequence[str]]]:
        """The runs in a text, where each begins, and the text."""
        for length in self.lengths:
            for place, gram in enumerate(_grams(said, length)):
                if gram in self.problems:
                    yield gram, place, said
        if 0 < len(said) < LEAST and tuple(said) in self.problems:
            yield tuple(said), 0, said


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
