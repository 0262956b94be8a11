"""Which rewards a run's settings make, and that nothing of them stays behind."""

import json
import math
import re
import subprocess

import pytest

from deepseek_jax.rewards import recipe
from deepseek_jax.rewards.combine import RewardError
from deepseek_jax.rewards.recipe import RewardConfig, check_columns, rewards

RIGHT = "<think>two and two</think><answer>\\boxed{4}</answer>"


EXACT = RewardConfig(accuracy="exact")


def score(config: RewardConfig, *completions: str, **columns):
    rows = len(completions)
    columns = columns or {"answer": ["4"] * rows}
    with rewards(config, max_new_tokens=8) as made:
        return made.total(["2+2=?"] * rows, list(completions), [[1] * 6] * rows, **columns)


def test_a_weight_of_zero_leaves_a_reward_out():
    totals, parts = score(EXACT, RIGHT, "\\boxed{5}")
    assert totals == [2.0, 0.0] and parts == {"accuracy": [1.0, 0.0], "format": [1.0, 0.0]}


def test_every_reward_by_its_weight():
    config = RewardConfig(
        accuracy="exact",
        weight_format=0.3,
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
    rows = (["?"] * 3, answers, [[1]] * 3)
    with rewards(config, max_new_tokens=8) as made:
        assert made.accuracy(*rows, answer=["(x+1)^2"] * 3) == ([1.0, 1.0, 0.0], {"accuracy": [1.0, 1.0, 0.0]})
        assert set(made.take_metrics().values()) == {0.0}  # an evaluation is not of the step
        assert made.total(*rows, answer=["(x+1)^2"] * 3)[0] == [1.0, 1.0, 0.0]
        counts = made.take_metrics()
    assert (counts["grader/answers"], counts["grader/exact"], counts["grader/algebra"]) == (3, 1, 2)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "rewards.algebra:grade" not in listed


def test_choices():
    totals, _ = score(RewardConfig(accuracy="choice", weight_format=0.0), "\\boxed{B}", "\\boxed{A}", answer=["B", "B"])
    assert totals == [1.0, 0.0]
    config = RewardConfig(accuracy="choice", choices="ABCDEFGHIJ", weight_format=0.0)
    assert score(config, "\\boxed{J}", "\\boxed{A}", answer=["J", "J"])[0] == [1.0, 0.0]


def test_an_evaluation_follows_reward_error():
    columns = {
        "prompts": ["?"] * 2,
        "completions": ["\\boxed{B}"] * 2,
        "completion_ids": [[1]] * 2,
        "answer": ["B", "Z"],
    }
    with rewards(RewardConfig(accuracy="choice", reward_error="none"), max_new_tokens=8) as made:
        assert made.accuracy.graded(**columns).parts == {"accuracy": [1.0, None]}
        totals, parts = made.total(**columns)
        assert totals[0] == 1.0 and math.isnan(totals[1]) and parts["format"] == [0.0, 0.0]
    with rewards(RewardConfig(accuracy="choice"), max_new_tokens=8) as made, pytest.raises(RewardError, match="row 1"):
        made.accuracy.graded(**columns)


def test_programs_that_cannot_be_isolated_are_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(recipe, "available", lambda: "no namespaces here")
    with pytest.raises(ValueError, match="no namespaces here; or .* --allow-unsandboxed"):
        score(RewardConfig(accuracy="code"), "", tests=[None])
    config = RewardConfig(accuracy="code", allow_unsandboxed=True)
    assert score(config, "", tests=[None]) == ([0.0], {"accuracy": [None], "format": [0.0]})
    assert score(EXACT, RIGHT)[0] == [2.0]


ALONE = {"weight_format": 0.0}


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, {"answer": "4"}),
        ({}, {"answer": None}),
        (ALONE, {"answer": "4", "level": 3}),
        ({"accuracy": "math"}, {"answer": "x^2"}),
        ({"accuracy": "choice"}, {"answer": "e"}),
        ({"accuracy": "choice"}, {"answer": "B", "choices": ["x", "y"]}),
        ({"accuracy": "choice", "choices": "ABCDEF"}, {"answer": "F", "choices": None}),
        ({"accuracy": "code"}, {"tests": json.dumps([{"input": "1", "output": "2"}])}),
        ({"accuracy": "code"}, {"tests": None}),
        ({"accuracy": "code", **ALONE}, {"tests": ["assert f(1) == 2"], "answer": None}),
    ],
)
def test_columns_that_can_be_graded(settings, columns):
    check_columns(RewardConfig(**settings), columns)


@pytest.mark.parametrize(
    ("settings", "columns", "message"),
    [
        (
            {},
            {},
            "answer: got columns none, wanted 'answer' for --accuracy math; .*--answer-column",
        ),
        (
            {"accuracy": "code"},
            {"answer": "4"},
            "tests: got columns answer, wanted 'tests' for --accuracy code; .*--tests-column",
        ),
        ({"accuracy": "math"}, {"answer": 4}, "answer: got int 4, wanted a string or None"),
        (ALONE, {"answer": None}, "answer: got none, wanted some where accuracy is the only reward"),
        ({"accuracy": "code", **ALONE}, {"tests": []}, "tests: got none, wanted some"),
        ({"accuracy": "code"}, {"tests": "no JSON"}, "tests: got 'no JSON', wanted JSON"),
        ({"accuracy": "code"}, {"tests": ["assert ("]}, "is not Python"),
        (
            {"accuracy": "code", "reference_column": "solved"},
            {"tests": ["assert f(1) == 2"], "code": ""},
            "reference_column: got 'solved', wanted one of tests, code; .*--reference-column",
        ),
        ({"accuracy": "choice"}, {"answer": "F"}, "answer: got 'F', wanted one of A, B, C, D, E"),
        ({"accuracy": "choice"}, {"answer": "C", "choices": ["x", "y"]}, "answer: got 'C', wanted one of A, B;"),
        ({"accuracy": "choice"}, {"answer": "A", "choices": "xy"}, "choices: got 'xy', wanted a list of strings"),
    ],
)
def test_columns_that_cannot_be_graded_are_refused(settings, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_columns(RewardConfig(**settings), columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_overlong": 1.0}, "overlong_cache: got 0, wanted at least 1"),
        ({"tolerance": -1.0}, "tolerance: got -1.0, wanted a finite number"),
        ({"reference_column": "code"}, "reference_column: got 'code' with accuracy 'math'"),
        ({"weight_format": float("nan")}, "weight_format: got nan, wanted a finite number"),
        ({"weight_accuracy": 0.0, "weight_format": 0.0}, "weight_accuracy: got 0, and no other reward"),
        ({"accuracy": "choice", "choices": "AA"}, "letters: got 'AA', wanted different letters"),
        ({"weight_language": 1.0, "language": "xx"}, "language: got 'xx'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message), rewards(RewardConfig(**settings), max_new_tokens=8):
        pass


# --- functions of one's own ------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass


@dataclass
class Answer:
    text: str


def short(prompts, completions, completion_ids, **columns):
    return [1.0 if len(Answer(text).text) < columns["most"][0] else None for text in completions]


async def words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def one(completions, **columns):
    return [1.0]


LIMIT = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_own_functions_are_added_to_those_of_the_recipe_under_their_names(file):
    config = RewardConfig(accuracy="exact", reward=(f"{file}:short", f"{file}:words:0.25"))
    totals, parts = score(config, RIGHT, "five or six", answer=["4", "4"], most=[12, 12])
    assert parts == {
        "accuracy": [1.0, 0.0],
        "format": [1.0, 0.0],
        "short": [None, 1.0],
        "words": [3.0, 3.0],
    }
    assert totals == [2.75, 1.75]
    alone = RewardConfig(weight_accuracy=0, weight_format=0, reward=(f"{file}:words:-2",))
    assert score(alone, "a b") == ([-4.0], {"words": [2.0]})
    check_columns(RewardConfig(accuracy="exact", weight_format=0, reward=(f"{file}:words",)), {"answer": None})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["own.py"], "got 'own.py', wanted FILE.py:function, or FILE.py:function:weight"),
        (["FILE:short:nan"], "wanted FILE.py:function"),
        (["other.py:short"], "other.py: no such .py file"),
        (["FILE:long"], "own.py: no function 'long', wanted one of Answer, short, words, one"),
        (["FILE:LIMIT"], "no function 'LIMIT'"),
        (["FILE:short", "FILE:short:2"], "got 'short' twice"),
        (["FILE:one"], "reward function 'one': got 1 scores, wanted a list of 2"),
    ],
)
def test_what_is_no_function_of_ones_own_is_refused_in_one_line(file, texts, message):
    config = RewardConfig(accuracy="exact", reward=tuple(text.replace("FILE", str(file)) for text in texts))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        score(config, RIGHT, RIGHT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import math\n\nx = math.nothing\n", "bad.py:3: raised AttributeError: .*; mend the file"),
        ("x = 1\ndef f(:\n", r"bad.py: raised SyntaxError: .*\(bad.py, line 2\); mend the file"),
    ],
)
def test_a_file_that_raises_is_named_with_its_line(tmp_path, source, says):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ValueError, match=says):
        score(RewardConfig(reward=(f"{tmp_path / 'bad.py'}:f",)), RIGHT)


def test_a_name_of_the_recipe_is_not_ones_own(tmp_path):
    (tmp_path / "own.py").write_text("def format(completions, **columns):\n    return [1.0 for _ in completions]\n")
    with pytest.raises(ValueError, match="format: got a function of that name"):
        score(RewardConfig(reward=(f"{tmp_path / 'own.py'}:format",)), RIGHT)


# --- defaults --------------------------------------------------------------------------------------


def test_the_defaults_are_r1_zeros():
    """Accuracy, by computer algebra, and format count the same, and nothing else does."""
    config = RewardConfig()
    weights = {name: weight for name, weight in vars(config).items() if name.startswith("weight_") and weight}
    assert (config.accuracy, config.format, weights) == ("math", "tags", {"weight_accuracy": 1, "weight_format": 1})


def test_the_format_is_that_of_the_setting():
    boxed = RewardConfig(accuracy="exact", format="boxed")
    assert score(boxed, "so \\boxed{4}", RIGHT)[1]["format"] == [1.0, 0.0]
    assert score(EXACT, "so \\boxed{4}", RIGHT)[1]["format"] == [0.0, 1.0]
