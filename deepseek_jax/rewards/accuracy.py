"""Accuracy: is the final answer the right one?"""

import re
from typing import Literal

from deepseek_jax.rewards.answers import answers_equal
from deepseek_jax.rewards.combine import check_strings

Extraction = Literal["strict", "lenient"]
"""What counts as a final answer: a box or answer tags; or also a phrase or the last number."""

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_TAIL_CHARS = 2_000
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:)[ \t*:]*([^\n]*)|####[ \t]*([^\n]*)", re.IGNORECASE)
_LOOSE_NUMBER = re.compile(
    r"(?<![\w.,)/])-?\s?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?:\s?\\?%)?"
)


def extract_answer(text: str, *, unclosed_box: bool = False) -> str | None:
    r"""Finds a completion's final answer.

    Thoughts hold no answers: where there is a `</think>`, only what follows the last one counts, and after a
    `<think>` that is never closed there is nothing.

    Args:
      text: a completion.
      unclosed_box: whether a `\boxed{` that is never closed, after every closed one, holds the answer too: what
        follows it on its line, for models that are cut off by their token limit.

    Returns:
      What the last `\boxed{...}` holds, braces balanced (the outer one of nested boxes; a box that is not
      closed or holds nothing is passed over); else what the last `<answer>...</answer>` holds; else None.
      Stripped.

    Source: huggingface/math-verify (the last box is the answer).
    """
    final = _final(text)
    return _last_boxed(final, unclosed_box) or _last_tagged(final)


def extract_lenient(text: str, *, unclosed_box: bool = False) -> str | None:
    """Finds a completion's final answer, less strictly.

    For a figure beside the strict one, which says how many right answers only lack their form; as a reward it is
    easier to game.

    Args:
      text: a completion.
      unclosed_box: as in `extract_answer`.

    Returns:
      What `extract_answer` finds; else, in the last 2,000 characters after the thought, what follows the last
      "answer is", "answer:" or "####" (the number that it begins with, where it begins with one, else the rest of
      its line); else the last number; else None.

    Source: EleutherAI/lm-evaluation-harness, gsm8k (strict-match beside flexible-extract).
    """
    strict = extract_answer(text, unclosed_box=unclosed_box)
    if strict is not None:
        return strict
    tail = _final(text)[-_TAIL_CHARS:]
    phrases = [first or second for first, second in _PHRASE.findall(tail)]
    if phrases and phrases[-1].strip(" .*"):
        return _first_number(phrases[-1].strip(" *"))
    numbers = _LOOSE_NUMBER.findall(tail)
    return numbers[-1].strip() if numbers else None


def answer_of(
    prompt: str, completion: str, extraction: Extraction = "strict", *, unclosed_box: bool = False
) -> str | None:
    """The final answer of a completion whose prompt may have opened the thought.

    Args:
      prompt: one that ends in `<think>` makes a completion that never closes it unanswered.
      completion: what the model wrote.
      extraction: "strict" is `extract_answer`, "lenient" `extract_lenient`.
      unclosed_box: as in `extract_answer`.

    Returns:
      The answer, or None.
    """
    text = "<think>" + completion if prompt.rstrip().endswith("<think>") else completion
    extract = extract_answer if extraction == "strict" else extract_lenient
    return extract(text, unclosed_box=unclosed_box)


def check_answers(name: str, answers: list[str | None], rows: int) -> None:
    """Refuses a column of right answers that does not fit its rows.

    Args:
      name: the reward function's name, for the message.
      answers: the column.
      rows: how many completions there are.

    Raises:
      ValueError: the number of rows differs, or one is neither a string nor None.
    """
    if len(answers) != rows:
        raise ValueError(
            f"{name}: answer: got {len(answers)} rows, wanted {rows}, one a completion;"
            " repeat the column as the prompts are"
        )
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise ValueError(
                f"{name}: answer: got {type(answer).__name__} {answer!r}, wanted a string or None; convert it"
            )


def accuracy_reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    answer: list[str | None],
    **columns: object,
) -> list[float | None]:
    """1.0 where the completion's final answer is the row's, else 0.0.

    Args:
      prompts: one a row; one that ends in `<think>` makes a completion that never closes it unanswered.
      completions: one a row.
      completion_ids: not used.
      answer: the right answer of each row (for GSM8K what `gsm8k_answer` returns), None where there is none.
      **columns: not used.

    Returns:
      One score a row, None for a row without a right answer.

    Raises:
      ValueError: the numbers of rows differ, or something is not a string.

    Source: DeepSeek-R1 paper, section 2.2.2 (accuracy rewards).
    Differs: compares with `answers_equal` only, so that it needs no other process; `rewards.math` also understands
      units, lists and algebra.
    """
    check_strings("accuracy_reward", prompts, completions)
    check_answers("accuracy_reward", answer, len(completions))
    return [_score(*row) for row in zip(prompts, completions, answer, strict=True)]


def gsm8k_answer(text: str) -> str | None:
    """Reads the final answer of a GSM8K solution.

    Args:
      text: a solution, which ends in "#### 42".

    Returns:
      What follows the last `####` on its line, stripped; None when there is no mark or nothing follows it.

    Source: openai/grade-school-math, README.
    Differs: reads the last mark, where the reference reads the first; a model may write the mark while it
      works.
    """
    _, mark, rest = text.rpartition("####")
    answer = rest.partition("\n")[0].strip()
    return answer if mark and answer else None


def _score(prompt: str, completion: str, answer: str | None) -> float | None:
    if answer is None:
        return None
    found = answer_of(prompt, completion)
    return float(found is not None and answers_equal(found, answer))


def _final(text: str) -> str:
    before, closed, final = text.rpartition("</think>")
    return final if closed else text.partition("<think>")[0]


def _first_number(text: str) -> str:
    match = _LOOSE_NUMBER.match(text)
    # "3/4 of it" begins with its number, "3x" does not.
    return match[0] if match and not re.match(r"[\w\\^+*/(\-]", text[match.end() :]) else text


def _last_boxed(text: str, unclosed: bool) -> str | None:
    """One pass, so that many unclosed boxes cost no more than closed ones."""
    found, found_at = "", -1
    opened: list[int | None] = []
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            opened.append(None)
        elif match[0].startswith("\\boxed"):
            opened.append(match.end())
        elif match[0] == "}" and opened:
            start = opened.pop()
            # An outer box closes after the ones inside it, and so has the last word.
            if start is not None and text[start : match.start()].strip():
                found, found_at = text[start : match.start()].strip(), match.start()
    open_boxes = [start for start in opened if start is not None and start > found_at]
    if unclosed and open_boxes:
        found = text[open_boxes[-1] :].partition("\n")[0].strip().rstrip("$").strip() or found
    return found or None


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].strip() or None
