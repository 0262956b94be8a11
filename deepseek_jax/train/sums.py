"""Sums: a verifiable arithmetic task with step-by-step traces, small enough for a model trained from nothing.

A question is `47+5+83+12=?`. The trace runs through it: `47+5=52;52+83=135;135+12=147`.
"""

from typing import NamedTuple

import numpy as np

ALPHABET = "0123456789+=?;"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


class Sum(NamedTuple):
    """A question, its worked steps, and its answer, as text."""

    question: str
    steps: str
    answer: str


def draw_sums(count: int, *, terms: int, largest: int, seed: int) -> list[Sum]:
    """`count` different sums.

    Args:
        count: how many.
        terms: numbers in a sum, at least 2.
        largest: numbers are drawn evenly from 0 to this.
        seed: of the draw.

    Raises:
        ValueError: fewer than 2 terms, or more sums asked for than half of those there are.
    """
    if terms < 2:
        raise ValueError(f"terms: got {terms}, wanted at least 2")
    if count > (largest + 1) ** terms / 2:
        raise ValueError(f"count: got {count}, wanted at most half of the {(largest + 1) ** terms} sums there are")
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        for numbers in rng.integers(0, largest + 1, (count, terms)).tolist():
            found[tuple(numbers)] = None
    return [make_sum(numbers) for numbers in list(found)[:count]]


def make_sum(numbers: tuple[int, ...]) -> Sum:
    """The question, running sums and answer of given numbers.

    >>> make_sum((4, 15, 2))
    Sum(question='4+15+2=?', steps='4+15=19;19+2=21', answer='21')
    """
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return Sum("+".join(map(str, numbers)) + "=?", ";".join(steps), str(total))


def trace(problem: Sum) -> str:
    """The completion a cold start teaches: thoughts, then the answer."""
    return f"<think>{problem.steps}</think><answer>{problem.answer}</answer>"
