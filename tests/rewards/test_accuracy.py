"""Laws of the accuracy reward: the last answer counts, numbers compare as numbers, nothing is evaluated."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.answers import answers_equal
from deepseek_jax.text.answers import extract_answer, gsm8k_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{3} no, \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1+\boxed{2}}", r"1+\boxed{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {4}", "4"),
        (r"\boxed{ 4 }", "4"),
        (r"\boxed{4", None),
        (r"\boxed{3} then \boxed{4", "3"),
        (r"\boxed{a \boxed{b}", "b"),
        (r"} } \boxed{4}", "4"),
        (r"\boxed{4} as in \boxed{}", "4"),
        (r"\boxed{}", None),
        ("<answer>4</answer>", "4"),
        ("<answer>3</answer><answer> 4 </answer>", "4"),
        (r"<answer>so \boxed{4} apples</answer>", "4"),
        ("<answer>4", None),
        ("4</answer>", None),
        ("<answer> </answer>", None),
        ("4", None),
        ("", None),
        (r"\boxed{3}</think>\boxed{4}", "4"),
        (r"\boxed{3}</think>so 4", None),
        (r"<think>\boxed{3}</think>a</think>\boxed{4}", "4"),
        (r"<think>a</think>\boxed{3}</think>", None),
        (r"<think>\boxed{3}", None),
        (r"\boxed{4}<think>\boxed{3}", "4"),
        (r"<think>x</think><answer>4</answer>", "4"),
    ],
)
def test_extract_answer_values(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("4", "4.0"),
        (" 4 ", "4."),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        ("1,234,567.5", "1234567.5"),
        ("$12", "12"),
        (r"\$12", "12"),
        ("$12$", "12"),
        (r"\(12\)", "12"),
        ("-$5", "-5"),
        ("−5", "-5"),
        ("+5", "5"),
        (r"10\%", "0.1"),
        ("10%", "0.1"),
        ("10 %", r"10\%"),
        ("1/2", "0.5"),
        ("-1/2", "-0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac{1}{2}", "0.5"),
        (r"\frac12", "0.5"),
        (r"-\frac{1}{4}", "-.25"),
        (r"\text{4}", "4"),
        (r"\text{Yes}", "Yes"),
        ("1e3", "1000"),
        ("1.5E-3", ".0015"),
        ("0.3333333", "1/3"),
        ("1.0000005", "1"),
        ("yes.", "yes"),
        ("(1, 2)", "(1, 2)"),
        ("1/0", "1/0"),
        (r"\left(1,2\right)", "(1,2)"),
        ("", ""),
    ],
)
def test_equal_answers(a, b):
    assert answers_equal(a, b) and answers_equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("4", "5"),
        ("1.00001", "1"),
        ("10%", "10"),
        ("1,00", "100"),
        ("100000000000000000001", "100000000000000000000"),
        ("nan", "nan"),
        ("NaN", "NaN"),
        ("inf", "inf"),
        ("-Infinity", "-Infinity"),
        ("inf", "1e999999999"),
        ("1e999999999", "1e999999998"),
        ("9**9", "387420489"),
        ("2+2", "4"),
        ("1_000", "1000"),
        ("0x10", "16"),
        ("٤", "4"),
        ("1/0", "2/0"),
        ("5%%", "0.0005"),
        ("yes", "Yes"),
        ("4", ""),
        ("1/2/2", "0.25"),
    ],
)
def test_unequal_answers(a, b):
    assert not answers_equal(a, b) and not answers_equal(b, a)


@given(value=st.integers(-(10**12), 10**12))
def test_thousands_separators_do_not_matter(value):
    assert answers_equal(f"{value:,}", str(value))
    assert not answers_equal(f"{value:,}", str(value + 1))


@given(a=st.text(max_size=12), b=st.text(max_size=12))
def test_equality_is_symmetric_and_total(a, b):
    assert answers_equal(a, b) == answers_equal(b, a)


@pytest.mark.parametrize(
    "huge",
    [
        "9**9**9**9",
        "1e999999999",
        "1e-999999999",
        "9" * 1_000_000,
        "1," * 500_000,
        "0." + "1" * 1_000_000,
        "9" * 1_000_000 + "/" + "7" * 1_000_000,
        r"\text{" * 100_000,
        r"\frac{" * 100_000,
        r"\boxed{" * 100_000,
        "<answer>" * 100_000,
        "</answer>" * 100_000,
        "{" * 1_000_000,
        "$" * 1_000_000,
        "%" * 1_000_000,
        " " * 1_000_000 + "1",
    ],
    ids=lambda text: text[:12],
)
def test_huge_inputs_are_fast(huge):
    begin = time.process_time()
    assert answers_equal(huge, "1") is (huge.strip() == "1")
    answers_equal(huge, huge)
    extract_answer(huge)
    assert time.process_time() - begin < 5


def test_accuracy_reward_values():
    completions = [r"\boxed{4}", r"\boxed{5}", "4", r"\boxed{4}", r"a</think>\boxed{4.0}"]
    answers = ["4", "4", "4", None, "4"]
    scores = accuracy_reward([""] * 5, completions, [[]] * 5, answer=answers, other=[1] * 5)
    assert scores == [1.0, 0.0, 0.0, None, 1.0]


def test_a_box_inside_an_unfinished_thought_earns_nothing():
    prompts = ["<｜Assistant｜><think>\n", "<｜Assistant｜>"]
    assert accuracy_reward(prompts, [r"\boxed{4}"] * 2, [[]] * 2, answer=["4", "4"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("prompts", "completions", "answer", "reason"),
    [
        ([""], ["", ""], ["4", "4"], "1 prompts and 2 completions"),
        ([""], [""], ["4", "4"], "answer: got 2 rows, wanted 1"),
        ([""], [[{"role": "assistant"}]], ["4"], r"completions\[0\]: got list"),
        ([""], [""], [4], "got int 4"),
    ],
)
def test_bad_rows_are_named(prompts, completions, answer, reason):
    with pytest.raises(ValueError, match=reason):
        accuracy_reward(prompts, completions, [[]], answer=answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5*2=10\n#### 10", "10"),
        ("#### 3\nno\n#### 1,000\n", "1,000"),
        ("#### 10\nthanks", None),
        ("#### 10\n\n  \n", "10"),
        ("10", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_gsm8k_reads_the_last_mark(text, expected):
    assert gsm8k_answer(text) == expected
