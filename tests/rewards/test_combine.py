"""Laws of the weighted sum: None contributes nothing, and a function at fault is named."""

import asyncio
import contextlib
import functools
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.combine import RewardError, combine
from deepseek_jax.rewards.format import format_reward
from deepseek_jax.rewards.protocol import RowsFailed

SCORES = st.lists(st.none() | st.floats(-10, 10), min_size=3, max_size=3)


def fixed(scores):
    return lambda prompts, completions, completion_ids, **columns: scores


def run(functions, weights, rows=3, **columns):
    return combine(functions, weights)([""] * rows, ["c"] * rows, [[1]] * rows, **columns)


def test_values():
    total, parts = run({"a": fixed([1.0, 0.0, None]), "b": fixed([0.5, None, 1])}, {"a": 1.0, "b": 0.3})
    assert total == pytest.approx([1.15, 0.0, 0.3], abs=1e-12)
    assert parts == {"a": [1.0, 0.0, None], "b": [0.5, None, 1.0]}


@given(a=SCORES, weight=st.floats(-3, 3))
def test_none_contributes_nothing(a, weight):
    alone, _ = run({"base": fixed([1.0] * 3)}, {"base": 2.0})
    total, parts = run({"base": fixed([1.0] * 3), "a": fixed(a)}, {"base": 2.0, "a": weight})
    expected = [base + (0.0 if x is None else weight * x) for base, x in zip(alone, a, strict=True)]
    assert total == pytest.approx(expected, abs=1e-12)
    assert parts["a"] == a


def test_functions_see_the_rows_and_every_column():
    seen = {}

    def spy(prompts, completions, completion_ids, log_extra, log_metric, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [0.0]

    combine({"spy": spy}, {"spy": 1.0})(["p"], ["c"], [[7]], answer=["4"], level=[2])
    assert seen == {
        "prompts": ["p"],
        "completions": ["c"],
        "completion_ids": [[7]],
        "answer": ["4"],
        "level": [2],
    }


def test_real_functions_combine():
    reward = combine({"accuracy": accuracy_reward, "format": format_reward}, {"accuracy": 1.0, "format": 0.3})
    completions = ["a</think><answer>4</answer>", "a</think>4"]
    total, parts = reward(["<think>\n"] * 2, completions, [[1]] * 2, answer=["4", None])
    assert total == pytest.approx([1.3, 0.0], abs=1e-12)
    assert parts == {"accuracy": [1.0, None], "format": [1.0, 0.0]}


def test_a_row_to_which_nothing_applies_is_not_known_and_said(caplog):
    total, parts = run({"a": fixed([1.0, None, 1.0]), "b": fixed([None, None, 1.0])}, {"a": 1.0, "b": 1.0})
    assert total == [1.0, pytest.approx(math.nan, nan_ok=True), 2.0]
    assert parts == {"a": [1.0, None, 1.0], "b": [None, None, 1.0]}
    assert "no reward applies to 1 of 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([1.0, 1.0], "got 2 scores, wanted a list of 3"),
        ([1.0] * 4, "got 4 scores"),
        (1.0, "got float"),
        (None, "got NoneType"),
        ("abc", "got str"),
        ([1.0, math.nan, 1.0], "row 1: got nan"),
        ([1.0, 1.0, math.inf], "row 2: got inf"),
        ([1.0, "1", 1.0], "row 1: got '1'"),
    ],
)
def test_a_function_at_fault_is_named(scores, reason):
    with pytest.raises(ValueError, match=f"reward function 'bad': {reason}"):
        run({"good": fixed([1.0] * 3), "bad": fixed(scores)}, {"good": 1.0, "bad": 0.0})


@pytest.mark.parametrize(
    ("functions", "weights", "reason"),
    [
        ({}, {}, "one at least"),
        ({"a": fixed([])}, {}, "same names"),
        ({"a": fixed([])}, {"a": 1.0, "b": 1.0}, "same names"),
        ({"a": fixed([])}, {"a": math.nan}, r"weights\['a'\]: got nan"),
        ({"a": fixed([])}, {"a": "1"}, r"weights\['a'\]: got '1'"),
    ],
)
def test_names_and_weights_must_match(functions, weights, reason):
    with pytest.raises(ValueError, match=reason):
        combine(functions, weights)


def test_every_column_has_a_value_for_each_row():
    with pytest.raises(ValueError, match="answer: got 2 rows, wanted 3"):
        run({"a": fixed([1.0] * 3)}, {"a": 1.0}, answer=["4", "4"])
    with pytest.raises(ValueError, match="completion_ids: got 1 rows, wanted 2"):
        combine({"a": fixed([1.0] * 2)}, {"a": 1.0})(["", ""], ["", ""], [[1]])


def picky(prompts, completions, completion_ids, **columns):
    """Raises for a batch with a completion "bad", as functions do that were not written with care."""
    if "bad" in completions:
        raise KeyError("oh")
    return [1.0] * len(completions)


def scored(completions, on_error, functions=None):
    functions = functions or {"picky": picky, "base": lambda p, c, i, **k: [0.5] * len(c)}
    reward = combine(functions, dict.fromkeys(functions, 1.0), on_error=on_error)
    rows = len(completions)
    return reward([f"prompt {row}" for row in range(rows)], completions, [[1]] * rows, answer=["4"] * rows)


def test_a_function_that_raises_ends_the_run_and_names_the_row():
    with pytest.raises(RewardError, match=r"'picky': row 1: raised KeyError: 'oh' \(test_combine.py:\d+\);") as caught:
        scored(["good", "bad", "good"], "raise")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_raises_costs_only_its_rows_where_told_so():
    total, parts = scored(["good", "bad", "good"], "none")
    assert parts == {"picky": [1.0, None, 1.0], "base": [0.5] * 3}
    assert total == [1.5, pytest.approx(math.nan, nan_ok=True), 1.5]


def test_a_function_without_weight_that_raises_leaves_the_total_known():
    functions = {"picky": picky, "base": fixed([0.5])}
    reward = combine(functions, {"picky": 0.0, "base": 1.0}, on_error="none")
    assert reward([""], ["bad"], [[1]]) == ([0.5], {"picky": [None], "base": [0.5]})


def test_the_parts_alone_may_all_be_none():
    reward = combine({"picky": picky, "none": lambda p, c, i, **k: [None] * len(c)}, {"picky": 1.0, "none": 1.0})
    assert reward.graded([""], ["good"], [[1]]).parts == {"picky": [1.0], "none": [None]}
    none = combine({"none": fixed([None])}, {"none": 1.0})
    assert none.graded([""], ["c"], [[1]]).parts == {"none": [None]}
    with pytest.raises(ValueError, match="answer: got 2 rows, wanted 1"):
        none.graded([""], ["c"], [[1]], answer=["4", "4"])


@pytest.mark.parametrize("on_error", ["raise", "none"])
def test_the_sample_is_logged(caplog, on_error):
    long = "x" * 10_000 + "\nERROR forged line\ud800"

    def fails(prompts, completions, completion_ids, **columns):
        raise OSError("disk")

    with contextlib.suppress(RewardError):
        scored([long], on_error, {"fails": fails, "base": lambda p, c, i, **k: [0.5] * len(c)})
    message = caplog.records[-1].getMessage()
    assert "'fails' raised OSError('disk')" in message and "'prompt 0'" in message
    assert "ERROR forged line" in message and "\nERROR" not in message
    assert len(message) < 1_000


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_row_that_only_a_failing_function_scores_is_not_known(weight):
    functions = {"picky": picky, "elsewhere": lambda p, c, i, **k: [None] * len(c)}
    reward = combine(functions, {"picky": weight, "elsewhere": 1.0}, on_error="none")
    total, parts = reward([""] * 2, ["bad", "good"], [[1]] * 2)
    assert math.isnan(total[0]) and total[1] == weight
    assert parts == {"picky": [None, 1.0], "elsewhere": [None, None]}


def test_a_failure_of_the_batch_alone_is_named():
    def no_pairs(prompts, completions, completion_ids, **columns):
        if len(completions) > 1:
            raise ZeroDivisionError("variance")
        return [1.0]

    with pytest.raises(RewardError, match="'no_pairs': raised ZeroDivisionError: variance, for the batch of 2 rows"):
        scored(["a", "b"], "raise", {"no_pairs": no_pairs})
    assert scored(["a", "b"], "none", {"no_pairs": no_pairs})[0] == [1.0, 1.0]


def test_an_interrupt_is_no_error_of_a_function():
    def interrupted(prompts, completions, completion_ids, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(["a"], "none", {"interrupted": interrupted})


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="on_error: got 'zero'"):
        combine({"a": fixed([])}, {"a": 1.0}, on_error="zero")


# --- as TRL calls ------------------------------------------------------------------------------------


def named(completions, **kwargs):
    return [float(len(c)) for c in completions]


def answered(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def keyword_only(*, prompts, completions, completion_ids, **kwargs):
    return [float(len(i)) for i in completion_ids]


class Callable:
    def __call__(self, prompts, completions, **kwargs):
        return [float(len(p)) for p in prompts]


class Waiting:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)


async def waiting(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(a == "5") for a in answer]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (named, [3.0, 1.0]),
        (answered, [1.0, 0.0]),
        (keyword_only, [2.0, 1.0]),
        (Callable(), [1.0, 2.0]),
        (functools.partial(named), [3.0, 1.0]),
        (Callable().__call__, [1.0, 2.0]),
        (waiting, [1.0, 0.0]),
        (Waiting(), [2.0, 2.0]),
        (lambda p, c, i, **k: [float(len(x)) for x in i], [2.0, 1.0]),
    ],
)
def test_a_function_names_only_what_it_looks_at(function, wanted):
    total, _ = combine({"f": function}, {"f": 1.0})(["p", "pp"], ["c 5", "c"], [[1, 2], [1]], answer=["5", "6"])
    assert total == wanted


def test_a_function_without_kwargs_is_refused_as_any_that_raises():
    with pytest.raises(RewardError, match="'f': row 0: raised TypeError: .*unexpected keyword argument"):
        combine({"f": lambda completions: [1.0]}, {"f": 1.0})(["p"], ["c"], [[1]])


def test_asynchronous_functions_wait_for_each_other():
    """Each goes on only when the other has begun: one after the other they would wait for ever."""
    begun = {"a": threading.Event(), "b": threading.Event()}

    def of(own, other):
        async def function(completions, **kwargs):
            begun[own].set()
            for _ in range(500):
                if begun[other].is_set():
                    return [1.0] * len(completions)
                await asyncio.sleep(0.01)
            raise TimeoutError(other)

        return function

    total, _ = combine({"a": of("a", "b"), "b": of("b", "a")}, {"a": 1.0, "b": 2.0})([""], [""], [[1]])
    assert total == [3.0]


def test_asynchronous_functions_run_where_a_loop_runs_already():
    reward = combine({"w": waiting}, {"w": 1.0})

    async def notebook():
        return reward([""], [""], [[1]], answer=["5"])

    assert asyncio.run(notebook())[0] == [1.0]


async def picky_later(prompts, completions, **kwargs):
    return picky(prompts, completions, None)


def test_an_asynchronous_function_that_raises_is_named_with_its_row():
    with pytest.raises(RewardError, match="'picky': row 1: raised KeyError"):
        scored(["good", "bad"], "raise", {"picky": picky_later})
    total, parts = scored(["good", "bad"], "none", {"picky": picky_later})
    assert parts == {"picky": [1.0, None]} and math.isnan(total[1])


def logging_lengths(completions, log_extra, log_metric, **kwargs):
    log_extra("length", [len(c) for c in completions])
    log_metric("rows", len(completions))
    if "bad" in completions:
        raise KeyError("oh")
    return [1.0] * len(completions)


def graded(completions, functions, on_error="raise"):
    rows = len(completions)
    return combine(functions, dict.fromkeys(functions, 1.0), on_error=on_error).graded(
        [""] * rows, completions, [[1]] * rows
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_function_that_knows_which_rows_failed_is_called_once(asynchronous, caplog):
    calls = []

    def partly(completions, log_metric, **kwargs):
        calls.append(len(completions))
        log_metric("known", 2)
        raise RowsFailed("no", [1.0, None, 0.5, None], {3: KeyError("later"), 1: KeyError("sooner")})

    async def awaited(**kwargs):
        return partly(**kwargs)

    functions = {"f": awaited if asynchronous else partly}
    found = graded(["a", "b", "c", "d"], functions, on_error="none")
    assert found.parts == {"f": [1.0, None, 0.5, None]} and np.isnan(found.total).tolist() == [False, True, False, True]
    assert found.metrics == {"known": [2.0]} and "completion: 'b'" in caplog.text and "completion: 'd'" in caplog.text
    with pytest.raises(RewardError, match="'f': row 1: raised KeyError: 'sooner'"):
        graded(["a", "b", "c", "d"], functions)
    assert calls == [4, 4]


def test_the_scores_beside_failed_rows_are_checked():
    def short(**kwargs):
        raise RowsFailed("no", [1.0], {0: KeyError("x")})

    with pytest.raises(ValueError, match="'f': got 1 scores, wanted a list of 2"):
        graded(["a", "b"], {"f": short}, on_error="none")


def test_numbers_of_numpy_are_logged_as_numbers():
    values = [np.float32(0.5), np.int64(3)]
    found = graded(["a", "b"], {"f": lambda log_extra, **k: log_extra("x", values) or [0.0, 0.0]})
    assert found.extra == {"x": [0.5, 3]} and [type(v) for v in found.extra["x"]] == [float, int]


def test_functions_log_columns_and_numbers():
    found = graded(
        ["a", "bb"],
        {
            "f": logging_lengths,
            "g": lambda completions, log_extra, **k: log_extra("nan", [math.nan, "x"]) or [0.0, 0.0],
        },
    )
    assert found.extra == {"length": [1, 2], "nan": [None, "x"]} and found.metrics == {"rows": [2.0]}


def test_what_a_failed_call_logged_does_not_count():
    found = graded(["a", "bad", "cc"], {"f": logging_lengths}, on_error="none")
    assert found.extra == {"length": [1, None, 2]} and found.metrics == {"rows": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (lambda extra, metric: extra("x", [1, 2, 3]), "log_extra: x: got 3 values, wanted [12]"),
        (lambda extra, metric: metric("x", math.nan), "log_metric: x: got nan"),
        (lambda extra, metric: metric("x", "1"), "log_metric: x: got '1'"),
    ],
)
def test_what_cannot_be_logged_is_refused(log, reason):
    def function(completions, log_extra, log_metric, **kwargs):
        log(log_extra, log_metric)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=f"raised ValueError: {reason}"):
        graded(["a", "b"], {"f": function})


def test_a_column_cannot_have_a_loggers_name():
    with pytest.raises(ValueError, match="log_metric: got a column of that name"):
        run({"a": fixed([1.0] * 3)}, {"a": 1.0}, log_metric=["x"] * 3)
