"""Values of multiple choice: one option, named unmistakably."""

import pytest

from deepseek_jax.rewards.choice import check_choice, choice_reward

CITIES = ["London", "Paris", "A city in Spain", "Rome"]


def score(answer, right="B", choices=CITIES, completion=None, **settings):
    completion = rf"\boxed{{{answer}}}" if completion is None else completion
    (value,) = choice_reward(**settings)([""], [completion], [[]], answer=[right], choices=[choices])
    return value


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "[B]", "B.", "B)", "B:", "**B**", "$B$", r"\text{B}", r"\text{(B)}", r"\textbf{B}",
     "option B", "The answer is B", "answer: (B)", "the correct option is B.", "Paris", "paris.", "B) Paris",
     "(B) Paris", "B. paris", "B: Paris", r"\text{(B) Paris}", " B ", "B (Paris)", "B - Paris", "B – Paris"],
)  # fmt: skip
def test_right(answer):
    assert score(answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["A", "E", "Z", "", " ", "Because", "Bananas", "B or C", "B, C", "A B", "AB", "B) London", "(B) Rome", "not B",
     "B?", "Paris or London", "Paris, London", "London", "all of them", "B is wrong, C", "2", "the grader wants B",
     "(B", "BB", "B" * 100_000, "B\x00", "В", "B (London)", "B - Rome", "B (or C)", "B (not A)", "B-Paris", "B - C"],
)  # fmt: skip
def test_wrong(answer):
    assert score(answer) == 0.0


def test_an_article_is_no_letter():
    assert score("A city in Spain", right="A") == 0.0
    assert score("A city in Spain", right="C") == 1.0
    assert score("A town", right="A", choices=None) == 0.0


def test_without_texts_the_letter_counts():
    assert score("B", choices=None) == 1.0
    assert score("Paris", choices=None) == 0.0
    assert score("B) Paris", choices=None) == 1.0
    assert score("A) Paris", choices=None) == 0.0
    for several in ("B (A)", "B (or A)", "B - A", "B - not A", "B (Paris) or A"):
        assert score(several, choices=None) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["B. 12", "B: 12", r"\textbf{(B) }12", r"\text{(B)}\ 12", r"\boldsymbol{B}", "（B）", "Ｂ", "Ｂ）12", "B;"],
)
def test_a_letter_may_be_set_in_any_way(answer):
    assert score(answer, choices=None) == 1.0
    assert score(answer.replace("B", "C").replace("Ｂ", "Ｃ"), choices=None) == 0.0


@pytest.mark.parametrize("right", ["(B)", "B.", "b", "[B]", r"\text{(B)}", "（B）"])
def test_the_right_letter_may_be_set_in_any_way(right):
    check_choice(right, CITIES)
    for choices in (CITIES, None):
        assert [score(answer, right=right, choices=choices) for answer in "BC"] == [1.0, 0.0]


def test_a_text_of_two_options_is_ambiguous():
    assert score("same", right="A", choices=["same", "same"]) == 0.0


def test_a_letter_may_be_another_options_text():
    assert score("B", right="A", choices=["B", "A"]) == 1.0


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        ("<answer>B</answer>", 1.0, 1.0),
        ("The answer is B.", 0.0, 1.0),
        ("Answer: (B) Paris", 0.0, 1.0),
        ("B", 0.0, 0.0),
        ("Better: the answer is Because", 0.0, 0.0),
        (r"\boxed{A} \boxed{B}", 1.0, 1.0),
        (r"\boxed{B} \boxed{A}", 0.0, 0.0),
        (r"<think>\boxed{B}</think>A", 0.0, 0.0),
    ],
)
def test_where_the_answer_is_looked_for(completion, strict, lenient):
    assert score(None, completion=completion) == strict
    assert score(None, completion=completion, extraction="lenient") == lenient


def test_other_letters_and_rows_without_an_answer():
    reward = choice_reward(letters="XY")
    assert reward([""] * 3, [r"\boxed{Y}"] * 3, [[]] * 3, answer=["Y", "x", None]) == [1.0, 0.0, None]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="letters: got 'AA'"):
        choice_reward(letters="AA")
    with pytest.raises(ValueError, match=r"answer\[0\]: got 'E', wanted one of A, B, C, D"):
        score("B", right="E")
    with pytest.raises(ValueError, match=r"choices\[0\]: got 6 options, wanted 1 to 5"):
        score("B", choices=["x"] * 6)
    with pytest.raises(ValueError, match=r"choices\[0\]: got 'abcd', wanted a list of strings"):
        score("B", choices="abcd")
    with pytest.raises(ValueError, match=r"choices\[0\]: got \[1, 2\], wanted a list of strings"):
        score("B", choices=[1, 2])


def test_a_row_is_checked_as_it_is_graded():
    check_choice("b", CITIES)
    check_choice("F", None, letters="ABCDEF")
    with pytest.raises(ValueError, match="answer: got 'E', wanted one of A, B, C, D"):
        check_choice("E", CITIES)
    with pytest.raises(ValueError, match="choices: got 4 options, wanted 1 to 2"):
        check_choice("A", CITIES, letters="AB")
