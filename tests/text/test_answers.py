r"""Where final answers stand: boxes of every form, marks, bare answers; prose and headings are none; linear time."""

import time

import pytest

from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.choice import choice_reward
from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.text.answers import extract_answer, extract_lenient, gsm8k_answer, solution_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \fbox{5}", "5"),
        (r"or $\framebox{204}$ minutes", "204"),
        (r"\framebox[2cm]{7}", "7"),
        (r"\boxed 5", "5"),
        (r"$\boxed 12$.", "12"),
        (r"thus \boxed 1,000.", "1,000"),
        (r"\boxed -3", "-3"),
        (r"\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed{3} or \boxed 4", "4"),
        (r"\boxed 4 or \boxed{3}", "3"),
        (r"\boxed x", "x"),
        (r"put it in \boxed format", None),
        (r"\boxed{4}, in \boxed form", "4"),
        (r"\boxedx{4}", None),
        (r"\fbox{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{ } \fbox{6}", "6"),
    ],
)
def test_boxes(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2+2=4\n#### 4", "4"),
        ("so #### 4", "4"),
        ("#### 4\n\n", "4"),
        ("#### Step 1: add\n2+2=4\n#### 4", "4"),
        ("#### Step 1: add\n2+2=4\nso it is 4", None),
        ("work\n#### Step 2: check the sum", None),
        ("work\n#### Conclusion", None),
        ("work\n#### 2. Check the sum", None),
        ("work\n#### What to do:", None),
        ("#### 3\nno wait", None),
        ("work\n#### **4**", "4"),
        ("work\n#### Answer: 4", "4"),
        ("work\n#### The final answer is 4", "4"),
        ("work\n#### $1,200.50", "$1,200.50"),
        ("work\n#### 18 apples", "18 apples"),
        ("work\n#### 3:2", "3:2"),
        ("work\n#### We conclude that there are more apples than pears in all of the baskets", None),
        ("####", None),
        ("a #### ", None),
    ],
)
def test_the_mark_is_on_the_last_line_and_holds_the_answer(text, expected):
    assert gsm8k_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\text{Monday, June 5}", r"\text{Monday, June 5}"),
        ("No real solutions exist", "No real solutions exist"),
        ("B", "B"),
        ("  7 \n", "7"),
        (r"Long work. So $x = \boxed{5}$, as was asked.", "5"),
        ("#### Step 1: think\nfoo\n\n#### Step 2: done\n" + r"\boxed{10}", "10"),
        (r"#### Heading" + "\n" + r"it is \fbox{10}.", "10"),
        ("work\n" + r"#### \boxed{10}", "10"),
        ("work\n#### 10\nThe answer is: 10", "10"),
        ("Some work here.\nThe answer is 12", "12"),
        ("<think>hm</think><answer>6</answer>", "6"),
        (r"\begin{pmatrix} 1 \\ 2" + "\n" + r"\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2" + "\n" + r"\end{pmatrix}"),
        ("", None),
        ("   ", None),
        ("blah ####  ", None),
        (r"so \boxed{}", None),
        (r"so \boxed{5", None),
        ("#### Step 2: add the numbers up", None),
        ("#### Step 1\nfive and five\n#### Step 2\nthat is ten", None),
        ("We add both numbers. Then it is ten.", None),
        ("It follows by induction that the sum is always even.", None),
        ("first line\nsecond line", None),
        ("NaN", None),
        ("-Infinity", None),
        ("nan", None),
        (r"\boxed{inf}", None),
        (r"<think>\boxed{5}", None),
    ],
)
def test_answers_of_solutions(text, expected):
    assert solution_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("long proof without box", None), ("5", "5"), ("5 apples", "5 apples"), (r"x \boxed{3}", "3"), ("a\n#### 3", "3")],
)
def test_a_column_of_solutions_holds_no_words_as_answers(text, expected):
    assert solution_answer(text, bare=False) == expected


DEEP = {
    "boxes": r"\boxed{" * 400_000 + "4" + "}" * 400_000,  # where copying each box as it closes would take a minute
    "open boxes": r"\boxed{" * 50_000 + "4",
    "framed": r"\fbox{" * 50_000 + "}" * 50_000,
    "bare boxes": r"\boxed " * 50_000 + "4",
    "braces": r"\boxed{" + "{" * 50_000 + "4" + "}" * 50_000 + "}",
    "fractions": r"\boxed{" + r"\frac{" * 50_000 + "1" + "}{2}" * 50_000 + "}",
    "bare fractions": r"\boxed\frac{" * 50_000,
    "parentheses": r"\boxed{" + "(" * 50_000 + "4" + ")" * 50_000 + "}",
    "blank": (r"\boxed" + " " * 50) * 2_000,
    "tags": "<answer>" * 50_000 + "4" + "</answer>" * 50_000,
    "marks": "#### 4\n" * 50_000,
    "digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "1,900 of text": r"\boxed{" + r"\text{" * 15 + "a " * 900 + "}" * 15 + "}",
    "1,900 of units": r"\boxed{5" + " me" * 600 + "}",
    "1,900 of sums": r"\boxed{x" + "+m" * 900 + " = 5}",
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_and_long_answers_cost_no_more_than_their_length(kind):
    text = DEEP[kind]
    row = dict(prompts=[""], completions=[text], completion_ids=[[]])
    begin = time.process_time()
    extract_lenient(text, unclosed_box=True)
    solution_answer(text)
    accuracy_reward(**row, answer=["5"])
    choice_reward()(**row, answer=["B"])
    with MathGrader() as grader:
        assert math_reward(grader)(**row, answer=["77"]) == [0.0]
        assert math_reward(grader, unclosed_box=True)(**row, answer=["77"]) == [0.0]
    assert time.process_time() - begin < 10
