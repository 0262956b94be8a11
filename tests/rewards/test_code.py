"""Laws of the code reward: honest programs earn it, others do not, whatever they do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.rewards.assertions import Assertions, TestsUnusable, count_assertions
from deepseek_jax.rewards.code import CodeReward, code_reward
from deepseek_jax.rewards.combine import RewardError, combine
from deepseek_jax.rewards.outputs import outputs_equal
from deepseek_jax.rewards.programs import extract_program
from deepseek_jax.rewards.sandbox import Limits, SandboxUnavailable
from deepseek_jax.rewards.tests_column import InputOutput, parse_tests
from tests.rewards.honest import HONEST, Honest
from tests.rewards.hostile import FORGERIES, Forgery
from tests.rewards.lies import LIES, Lie
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
        ("", "```py3\nb\n```", "b\n"),
        ("", "```python3.11\nb\n```", "b\n"),
        ("", "```Python title=x.py\nb\n```", "b\n"),
        ("", "```{.python}\nb\n```", "b\n"),
        ("", "```pythonic\nb\n```", None),
        ("", "~~~python\nb\n~~~", "b\n"),
        ("", "~~~\n```\nb\n~~~", "```\nb\n"),
        ("", "```\na\n```\n```python\nb\n```\n```\nc\n```", "b\n"),
        ("", "```\r\na = 1\r\n```\r\n", "a = 1\r\n"),
        ("", "1. First:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("", "- ```python\n  def f():\n      return 1\n  ```", "def f():\n    return 1\n"),
        ("", "> ```python\n> def f():\n>     return 1\n> ```", "def f():\n    return 1\n"),
        ("", "```python\n    def f():\n        return 1\n```", "def f():\n    return 1\n"),
        ("", "\t```python\n\tx = 1\n\t```", "x = 1\n"),
        ("", "```python\ndef f(): return 1\n```\nUsage:\n```python\nprint(f())\n```", "def f(): return 1\n"),
        ("", "```python\nprint(1)\n```\nor\n```python\nprint(2)\n```", "print(2)\n"),
        ("", "```python\nx = 1\n```\n```python\nx = (\n```", "x = 1\n"),
        ("", "```python\nx = 1\n```\n```python\ny = 2", "y = 2\n"),
        ("", "<answer>\n```python\na\n```\n</answer>\n```python\nb\n```", "a\n"),
        ("", "```python\na\n```\n<answer>a</answer>", "a\n"),
        ("", "<think>\n```python\na\n```\n</think>", None),
        ("", "", None),
    ],
)
def test_the_last_python_block_after_the_thoughts_is_the_program(prompt: str, completion: str, program: str | None):
    assert extract_program(prompt, completion) == program


@pytest.mark.parametrize(
    ("completion", "names", "program"),
    [
        ("```python\ndef f(): return 1\n```\n```python\nx = f()\ny = x\n```", ["f"], "def f(): return 1\n"),
        ("```python\ndef f(): 1\n```\n```python\ndef f(): 2\n```\n```python\ndef g(): f()\n```", ["f"],
         "def f(): 2\n"),
        ("```python\nclass A: pass\n```\n```python\nclass B(A): pass\n```\n```python\nB()\n```", ["A", "B"],
         "class A: pass\n\nclass B(A): pass\n\nB()\n"),
        ("```python\nf = lambda x: x\n```\n```python\nassert f(1) == 1\n```", ["f"], "f = lambda x: x\n"),
        ("```\nf(1)\n```\n```\ndef f(x): return x\n```\n```\noutput: 3\n```", ["f"], "def f(x): return x\n"),
        ("```python\ndef g(): 1\n```", ["f"], "def g(): 1\n"),
    ],
)  # fmt: skip
def test_of_several_blocks_the_one_that_defines_what_tests_need_is_the_program(completion, names, program):
    assert extract_program("", completion, frozenset(names)) == program


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
        ("0.30000000000000004", "0.3"),
        ("0.333333", "0.333333333333"),
        ("123456789.0001", "123456789.0002"),
        ("area = 0.30000000000000004 m", "area = 0.3 m"),
        ("1e-9", "0.0"),
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
        ("0.3334", "0.333333333333"),
        ("100000000000000000001", "100000000000000000000"),
        ("x 0.5", "y 0.5"),
        ("0.5  x", "0.5000000001 x"),
        ("1e500", "1.1e500"),
        ("2", "2.0000001"),
        ("-0.25", "0.25"),
    ],
)
def test_different_outputs(got: str, wanted: str):
    assert not outputs_equal(got, wanted) and not outputs_equal(wanted, got)


def test_the_tolerance_of_printed_fractions_is_an_option():
    assert not outputs_equal("0.333333", "0.333333333333", tolerance=0)
    assert outputs_equal("0.33", "0.3333", tolerance=0.01) and outputs_equal("1.50", "1.5", tolerance=0)
    assert outputs_equal("1000.4", "1000.0", tolerance=1e-3) and not outputs_equal("1001.4", "1000.0", tolerance=1e-3)


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


@pytest.mark.parametrize(
    "source",
    [
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import os\nprint(sum(map(int, os.read(0, 100).split())), file=open('/dev/stdout', 'w'))",
        "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
        "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())), end=' \\n\\n')",
        "import pathlib\nprint(sum(map(int, pathlib.Path('/dev/stdin').read_text().split())))",
        "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    print(sum(map(int, input().split())))\n"
        "asyncio.run(main())",
        "import asyncio, sys\nasync def main():\n    r = asyncio.StreamReader()\n"
        "    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(r), sys.stdin)\n"
        "    print(sum(map(int, (await r.read()).split())))\nasyncio.run(main())",
        "t = 0\ntry:\n    while True: t += sum(map(int, input().split()))\nexcept EOFError: print(t)",
        "import numpy as np\nprint(np.array(input().split(), dtype=int).sum())",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\n"
        "t = threading.Thread(target=lambda: print(sum(map(int, input().split()))))\nt.start(); t.join()",
    ],
)  # fmt: skip
def test_programs_read_and_write_in_every_way(source: str):
    assert score(source, SUMS) == 1.0


def test_a_program_may_print_what_is_wanted_however_long_and_not_much_more():
    wanted = "\n".join(map(str, range(300_000)))
    assert score("for i in range(300000): print(i)", [{"input": "", "output": wanted}]) == 1.0
    small = Limits(seconds=30.0, output_bytes=1000)
    assert score("print(' ' * 3_000_000)", [{"input": "", "output": ""}], limits=small) == 0.0
    roomy = Limits(seconds=30.0, output_bytes=4 << 20)
    assert score("print(' ' * 3_000_000)", [{"input": "", "output": ""}], limits=roomy) == 1.0


# --- Assertions

SOLVE = ["assert solve(1) == 2", "assert solve(2) == 5", "assert solve(7) == 50"]
RIGHT = "def solve(n):\n    return n * n + 1\n"


def test_a_solution_passes_the_tests_that_forgeries_aim_at():
    assert score(RIGHT, SOLVE) == 1.0


@pytest.mark.parametrize("forgery", FORGERIES, ids=[forgery.name for forgery in FORGERIES])
def test_no_forgery_passes_one_test(forgery: Forgery):
    assert score(forgery.source, SOLVE, share=True, limits=HASTY) == 0.0


@pytest.mark.parametrize("program", HONEST, ids=[program.name for program in HONEST])
def test_honest_programs_pass_all_their_tests(program: Honest):
    need_sandbox()
    tests = Assertions(tests=program.tests, setup=program.setup, entry_point=program.entry_point, prompt=program.prompt)
    assert count_assertions(program.source, tests, limits=PATIENT) == len(program.tests)


@pytest.mark.parametrize("lie", LIES, ids=[lie.name for lie in LIES])
def test_no_lie_passes_one_test(lie: Lie):
    need_sandbox()
    limits = Limits(seconds=10.0, memory_bytes=512 << 20)
    assert count_assertions(lie.source, Assertions(tests=lie.tests, setup=lie.setup), limits=limits) == 0


def test_there_are_as_many_shapes_and_lies_as_the_project_asks_for():
    assert len({program.name for program in HONEST}) == len(HONEST) >= 60
    assert len({lie.name for lie in LIES}) == len(LIES) >= 20


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


# --- Tests that are at fault themselves


@pytest.mark.parametrize(
    ("setup", "test"),
    [
        ("raise ValueError('why')", "assert helper(solve(1)) == 2"),
        ("DATA = open('/data/no_such.json')", "assert DATA and solve(1) == 2"),
        ("import no_such_library", "assert no_such_library.check(solve(1))"),
        ("from no_such_library import check", "assert check(solve(1))"),
        ("x = 1 / 0", "assert solve(1) == x"),
        ("import sys\nsys.exit(3)", "assert solve(1) == 3"),
        ("x = bytearray(1 << 50)", "assert x == solve(1)"),
        ("", "import no_such_library\nassert solve(1) == 2"),
        ("", "x = bytearray(1 << 50)\nassert solve(1) == 2"),
        ("while True: pass", "assert solve(1) == 2"),
        ("import os\nos._exit(0)", "assert solve(1) == 2"),
        ("import os\nos.abort()", "assert solve(1) == 2"),
    ],
)
def test_tests_that_fail_by_themselves_are_an_error_and_no_verdict(setup: str, test: str):
    with pytest.raises(TestsUnusable, match="^code_reward: tests: [^\n]*correct the row[^\n]*$"):
        score(RIGHT, {"asserts": [test], "setup": setup}, limits=HASTY)


def test_a_reward_whose_tests_fail_by_themselves_is_unknown():
    need_sandbox()
    reward = combine({"code": CodeReward(workers=1)}, {"code": 1.0}, on_error="none")
    tests = [{"asserts": SOLVE[:1], "setup": "import no_such_library\nSOLVED = no_such_library.SOLVED"}, SOLVE]
    tests[0]["asserts"] = ["assert solve(1) == SOLVED"]
    total, parts = reward([""] * 2, [fenced(RIGHT)] * 2, [[]] * 2, tests=tests)
    assert parts["code"] == [None, 1.0] and total[0] != total[0] and total[1] == 1.0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_whose_tests_fail_is_named_and_no_row_is_run_again(monkeypatch, workers):
    need_sandbox()
    ran, whole = [], CodeReward._score
    monkeypatch.setattr(CodeReward, "_score", lambda self, *row: ran.append(row) or whole(self, *row))
    reward = CodeReward(workers=workers)
    broken = {"asserts": ["assert solve(1) == SOLVED"], "setup": "import no_such_library as n\nSOLVED = n.SOLVED"}
    rows = [""] * 4, [fenced(RIGHT)] * 3 + [fenced("def solve(n): return 0")], [[]] * 4
    tests = [SOLVE, broken, SOLVE, SOLVE]
    total, parts = combine({"code": reward}, {"code": 1.0}, on_error="none")(*rows, tests=tests)
    assert parts["code"] == [1.0, None, 1.0, 0.0] and total[1] != total[1] and len(ran) == 4
    with pytest.raises(RewardError, match="'code': row 1: raised TestsUnusable: code_reward: tests: .*correct the row"):
        combine({"code": reward}, {"code": 1.0})(*rows, tests=tests)
    assert len(ran) == 8
    with pytest.raises(TestsUnusable, match="correct the row") as raised:
        reward(*rows, tests=tests)
    assert list(raised.value.errors) == [1] and raised.value.scores == [1.0, None, 1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "setup", "test"),
    [
        ("1 / 0", "", "assert solve(1) == 2"),
        ("def other(): pass", "x = solve(1)", "assert x == 2"),
        ("def solve(n): raise ImportError('x')", "", "assert solve(1) == 2"),
        ("def solve(n): raise MemoryError", "", "assert solve(1) == 2"),
        ("def solve(n): return bytearray(1 << 50)", "", "assert solve(1) == 2"),
        ("def solve(n): raise ValueError", "x = solve(1)", "assert x == 2"),
        ("def solve(n): return 0", "x = solve(1)[0]", "assert x == 2"),
        ("def solve(n):\n    while True: pass", "x = solve(1)", "assert x == 2"),
        ("while True: pass", "", "assert solve(1) == 2"),
        ("import os\nos.kill(os.getpid(), 11)", "", "assert solve(1) == 2"),
        ("import no_such_library", "", "assert solve(1) == 2"),
        ("def solve(n): return 0", "raise_later = 1", "assert solve(1) == 2"),
        ("def solve(n): return range(10 ** 14)", "", "assert list(solve(1)) == [2]"),
    ],
)
def test_a_program_cannot_have_the_tests_blamed(source: str, setup: str, test: str):
    assert score(source, {"asserts": [test], "setup": setup}, limits=HASTY) == 0.0


def test_tests_that_their_own_reference_fails_are_an_error():
    need_sandbox()
    reward = CodeReward(assert_limits=PATIENT, io_limits=PATIENT, reference="solutions", workers=1)
    wrong = [fenced("def solve(n): return 0")]
    run = lambda tests, reference: reward([""], wrong, tests=[tests], solutions=[reference])
    assert run(SOLVE, RIGHT) == run(SOLVE, None) == run(SUMS, "print(sum(map(int, input().split())))") == [0.0]
    for tests in (["assert solve(1) == 3"], ["assert undefined(solve(1))"], [{"input": "1", "output": "2"}]):
        with pytest.raises(TestsUnusable, match="reference"):
            run(tests, RIGHT)
    with pytest.raises(ValueError, match="solutions: got None, wanted a program or None for each of 1 rows"):
        reward([""], wrong, tests=[SOLVE])


def test_a_test_that_needs_nothing_of_a_broken_setup_counts():
    assert score(RIGHT, {"asserts": SOLVE, "setup": "open('/data/x.json')\nimport math"}) == 1.0


def test_time_that_others_take_from_a_program_is_not_its_own():
    """Under a load of eight busy processes a processor a program gets a fraction of its time."""
    need_sandbox()
    source = "def f():\n    x = 0\n    for i in range(9_000_000): x += i\n    return x > 0"
    alone = time.monotonic()
    assert count_assertions(source, Assertions(tests=["assert f()"]), limits=PATIENT) == 1
    seconds = time.monotonic() - alone
    count = 4 * len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        limits = Limits(seconds=max(1.0, 1.3 * seconds))
        assert count_assertions(source, Assertions(tests=["assert f()"]), limits=limits) == 1
    finally:
        for other in others:
            other.kill()
            other.wait()


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


FUNCTIONAL = [
    {"input": "[2, 7]\n9", "output": "[0, 1]", "testtype": "functional"},
    {"input": "[3, 3]\n6", "output": "[0, 1]", "testtype": "functional"},
]
TWO_SUM = """
class Solution:
    def pairs(self, n): return [(i, j) for j in range(n) for i in range(j)]
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        return next(((i, j) for i, j in self.pairs(len(nums)) if nums[i] + nums[j] == target), None)
"""


@pytest.mark.parametrize(
    "row",
    [
        FUNCTIONAL,
        [{**test, "func_name": "twoSum"} for test in FUNCTIONAL],
        {"tests": FUNCTIONAL},
        {"inputs": [[[2, 7], 9]], "outputs": [[0, 1]], "fn_name": "twoSum"},
        {"functional": "def check(candidate):\n    assert list(candidate(nums=[2, 7], target=9)) == [0, 1]"},
        {"test": "def check(candidate):\n    assert candidate([3, 3], 6)[1] == 1", "entry_point": "Solution().twoSum"},
        {"language": "python", "test_cases": [{"input": "[2, 7]\n9", "output": "[0, 1]", "type": "function_call",
                                               "fn_name": "twoSum"}]},
    ],
)  # fmt: skip
def test_methods_of_solution_are_called(row: object):
    assert score(TWO_SUM, row) == 1.0
    assert score(TWO_SUM.replace("==", "!="), row) == 0.0
    assert score("def twoSum(nums, target): return [0, 1]", row) == (0.0 if "twoSum" not in json.dumps(row) else 1.0)


@pytest.mark.parametrize(
    "row",
    [
        {"tests": SUMS},
        {"inputs": ["1 2\n"], "outputs": ["3\n"]},
        {"language": "python", "test_cases": [{"input": "1 2\n", "output": "3\n", "type": "stdin_stdout"}]},
    ],
)
def test_input_and_output_in_each_form(row: object):
    assert score("print(sum(map(int, input().split())))", row) == 1.0


def test_rows_of_the_hub_s_human_eval():
    row = {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\n\ndef helper(x):\n    return x + 1\n\n"
        'def solve(xs: List[int]) -> List[int]:\n    """Adds one."""\n',
        "canonical_solution": "    return [helper(x) for x in xs]\n",
        "test": "def check(candidate):\n    assert candidate([1]) == [helper(1)]\n    assert solve([2]) == [3]\n",
        "entry_point": "solve",
    }
    assert score("def solve(xs: List[int]):\n    return [helper(x) for x in xs]", row) == 1.0
    assert score("def solve(xs):\n    return xs", row) == 0.0
    assert score("def helper(x): return x\ndef solve(xs): return xs", row) == 0.0


def test_the_reward_is_called_by_keyword():
    need_sandbox()
    call = {"prompts": [""], "completions": [fenced(RIGHT)], "tests": [SOLVE]}
    assert code_reward(**call) == CodeReward()(**call, completion_ids=[[1]], trainer_state=None) == [1.0]


def test_rows_of_each_shape():
    assert parse_tests(SUMS)[0] == InputOutput(input="1 2\n", output="3\n")
    assert parse_tests(SOLVE) == Assertions(tests=tuple(SOLVE))
    assert parse_tests(json.dumps({"asserts": SOLVE, "setup": "import math"})).setup == "import math"
    assert parse_tests(HUMAN_EVAL).tests == ("check(candidate)",)


@pytest.mark.parametrize(
    "row",
    [7, {}, "not json", "7", [1], [{"input": "x"}], [{"input": 1, "output": "x"}], ["assert ("], {"asserts": "x"},
     {"test": "def check(candidate): pass"}, [{"input": "{", "output": "", "testtype": "functional"}],
     {"inputs": [1], "outputs": []}, {"tests": 3},
     [{"input": "1", "output": "1", "testtype": "functional"}, SUMS[0]], {"functional": 3}, ["x", {}],
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
    with pytest.raises(ValueError, match="tolerance"):
        CodeReward(tolerance=-1.0)


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


@pytest.mark.parametrize("count", [8, pytest.param(974, marks=pytest.mark.slow)])
def test_reference_solutions_of_mbpp_pass_and_broken_ones_fail(count: int):
    need_sandbox()
    rows = mbpp(count)
    tests = [{"asserts": row["test_list"], "setup": row["test_setup_code"]} for row in rows]
    reward = CodeReward(share=True, assert_limits=PATIENT)
    run = lambda programs: reward([""] * count, [fenced(program) for program in programs], [[]] * count, tests=tests)
    assert run([row["code"] for row in rows]) == [1.0] * count
    assert run([broken(row["code"]) for row in rows]) == [0.0] * count
