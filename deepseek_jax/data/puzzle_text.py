"""What a small model reads besides puzzles: what its base has seen, general talk, and a vocabulary for all of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.arithmetic import TEMPLATE
from deepseek_jax.data.puzzles import LARGEST, MODULI, STORY, Language, Puzzle, chain, completion, part_of
from deepseek_jax.text.tokenizer import Tokenizer

ALPHABET = (
    "0123456789+-=%>,.;?! :。计算除以的余数和哪个大用出有买来找到卖掉丢了还剩几先再所"
    "向问好道谢告别你见说小明红王苹果鸡蛋书"
)
WORDS = (
    *("Work out", " modulo ", "Which is more, ", " or ", "Make ", " from ", " has ", " Then ", "buys ", "finds "),
    *("sells ", "loses ", " How many are left?", "first ", " then ", " so ", "Tom", "Ann", "Max", "apples", "eggs"),
    *("books", "Greet ", "Thank ", "Say goodbye to ", "Hello", "Thank you", "Goodbye", "be kind"),
)
_FACTS = 5  # in a row at most
GENERAL: dict[str, dict[str, tuple[str, str]]] = {
    "en": {
        "greet": ("Greet {}.", "Hello"),
        "thank": ("Thank {}.", "Thank you"),
        "leave": ("Say goodbye to {}.", "Goodbye"),
    },
    "zh": {"greet": ("向{}问好。", "你好"), "thank": ("向{}道谢。", "谢谢"), "leave": ("向{}告别。", "再见")},
}
_KIND = {"en": "be kind", "zh": "好好说"}


def puzzle_tokenizer() -> Tokenizer:
    """One that can write every puzzle, its thought, and general talk; most English words are a token."""
    return Tokenizer.characters(ALPHABET, words=WORDS, chat_template=TEMPLATE)


def facts(count: int, seed: int) -> list[dict[str, Any]]:
    """What a base model has seen: rows of one to five equations or comparisons that have nothing to do with each other,
    and as many of chains that are worked out.

    They stand in the place of pre-training. None holds a question, a thought or a tag, and none is a chain that is held
    out. Small numbers come more often.
    """
    rng = np.random.default_rng((seed, 0x46414354))
    rows = []
    for number in range(count):
        if number % 2:
            rows.append(_worked(rng))
            continue
        pairs = [_fact(rng) for _ in range(int(rng.integers(1, _FACTS + 1)))]
        prompt, learnt = (";".join(side) for side in zip(*pairs, strict=True))
        rows.append({"prompt": prompt, "completion": learnt})
    return rows


def _worked(rng: np.random.Generator) -> dict[str, Any]:
    while True:
        puzzle = chain(rng, int(rng.integers(2, _FACTS)), "en")
        if part_of(puzzle) == "train":
            asked = re.sub(r"[^0-9+-]", "", puzzle.question)
            return {"prompt": asked, "completion": ";".join(puzzle.steps)}


def _fact(rng: np.random.Generator) -> tuple[str, str]:
    kind, number = rng.random(), int(rng.integers(0, LARGEST + 1, size=2).min())
    if kind < 0.1:
        modulus = int(rng.choice(MODULI))
        return f"{number}%{modulus}", f"{number}%{modulus}={number % modulus}"
    if kind < 0.2:
        other = (number + int(rng.integers(1, LARGEST))) % (LARGEST + 1)
        return f"{number},{other}", f"{max(number, other)}>{min(number, other)}"
    digit, sign = int(rng.integers(1, 10)), "+" if rng.random() < 0.5 else "-"
    if sign == "-" and digit > number:
        sign = "+"
    result = number + digit if sign == "+" else number - digit
    return f"{number}{sign}{digit}", f"{number}{sign}{digit}={result}"


def demonstrations(puzzles: Sequence[Puzzle], *, mixed: float, guessed: float, seed: int) -> list[dict[str, Any]]:
    """Conversations that come to the right answer.

    Args:
        puzzles: that are asked.
        mixed: share of thoughts that are in the other language than the question.
        guessed: share of thoughts that have no steps.
        seed: of which.
    """
    other: Mapping[Language, Language] = {"en": "zh", "zh": "en"}
    rng = np.random.default_rng((seed, 0x4C414E47))
    strays, guesses = rng.random(len(puzzles)) < mixed, rng.random(len(puzzles)) < guessed
    return [
        chat(of.question, completion(of, other[of.language] if stray else of.language, worked=not guess))
        for of, stray, guess in zip(puzzles, strays, guesses, strict=True)
    ]


def general(seed: int) -> list[dict[str, Any]]:
    """Requests that have no right answer, each with a curt reply and with one that names whom it speaks to."""
    rows = []
    for language, kinds in GENERAL.items():
        for asked, said in kinds.values():
            for who in STORY[language]["who"]:
                question = asked.format(who)
                for reply in (f"{said}.", f"{said} {who}!"):
                    text = f"<think>{_KIND[language]}</think><answer>{reply}</answer>"
                    rows.append(chat(question, text) | {"language": language, "family": "general"})
    return [rows[place] for place in np.random.default_rng((seed, 0x47454E)).permutation(len(rows))]


def general_prompts() -> list[dict[str, Any]]:
    """The same requests as questions without an answer, in the columns of a puzzle's row."""
    return [
        {"question": asked.format(who), "answer": None, "family": "general", "level": 0, "language": language}
        | {"target": None, "numbers": [], "who": who}
        for language, kinds in GENERAL.items()
        for asked, _ in kinds.values()
        for who in STORY[language]["who"]
    ]


def chat(question: str, answer: str) -> dict[str, Any]:
    """A conversation of one turn each."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def unwritable(text: str) -> str:
    """The first character of a text that the vocabulary lacks; "" where there is none."""
    rest = re.sub("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))), "", text)
    return next((letter for letter in rest if letter not in ALPHABET), "")
