"""Values that people write in words: "twenty-one apples", "all real numbers", "no solutions"."""

import re

_ONES = "zero one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {
    **{word: value for value, word in enumerate([*_ONES, *_TEENS])},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth".split()

_UPTO_99 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_ONES[1:])}))?|{'|'.join([*_TEENS, *_ONES])})"
_UPTO_999 = rf"(?:{_UPTO_99} hundred(?: (?:and )?{_UPTO_99})?|{_UPTO_99})"
_SCALED = rf" (?:{'|'.join(_SCALES)})(?![A-Za-z])"
# A cardinal at the beginning of an answer or a part of one. A capital after it is of a name ("Two Rivers"), an ordinal
# after tens is one with it ("twenty-fifth"), and of words one after another only digits could be meant ("one two").
_CARDINAL = re.compile(
    r"(?:^|(?<=[,;=({\[])|(?<=and )|(?<=or )|(?<=\bis ))"
    rf"(\s*)(?i:(negative |minus )?((?:{_UPTO_999}{_SCALED},? (?:and )?)*{_UPTO_999}(?:{_SCALED})?)(?![A-Za-z]))"
    rf"(?![\s-]+[A-Z])(?!(?:(?<=ty)|(?<=ed))[ -](?:{'|'.join(_ORDINALS)})(?![a-z]))"
    rf"(?![\s-]+(?i:{'|'.join(_SMALL)})(?![A-Za-z]))"
)
_HALF = re.compile(r"(?:(?:a|one)[ -])?half", re.IGNORECASE)
_A_SCALE = re.compile(rf"(half )?an? (?=(?:dozen|hundred|{'|'.join(_SCALES)})(?![A-Za-z]))", re.IGNORECASE)

_SETS = (
    (r"(?:the )?(?:empty|null) set|(?:there (?:is|are) )?no solutions?(?: exists?)?", r"\emptyset"),
    (r"(?:it )?(?:dne|does not exist|doesn't exist)", "does not exist"),
    *(
        (rf"(?:all|every|any|(?:the )?set of(?: all)?|all of the) {words}", rf"\mathbb{{{letter}}}")
        for words, letter in (
            (r"reals?(?: numbers?)?(?: x)?", "R"),
            (r"integers?", "Z"),
            (r"rational numbers?", "Q"),
            (r"complex numbers?", "C"),
        )
    ),
)
_SET = re.compile("|".join(f"({words})" for words, _ in _SETS), re.IGNORECASE)


def worded(text: str) -> str:
    r"""An answer with digits and symbols for its words.

    Args:
      text: as `notation.canonical` writes it.

    Returns:
      "twelve apples" as "12 apples", "two thirds" as "2 thirds", "half" as "1/2", "all real numbers" as `\mathbb{R}`,
      "no solutions" as `\emptyset`, "DNE" as "does not exist"; names ("Two Rivers") and ordinals stay.
    """
    if _HALF.fullmatch(text):
        return "1/2"
    if match := _SET.fullmatch(text):
        return _SETS[match.lastindex - 1][1]
    if match := _A_SCALE.match(text):
        return f"{'1/2' if match[1] else '1'} {text[match.end() :]}"
    return _CARDINAL.sub(_in_digits, text)


def _in_digits(match: re.Match[str]) -> str:
    space, sign, words = match.groups()
    return f"{space}{'-' if sign else ''}{_value(words)}"


def _value(words: str) -> int | str:
    """The number; the words where a scale is not below the one before it."""
    total, part, last = 0, 0, 10**12
    for word in re.split(r"[\s,-]+", words.casefold()):
        if word in _SCALES:
            if _SCALES[word] >= last:
                return words
            last = _SCALES[word]
            total, part = total + part * last, 0
        elif word != "and":
            part = part * 100 if word == "hundred" else part + _SMALL[word]
    return total + part if part < 1000 else words
