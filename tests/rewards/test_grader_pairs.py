"""Answers as people write them beside right answers: every verdict of grader_pairs.txt, and math-verify's beside it."""

from collections import Counter
from pathlib import Path

import pytest

from deepseek_jax.rewards.math import MathGrader
from deepseek_jax.rewards.pool import PoolConfig, WorkerPool
from deepseek_jax.text.answers import extract_answer


def read_pairs() -> list[tuple[str, str, str, bool]]:
    """(kind, answer, right answer, verdict) of each line."""
    kind, pairs = "", []
    for line in (Path(__file__).parent / "grader_pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]") and "=" not in line:
            kind = line[1:-1]
        elif line and not line.startswith("#"):
            sign = " === " if " === " in line else " =/= "
            answer, gold = line.replace("\\u200b", "\u200b").split(sign)
            pairs.append((kind, answer, gold, sign == " === "))
    return pairs


PAIRS = read_pairs()


def boxed(answer: str) -> str:
    """What is found where a completion boxes the answer."""
    return extract_answer(rf"so $\boxed{{{answer}}}$.") or ""


def mistakes(verdicts: list[bool]) -> list[str]:
    return [
        f"{kind}: {answer!r} beside {gold!r} is {'right' if right else 'wrong'}"
        for (kind, answer, gold, right), verdict in zip(PAIRS, verdicts, strict=True)
        if verdict != right
    ]


def test_there_are_many_pairs_of_both_verdicts_and_none_twice():
    assert len(PAIRS) >= 500 and len({pair[1:3] for pair in PAIRS}) == len(PAIRS)
    assert min(Counter(right for *_, right in PAIRS).values()) >= 200


def test_every_verdict_is_right():
    with MathGrader(PoolConfig(workers=2)) as grader:
        verdicts = grader.grade([(boxed(answer), gold) for _, answer, gold, _ in PAIRS])
    assert mistakes([verdict.right for verdict in verdicts]) == []
    assert not [verdict for verdict in verdicts if verdict.reason]


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "either"),
    [
        (r"10\%", "10", False, True),
        ("10", r"10\%", False, True),
        ("12.5 percent", "12.5", False, True),
        (r"10\%", "0.1", True, True),
        ("0.1", r"10\%", True, True),
        (r"10\%", "0.01", False, False),
        (r"10\%", r"10\%", True, True),
        (r"10\%", "11", False, False),
        ("10", "10", True, True),
        (r"10\%", r"0.1\%", False, False),
    ],
)
def test_percent_is_strict_unless_asked_otherwise(answer: str, gold: str, strict: bool, either: bool):
    for option, wanted in (("strict", strict), ("either", either)):
        with MathGrader(PoolConfig(workers=1), percent=option) as grader:
            assert grader.grade([(answer, gold)])[0].right == wanted


def test_another_percent_is_refused():
    with pytest.raises(ValueError, match="percent: got 'loose'"):
        MathGrader(percent="loose")


@pytest.mark.slow
def test_math_verify_alone_gets_fewer_right():
    """Its own defaults: LaTeX and expressions, in a box as a model writes it; run with -s to see the shares."""
    tasks = [[rf"$\boxed{{{answer}}}$", f"${gold}$"] for _, answer, gold, _ in PAIRS]
    with WorkerPool("tests.rewards.pool_tasks:math_verify_alone", PoolConfig(workers=2)) as pool:
        verdicts = [outcome.kind == "done" and bool(outcome.value) for outcome in pool.map(tasks)]
    total, right = Counter(kind for kind, *_ in PAIRS), Counter()
    for (kind, *_, wanted), verdict in zip(PAIRS, verdicts, strict=True):
        right[kind] += verdict == wanted
    for kind in total:
        print(f"{kind}: math-verify {right[kind]} of {total[kind]}, {right[kind] / total[kind]:.0%}")
    print(f"together: math-verify {right.total()} of {len(PAIRS)}, {right.total() / len(PAIRS):.1%}")
    assert right.total() < len(PAIRS)
