"""Accuracy: is the final answer the right one?"""

import re
from fractions import Fraction

from deepseek_jax.rewards.combine import check_strings

TOLERANCE = Fraction(1, 10**6)
"""Absolute difference below or at which two numbers are equal."""
_MAX_NUMBER_CHARS = 400
_MAX_EXPONENT = 400

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;: ]|\\(?:left|right)(?![A-Za-z])|~")
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(rf"([+-]?)\$?({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,9}}))?")
_QUOTIENT = re.compile(r"([^/]+)/([^/]+)")
_LATEX_QUOTIENT = re.compile(r"([+-]?)\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""Finds a completion's final answer.

    Thoughts hold no answers: where there is a `</think>`, only what follows the last one counts, and after a
    `<think>` that is never closed there is nothing.

    Args:
      text: a completion.

    Returns:
      What the last `\boxed{...}` holds, braces balanced (the outer one of nested boxes; a box that is not
      closed or holds nothing is passed over); else what the last `<answer>...</answer>` holds; else None.
      Stripped.

    Source: huggingface/math-verify (the last box is the answer).
    Differs: math-verify's treatment of an unclosed box is configurable; here it is never an answer.
    """
    before, closed, final = text.rpartition("</think>")
    if not closed:
        final = text.partition("<think>")[0]
    return _last_boxed(final) or _last_tagged(final)


def answers_equal(a: str, b: str) -> bool:
    r"""Compares two final answers.

    Both are trimmed of whitespace, `$`, `\(...\)`, one trailing full stop and wrappers such as `\text{...}`.
    Two numbers are equal within an absolute 1e-6: decimals, scientific notation, thousands separators, `$12`,
    `10\%` (a tenth), `1/2` and `\frac{1}{2}`. Anything else is equal when the trimmed strings are. No
    expression is evaluated and no unit understood. "nan", "inf" and "infinity" equal nothing. A number of
    more than 400 characters, or with an exponent beyond 400, is compared as a string, so that no input is
    slow.

    Args:
      a: an answer.
      b: another; the order does not matter.

    Returns:
      Whether they are the same.

    Source: the project's design documents (numbers equal within 1e-6, else trimmed strings equal).
    """
    a, b = _clean(a), _clean(b)
    if _NOT_FINITE.fullmatch(a) or _NOT_FINITE.fullmatch(b):
        return False
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return abs(x - y) <= TOLERANCE
    return a == b


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
    """
    check_strings("accuracy_reward", prompts, completions)
    if len(answer) != len(completions):
        raise ValueError(
            f"accuracy_reward: answer: got {len(answer)} rows, wanted {len(completions)}, one a completion;"
            " repeat the column as the prompts are"
        )
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
    if not isinstance(answer, str):
        raise ValueError(
            f"accuracy_reward: answer: got {type(answer).__name__} {answer!r}, wanted a string or None; convert it"
        )
    opened = prompt.rstrip().endswith("<think>")
    found = extract_answer("<think>" + completion if opened else completion)
    return float(found is not None and answers_equal(found, answer))


def _last_boxed(text: str) -> str | None:
    """One pass, so that many unclosed boxes cost no more than closed ones."""
    found = ""
    opened: list[int | None] = []
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            opened.append(None)
        elif match[0].startswith("\\boxed"):
            opened.append(match.end())
        elif match[0] == "}" and opened:
            start = opened.pop()
            # An outer box closes after the ones inside it, and so has the last word.
            if start is not None:
                found = text[start : match.start()].strip() or found
    return found or None


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].strip() or None


def _clean(text: str) -> str:
    text = _WRAPPER.sub(r"\1", _SPACING.sub("", text.strip()))
    text = text.replace("{,}", ",").replace("\\$", "$").replace("−", "-").strip()
    text = text.removeprefix("\\(").removesuffix("\\)").strip().removesuffix(".")
    return text.strip().strip("$").strip()


def _number(text: str) -> Fraction | None:
    """The number that the text writes, exactly; None when it writes none or an absurdly large one."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    percent = text.removesuffix("%").removesuffix("\\").rstrip()
    if text.endswith("%"):
        value = _number(percent) if not percent.endswith("%") else None
        return None if value is None else value / 100
    if match := _LATEX_QUOTIENT.fullmatch(text):
        sign, top, short_top, bottom, short_bottom = match.groups()
        return _divide(sign + (top or short_top or ""), bottom or short_bottom or "")
    if match := _QUOTIENT.fullmatch(text):
        return _divide(match[1], match[2])
    return _decimal(text)


def _divide(top: str, bottom: str) -> Fraction | None:
    x, y = _decimal(top.strip()), _decimal(bottom.strip())
    return None if x is None or not y else x / y


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits, exponent = match.groups()
    power = int(exponent or 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    value = Fraction(digits.replace(",", "").rstrip(".") or "0") * Fraction(10) ** power
    return -value if sign == "-" else value
