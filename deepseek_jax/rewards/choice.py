"""Multiple choice: did the completion choose the right option, and only that one?"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from deepseek_jax.rewards.answers import MAX_CHARS
from deepseek_jax.rewards.notation import MAX_NESTING, canonical, nesting
from deepseek_jax.rewards.protocol import RewardFunction, check_answers, check_strings
from deepseek_jax.text.answers import Extraction, answer_of

_LEAD = re.compile(
    r"^(?:the\s+)?(?:(?:correct|final|best)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s+", re.IGNORECASE
)
# A letter, and either nothing after it or a mark and the option's text, which may stand in brackets.
_NAMED = re.compile(r"([(\[]?)\s*([a-z])\s*(?:([)\].:,;]+|(?<=\s)[-–—](?=\s)|(?<=\s)(?=\())\s*(.*))?", re.DOTALL)


def choice_reward(*, letters: str = "ABCDE", extraction: Extraction = "strict") -> RewardFunction:
    r"""Makes the reward of multiple choice: 1.0 where the completion's final answer is the right option, else 0.0.

    The answer is a letter (`B`, `b`, `(B)`, `B.`, `**B**`, `\text{(B)}`, "option B"), a letter with its option
    (`B) Paris`), or the option's text, whatever its case. A letter that begins a word chooses nothing, two letters
    choose nothing, and neither does a letter with the text of another option. Where the options' texts are not known,
    any text may stand after a letter and a mark, if it names no second letter.

    Args:
      letters: names of the options, in order.
      extraction: where the answer is looked for, as in `rewards.math.math_reward`.

    Returns:
      A reward function that needs a column `answer` (the right letter, also as `(B)` or `B.`, or None: the score is
      then None) and takes a column `choices` (a list of texts, one an option, or None). It raises ValueError where a
      right answer is not one of the row's letters or something has the wrong form.

    Raises:
      ValueError: a letter that is no letter or there twice.

    Source: EleutherAI/lm-evaluation-harness and deepseek-ai/DeepSeek-R1 (multiple choice by letter).
    """
    if not letters.isalpha() or len(set(letters.upper())) != len(letters):
        raise ValueError(f"choice_reward: letters: got {letters!r}, wanted different letters; for example 'ABCD'")

    def reward(
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        *,
        answer: list[str | None],
        choices: list[list[str] | None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_strings("choice_reward", prompts, completions)
        check_answers("choice_reward", answer, len(completions))
        scores: list[float | None] = []
        for row, right in enumerate(answer):
            if right is None:
                scores.append(None)
                continue
            options = _options(f"[{row}]", right, letters.upper(), choices[row] if choices else None)
            found = answer_of(prompts[row], completions[row], extraction)
            scores.append(float(found is not None and _chosen(found, options) == _letter(right)))
        return scores

    return reward


def check_choice(answer: str, choices: list[str] | None, *, letters: str = "ABCDE") -> None:
    """Refuses a row that `choice_reward` could not grade.

    Args:
      answer: the right letter.
      choices: the options' texts in order, or None.
      letters: as for `choice_reward`.

    Raises:
      ValueError: the answer is not one of the row's letters, or the texts are not a list of as many strings at most.
    """
    _options("", answer, letters.upper(), choices)


def chosen_option(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option that an answer names, by letter, text or both; None where it names none or several.

    Args:
      answer: as extracted from a completion.
      choices: the options' texts in order, at most 26.
    """
    return _chosen(answer, dict(zip(ascii_uppercase, map(_plain, choices), strict=False)))


def _options(where: str, right: str, letters: str, texts: list[str] | None) -> dict[str, str]:
    """The row's options by letter; "" where their texts are not given."""
    if texts is not None and not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise ValueError(
            f"choice_reward: choices{where}: got {repr(texts)[:80]}, wanted a list of strings or None;"
            " convert the column"
        )
    if texts is not None and not 1 <= len(texts) <= len(letters):
        raise ValueError(
            f"choice_reward: choices{where}: got {len(texts)} options, wanted 1 to {len(letters)}; give more letters"
        )
    options = dict.fromkeys(letters, "") if texts is None else dict(zip(letters, map(_plain, texts), strict=False))
    if _letter(right) not in options:
        raise ValueError(
            f"choice_reward: answer{where}: got {right[:80]!r}, wanted one of {', '.join(options)};"
            " give the option's letter, or more letters"
        )
    return options


def _letter(right: str) -> str:
    """The letter of a right answer, however it is marked; the answer itself where it is none."""
    match = _NAMED.fullmatch(_plain(right))
    return match[2].upper() if match and not match[4] and (match[3] or not match[1]) else right.upper()


def _chosen(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the one option that the answer names."""
    if len(answer) > MAX_CHARS:
        return None
    text = _plain(answer)
    named = [letter for letter, option in options.items() if option and option == text]
    if named:
        return named[0] if len(named) == 1 else None
    match = _NAMED.fullmatch(_LEAD.sub("", text))
    if match is None or match[2].upper() not in options or (match[1] and not match[3]):
        return None
    letter, rest = match[2].upper(), (match[4] or "").strip()
    rest = rest[1:-1] if re.fullmatch(r"\([^()]*\)", rest) else rest
    if not rest or rest == options[letter]:
        return letter
    unknown = not any(options.values())
    return letter if unknown and "," not in match[3] and not _names_another(rest, options) else None


def _names_another(rest: str, options: dict[str, str]) -> bool:
    """Whether a second letter is named: alone, in brackets, or after a conjunction; "a city" names none."""
    letter = f"[{''.join(options).lower()}]"
    return (
        re.search(
            rf"^[(\[]?{letter}(?:[)\].:,;]|\s*$|\s+(?:is|or|and)\b)|[(\[]{letter}[)\]]|\b{letter}\)"
            rf"|(?:^|\s)(?:and|or|not|but|nor|also)\s+(?:option\s+)?[(\[]?{letter}(?:[)\].:,;]|\s*$)|^(?:and|or|not|nor)\b",
            rest,
        )
        is not None
    )


def _plain(text: str) -> str:
    text = canonical(text) if len(text) <= MAX_CHARS and nesting(text) <= MAX_NESTING else text
    return " ".join(text.replace("*", "").split()).casefold().removesuffix(".").strip()
