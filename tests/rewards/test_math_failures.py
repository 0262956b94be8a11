"""What the grader's own failures cost: they are no wrong answers, and no other row pays for them."""

import math

import pytest

from deepseek_jax.rewards import math as module
from deepseek_jax.rewards.combine import RewardError, combine
from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.rewards.pool import PoolConfig, WorkerPool


@pytest.fixture
def grader(monkeypatch):
    """One whose workers do what the answer says, with the right answer as argument; see `pool_tasks`."""
    monkeypatch.setattr(module, "_exactly", lambda answer, gold: None)
    with WorkerPool("tests.rewards.pool_tasks:act", PoolConfig(workers=1, cpu_seconds=0.3)) as pool:
        grader = MathGrader()
        grader._pool = pool
        yield grader


def rows(*tasks):
    count = len(tasks)
    completions = [rf"\boxed{{{name}}}" for name, _ in tasks]
    return dict(
        prompts=[""] * count, completions=completions, completion_ids=[[1]] * count, answer=[gold for _, gold in tasks]
    )


GOOD, WRONG = ("echo", "1"), ("echo", "0")


@pytest.mark.parametrize(
    ("bad", "reason", "count", "restarts"),
    [(("fail", "oh"), "error, OSError: oh", "errors", 0), (("segfault", "x"), "died, exit code -11", "deaths", 2)],
)
def test_a_failure_is_the_rows_own_and_not_known(grader, caplog, bad, reason, count, restarts):
    batch = rows(GOOD, bad, WRONG)
    reward = combine({"accuracy": math_reward(grader)}, {"accuracy": 1.0}, on_error="none")
    total, parts = reward(**batch)
    assert parts == {"accuracy": [1.0, None, 0.0]}
    assert (total[0], total[2]) == (1.0, 0.0) and math.isnan(total[1])
    assert reason in caplog.text and rf"\\boxed{{{bad[0]}}}" in caplog.text
    # Each row counts once; the batch's verdicts and its failure are remembered, so that no row cost a worker again.
    metrics = grader.take_metrics()
    assert (metrics["grader/answers"], metrics["grader/algebra"], metrics[f"grader/{count}"]) == (3, 2, 1)
    assert metrics["grader/restarts"] == restarts
    ended = combine({"accuracy": math_reward(grader)}, {"accuracy": 1.0})
    with pytest.raises(RewardError, match=f"row 1: raised RuntimeError: .*{reason}"):
        ended(**batch)


def test_a_timeout_is_a_wrong_answer(grader):
    assert math_reward(grader)(**rows(GOOD, ("spin", "x"))) == [1.0, 0.0]
    metrics = grader.take_metrics()
    assert (metrics["grader/answers"], metrics["grader/timeouts"], metrics["grader/restarts"]) == (2, 1, 1)


def test_an_evaluation_does_not_count(grader):
    uncounted = math_reward(grader, counted=False)
    assert uncounted(**rows(GOOD, ("spin", "x"))) == [1.0, 0.0]
    with pytest.raises(RuntimeError, match="no verdict on 'fail' beside 'oh'"):
        uncounted(**rows(("fail", "oh")))
    assert set(grader.take_metrics().values()) == {0.0}
    math_reward(grader)(**rows(WRONG))
    assert grader.take_metrics()["grader/answers"] == 1
