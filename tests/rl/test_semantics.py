"""Rules about thoughts: each with its precision and recall on labelled samples, and what they must not fall for.

`thoughts.jsonl` was written by hand by who wrote the rules, faults that no rule can see among them: the figures say how
the rules do on clear cases, and not how often such cases occur. `python -m tests.rl.test_semantics` prints the table.
"""

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest

from deepseek_jax.rl.semantics import (
    agreement,
    clashing_claims,
    comes_to,
    false_equations,
    loops,
    value_of,
)
from deepseek_jax.text.think import split_thinking

ROWS = [json.loads(line) for line in (Path(__file__).parent / "thoughts.jsonl").read_text("utf-8").splitlines()]
thought_of = lambda row: split_thinking(row["completion"], opened=False)[0]
RULES = {
    "false step": lambda row: bool(false_equations(row["completion"])),
    "clash": lambda row: clashing_claims(row["completion"]) is not None,
    "answer": lambda row: not comes_to(thought_of(row), row["answer"]),
    "loop": lambda row: loops(thought_of(row)),
}


class Figures(NamedTuple):
    """Of a rule: samples that it found and are so, that it found and are not, and that it missed."""

    found: int
    false: int
    missed: int

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.false)

    @property
    def recall(self) -> float:
        return self.found / (self.found + self.missed)


def figures(name: str) -> Figures:
    told, there = [RULES[name](row) for row in ROWS], [name in row["flaws"] for row in ROWS]
    both = list(zip(told, there, strict=True))
    return Figures(both.count((True, True)), both.count((True, False)), both.count((False, True)))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("false step", Figures(found=12, false=0, missed=4)),
        ("clash", Figures(found=7, false=0, missed=1)),
        ("answer", Figures(found=13, false=1, missed=2)),
        ("loop", Figures(found=6, false=0, missed=1)),
    ],
)
def test_rules_do_on_labelled_samples_as_they_are_said_to(name, wanted):
    found = figures(name)
    assert found == wanted, f"precision {found.precision:.3f}, recall {found.recall:.3f}"


def test_sound_thoughts_pass_every_rule():
    sound = [row for row in ROWS if not row["flaws"]]
    assert len(sound) == 41
    assert not [(name, row) for row in sound for name, rule in RULES.items() if rule(row)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7*8-6", 50), ("2*(3+4)", 14), ("-3+5", 2), ("5 - -3", 8), ("1/2+1/3", Fraction(5, 6)), ("1,000/8", 125),
        ("4 * $12", 48), ("7 × 8 ÷ 2", 28), ("0.1+0.2", Fraction(3, 10)), ("1/0", None), ("2(3)", None), ("", None),
        ("(1", None), ("1)", None), ("a", None), ("9" * 300, int("9" * 300)), ("(" * 150 + "1", None),
    ],
)  # fmt: skip
def test_sums_have_their_value(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "x+3=7", "x - 3 + 5 = 7", "2(3+4)=15", "2^3+1=10", "50%*20=11", "7*8=6 (mod 10)", "3+4=7+2", "10/3=3.33",
        "7+8 = 14? No", "not 3+4=8", "5!+3=9", "3+4=8x", "a_3+4=8", "1.5.2=4", "3+4=", "=7", "3+4==8", "12:30-1=3",
    ],
)  # fmt: skip
def test_what_is_no_plain_equation_is_not_called_false(text):
    assert false_equations(text) == []


def test_agreement_is_the_share_of_samples_with_the_same_answer():
    answers = ["1", "1.0", "2", None]
    same = [[a is not None and b is not None and float(a) == float(b) for b in answers] for a in answers]
    assert agreement(answers, same) == [0.5, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "text",
    ["1+" * 100_000, "=" * 200_000, "(" * 200_000 + "=1", "1=" * 100_000, "answer is " * 20_000, "-$(" * 60_000 + "=1",
     ", " * 100_000 + "=3", "1 " * 100_000 + "=3", "\\boxed{" * 30_000],
)  # fmt: skip
def test_hostile_text_takes_no_time(text):
    before = time.process_time()
    false_equations(text), clashing_claims(text), comes_to(text, "1"), loops(text)
    assert time.process_time() - before < 5


if __name__ == "__main__":
    for name in RULES:
        of = figures(name)
        print(f"{name:12} precision {of.precision:.3f}  recall {of.recall:.3f}  {of}")
