"""How many answers a second the math grader takes on two workers; run with -m slow -s to see the figures."""

import os
import random
import time
from pathlib import Path

import pytest

from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.rewards.pool import PoolConfig, WorkerPool
from deepseek_jax.text.answers import extract_answer

ROWS = 2_000


def question(rng: random.Random) -> tuple[str, str, str]:
    """(right answer as the data set has it, as a model writes it, a wrong one)."""
    a, b, c = rng.randint(31, 400), rng.randint(2, 30), rng.randint(2, 9)
    d = a + b
    kinds = [
        # GSM8K and AIME: numbers, half of all rows.
        *[(f"{a * b}", f"{a * b:,}", f"{a * b + 1}")] * 3,
        *[(f"{a}", rf"\${a}.00", f"{a - 1}")] * 2,
        *[(f"{a * c:03d}", f"{a * c}", f"{a * c + 9}")] * 2,
        (f"{a}", rf"{a}\text{{ cm}}", rf"{a + 2}\text{{ cm}}"),
        (f"{b}\\%", rf"{b}\%", f"{b + 1}%"),
        (rf"\frac{{{a}}}{{{d}}}", f"{a}/{d}", rf"\frac{{{d}}}{{{a}}}"),
        # MATH: pairs, lists, radicals, polynomials, intervals, matrices.
        (rf"\left({a}, \frac{{1}}{{{b}}}\right)", f"({a}, 1/{b})", f"({b}, 1/{a})"),
        (f"{a}, {-b}", f"{-b}, {a}", f"{b}, {-a}"),
        (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}", rf"{a + 1}\sqrt{{{c}}}"),
        (rf"\frac{{{b}\pi}}{{{a}}}", rf"{b}\pi/{a}", rf"\frac{{{a}\pi}}{{{b}}}"),
        (f"x^2+{a}x+{b}", f"{b}+{a}x+x^2", f"x^2-{a}x+{b}"),
        (f"({c}x+{a})(x-{b})", f"(x-{b})({c}x+{a})", f"({c}x-{a})(x-{b})"),
        (rf"[{-a}, {b})", rf"\left[{-a},{b}\right)", f"({-a},{b})"),
        (rf"(-\infty,{-a})\cup({b},\infty)", rf"({b},\infty)\cup(-\infty,{-a})", rf"(-\infty,{-a}]\cup[{b},\infty)"),
        (
            rf"\begin{{pmatrix}} {a} & {b} \\ 0 & {c} \end{{pmatrix}}",
            rf"\begin{{bmatrix}}{a}&{b}\\0&{c}\end{{bmatrix}}",
            rf"\begin{{pmatrix}} {b} & {a} \\ 0 & {c} \end{{pmatrix}}",
        ),
        (
            rf"\frac{{{a}+\sqrt{{{b}}}}}{{{c}}}",
            rf"\frac{{\sqrt{{{b}}}+{a}}}{{{c}}}",
            rf"\frac{{{a}-\sqrt{{{b}}}}}{{{c}}}",
        ),
    ]
    return rng.choice(kinds)


def garbage(rng: random.Random) -> str:
    junk = [
        "",
        "}{",
        r"\frac{",
        "the answer",
        "I cannot",
        r"\sqrt{x",
        "((((",
        "5 or 6 or 7",
        r"\text{?}",
        "....",
        "x = = 2",
    ]
    return rng.choice(junk) + str(rng.randint(0, 99))


def mix(seed: int) -> tuple[list[str], list[str], list[float | None]]:
    """Completions, right answers and scores: 75 % right, 20 % wrong, 5 % garbage; hardly two rows alike."""
    rng = random.Random(seed)
    completions, gold, scores = [], [], []
    for _ in range(ROWS):
        right, written, wrong = question(rng)
        luck = rng.random()
        answer = written if luck < 0.75 else wrong if luck < 0.95 else garbage(rng)
        thought = "Let me work this out. " * rng.randint(10, 200) + r"Perhaps \boxed{0}."
        completions.append(rf"<think>{thought}</think>So the answer is $\boxed{{{answer}}}$.")
        gold.append(right)
        scores.append(1.0 if luck < 0.75 else 0.0 if luck < 0.95 else None)
    return completions, gold, scores


def processor_seconds(grader: MathGrader) -> float:
    """Of this process and the grader's workers."""
    ticks = 0
    for pid in grader._pool.process_ids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_five_hundred_answers_a_second():
    with MathGrader(PoolConfig(workers=2)) as grader:
        reward = math_reward(grader)
        begin = time.perf_counter()
        reward([""], [r"\boxed{x+1}"], [[]], answer=["1+x"])
        cold = time.perf_counter() - begin
        grader.take_metrics()
        for seed in (1, 2):
            completions, gold, expected = mix(seed)
            begin, before = time.perf_counter(), processor_seconds(grader)
            scores = reward([""] * ROWS, completions, [[]] * ROWS, answer=gold)
            seconds, work = time.perf_counter() - begin, processor_seconds(grader) - before
            mistakes = [
                (c[-60:], g)
                for c, g, s, e in zip(completions, gold, scores, expected, strict=True)
                if e not in (s, None)
            ]
            wall, free = ROWS / seconds, ROWS / (work / 2)
            print(f"cold {cold:.2f} s; batch {seed}: {wall:.0f} answers/s, {free:.0f} by processor time")
            print(grader.take_metrics())
            assert mistakes == []
        # By processor time on two cores, so that the law does not depend on what else the machine does.
        assert free >= 500
    with WorkerPool("tests.rewards.pool_tasks:algebra_only", PoolConfig(workers=2)) as pool:
        pool.map([["x+1", "1+x"]] * 2)
        pairs = [[extract_answer(c) or "", g] for c, g in zip(completions, gold, strict=True)]
        begin = time.perf_counter()
        found = pool.map(pairs)
        seconds = time.perf_counter() - begin
        disagreeing = sum(outcome.value != bool(score) for outcome, score in zip(found, scores, strict=True))
        print(f"algebra for every answer: {ROWS / seconds:.0f} answers/s, {disagreeing} verdicts differ")
