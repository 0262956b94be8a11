"""Chains of arithmetic: a verifiable task with step-by-step traces, small enough for a model trained from nothing.

A chain is read from left to right, without precedence; with a modulus, only remainders are kept. Modulo 10,
`7+8+6+3=?` runs through `7+8=5;5+6=1;1+3=4`: each step is easy, but the result is hard to see without the steps.
With `+` alone and no modulus the chains are plain sums.
"""

from typing import NamedTuple

import numpy as np

ALPHABET = "0123456789+*=?;"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


class Chain(NamedTuple):
    """A question, its worked steps, and its answer, as text."""

    question: str
    steps: str
    answer: str


def draw_chains(count: int, *, terms: int, largest: int, operators: str, modulus: int | None, seed: int) -> list[Chain]:
    """`count` different chains.

    Args:
        count: how many.
        terms: numbers in a chain, at least 2.
        largest: numbers are drawn evenly from 0 to this.
        operators: drawn from evenly: "+", "*" or both.
        modulus: only remainders are kept; None keeps whole numbers.
        seed: of the draw.

    Raises:
        ValueError: fewer than 2 terms, unknown operators, or more chains than half of those there are.
    """
    if terms < 2:
        raise ValueError(f"terms: got {terms}, wanted at least 2")
    if operators not in ("+", "*", "+*"):
        raise ValueError(f"operators: got {operators!r}, wanted '+', '*' or '+*'")
    if modulus is not None and modulus < 2:
        raise ValueError(f"modulus: got {modulus}, wanted at least 2, or None")
    possible = (largest + 1) ** terms * len(operators) ** (terms - 1)
    if count > possible / 2:
        raise ValueError(f"questions: got {count}, wanted at most half of the {possible} that there are")
    rng = np.random.default_rng(seed)
    found: dict[tuple[tuple[int, ...], str], None] = {}
    while len(found) < count:
        numbers = rng.integers(0, largest + 1, (count, terms)).tolist()
        chosen = rng.choice(list(operators), (count, terms - 1)).tolist()
        found |= {(tuple(n), "".join(o)): None for n, o in zip(numbers, chosen, strict=True)}
    return [make_chain(numbers, signs, modulus) for numbers, signs in list(found)[:count]]


def make_chain(numbers: tuple[int, ...], signs: str, modulus: int | None) -> Chain:
    """The question, running results and answer of given numbers and signs.

    >>> make_chain((4, 15, 2), "++", None)
    Chain(question='4+15+2=?', steps='4+15=19;19+2=21', answer='21')
    >>> make_chain((7, 8, 6), "*+", 10)
    Chain(question='7*8+6=?', steps='7*8=6;6+6=2', answer='2')
    """
    total, question, steps = numbers[0], str(numbers[0]), []
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total + number if sign == "+" else total * number
        result = result if modulus is None else result % modulus
        steps.append(f"{total}{sign}{number}={result}")
        question += f"{sign}{number}"
        total = result
    return Chain(f"{question}=?", ";".join(steps), str(total))


def trace(chain: Chain, *, worked: bool) -> str:
    """A completion to imitate: thoughts, then the answer. Thoughts are the worked steps, or a guess at the result.

    >>> trace(make_chain((4, 15, 2), "++", None), worked=True)
    '<think>4+15=19;19+2=21</think><answer>21</answer>'
    >>> trace(make_chain((4, 15, 2), "++", None), worked=False)
    '<think>=21</think><answer>21</answer>'
    """
    thoughts = chain.steps if worked else f"={chain.answer}"
    return f"<think>{thoughts}</think><answer>{chain.answer}</answer>"
