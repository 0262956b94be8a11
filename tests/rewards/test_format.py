"""Laws of the format rewards: exactly the template, no junk, no empty thoughts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rewards.format import boxed_format_reward, format_reward, soft_format_reward

GOOD = "<think>a</think><answer>b</answer>"
OPENED = GOOD.removeprefix("<think>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = st.lists(st.sampled_from([*TAGS, "a", " "]), max_size=7)


def strict(completion, prompt=""):
    (score,) = format_reward([prompt], [completion], [[]], answer=["4"])
    return score


def soft(completion, prompt=""):
    (score,) = soft_format_reward([prompt], [completion], [[]], answer=["4"])
    return score


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\n<think>\na\nb\n</think>\n\n<answer> 4 < 5 </answer> \n",
        "<think>a<b</think><answer>\\{}</answer>",
    ],
)
def test_the_template_scores_one(text):
    assert strict(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        GOOD + "junk",
        GOOD + GOOD,
        "junk" + GOOD,
        "<think>a</think>junk<answer>b</answer>",
        "<think></think><answer>b</answer>",
        "<think> \n</think><answer>b</answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>\t</answer>",
        "<think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<answer>b</answer><think>a</think>",
        "</think>a<think><answer>b</answer>",
        "<think><think>a</think><answer>b</answer>",
        "<think>a</think></think><answer>b</answer>",
        "<think>a</think><answer>b</answer></answer>",
        "<Think>a</Think><answer>b</answer>",
        OPENED,
        "<think>\u200b\u2060\x00</think><answer>b</answer>",
        "<think>a</think><answer>\u00a0\ufeff\ud800</answer>",
        "<think>```<answer>4</answer>```</think><answer>b</answer>",
        "<think>write `</think>`</think><answer>b</answer>",
        GOOD + "\u200b",
        GOOD + "<answer>",
        "<think>a</think><answer>b</answer ><answer>b</answer>c",
        "<answer>" + GOOD + "</answer>",
    ],
)
def test_anything_else_scores_zero(text):
    assert strict(text) == 0.0


@pytest.mark.parametrize("prompt", ["Q<think>", "Q<think>\n", "Q<think> \n\n"])
def test_a_prompt_that_opens_the_thought_counts(prompt):
    assert strict(OPENED, prompt) == 1.0
    assert strict(GOOD, prompt) == 0.0
    assert strict("</think><answer>b</answer>", prompt) == 0.0
    assert soft(OPENED, prompt) == pytest.approx(1.0, abs=1e-12)


def test_a_tag_earlier_in_the_prompt_does_not_open():
    assert strict(OPENED, "write <think> first") == 0.0
    assert strict(GOOD, "write <think> first") == 1.0


@given(pieces=PIECES)
def test_only_the_template_scores_one(pieces):
    solid = [piece for piece in pieces if piece != " "]
    merged = [p for i, p in enumerate(solid) if p != "a" or i == 0 or solid[i - 1] != "a"]
    good = merged == ["<think>", "a", "</think>", "<answer>", "a", "</answer>"]
    assert strict("".join(pieces)) == float(good)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("text", 0.0),
        ("<think>", 0.5),
        ("<think></think>", math.sqrt(2) / 2),
        ("<think></think><answer>", math.sqrt(3) / 2),
        (GOOD, 1.0),
        # (2, 1, 1, 1, 1) against (1, 1, 1, 1, 0): 5 / (2 sqrt 8).
        ("<think>" + GOOD, 5 / (2 * math.sqrt(8))),
    ],
)
def test_soft_values(text, expected):
    assert soft(text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("times", [2, 3, 50])
def test_soft_repeating_every_tag_is_no_full_score(times):
    excess = 4 * (times - 1)
    assert soft(GOOD * times) == pytest.approx(2 * times / math.sqrt(4 * times**2 + excess**2), abs=1e-12)
    assert soft(GOOD * times) < 0.71


@given(pieces=PIECES)
def test_soft_is_one_only_for_each_tag_once(pieces):
    score = soft("".join(pieces))
    assert 0.0 <= score <= 1.0 + 1e-12
    assert (score > 1 - 1e-9) == all(pieces.count(tag) == 1 for tag in TAGS)


@pytest.mark.parametrize("function", [format_reward, soft_format_reward])
def test_bad_rows_are_named(function):
    with pytest.raises(ValueError, match=r"_reward: completions\[1\]: got NoneType"):
        function(["", ""], [GOOD, None], [[], []])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        function(["", ""], [GOOD], [[]])


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("p <think>\n", "two and two</think>So \\boxed{4}.", 1.0),
        ("p", "<think>two and two</think> \\boxed{4}", 1.0),
        ("p", "two and two make \\boxed{4}", 1.0),
        ("p <think>\n", "two and two \\boxed{4}", 0.0),  # the thought is not closed
        ("p <think>\n", "it is \\boxed{4}</think>4", 0.0),  # boxed in the thought alone
        ("p <think>\n", " \n</think>\\boxed{4}", 0.0),  # nothing thought
        ("p <think>\n", "a</think>\\boxed{4}</think>", 0.0),
        ("p <think>\n", "a<think>b</think>\\boxed{4}", 0.0),
        ("p", "a</think>\\boxed{4}", 0.0),  # closed, never opened
        ("p", "<think>a</think><answer>\\boxed{4}</answer>", 0.0),  # the other format
        ("p", "<think>a</think>\\boxed{}", 0.0),
        ("p", "<think>a</think>4", 0.0),
    ],
)
def test_a_boxed_answer_stands_after_a_thought_that_is_closed(prompt, completion, score):
    assert boxed_format_reward([prompt], [completion], [[]]) == [score]
