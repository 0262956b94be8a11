"""Benchmarks on recorded rows and completions: every verdict, and what a broken row is told."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.private_tests import hidden_tests, pickled_text
from deepseek_jax.evals.task import Answered
from deepseek_jax.evals.tasks import TASKS, task_named
from deepseek_jax.evals.tasks.choice import gpqa_order
from deepseek_jax.evals.tasks.contests import livecodebench_tests
from deepseek_jax.rewards.math import Verdict
from deepseek_jax.rewards.sandbox import available

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def need_sandbox():
    if available() is not None:
        pytest.skip(f"needs a sandbox: {available()}")


@pytest.fixture(scope="module")
def graders():
    with Graders() as found:
        yield found


@pytest.fixture
def rows(tmp_path):
    """A source of these rows."""

    def of(*given):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return open_source(str(path))

    return of


@pytest.fixture
def graded(rows, graders):
    """Grades of completions of one row."""

    def of(name, row, *completions, style="deepseek", prompt=""):
        task = task_named(name)
        (problem,) = task.problems(rows(row))
        return task.grade([Answered(problem, task.style(style), prompt, text) for text in completions], graders)

    return of


def scores(grades):
    return [grade.score for grade in grades]


# --- mathematics ----------------------------------------------------------------------------------


GSM8K = {"question": "2 ducks and 2 ducks?", "answer": "2+2=<<2+2=4>>4\n#### 4"}


def test_every_form_of_the_public_rows_is_read(rows):
    given = {
        "gsm8k": (GSM8K, "4"),
        "math500": ({"problem": "?", "solution": "so $\\boxed{7}$", "answer": "x+1", "unique_id": "a/1"}, "x+1"),
        "aime24": ({"Problem": "?", "Answer": 33}, "33"),
        "aime25": ({"question": "?", "answer": "070"}, "070"),
        "amc23": ({"problem": "?", "answer": 27.0, "question": "?"}, "27.0"),
        "svamp": ({"Body": "Two ducks.", "Question": "How many?", "Answer": 2.0}, "2.0"),
        "cmath": ({"question": "？", "golden": "1", "grade": "1"}, "1"),
    }  # fmt: skip
    for name, (row, answer) in given.items():
        (problem,) = TASKS[name].problems(rows(row))
        assert problem.answer == answer, name
    assert TASKS["svamp"].problems(rows(given["svamp"][0]))[0].question == "Two ducks. How many?"
    assert TASKS["math500"].problems(rows(given["math500"][0]))[0].id == "a/1"


def test_mathematical_verdicts_strict_and_lenient(graded):
    found = graded(
        "gsm8k",
        GSM8K,
        r"<think>\boxed{5}</think>So \boxed{4}.",
        r"\boxed{4.0}",
        "The answer is 4",
        "It is 5.",
        "",
        r"<think>\boxed{4}",
    )
    assert [(each.score, each.lenient) for each in found] == [(1, 1), (1, 1), (0, 1), (0, 0), (0, 0), (0, 0)]
    assert [each.answer for each in found] == ["4", "4.0", None, None, None, None]


def test_a_grader_that_fails_on_the_lenient_answer_leaves_the_strict_score(graded, graders, monkeypatch):
    """One without a box is wrong, whatever else stands in it."""
    verdict = lambda pair: Verdict(False, "died", "signal 9") if pair[0] == "x" else Verdict(pair[0] == "4", "exact")
    monkeypatch.setattr(graders.math, "grade", lambda pairs: list(map(verdict, pairs)))
    found = graded("gsm8k", GSM8K, "The answer is x", r"\boxed{x}", r"\boxed{4}")
    assert [(each.score, each.lenient) for each in found] == [(0, None), (None, None), (1, 1)]
    assert [each.reason for each in found] == ["", "died: signal 9", ""]


def test_a_prompt_that_opens_the_thought_hides_its_answers(graded):
    assert scores(graded("gsm8k", GSM8K, r"\boxed{4}", r"\boxed{5}</think>\boxed{4}", prompt="<think>\n")) == [0, 1]


def test_styles_look_for_the_answer_in_their_own_form(graded):
    given = ("so 2+2\nAnswer: $4$", "**ANSWER: 4**", "2+2=4\n#### 4", r"\boxed{4}", "Answer: 5\nAnswer: 4.")
    assert scores(graded("gsm8k", GSM8K, *given, style="simple-evals")) == [1, 1, 0, 0, 1]
    assert scores(graded("gsm8k", GSM8K, *given, "#### 4.", "#### 5 #### 4", style="lm-eval")) == [0, 0, 1, 0, 0, 1, 0]
    assert TASKS["gsm8k"].style("lm-eval").stop == ("Question:", "</s>", "<|im_end|>")


def test_percent_signs_may_be_left_out_as_published_answers_do(graded):
    row = {"problem": "?", "answer": "10"}
    assert scores(graded("math500", row, r"\boxed{10\%}", r"\boxed{0.1}")) == [1, 0]


# --- multiple choice ------------------------------------------------------------------------------


GPQA = {"Question": "Which?", "Correct Answer": "red", **{f"Incorrect Answer {n}": f"blue {n}" for n in (1, 2, 3)}}


def test_gpqa_options_stand_as_simple_evals_draws_them(rows):
    """random.Random(0).sample(range(4), 4) row by row, as CPython 3.11 and 3.12 draw it."""
    assert [gpqa_order(n) for n in range(3)] == [[3, 1, 0, 2], [3, 1, 2, 0], [2, 3, 0, 1]]
    assert gpqa_order(2) == gpqa_order(2) and len(gpqa_order(3_000)) == 4
    first, second = TASKS["gpqa"].problems(rows(GPQA, GPQA))
    assert first.choices == ("blue 3", "blue 1", "red", "blue 2") and first.answer == "C"
    assert second.answer == "D"


def test_choice_verdicts(graded):
    given = ("Answer: C", "answer: (c) red", "Answer: red", "Answer: B", "Answer: C or B", "The answer is C", "")
    found = graded("gpqa", GPQA, *given)
    assert scores(found) == [1, 1, 1, 0, 0, 0, 0]
    assert [grade.lenient for grade in found] == [1, 1, 1, 0, 0, 1, 0]
    marked = (
        "**Answer**: C",
        "*Answer:* C",
        "- Answer: C",
        "**Final Answer**: **C**",
        "__Answer__: C (red)",
        "Answer C",
    )
    assert scores(graded("gpqa", GPQA, *marked)) == [1, 1, 1, 1, 1, 0]
    reasoned = ("C, because red is warm", "(C) since it is red", "C; for blue is cold", "B, because", "C, D", "C and B")
    told = [f"Answer: {each}" for each in reasoned]
    assert scores(graded("gpqa", GPQA, *told)) == [1, 1, 1, 0, 0, 0]
    pro = {"question": "?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9, "question_id": 7}
    assert scores(graded("mmlu_pro", pro, "Answer: J", "Answer: A")) == [1, 0]
    mmlu = {"question": "?", "choices": ["x", "y", "z", "w"], "answer": 1, "subject": "law"}
    assert scores(graded("mmlu", mmlu, "Answer: B", "Answer: A")) == [1, 0]
    table = mmlu | {"choices": '["x", "y", "z", "w"]', "answer": "1"}  # as CSV has it
    assert scores(graded("mmlu", table, "Answer: B", "Answer: A")) == [1, 0]
    assert scores(graded("mmlu", mmlu, " B", " A\n\nQuestion", style="lm-eval")) == [1, 0]
    written = TASKS["mmlu_pro"].style("simple-evals").write
    assert "one of ABCDEFGHIJ." in written(TASKS["mmlu_pro"].read(pro, 0))


# --- programs -------------------------------------------------------------------------------------

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum them."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}


def fenced(text):
    return f"```python\n{text}\n```"


def test_humaneval_verdicts_in_chat_and_raw_styles(graded):
    need_sandbox()
    whole = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    found = graded("humaneval", HUMANEVAL, fenced(whole), fenced(whole + "\n    return 1"), whole, fenced("x ="))
    assert [(each.score, each.lenient) for each in found] == [(1, 1), (1, 1), (0, 1), (0, 0)]
    found = graded("humaneval", HUMANEVAL, "    return sum(xs)\n", "    return 3\n", style="lm-eval")
    assert scores(found) == [1, 0]


def test_plus_tests_are_computed_by_the_reference(graded):
    need_sandbox()
    row = {name: HUMANEVAL[name] for name in ("task_id", "prompt", "canonical_solution", "entry_point")}
    row |= {"base_input": [[[1, 2]]], "plus_input": [[[]], [[5, -5, 1]]], "atol": 0, "contract": ""}
    right = fenced("def total(xs):\n    return sum(xs)")
    wrong = fenced("def total(xs):\n    return sum(abs(x) for x in xs)")
    assert scores(graded("humaneval_plus", row, right, wrong)) == [1, 0]


def test_mbpp_verdicts(graded):
    need_sandbox()
    row = {"task_id": 2, "text": "Double it.", "code": "", "test_setup_code": "import math"}
    row |= {"test_list": ["assert twice(2) == 4", "assert twice(math.inf) == math.inf"]}
    assert scores(graded("mbpp", row, fenced("def twice(x): return 2 * x"), fenced("def twice(x): return 4"))) == [1, 0]


def test_tests_that_cannot_run_give_no_score(graded):
    need_sandbox()
    row = HUMANEVAL | {"test": "def check(candidate):\n    import no_such_library\n"}
    (found,) = graded("humaneval", row, fenced(HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]))
    assert found.score is None and "no_such_library" in found.reason


def livecodebench(private, **more):
    public = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    row = {"question_title": "Sum", "question_content": "Add.", "platform": "atcoder", "question_id": "abc1"}
    row |= {"contest_id": "abc", "contest_date": "2024-09-01", "starter_code": "", "difficulty": "easy"}
    row |= {"public_test_cases": json.dumps(public), "private_test_cases": private, "metadata": "{}"}
    return row | more


def packed(tests, protocol=4):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol=protocol))).decode()


def test_livecodebench_by_standard_input(graded):
    need_sandbox()
    row = livecodebench(packed([{"input": "5 -5", "output": "0.0", "testtype": "stdin"}]))
    good = fenced("print(sum(map(int, input().split())))")
    assert scores(graded("livecodebench", row, good, fenced("print(3)"))) == [1, 0]


def test_livecodebench_by_function(graded):
    need_sandbox()
    tests = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
    starter = "class Solution:\n    def add(self, xs: List[int], y: int) -> int:\n        "
    row = livecodebench(packed(tests), public_test_cases="[]", starter_code=starter, metadata='{"func_name": "add"}')
    good = starter + "return sum(xs) + y"
    found = graded("livecodebench", row, fenced(good), fenced(starter + "return 5"))
    assert scores(found) == [1, 0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("text", ["[1]", "[" + "1," * 200 + "1]", "[" + "1," * 70_000 + "1]", '["é"]'])
def test_released_pickles_of_a_text_are_read(protocol, text):
    assert pickled_text(pickle.dumps(text, protocol=protocol)) == text
    assert hidden_tests(base64.b64encode(zlib.compress(pickle.dumps(text, protocol=protocol))).decode()) == json.loads(
        text
    )


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("value", [Evil(), ["text"], {"a": 1}, 7, None, ("a", "b"), Path("x")])
def test_other_pickles_are_refused_and_run_nothing(value, capsys):
    for protocol in (2, 4, 5):
        with pytest.raises(ValueError, match="a pickle"):
            pickled_text(pickle.dumps(value, protocol=protocol))
    assert capsys.readouterr().out == ""


def test_hidden_tests_that_are_none():
    whole = pickle.dumps("[1]")
    for cut in range(len(whole)):
        with pytest.raises(ValueError):
            pickled_text(whole[:cut])
    bomb = base64.b64encode(zlib.compress(bytes(1 << 20))).decode()
    for text in ("", "{", "no base64!", "aGVsbG8=", bomb):
        with pytest.raises(ValueError):
            hidden_tests(text)


def codeforces(**more):
    tests = [{"input": "2\n", "output": "1 1\n"}, {"input": "7\n", "output": "3 4\n"}]
    row = {
        "id": "1/A",
        "title": "Split",
        "description": "Write n as a sum of two.",
        "input_format": "n",
        "output_format": "a b",
    }
    row |= {"rating": 800, "time_limit": 2.0, "memory_limit": 256.0, "official_tests": tests, "input_mode": "stdio"}
    return row | more


CHECKER = """
import sys
n, out = int(open(sys.argv[1]).read()), open(sys.argv[3]).read().split()
print(1 if len(out) == 2 and sum(map(int, out)) == n and all(int(x) > 0 for x in out) else 0)
"""


def test_codeforces_with_and_without_its_checker(graded):
    need_sandbox()
    halves = fenced("n = int(input()); print(n // 2, n - n // 2)")
    ones = fenced("n = int(input()); print(1, n - 1)")
    given = (halves, ones, fenced("print(0, 0)"), "no program")
    assert scores(graded("codeforces", codeforces(), *given)) == [1, 0, 0, 0]
    assert scores(graded("codeforces", codeforces(generated_checker=CHECKER), *given)) == [1, 1, 0, 0]
    broken = codeforces(generated_checker="raise OSError('no')")
    (found,) = graded("codeforces", broken, ones)
    assert found.score is None and "checker" in found.reason
    by_file = fenced("n = int(open('input.txt').read())\nopen('output.txt', 'w').write(f'{n // 2} {n - n // 2}')")
    prints = fenced("n = int(open('input.txt').read())\nprint(n // 2, n - n // 2)")
    leaves = by_file.removesuffix("\n```") + "\nprint('done')\nf = open('more.txt', 'w')\nexit()\n```"
    given = (by_file, halves, prints, leaves, by_file.removesuffix("\n```") + "\nexit(1)\n```")
    assert scores(graded("codeforces", codeforces(input_mode="file"), *given)) == [1, 0, 0, 1, 0]


def test_a_checker_that_says_nothing_is_believed_only_where_it_refuses_nonsense(graded):
    """One that defines a function and calls it nowhere passes any output."""
    need_sandbox()
    ones = fenced("n = int(input()); print(1, n - 1)")
    silent = "import sys\nsys.exit(len(open(sys.argv[3]).read().split()) != 2)"
    assert scores(graded("codeforces", codeforces(generated_checker=silent), ones, fenced("print(1)"))) == [1, 0]
    (found,) = graded("codeforces", codeforces(generated_checker="def check(*files):\n    return False"), ones)
    assert found.score is None and "passes any output" in found.reason


def test_an_output_that_a_checker_falls_over_is_wrong(graded):
    """Else a program could print its way out of the mean."""
    need_sandbox()
    row = codeforces(generated_checker=CHECKER.replace("print(1 if", "[int(x) for x in out]\nprint(1 if"))
    assert scores(graded("codeforces", row, fenced("input(); print('many', 'words')"))) == [0]


# --- what is wrong with a row ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("gsm8k", {"question": "?"}, "no field 'answer'"),
        ("gsm8k", {"question": " ", "answer": "4"}, "'question' or .*: got ' ', which is blank"),
        ("gsm8k", {"question": "?", "answer": "nan"}, "'answer': got 'nan', wanted a final answer"),
        ("gsm8k", {"question": "?", "answer": {"a": 1}}, "'answer' or .*: got {'a': 1}, wanted text"),
        ("aime24", {"text": "?", "answer": 1}, "no field 'problem' or 'question'"),
        ("gpqa", {"Question": "?", "Correct Answer": "a"}, "no field 'Incorrect Answer 1'"),
        ("mmlu_pro", {"question": "?", "options": ["a", "b"], "answer": "C"}, "'answer': got 'C', wanted a letter"),
        ("mmlu", {"question": "?", "choices": "ab", "answer": 0}, "'options': got 'ab', wanted JSON"),
        ("humaneval", {"prompt": "def f():\n", "test": "def check(:", "entry_point": "f"}, "is not Python"),
        ("mbpp", {"text": "?", "test_list": []}, "'test_list': got .*, wanted a list of texts"),
        ("livecodebench", livecodebench("@@"), "'private_test_cases': neither JSON nor base64"),
        ("livecodebench", livecodebench(packed([{"input": 1}])), "'private_test_cases': code_reward: tests"),
        ("codeforces", {"problem": "?", "tests": []}, "'official_tests': got .*, wanted a list of input and output"),
        ("codeforces", codeforces(rating="hard"), "'rating': got 'hard', wanted a number"),
    ],
)  # fmt: skip
def test_a_broken_row_is_told_by_file_line_and_field(rows, name, row, wanted):
    good = {"gsm8k": GSM8K}.get(name)
    source = rows(*([good] if good else []), row)
    with pytest.raises(ValueError, match=wanted) as told:
        TASKS[name].problems(source)
    assert f"rows.jsonl:{2 if good else 1}: " in str(told.value)
    assert TASKS[name].hub in str(told.value) and "\n" not in str(told.value)


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="benchmark: got 'gsm', wanted one of gsm8k, "):
        task_named("gsm")
    with pytest.raises(ValueError, match="prompt_style: got 'lighteval', wanted one that mbpp has: deepseek, lm-eval"):
        TASKS["mbpp"].style("lighteval")


def test_a_mapping_is_no_list_of_hidden_tests(rows):
    (problem,) = TASKS["livecodebench"].problems(rows(livecodebench("[]")))
    assert [test["output"] for test in livecodebench_tests(problem)] == ["3\n"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the data sets beside the repository")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("aime24", "aime24/test.jsonl", 30),
        ("amc23", "amc23/test.jsonl", 40),
        ("svamp", "svamp/test.jsonl", 1000),
        ("mbpp", "mbpp/mbpp.jsonl", 974),
        ("codeforces", "codeforces/test.json", 408),
    ],
)
def test_real_files_are_read_whole(name, file, count):
    problems = TASKS[name].problems(open_source(str(REAL / file)))
    assert len(problems) == count
    style = TASKS[name].style("deepseek")
    assert all(style.write(problem).strip() for problem in problems)


def test_puzzles_are_graded_by_their_own_rule_with_parts_by_level_family_form_and_language():
    task = TASKS["puzzles"]
    row = {"question": "Make 11 from 9,5,3.", "answer": "9+5-3", "numbers": [9, 5, 3], "target": 11}
    problem = task.read(row | {"family": "countdown", "level": 2, "language": "en"}, 0)
    texts = {
        "<think>first 9+5=14 then 14-3=11</think><answer>5-3+9</answer>": (1.0, 1.0, 1.0),
        "<think>先9+5=14再14-3=11</think><answer>9+5-3</answer>": (1.0, 1.0, 0.0),
        "<think>first 9+5=14</think>\\boxed{9+5+3}": (0.0, 0.0, 1.0),
        "9+5-3": (0.0, 0.0, 0.0),
    }
    rows = [Answered(problem, task.style("deepseek"), "", text) for text in texts]
    with Graders() as graders:
        grades = task.grade(rows, graders)
    found = [(of.score, of.parts["format"], of.parts["language"]) for of in grades]
    assert found == list(texts.values())
    assert all(of.parts["level 2"] == of.parts["family countdown"] == of.score for of in grades)
    with pytest.raises(ValueError, match="answer: got 'x'"):
        task.read({"question": "?", "answer": "x"}, 0)
