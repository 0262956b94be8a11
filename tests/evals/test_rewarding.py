"""The same Task as a reward of each row and as what rejection sampling keeps."""

import pytest

from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.rewarding import task_reward
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rewards.protocol import RowsFailed

ROWS = [
    ("gsm8k", {"question": "2+2?", "answer": "#### 4"}),
    ("mmlu", {"question": "?", "choices": ["a", "b"], "answer": 1}),
    (None, {}),
    ("aime24", {"problem": "?", "answer": 33}),
]


def columns(rows):
    return {"task": [task for task, _ in rows], "row": [row for _, row in rows]}


def test_every_row_is_rewarded_by_its_own_task():
    with Graders() as graders:
        reward = combine({"accuracy": task_reward(graders)}, {"accuracy": 1.0})
        texts = [r"\boxed{4}", "Answer: B", "anything", r"\boxed{34}"]
        found = reward.graded(prompts=[""] * 4, completions=texts, completion_ids=[[]] * 4, **columns(ROWS))
    assert found.parts["accuracy"] == [1.0, 1.0, None, 0.0]


def test_rejection_sampling_keeps_what_the_task_calls_right():
    """Reward and evaluation agree on every completion, for they are one function."""
    name, row = ROWS[0]
    drawn = [r"\boxed{4}", r"\boxed{5}", "4", r"<think>\boxed{4}", r"<think>hm</think>\boxed{4.0}"]
    with Graders() as graders:
        scores = task_reward(graders)([""] * 5, drawn, [[]] * 5, **columns([(name, row)] * 5))
    assert [text for text, score in zip(drawn, scores, strict=True) if score == 1.0] == [drawn[0], drawn[4]]


def test_what_could_not_be_graded_is_no_zero(monkeypatch):
    from deepseek_jax.evals.task import Grade

    monkeypatch.setitem(vars(TASKS["aime24"]), "grade", lambda rows, graders: [Grade(None, reason="died")] * len(rows))
    with Graders() as graders, pytest.raises(RowsFailed, match="aime24: no verdict: died") as told:
        task_reward(graders)(["", ""], [r"\boxed{4}", ""], [[], []], **columns([ROWS[0], ROWS[3]]))
    assert told.value.scores == [1.0, None] and list(told.value.errors) == [1]
