r"""Reasoning structure: an optional score of surface signs. It can be gamed, and R1 presets leave it off."""

import re

from deepseek_jax.rewards.protocol import check_strings

FORMAT_SIGNS = (
    (0.2, re.compile(r"\b(?:step|first)\b", re.IGNORECASE)),
    (0.3, re.compile(r"\\boxed\{")),
    (0.2, re.compile(r"\b(?:therefore|thus|since|because|so)\b", re.IGNORECASE)),
    (0.3, re.compile(r"\b(?:check|verify)\b", re.IGNORECASE)),
)
FLOW_WORDS = tuple(
    re.compile(rf"\b{word}\b", re.IGNORECASE) for word in ("next", "then", "now", "finally", "conclusion")
)
_FLOW_SCORE, _FLOW_CAP = 0.1, 0.5
_FULL_LENGTH_WORDS, _LENGTH_CAP = 1000, 0.5


def structure_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    r"""Scores signs of structured reasoning, from 0.0 to 2.0.

    Format, at most 1: 0.2 for "step" or "first", 0.3 for `\boxed{`, 0.2 for a connective (therefore, thus,
    since, because, so), 0.3 for "check" or "verify". Quality, at most 1: min(words / 1000, 0.5), and 0.1 for
    each of next, then, now, finally, conclusion that occurs, up to 0.5. The score is their sum. Whole words
    count, in either case, and each sign counts once; words are what whitespace separates.

    It can be gamed: a list of these words and enough padding earns all of it. Give it a small weight or none,
    as the R1 presets do, and watch accuracy beside it.

    Args, Returns, Raises: as of `RewardFunction`; never None.

    Source: the project's design documents (reasoning-structure score).
    """
    check_strings("structure_reward", prompts, completions)
    return [_format_part(text) + _quality_part(text) for text in completions]


def _format_part(text: str) -> float:
    return min(sum(score for score, sign in FORMAT_SIGNS if sign.search(text)), 1.0)


def _quality_part(text: str) -> float:
    length = min(len(text.split()) / _FULL_LENGTH_WORDS, _LENGTH_CAP)
    flow = min(_FLOW_SCORE * sum(1 for word in FLOW_WORDS if word.search(text)), _FLOW_CAP)
    return length + flow
