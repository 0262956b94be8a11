r"""Where the final answer stands: in a completion, and in a data set's solution. Linear in the text's length."""

import re
from typing import Literal

from deepseek_jax.text.think import after_thoughts, with_opening

Extraction = Literal["strict", "lenient"]
"""What counts as a final answer: a box or answer tags; or also a phrase or the last number."""

_BOX = r"\\(?:boxed|fbox|framebox)(?![A-Za-z])"
# After a box without braces: a number, a command with its arguments, or a letter. What is no such thing is prose.
_UNBRACED = (
    r"[+-]?\s?(?:\\?\$)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?(?:\\?%)?(?![A-Za-z{])"
    rf"|[+-]?[0-9]*(?!{_BOX})\\[A-Za-z]+(?:\s*\{{[^{{}}]*\}}|[0-9])*|[A-Za-z](?![A-Za-z])"
)
_BRACES = re.compile(rf"{_BOX}(?:\s*\[[^\[\]{{}}\n]{{0,40}}\])*\s*(?:(\{{)|({_UNBRACED}))|\\.|[{{}}]", re.DOTALL)
_TAIL_CHARS = 2_000
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:)[ \t*:]*([^\n]*)|####[ \t]*([^\n]*)", re.IGNORECASE)
_LOOSE_NUMBER = re.compile(
    r"(?<![\w.,)/])-?\s?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?:\s?\\?%)?"
)


_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|[:=])\s*", re.IGNORECASE
)
_HEADING = re.compile(
    r"(?:step|part|case|question|problem|example|section)s?\s*[0-9]|[0-9]+[.)]\s+[A-Za-z]"
    r"|(?:solution|method|approach|conclusion|summary|verification|explanation|proof|note)s?\b|[^\W\d_][^:]*:(?:\s|$)",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_SENTENCE_BREAK = re.compile(r"[^\W\d_]{2,}[.!?]\s+\S")
_UNANSWERED = re.compile(rf"####|{_BOX}|</?(?:think|answer)>")
_MAX_WORDS = 8
_MAX_BARE_WORDS = 2
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def extract_answer(text: str, *, unclosed_box: bool = False) -> str | None:
    r"""Finds a completion's final answer.

    Thoughts hold no answers: where there is a `</think>`, only what follows the last one counts, and after a
    `<think>` that is never closed there is nothing.

    Args:
      text: a completion.
      unclosed_box: whether a `\boxed{` that is never closed, after every closed one, holds the answer too: what
        follows it on its line, for models that are cut off by their token limit.

    Returns:
      What the last `\boxed{...}`, `\fbox{...}` or `\framebox{...}` holds, braces balanced (the outer one of nested
      boxes; a box that is not closed or holds nothing is passed over), or what follows a `\boxed` without braces (a
      number or a LaTeX command); else what the last `<answer>...</answer>` holds; else None.
      Stripped.

    Source: huggingface/math-verify (the last box is the answer).
    """
    final = after_thoughts(text)
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
    tail = after_thoughts(text)[-_TAIL_CHARS:]
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
    text = with_opening(prompt, completion)
    extract = extract_answer if extraction == "strict" else extract_lenient
    return extract(text, unclosed_box=unclosed_box)


def gsm8k_answer(text: str) -> str | None:
    """Reads the final answer of a GSM8K solution.

    Args:
      text: a solution, whose last line ends in "#### 42".

    Returns:
      What follows the last `####` on the last line that is not blank, stripped; None where that line has no mark, or
      nothing follows it, or a heading does: a mark that more text follows is Markdown's.

    Source: openai/grade-school-math, README.
    Differs: reads the last mark, where the reference reads the first, which may be a heading.
    """
    _, mark, rest = text.rstrip().rpartition("\n")[2].rpartition("####")
    answer = _LEAD.sub("", rest.strip(" \t#*"), count=1).strip(" \t*")
    return answer if mark and answer and not _HEADING.match(answer) and not _is_prose(answer) else None


def solution_answer(text: str, *, bare: bool = True) -> str | None:
    r"""Finds the final answer of a data set's solution, or of its answer.

    Args:
      text: a reference solution or a final answer.
      bare: whether the text may be the answer itself, a few words included. Else only what has no words, for a column
        that holds solutions, where a few words are no answer.

    Returns:
      What `gsm8k_answer` finds, or `extract_answer` there or in the text; else what follows "the answer is" on the last
      line; else the text itself where it is no prose. None where there is nothing of these, or it is "nan", "inf" or
      "infinity", to which no answer is equal.
    """
    marked = gsm8k_answer(text)
    found = (extract_answer(marked) or marked) if marked is not None else extract_answer(text)
    if found is None:
        found = _bare_answer(text.strip(), bare)
    return found if found and not not_finite(found) else None


def _first_number(text: str) -> str:
    match = _LOOSE_NUMBER.match(text)
    # "3/4 of it" begins with its number, "3x" does not.
    return match[0] if match and not re.match(r"[\w\\^+*/(\-]", text[match.end() :]) else text


def _last_boxed(text: str, unclosed: bool) -> str | None:
    """One pass that cuts nothing out before its end, so that neither many boxes nor deep ones cost more."""
    found: tuple[int, int] | None = None
    opened: list[int | None] = []
    before = 0
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            opened.append(None)
        elif match[1]:
            opened.append(match.end())
        elif match[2]:
            found = match.span(2)
        elif match[0] == "}" and opened:
            start = opened.pop()
            # Blank only where nothing opened in between. An outer box closes last, and so has the last word.
            if start is not None and (before > start or text[start : match.start()].strip()):
                found = start, match.start()
        before = match.end()
    closed_at = found[1] if found else -1
    open_boxes = [start for start in opened if start is not None and start > closed_at]
    answer = text[slice(*found)].strip().rstrip(",") if found else ""
    if unclosed and open_boxes:
        end = text.find("\n", open_boxes[-1])
        answer = text[open_boxes[-1] : end if end >= 0 else None].strip().rstrip("$").strip() or answer
    return answer or None


def _bare_answer(text: str, bare: bool) -> str | None:
    """The text itself, or what follows "the answer is" on its last line; None where that is prose."""
    last = text.rpartition("\n")[2].strip(" \t*")
    lead = _LEAD.match(last)
    if lead is not None:
        text = last[lead.end() :].strip(" \t*")
    elif "\n" in text and "\\begin" not in text:
        return None
    if _UNANSWERED.search(text) or _is_prose(text):
        return None
    return text if bare or lead or len(_WORD.findall(text)) <= _MAX_BARE_WORDS else None


def _is_prose(text: str) -> bool:
    words = len(_WORD.findall(text))
    ends = text.rstrip(" $").endswith((".", "!", "?"))
    return words > _MAX_WORDS or (words > 3 and _SENTENCE_BREAK.search(text) is not None) or (words > 5 and ends)


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].strip() or None


def not_finite(text: str) -> bool:
    """Whether the text is "nan", "inf" or "infinity", which equal nothing."""
    return _NOT_FINITE.fullmatch(text) is not None
