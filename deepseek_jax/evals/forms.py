"""Where a completion has its answer, in the forms that prompts of public benchmarks ask for."""

import re

from deepseek_jax.text.answers import extract_answer
from deepseek_jax.text.think import after_thoughts

_ANSWER_LINE = re.compile(
    r"^[\s*_>#-]*(?:the\s+)?(?:final\s+)?answer[\s*_]*[:：]\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE
)
_HASHES = re.compile(r"#### (-?[0-9.,]+)")
_MAX_CHARS = 2_000


def answer_line(text: str) -> str | None:
    """What follows "Answer:" on the last line that begins so, marks of emphasis and a dollar at both ends left out.

    Source: openai/simple-evals, ANSWER_PATTERN. Differs: the last such line counts, and thoughts hold none.
    """
    found = [each for each in _ANSWER_LINE.findall(after_thoughts(text)[-_MAX_CHARS:]) if each.strip(" *_$")]
    if not found:
        return None
    line = found[-1].strip(" *_")
    return extract_answer(line) or line.removeprefix("$").removesuffix("$").strip(" *_").rstrip(".") or None


def after_hashes(text: str) -> str | None:
    """The number after the first `#### `, without thousands' commas.

    Source: EleutherAI/lm-evaluation-harness, gsm8k (strict-match).
    """
    found = _HASHES.search(after_thoughts(text))
    return found[1].replace(",", "").rstrip(".") or None if found else None
