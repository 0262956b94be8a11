"""Laws of the code reward: honest programs earn it, others do not, whatever they do."""

import json
import time
from pathlib import Path

import pytest

from deepseek_jax.rewards.code import (
    Assertions,
    CodeReward,
    InputOutput,
    code_reward,
    count_assertions,
    extract_program,
    outputs_equal,
    parse_tests,
)
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rewards.sandbox import Limits, SandboxUnavailable
from tests.rewards.hostile import FORGERIES, Forgery
from tests.rewards.test_sandbox import need_sandbox

MBPP = Path(__file__).resolve().parents[3] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
PATIENT = Limits(seconds=30.0)
HASTY = Limits(seconds=1.5, memory_bytes=512 << 20)


def fenced(source: str) -> str:
    return f"thoughts</think>\nHere it is.\n```python\n{source}\n```\nDone."


def score(source: str, tests: object, *, share: bool = False, limits: Limits = PATIENT) -> float | None:
    need_sandbox()
    reward = CodeReward(share=share, io_limits=limits, assert_limits=limits, workers=1)
    return reward(["<think>"], [fenced(source)], [[]], tests=[tests])[0]


# --- Extraction


@pytest.mark.parametrize(
    ("prompt", "completion", "program"),
    [
        ("", "```python\nx = 1\n```", "x = 1\n"),
        ("", "```python\na\n```\ntext\n```python\nb\n```", "b\n"),
        ("", "```Python3 \nb\n```", "b\n"),
        ("", "```py\r\nb\r\n```\r\n", "b\r\n"),
        ("", "```python\na\n```\n```text\nb\n```", "a\n"),
        ("", "```\na\n```", "a\n"),
        ("", "```json\n{}\n```", None),
        ("", "```python\na", "a\n"),
        ("", "````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("", "```markdown\n```python\na\n```\n", None),
        ("", "print('```python')", None),
        ("", "<think>```python\na\n```</think>", None),
        ("", "<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("", "<think>\n```python\na\n```", None),
        ("<think>", "```python\na\n```", None),
        ("<think>\n", "```python\na\n```\n</think>\n", None),
        ("<think>", "hm</think>\n```python\na\n```", "a\n"),
        ("", "```python\n```", "\n"),
        ("", "", None),
    ],
)
def test_the_last_python_block_after_the_thoughts_is_the_program(prompt: str, completion: str, program: str | None):
    assert extract_program(prompt, completion) == program


def test_extraction_is_linear():
    start = time.monotonic()
    for text in ("```python\n" * 100_000, "`" * 10**6, "```python\nx\n```\n" * 50_000, "</think>" * 100_000):
        extract_program("", text)
    assert time.monotonic() - start < 5.0


# --- Comparison


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        ("1\n2\n", "1\n2"),
        (" 1 \r\n2\n\n", "1\n 2"),
        ("1.0", "1"),
        ("1e3 2", "1000 2.00"),
        ("", "\n"),
        ("0.1", "0.10"),
        ("inf", "inf"),
        ("YES 1", "YES 1"),
    ],
)
def test_equal_outputs(got: str, wanted: str):
    assert outputs_equal(got, wanted) and outputs_equal(wanted, got)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        ("1", "1\n2"),  # a correct first line
        ("1\n3", "1\n2"),
        ("1\n2\n3", "1\n2"),
        ("", "0"),
        ("1 2", "1  2 3"),
        ("yes", "YES"),
        ("1.0000001", "1"),
        ("nan", "NaN"),
        ("sNaN", "1"),
        ("Infinity", "inf"),
        ("YES 1.0", "YES 1"),
        ("a b", "a  b"),
        ("1\x002", "1 2"),
    ],
)
def test_different_outputs(got: str, wanted: str):
    assert not outputs_equal(got, wanted) and not outputs_equal(wanted, got)


def test_comparison_of_absurd_numbers_is_quick():
    start = time.monotonic()
    assert not outputs_equal("1e999999999", "1") and not outputs_equal("9" * 10**6, "1")
    assert time.monotonic() - start < 2.0


# --- Tests by input and output

SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n", "testtype": "stdin"}]


def test_a_right_program_passes_and_a_wrong_one_fails():
    assert score("print(sum(map(int, input().split())))", SUMS) == 1.0
    assert score("print(3)", SUMS) == 0.0
    assert score("print(3)", SUMS, share=True) == 0.5
    assert score("print(sum(map(int, input().split())))", json.dumps(SUMS)) == 1.0


@pytest.mark.parametrize(
    "source",
    [
        "print(sum(map(int, input().split())))\nraise SystemExit(1)",
        "print(sum(map(int, input().split())), flush=True)\nimport ctypes\nctypes.string_at(0)",
        "print(sum(map(int, input().split())), flush=True)\nwhile True: pass",
        "print(sum(map(int, input().split())))\nprint('more')",
        "import os\nos.write(1, b'\\xff')",
        "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
        "",
    ],
)
def test_a_right_answer_with_a_wrong_end_fails(source: str):
    assert score(source, SUMS, limits=HASTY) == 0.0


# --- Assertions

SOLVE = ["assert solve(1) == 2", "assert solve(2) == 5", "assert solve(7) == 50"]
RIGHT = "def solve(n):\n    return n * n + 1\n"


def test_a_solution_passes_the_tests_that_forgeries_aim_at():
    assert score(RIGHT, SOLVE) == 1.0


@pytest.mark.parametrize("forgery", FORGERIES, ids=[forgery.name for forgery in FORGERIES])
def test_no_forgery_passes_one_test(forgery: Forgery):
    assert score(forgery.source, SOLVE, share=True, limits=HASTY) == 0.0


@pytest.mark.parametrize(
    "forgery",
    [forgery for forgery in FORGERIES if forgery.name in ("raises-stop", "always-equal", "exit-when-called")],
    ids=lambda forgery: forgery.name,
)
def test_no_forgery_passes_through_loops(forgery: Forgery):
    """`all` and `map` over nothing are true: an exception that ends loops must not cross."""
    tests = ["assert all(x == 2 for x in map(solve, [1]))", "assert [] != [*map(solve, [1])] == [2]"]
    assert score(RIGHT, tests, share=True) == 1.0
    assert score(forgery.source, tests, share=True, limits=HASTY) == 0.0


@pytest.mark.parametrize(
    ("source", "test"),
    [
        (
            "def f(): return (1, [2.5, None, True], {'a': {1, 2}}, b'x', 1j)",
            "assert f() == (1, [2.5, None, True], {'a': {1, 2}}, b'x', 1j)",
        ),
        ("def f(x, *, k): return x[0] + k", "assert f([2 ** 5000], k=1) == 2 ** 5000 + 1"),
        ("import collections\ndef f(): return collections.Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
        ("def f(): yield from range(3)", "assert list(f()) == [0, 1, 2]"),
        ("def f(): return float('inf'), -0.0", "assert f() == (float('inf'), 0.0)"),
        ("def f(): return float('nan')", "assert f() != f() and math.isnan(f())"),
        ("def f(x): return 1 / x", "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"),
        ("def f(s): return s[::-1]", "assert f('\\udc80é') == 'é\\udc80'"),
        ("def f(kind): return [x for x in (1, 'a') if not isinstance(x, kind)]", "assert f(int) == ['a']"),
        (
            "class Pair:\n    def __init__(self, a): self.a = a\ndef f(p): return p.a",
            "assert f(Pair(4)) == 4 and Pair(5).a == 5",
        ),
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
        ("X = [1, 2]", "assert X == [1, 2]"),
        ("def f(): print('x' * 10_000_000); return 1", "assert f() == 1"),
        ("def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(1)", "assert f() == 1"),
        ("import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and 1 + f(n - 1)", "assert f(5000) == 5000"),
        ("from functools import lru_cache\n@lru_cache\ndef f(n): return n", "x = f(3)\nassert x == 3, 'message'"),
    ],
)  # fmt: skip
def test_values_cross_as_themselves(source: str, test: str):
    assert score(source, [test]) == 1.0


@pytest.mark.parametrize(
    "test",
    [
        "assert f() == [1, 2]",  # a tuple is no list
        "assert f() is None",
        "assert not f()",
        "assert f(1) == (1, 2)",
        "assert missing() == 1",
        "assert missing",
        "assert missing != 1",
        "assert g == f",
        "assert f() == (1, 2), f'{1 / 0}'\nassert False",
        "assert f(lambda: 1) == (1, 2)",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
    ],
)
def test_wrong_values_fail(test: str):
    assert score("def f(): return (1, 2)\ndef g(): pass", [test]) == 0.0


def test_a_test_that_hangs_or_kills_the_judge_leaves_the_verdicts_before_it():
    source = "import time\ndef f(x):\n    time.sleep(x)\n    return 1"
    assert (
        score(source, ["assert f(0) == 1", "assert f(100) == 1", "assert f(0) == 1"], share=True, limits=HASTY) == 1 / 3
    )


def test_time_counts_for_all_assertions_together():
    source = "import time\ndef f():\n    time.sleep(0.3)\n    return 1"
    passed = count_assertions(source, Assertions(tests=["assert f() == 1"] * 8), limits=Limits(seconds=1.5))
    assert 1 <= passed <= 4


HUMAN_EVAL = {
    "setup": "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n",
    "test": (
        "def check(candidate):\n    for a in (1, 2):\n        assert abs(poly([-a, 1], candidate([-a, 1]))) < 1e-4\n"
    ),
    "entry_point": "find_zero",
}


def test_human_eval_takes_the_entry_point_and_trusts_only_its_own_helpers():
    assert score("def find_zero(xs):\n    return -xs[0] / xs[1]", HUMAN_EVAL) == 1.0
    assert score("def find_zero(xs):\n    return 0.0", HUMAN_EVAL) == 0.0
    assert score("def poly(xs, x):\n    return 0.0\ndef find_zero(xs):\n    return 0.0", HUMAN_EVAL) == 0.0
    assert score("def other(xs):\n    return -xs[0]", HUMAN_EVAL) == 0.0


def test_setup_and_the_standard_library_are_there_for_the_tests():
    tests = {
        "asserts": ["assert isclose(f(), 0.1 + 0.2)", "assert math.floor(f()) == 0"],
        "setup": "from math import *",
    }
    assert score("import math\ndef f(): return 0.3", tests) == 1.0


def test_the_library_that_tests_use_is_their_own_and_not_the_program_s():
    source = "class math:\n    isclose = staticmethod(lambda a, b: True)\nset = len = lambda x: 0\ndef f(): return [9]"
    assert score(source, ["assert math.isclose(f()[0], 1)", "assert set(f()) == set([1])"], share=True) == 0.0


# --- The reward's protocol


def test_rows_are_scored_apart_and_rows_without_tests_get_none():
    need_sandbox()
    completions = [fenced(RIGHT), fenced("def solve(n): return 0"), "no program", fenced(RIGHT), fenced("print(3)")]
    tests = [SOLVE, SOLVE, SOLVE, None, SUMS]
    prompts, ids = ["<think>"] * 5, [[]] * 5
    reward = CodeReward(io_limits=PATIENT, assert_limits=PATIENT, share=True)
    assert reward(prompts, completions, ids, tests=tests, other=[1] * 5) == [1.0, 0.0, 0.0, None, 0.5]
    assert code_reward(["<think>"], ["no program"], [[]], tests=[SOLVE]) == [0.0]
    total, _ = combine({"code": reward}, {"code": 2.0})(prompts[:1], completions[:1], ids[:1], tests=tests[:1])
    assert total == [2.0]


@pytest.mark.parametrize("row", [None, [], "null", "[]", {"asserts": []}])
def test_rows_without_tests(row: object):
    assert parse_tests(row) is None


def test_rows_of_each_shape():
    assert parse_tests(SUMS)[0] == InputOutput(input="1 2\n", output="3\n")
    assert parse_tests(SOLVE) == Assertions(tests=tuple(SOLVE))
    assert parse_tests(json.dumps({"asserts": SOLVE, "setup": "import math"})).setup == "import math"
    assert parse_tests(HUMAN_EVAL).tests == ("check(candidate)",)


@pytest.mark.parametrize(
    "row",
    [7, {}, "not json", "7", [1], [{"input": "x"}], [{"input": 1, "output": "x"}], ["assert ("], {"asserts": "x"},
     {"test": "def check(candidate): pass"}, [{"input": "", "output": "", "testtype": "functional"}], ["x", {}],
     {"asserts": ["assert 1"], "setup": "import ("}, "[" * 100_000, {"asserts": ["assert 1"], "setup": 3},
     {"test": 1, "entry_point": "f"}, {"test": "def check(c): pass", "entry_point": None}],
)  # fmt: skip
def test_malformed_rows_are_refused_in_one_line(row: object):
    with pytest.raises(ValueError, match="^code_reward: tests: [^\n]*$"):
        code_reward([""], [""], [[]], tests=[row])


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="tests: got 2 rows, wanted 1"):
        code_reward([""], [""], [[]], tests=[None, None])
    with pytest.raises(ValueError, match="workers"):
        CodeReward(workers=0)


def test_without_a_sandbox_there_is_no_score(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepseek_jax.rewards.sandbox.available", lambda: "no namespaces here")
    for tests in (SOLVE, SUMS):
        with pytest.raises(SandboxUnavailable, match="no namespaces here"):
            code_reward([""], [fenced(RIGHT)], [[]], tests=[tests])
    assert code_reward([""], ["no program"], [[]], tests=[SOLVE]) == [0.0]


# --- Real tasks


def mbpp(count: int) -> list[dict]:
    if not MBPP.exists():
        pytest.skip(f"no MBPP at {MBPP.name}'s place")
    lines = MBPP.read_text().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // count]][:count]


def broken(source: str) -> str:
    """The solution, but every function returns an object that claims to equal anything."""
    yes = "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    patch = "for _n, _f in list(globals().items()):\n    if type(_f).__name__ == 'function': globals()[_n] = _yes\n"
    yes += "def _yes(*args, **kwargs): return Yes()\n"
    return f"{source}\n{yes}{patch}"


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_reference_solutions_of_mbpp_pass_and_broken_ones_fail(count: int):
    need_sandbox()
    rows = mbpp(count)
    tests = [{"asserts": row["test_list"], "setup": row["test_setup_code"]} for row in rows]
    reward = CodeReward(share=True, assert_limits=PATIENT)
    run = lambda programs: reward([""] * count, [fenced(program) for program in programs], [[]] * count, tests=tests)
    assert run([row["code"] for row in rows]) == [1.0] * count
    assert run([broken(row["code"]) for row in rows]) == [0.0] * count
