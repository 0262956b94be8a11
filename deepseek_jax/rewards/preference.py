"""A stand-in for a preference model, and the form in which another takes its place: FILE.py:function of `--reward`.

The recipe rewards general talk, which has no right answer, by a scorer: any function of the protocol of rewards that
gives a number for rows without an answer and None for the others.
"""

from deepseek_jax.rewards.protocol import check_strings
from deepseek_jax.text.answers import answer_of


def kindness(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    answer: list[str | None],
    who: list[str | None],
    **columns: object,
) -> list[float | None]:
    """1.0 where the reply names whom it is for and ends in an exclamation mark, 0.5 for one of the two, else 0.0.

    Args:
      prompts, completions, completion_ids: as of `RewardFunction`.
      answer: the score is None where there is one: such a row has rules to be judged by.
      who: the name of each row's person.
    """
    check_strings("kindness", prompts, completions)
    scores: list[float | None] = []
    for prompt, completion, right, name in zip(prompts, completions, answer, who, strict=True):
        if right is not None or name is None:
            scores.append(None)
            continue
        reply = answer_of(prompt, completion) or ""
        scores.append(0.5 * (name in reply) + 0.5 * reply.endswith("!"))
    return scores
