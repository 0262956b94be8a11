"""Length and repetition: penalties for answers without end, counted in tokens."""

import math
import re

from deepseek_jax.rewards.protocol import RewardFunction, check_strings

# Scripts that put no spaces between words: each character is a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def length_penalty(*, max_length: int, cache: int) -> RewardFunction:
    """Makes DAPO's soft punishment of overlong answers.

    0 up to max_length - cache tokens, then falling linearly to -1 at max_length, and -1 beyond.

    Args:
      max_length: tokens of the longest answer wanted; as a rule the sampler's limit.
      cache: tokens over which the penalty grows, from 1 to max_length.

    Returns:
      A reward function; it counts `completion_ids`, end-of-sequence included where it is there, and is never None.

    Raises:
      ValueError: the numbers do not fit.

    Source: DAPO (arXiv 2503.14476), section 3.4, equation 13; huggingface/trl, `get_soft_overlong_punishment`.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(
            f"length_penalty: got cache {cache} and max_length {max_length}, wanted 1 <= cache <= max_length;"
            " the cache is the last part of the length"
        )

    def penalty(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
    ) -> list[float | None]:
        free = max_length - cache
        return [-min(max(len(ids) - free, 0) / cache, 1.0) for ids in completion_ids]

    return penalty


def repetition_penalty_reward(*, ngram: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """Makes a penalty for repeated n-grams of words.

    max_penalty * (1 - different n-grams / n-grams); 0 for a completion of fewer words than n. Words are what
    whitespace separates, in lower case; in scripts written without spaces each character is a word.

    Args:
      ngram: words in an n-gram.
      max_penalty: the limit for a completion that says one thing for ever, at most 0.

    Returns:
      A reward function, never None.

    Raises:
      ValueError: ngram is not positive, or max_penalty is.

    Source: huggingface/open-r1, `get_repetition_penalty_reward`; arXiv 2502.03373, appendix C.2.
    Differs: open-r1 splits Chinese with jieba where told its language; here every text is split alike.
    """
    if ngram < 1 or not -math.inf < max_penalty <= 0:
        raise ValueError(
            f"repetition_penalty_reward: got ngram {ngram} and max_penalty {max_penalty}, wanted ngram >= 1 and a"
            " finite max_penalty <= 0; correct them"
        )

    def penalty(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
    ) -> list[float | None]:
        check_strings("repetition_penalty_reward", prompts, completions)
        return [max_penalty * repeated_share(text, ngram) for text in completions]

    return penalty


def cosine_length_reward(
    accuracy: RewardFunction,
    *,
    max_length: int,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
) -> RewardFunction:
    """Makes a reward of accuracy and length: right answers earn more when short, wrong ones lose less when long.

    With the share p = min(tokens / max_length, 1), the score goes from the first to the second value of its pair as
    half a cosine: last + (first - last) (1 + cos(pi p)) / 2.

    Args:
      accuracy: a reward function of 0.0 and 1.0, for example `rewards.math.math_reward`.
      max_length: tokens at which the second values are reached.
      correct: scores of a right answer of no length and of max_length.
      wrong: scores of a wrong one.

    Returns:
      A reward function, None where `accuracy` is. It raises ValueError for an accuracy other than 0 and 1.

    Raises:
      ValueError: max_length is not positive.

    Source: huggingface/open-r1, `get_cosine_scaled_reward`; arXiv 2502.03373, section 4.
    Differs: counts tokens, not characters; beyond max_length the score stays, where open-r1's cosine turns back and
      rewards length again (tests/rewards/test_lengths.py, test_cosine_does_not_turn_back).
    """
    if max_length < 1:
        raise ValueError(f"cosine_length_reward: max_length: got {max_length}, wanted 1 at least; count tokens")

    def scaled(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
    ) -> list[float | None]:
        scores = accuracy(prompts, completions, completion_ids, **columns)
        strange = set(scores) - {0.0, 1.0, None}
        if strange:
            raise ValueError(f"cosine_length_reward: accuracy: got {strange.pop()!r}, wanted 0.0, 1.0 or None")
        shares = [min(len(ids) / max_length, 1.0) for ids in completion_ids]
        return [
            None if score is None else _half_cosine(correct if score else wrong, share)
            for score, share in zip(scores, shares, strict=True)
        ]

    return scaled


def repeated_share(text: str, ngram: int) -> float:
    """The share of a text's n-grams of words that were there before; 0 for one of fewer words."""
    words = _WORD.findall(text.lower())
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    return 1 - len({tuple(words[i : i + ngram]) for i in range(total)}) / total


def _half_cosine(values: tuple[float, float], share: float) -> float:
    first, last = values
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
