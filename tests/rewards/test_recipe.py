"""Which rewards a run's settings make, and that nothing of them stays behind."""

import subprocess

import pytest

from deepseek_jax.rewards.recipe import RewardConfig, rewards

RIGHT = "<think>two and two</think><answer>\\boxed{4}</answer>"


def score(config: RewardConfig, *completions: str, **columns):
    rows = len(completions)
    columns = columns or {"answer": ["4"] * rows}
    with rewards(config, max_new_tokens=8) as made:
        return made.total(["2+2=?"] * rows, list(completions), [[1] * 6] * rows, **columns)


def test_a_weight_of_zero_leaves_a_reward_out():
    totals, parts = score(RewardConfig(), RIGHT, "\\boxed{5}")
    assert totals == [1.3, 0.0] and parts == {"accuracy": [1.0, 0.0], "format": [1.0, 0.0]}


def test_every_reward_by_its_weight():
    config = RewardConfig(
        weight_soft_format=0.3,
        weight_language=0.2,
        weight_structure=0.1,
        weight_repetition=0.5,
        weight_overlong=2.0,
        overlong_cache=4,
    )
    (total,), parts = score(config, RIGHT)
    assert {name: score for name, (score,) in parts.items() if name not in ("structure", "repetition")} == {
        "accuracy": 1.0,
        "format": 1.0,
        "soft_format": 1.0,
        "language": 1.0,
        "overlong": -0.5,  # two of the cache's four tokens
    }
    rest = 0.1 * parts["structure"][0] + 0.5 * parts["repetition"][0]
    assert total == pytest.approx(1 + 0.3 + 0.3 + 0.2 - 1.0 + rest)


def test_algebra_grades_in_processes_that_end():
    config = RewardConfig(accuracy="math", weight_format=0.0)
    answers = ["\\boxed{x^2+2x+1}", "\\boxed{(x+1)^2}", "\\boxed{x^2+1}"]
    with rewards(config, max_new_tokens=8) as made:
        assert made.accuracy(["?"] * 3, answers, [[1]] * 3, answer=["(x+1)^2"] * 3) == [1.0, 1.0, 0.0]
        counts = made.take_metrics()
    assert (counts["grader/answers"], counts["grader/exact"], counts["grader/algebra"]) == (3, 1, 2)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "rewards.algebra:grade" not in listed


def test_choices():
    totals, _ = score(RewardConfig(accuracy="choice", weight_format=0.0), "\\boxed{B}", "\\boxed{A}", answer=["B", "B"])
    assert totals == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_overlong": 1.0}, "overlong_cache: got 0, wanted at least 1"),
        ({"weight_format": float("nan")}, "weight_format: got nan, wanted a finite number"),
        ({"weight_accuracy": 0.0, "weight_format": 0.0}, "weight_accuracy: got 0, and no other reward"),
        ({"weight_language": 1.0, "language": "xx"}, "language: got 'xx'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message), rewards(RewardConfig(**settings), max_new_tokens=8):
        pass
