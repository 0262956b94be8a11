"""Verifiable task families in two languages: each draws questions of a level, works them out, and knows what is right.

Every number is below 100, and every step adds or takes away one digit, so that what is hard is to put steps together.
A level is how many steps a question takes. Whether a question is for training or held out is a function of its numbers
alone, in both languages and however many are drawn.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

Language = Literal["en", "zh"]
Part = Literal["train", "held_out"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
LARGEST = 60
"""No running result is larger."""
MODULI = (3, 4, 5)
_HELD_OUT = 8  # of so many questions one is held out
_LONGEST = 100  # characters of an answer that is read
_IN_VAIN = 5_000  # draws that find nothing new, after which there is nothing
_THOUGHT = {"en": ("first ", " then ", " so "), "zh": ("先", "再", "所以")}


class Puzzle(NamedTuple):
    """A question, its worked steps, and a right answer.

    steps: equations, in order. concludes: whether the last of them is no step but what follows from the others.
    numbers: what the answer of a countdown is made of, and `target` what it comes to; else empty and None.
    """

    family: str
    level: int
    language: Language
    question: str
    steps: tuple[str, ...]
    answer: str
    concludes: bool = False
    numbers: tuple[int, ...] = ()
    target: int | None = None

    def row(self) -> dict[str, Any]:
        """As data sets hold it, and as `is_right` wants it."""
        named = {name: getattr(self, name) for name in ("question", "answer", "family", "level", "language", "target")}
        return named | {"numbers": list(self.numbers)}


def is_right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer solves the question of a row: equal as whole numbers, or, of a countdown, a sum that comes to
    the target and takes each number once, in any order.

    >>> is_right({"answer": "9"}, " 9 ")
    True
    >>> is_right({"answer": "9+5-3", "numbers": [9, 5, 3], "target": 11}, "5-3+9")
    True
    """
    answer = answer.strip()
    if len(answer) > _LONGEST:
        return False
    if row.get("target") is None:
        return re.fullmatch(r"-?[0-9]{1,9}", answer) is not None and int(answer) == int(row["answer"])
    if re.fullmatch(r"[0-9]{1,9}([+-][0-9]{1,9})*", answer) is None:
        return False
    parts = [int(part) for part in re.findall(r"[+-]?[0-9]+", answer)]
    return Counter(map(abs, parts)) == Counter(row["numbers"]) and sum(parts) == row["target"]


def check_row(row: Mapping[str, Any]) -> None:
    """Refuses a row that `is_right` could not judge by.

    Raises:
        ValueError: its answer is no whole number, or its countdown lacks numbers or a target.
    """
    target, numbers, answer = row.get("target"), row.get("numbers"), row.get("answer")
    if target is None and not (isinstance(answer, str) and re.fullmatch(r"-?[0-9]{1,9}", answer)):
        raise ValueError(f"answer: got {answer!r:.80}, wanted a whole number as text, or a target and numbers")
    if target is not None and not (
        type(target) is int and isinstance(numbers, list) and numbers and all(type(of) is int for of in numbers)
    ):
        raise ValueError(f"numbers: got {numbers!r:.80} and target {target!r:.80}, wanted whole numbers")


def thought(puzzle: Puzzle, language: Language | None = None) -> str:
    """The steps in words of a language, the question's own by default.

    >>> thought(chain(np.random.default_rng(0), 2, "en"))
    'first 8-6=2 then 2+3=5'
    """
    first, then, so = _THOUGHT[language or puzzle.language]
    last = so if puzzle.concludes else then
    return first + then.join(puzzle.steps[:-1]) + (last if len(puzzle.steps) > 1 else "") + puzzle.steps[-1]


def guess(puzzle: Puzzle, language: Language | None = None) -> str:
    """A thought that has no steps, in words of a language, the question's own by default.

    >>> guess(chain(np.random.default_rng(0), 2, "en"))
    ' so 5'
    """
    return _THOUGHT[language or puzzle.language][2] + puzzle.answer


def completion(puzzle: Puzzle, language: Language | None = None, *, worked: bool = True) -> str:
    """What a model is to imitate: the thought, of steps or a guess, then the answer, in R1-Zero's tags."""
    text = thought(puzzle, language) if worked else guess(puzzle, language)
    return f"<think>{text}</think><answer>{puzzle.answer}</answer>"


def draw(
    count: int,
    *,
    part: Part,
    levels: Sequence[int],
    seed: int,
    families: Sequence[str] = (),
    languages: Sequence[Language] = LANGUAGES,
) -> list[Puzzle]:
    """So many different questions, evenly of all families, levels and languages, in random order.

    Args:
        count: of questions.
        part: those to train on, or held-out ones; none is in both, in whatever language.
        levels: steps that a question takes, each from 1 to 6.
        seed: of the draw.
        families: of `FAMILIES`; none given takes all.
        languages: that questions are asked in.

    Raises:
        ValueError: an unknown family or level, or more questions than there are found.
    """
    names = tuple(families) or tuple(FAMILIES)
    if unknown := sorted(set(names) - FAMILIES.keys()):
        raise ValueError(f"families: got {unknown[0]!r}, wanted some of {', '.join(FAMILIES)}")
    if not levels or not all(1 <= level <= 6 for level in levels):
        raise ValueError(f"levels: got {list(levels)}, wanted some from 1 to 6")
    rng = np.random.default_rng((seed, part == "held_out"))
    cells = list(product(names, levels, languages))
    shares = [count // len(cells) + int(place < count % len(cells)) for place in rng.permutation(len(cells))]
    found = [puzzle for cell, share in zip(cells, shares, strict=True) for puzzle in _cell(rng, *cell, share, part)]
    return [found[place] for place in rng.permutation(len(found))]


def part_of(puzzle: Puzzle) -> Part:
    """Whether a question is to train on or held out, by its numbers and family alone."""
    # what two wordings, two orders of a comparison, or two solutions of a countdown have in common
    asked = (sorted(puzzle.numbers), puzzle.target) if puzzle.target is not None else sorted(puzzle.steps)
    digest = hashlib.blake2b(f"{puzzle.family} {asked}".encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest) % _HELD_OUT else "held_out"


def _cell(
    rng: np.random.Generator, family: str, level: int, language: Language, count: int, part: Part
) -> Iterator[Puzzle]:
    found: dict[str, Puzzle] = {}
    in_vain = 0
    while len(found) < count and in_vain < _IN_VAIN:
        puzzle = FAMILIES[family](rng, level, language)
        new = part_of(puzzle) == part and puzzle.question not in found
        in_vain = 0 if new else in_vain + 1
        if new:
            found[puzzle.question] = puzzle
    if len(found) < count:
        raise ValueError(
            f"puzzles: got {count} wanted of {family}, level {level}, {language}, and found {len(found)} different "
            "ones; ask for fewer, or for more levels"
        )
    yield from found.values()


# --- families ------------------------------------------------------------------------------------


def chain(rng: np.random.Generator, level: int, language: Language) -> Puzzle:
    """Digits added and taken away from left to right."""
    numbers, signs = _walk(rng, level)
    text, steps, total = _chained(numbers, signs)
    asked = {"en": f"Work out {text}.", "zh": f"计算{text}。"}[language]
    return Puzzle("chain", level, language, asked, steps, str(total))


def modular(rng: np.random.Generator, level: int, language: Language) -> Puzzle:
    """The remainder of a chain."""
    numbers, signs = _walk(rng, level)
    text, steps, total = _chained(numbers, signs)
    modulus = int(rng.choice(MODULI))
    asked = {"en": f"Work out {text} modulo {modulus}.", "zh": f"计算{text}除以{modulus}的余数。"}[language]
    rest = str(total % modulus)
    return Puzzle("modular", level, language, asked, (*steps, f"{total}%{modulus}={rest}"), rest, concludes=True)


def comparison(rng: np.random.Generator, level: int, language: Language) -> Puzzle:
    """The larger of two chains, by its value; the level is divided between them."""
    while True:
        (one, first, left), (other, second, right) = (
            _chained(*_walk(rng, part)) for part in (level - level // 2, level // 2)
        )
        if left != right:
            break
    asked = {"en": f"Which is more, {one} or {other}?", "zh": f"{one}和{other}哪个大?"}[language]
    high, low = max(left, right), min(left, right)
    return Puzzle("comparison", level, language, asked, (*first, *second, f"{high}>{low}"), str(high), concludes=True)


def countdown(rng: np.random.Generator, level: int, language: Language) -> Puzzle:
    """Signs between numbers, so that they come to a target."""
    numbers, signs = _walk(rng, level)
    text, steps, total = _chained(numbers, signs)
    listed = ",".join(map(str, numbers))
    asked = {"en": f"Make {total} from {listed}.", "zh": f"用{listed}算出{total}。"}[language]
    return Puzzle("countdown", level, language, asked, steps, text, numbers=tuple(numbers), target=total)


def story(rng: np.random.Generator, level: int, language: Language) -> Puzzle:
    """A word problem: somebody has things, gets some and loses some."""
    numbers, signs = _walk(rng, level)
    _, steps, total = _chained(numbers, signs)
    who, what = (rng.choice(STORY[language][name]) for name in ("who", "what"))
    events = [
        str(rng.choice(STORY[language][sign])).format(number) for sign, number in zip(signs, numbers[1:], strict=True)
    ]
    begins, asks = STORY[language]["begins"][0], STORY[language]["asks"][0]
    asked = begins.format(who, numbers[0], what) + "".join(events) + asks
    return Puzzle("story", level, language, asked, steps, str(total))


STORY: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "who": ("Tom", "Ann", "Max"),
        "what": ("apples", "eggs", "books"),
        "begins": ("{} has {} {}.",),
        "+": (" Then buys {}.", " Then finds {}."),
        "-": (" Then sells {}.", " Then loses {}."),
        "asks": (" How many are left?",),
    },
    "zh": {
        "who": ("小明", "小红", "小王"),
        "what": ("苹果", "鸡蛋", "书"),
        "begins": ("{}有{}个{}。",),
        "+": ("买来{}个。", "找到{}个。"),
        "-": ("卖掉{}个。", "丢了{}个。"),
        "asks": ("还剩几个?",),
    },
}
FAMILIES: dict[str, Callable[[np.random.Generator, int, Language], Puzzle]] = {
    of.__name__: of for of in (chain, modular, comparison, countdown, story)
}


def _walk(rng: np.random.Generator, steps: int) -> tuple[list[int], str]:
    """Digits, and the signs between them, whose running results stay from 0 to `LARGEST`."""
    numbers, signs = [int(rng.integers(1, 10))], ""
    total = numbers[0]
    for _ in range(steps):
        number, sign = int(rng.integers(1, 10)), str(rng.choice(["+", "-"]))
        if sign == "-" and number > total:
            sign = "+"
        total += number if sign == "+" else -number
        numbers, signs = [*numbers, number], signs + sign
    return numbers, signs


def _chained(numbers: Sequence[int], signs: str) -> tuple[str, tuple[str, ...], int]:
    """The expression, its steps and its value."""
    total, text, steps = numbers[0], str(numbers[0]), []
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={result}")
        text, total = f"{text}{sign}{number}", result
    return text, tuple(steps), total
