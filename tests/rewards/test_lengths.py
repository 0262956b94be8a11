"""Laws and values of the length and repetition rewards: tokens count, characters do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rewards.lengths import cosine_length_reward, length_penalty, repetition_penalty_reward


def lengths(*tokens):
    return dict(prompts=[""] * len(tokens), completions=["c"] * len(tokens), completion_ids=[[0] * n for n in tokens])


def repetition(text, **settings):
    (score,) = repetition_penalty_reward(**settings)([""], [text], [[]], answer=["4"])
    return score


def test_overlong_values():
    penalty = length_penalty(max_length=20, cache=4)
    assert penalty(**lengths(0, 15, 16, 17, 18, 19, 20, 21, 100)) == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_overlong_counts_tokens_not_characters():
    penalty = length_penalty(max_length=4, cache=2)
    assert penalty([""] * 2, ["c" * 1000, ""], [[1], [1] * 4]) == [0.0, -1.0]


@pytest.mark.parametrize(("max_length", "cache"), [(4, 0), (4, 5), (0, 0), (4, -1)])
def test_overlong_bad_numbers(max_length, cache):
    with pytest.raises(ValueError, match="wanted 1 <= cache <= max_length"):
        length_penalty(max_length=max_length, cache=cache)


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("", {}, 0.0),
        ("a b", {}, 0.0),
        ("a b c", {}, 0.0),
        ("a b c d", {}, 0.0),
        # Trigrams abc bca cab abc: three of four differ.
        ("a b c a b c", {}, -0.25),
        ("A b C a B c", {}, -0.25),
        # 8 trigrams, one kind.
        ("a " * 10, {}, -(1 - 1 / 8)),
        ("a " * 10, {"ngram": 1}, -(1 - 1 / 10)),
        ("a " * 10, {"max_penalty": -0.5}, -0.5 * (1 - 1 / 8)),
        ("a " * 10, {"max_penalty": 0.0}, 0.0),
        ("好的好的好的", {"ngram": 2}, -(1 - 2 / 5)),
    ],
)
def test_repetition_values(text, settings, expected):
    assert repetition(text, **settings) == pytest.approx(expected, abs=1e-12)


@given(words=st.lists(st.sampled_from("abc"), max_size=20), ngram=st.integers(1, 4))
def test_repetition_is_bounded_and_sees_only_words(words, ngram):
    score = repetition(" ".join(words), ngram=ngram)
    assert -1.0 < score <= 0.0
    assert score == repetition("\n  ".join(words).upper(), ngram=ngram)


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"max_penalty": 0.5}, {"max_penalty": float("nan")}])
def test_repetition_bad_numbers(settings):
    with pytest.raises(ValueError, match="wanted ngram >= 1"):
        repetition_penalty_reward(**settings)


def by_answer(prompts, completions, completion_ids, *, answer, **columns):
    return answer


def test_cosine_values():
    reward = cosine_length_reward(by_answer, max_length=100)
    rows = lengths(0, 50, 100, 0, 50, 100, 10)
    scores = reward(**rows, answer=[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, None])
    assert scores[:6] == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5], abs=1e-12)
    assert scores[6] is None


def test_cosine_does_not_turn_back():
    reward = cosine_length_reward(by_answer, max_length=100)
    scores = reward(**lengths(100, 150, 200, 1000), answer=[1.0] * 4)
    assert scores == pytest.approx([0.5] * 4, abs=1e-12)


def test_cosine_falls_with_length_for_right_and_rises_for_wrong_answers():
    reward = cosine_length_reward(by_answer, max_length=30)
    right = reward(**lengths(*range(31)), answer=[1.0] * 31)
    wrong = reward(**lengths(*range(31)), answer=[0.0] * 31)
    assert right == sorted(right, reverse=True) and wrong == sorted(wrong)
    assert min(right) > max(wrong)


def test_cosine_refuses_what_is_no_verdict():
    with pytest.raises(ValueError, match="got 0.5, wanted 0.0, 1.0 or None"):
        cosine_length_reward(by_answer, max_length=10)(**lengths(1), answer=[0.5])
    with pytest.raises(ValueError, match="max_length: got 0"):
        cosine_length_reward(by_answer, max_length=0)
