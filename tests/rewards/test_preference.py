"""The stand-in for a preference model: it judges what has no right answer, and that alone."""

from deepseek_jax.rewards.preference import kindness


def test_kindness_names_whom_it_speaks_to_and_leaves_rows_with_answers_alone():
    replies = ["Hello Tom!", "Hello Tom.", "Hello!", "Hello.", "", "Hello Tom!"]
    texts = [f"<think>be kind</think><answer>{reply}</answer>" for reply in replies]
    answers = [None] * 5 + ["9"]
    scores = kindness([""] * 6, texts, [[]] * 6, answer=answers, who=["Tom"] * 6, level=[0] * 6)
    assert scores == [1.0, 0.5, 0.5, 0.0, 0.0, None]


def test_a_name_in_the_thought_is_none_in_the_reply():
    text = "<think>Tom!</think><answer>Hello.</answer>"
    assert kindness(["", ""], [text, text], [[], []], answer=[None, None], who=["Tom", None]) == [0.0, None]
