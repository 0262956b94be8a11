"""Rejection sampling's filters: every sample has one reason, the first that applies, or is kept."""

import pytest

from deepseek_jax.rl.rejection import REASONS, FilterConfig, Sampled, language_of, verdicts

GOOD = "<think>first 7+8=15 then 15-6=9</think><answer>9</answer>"


def sampled(completion=GOOD, **changes) -> Sampled:
    given = {"prompt": "", "question": "Work out 7+8-6.", "answer": "9", "score": 1.0, "tokens": 20, "truncated": False}
    return Sampled(**{**given, "completion": completion, "language": "en", **changes})


def one(sample: Sampled, **config) -> str | None:
    return verdicts([sample], FilterConfig(**config), same=[[True]])[0]


@pytest.mark.parametrize(
    ("reason", "sample", "config"),
    [
        (None, sampled(), {"form": "tags"}),
        ("not graded", sampled(score=None), {}),
        ("cut off", sampled(truncated=True), {}),
        ("wrong answer", sampled(score=0.0), {}),
        ("other form", sampled("9 \\boxed{9}"), {"form": "tags"}),
        (None, sampled("9 \\boxed{9}"), {}),
        ("other form", sampled(), {"form": "boxed"}),
        (None, sampled("7+8=15, 15-6=9</think>\\boxed{9}", prompt="<think>\n"), {"form": "boxed"}),
        ("false step", sampled("<think>first 7+8=14 then 14-6=9</think><answer>9</answer>"), {}),
        (None, sampled("<think>first 7+8=14 then 14-6=9</think><answer>9</answer>"), {"sense": False}),
        ("answers that clash", sampled("<think>first the answer is 8</think>The answer is \\boxed{9}"), {}),
        ("answer is not the thought's", sampled("<think>first 7+8=15 then</think><answer>9</answer>"), {}),
        ("goes round", sampled(f"<think>{'let me think about it. ' * 9}15-6=9</think><answer>9</answer>"), {}),
        ("other language", sampled("<think>先7+8=15再15-6=9</think><answer>9</answer>"), {}),
        (None, sampled("<think>先7+8=15再15-6=9</think><answer>9</answer>", language="zh"), {}),
        (None, sampled("<think>先7+8=15再15-6=9</think><answer>9</answer>", language=None), {}),
        ("too short", sampled(), {"min_tokens": 21}),
        ("too long", sampled(), {"max_tokens_kept": 19}),
        ("long paragraph", sampled(), {"max_paragraph": 20}),
        (None, sampled(GOOD.replace(" then ", "\n\nthen ")), {"max_paragraph": 20}),
        ("block of code", sampled("<think>first\n```\n15-6=9\n```</think><answer>9</answer>"), {}),
        (None, sampled("<think>first\n```\n15-6=9\n```</think><answer>9</answer>"), {"code": True}),
    ],
)
def test_a_sample_falls_to_its_own_filter(reason, sample, config):
    assert one(sample, **config) == reason
    assert reason is None or reason in REASONS


def test_the_first_reason_counts():
    """A wrong, cut-off sample in another language without a form is counted once."""
    bad = sampled("先", score=0.0, truncated=True)
    assert one(bad, form="tags") == "cut off"
    assert one(bad._replace(truncated=False), form="tags") == "wrong answer"


def test_a_right_answer_that_few_samples_have_may_be_luck():
    samples = [sampled(), *(sampled(answer="8", score=0.0),) * 3]
    same = [[a.answer == b.answer for b in samples] for a in samples]
    assert verdicts(samples, FilterConfig(min_agreement=0.5), same=same)[0] == "few samples agree"
    assert verdicts(samples, FilterConfig(min_agreement=0.25), same=same)[0] is None


def test_near_duplicates_go_and_the_first_ones_stay():
    other = "<think>take 6 from 8 for 8-6=2 and add 7 so 2+7=9</think><answer>9</answer>"
    samples = [sampled(), sampled(GOOD + " "), sampled(other), sampled(GOOD.replace("first", "first we say"))]
    same = [[True] * 4] * 4
    assert verdicts(samples, FilterConfig(), same=same) == [None, "near duplicate", None, None]
    assert verdicts(samples, FilterConfig(max_similarity=0.5), same=same)[3] == "near duplicate"
    assert verdicts(samples, FilterConfig(keep=1), same=same) == [
        None, "near duplicate", "enough of its prompt", "enough of its prompt",
    ]  # fmt: skip


def test_an_embedding_tells_what_is_far_from_the_question():
    vectors = {"Work out 7+8-6.": [1.0, 0.0], GOOD: [0.0, 1.0]}
    embed = lambda texts: [vectors[text] for text in texts]
    found = verdicts([sampled()], FilterConfig(embedding="x.py:f"), same=[[True]], embed=embed)
    assert found == ["far from the question"]
    assert verdicts([sampled()], FilterConfig(min_relevance=0.0), same=[[True]], embed=embed) == [None]
    with pytest.raises(ValueError, match="vectors of two lengths"):
        verdicts([sampled()], FilterConfig(), same=[[True]], embed=lambda texts: [[1.0], [1.0, 2.0]])


def test_the_language_is_the_rows_the_questions_or_one_for_all():
    of = lambda name: FilterConfig(thought_language=name)
    assert language_of(of("row"), "?", {"language": "zh"}) == "zh"
    assert language_of(of("question"), "小明有几个苹果，还剩几个？", {}) == "zh"
    assert language_of(of("question"), "7+8=?", {}) is None
    assert language_of(of("any"), "小明有几个苹果", {}) is None
    assert language_of(of("en"), "小明有几个苹果", {}) == "en"
    with pytest.raises(ValueError, match="wanted two letters"):
        language_of(of("row"), "?", {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"min_agreement": 1.5}, "min_agreement: got 1.5, wanted a share from 0 to 1"),
        ({"keep": 0}, "keep: got 0, wanted at least 1"),
        ({"min_relevance": 2}, "min_relevance: got 2"),
        ({"thought_language": "xx"}, "thought_language: got 'xx'"),
    ],
)
def test_what_cannot_be_is_told(given, says):
    with pytest.raises(ValueError, match=says):
        FilterConfig(**given)
