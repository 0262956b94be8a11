"""Format: is the completion shaped `<think>reasoning</think><answer>answer</answer>`, or its answer boxed?"""

import math
import unicodedata

from deepseek_jax.rewards.protocol import check_strings
from deepseek_jax.text.answers import extract_answer
from deepseek_jax.text.think import CLOSE, OPEN, with_opening

TAGS = (OPEN, CLOSE, "<answer>", "</answer>")


def format_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    """1.0 where the completion is exactly the template, else 0.0.

    Exactly: each of the four tags once and in order, something that can be seen inside both pairs (not only
    whitespace, control and zero-width characters), nothing but whitespace before, between and after. A tag in a block
    of code or in a formula is a tag. A prompt that ends in `<think>` (whitespace after it
    allowed) counts as the completion's beginning; such a completion must not open again.

    Args, Returns, Raises: as of `RewardFunction`; never None.

    Source: DeepSeek-R1 paper, section 2.2.2 (format rewards) and Table 1 (template).
    """
    check_strings("format_reward", prompts, completions)
    return [float(_is_template(with_opening(*row))) for row in zip(prompts, completions, strict=True)]


def boxed_format_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    r"""1.0 where the thought is closed and the answer after it is in `\boxed{}`, else 0.0.

    A thought that the prompt or the completion opens is closed once, with something that can be seen in it, and not
    opened again; where none is opened, there are no tags of thoughts at all. What comes after it boxes an answer and
    holds no tags.

    Args, Returns, Raises: as of `format_reward`.

    Source: DeepSeek-R1's README ("put your final answer within \boxed{}") and chat template, which opens the thought.
    """
    check_strings("boxed_format_reward", prompts, completions)
    return [float(_is_boxed(with_opening(*row))) for row in zip(prompts, completions, strict=True)]


def soft_format_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object
) -> list[float | None]:
    """Cosine similarity between the completion's tags and the template's, from 0.0 to 1.0.

    The vector is (n1, n2, n3, n4, e): how often each of `<think>`, `</think>`, `<answer>`, `</answer>`
    occurs, and the excess e, the number of occurrences beyond the first of each. The template's is (1, 1, 1,
    1, 0). A completion without tags scores 0. One tag of four scores 1/2, two score 0.707, three 0.866, all
    once 1.0, all twice 0.707. It sees neither order nor content: it is a slope towards `format_reward`, not
    its substitute.

    Args, Returns, Raises: as of `RewardFunction`; never None.

    Source: the project's design documents (format as cosine similarity to the template).
    Differs: the documents leave the vectors open; without e, repeating every tag would score 1.0
      (tests/rewards/test_format.py, test_soft_repeating_every_tag_is_no_full_score).
    """
    check_strings("soft_format_reward", prompts, completions)
    return [_tag_cosine(with_opening(*row)) for row in zip(prompts, completions, strict=True)]


def _is_template(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    before, _, rest = text.partition(OPEN)
    thought, closed, rest = rest.partition(CLOSE)
    between, opened, rest = rest.partition("<answer>")
    answer, ended, after = rest.partition("</answer>")
    in_order = bool(closed and opened and ended)
    outside = before + between + after
    return in_order and not outside.strip() and _shows(thought) and _shows(answer)


def _is_boxed(text: str) -> bool:
    answer = text
    if text.lstrip().startswith(OPEN):
        thought, closed, answer = text.lstrip().removeprefix(OPEN).partition(CLOSE)
        if not closed or OPEN in thought or not _shows(thought):
            return False
    return not any(tag in answer for tag in TAGS) and extract_answer(answer) is not None


def _shows(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def _tag_cosine(text: str) -> float:
    counts = [text.count(tag) for tag in TAGS]
    excess = sum(max(count - 1, 0) for count in counts)
    norm = math.hypot(*counts, excess)
    return sum(counts) / (norm * math.sqrt(len(TAGS))) if norm else 0.0
