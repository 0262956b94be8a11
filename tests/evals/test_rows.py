"""A row of every benchmark in its published form, and what becomes of it when a field is mistyped or left out."""

import base64
import json
import pickle
import zlib

import pytest

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.tasks import TASKS

HIDDEN = base64.b64encode(
    zlib.compress(pickle.dumps('[{"input": "5 5", "output": "10", "testtype": "stdin"}]'))
).decode()
PLUS = {"base_input": [[2]], "plus_input": [[3]], "atol": 0, "contract": "", "entry_point": "twice"}
ROWS = {
    "gsm8k": {"question": "2+2?", "answer": "2+2=4\n#### 4"},
    "math500": {"problem": "?", "solution": r"so $\boxed{7}$", "answer": "7", "level": 1, "unique_id": "a"},
    "aime24": {"id": 60, "problem": "?", "solution": "x", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"question": "?", "answer": "70"},
    "amc23": {"id": 0, "problem": "?", "answer": 27.0, "url": "u"},
    "svamp": {"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "8 - 3", "Answer": "5", "Type": "x"},
    "cmath": {"grade": 1, "question": "q", "golden": "3", "reasoning_step": 1, "num_digits": 1},
    "humaneval": {
        "task_id": "HumanEval/0", "prompt": "def twice(x):\n", "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "twice",
    },
    "humaneval_plus": PLUS | {
        "task_id": "HumanEval/0", "prompt": "def twice(x):\n", "canonical_solution": "    return 2 * x\n",
    },
    "mbpp": {
        "task_id": 2, "text": "Double.", "code": "", "test_list": ["assert twice(2) == 4"], "test_setup_code": "",
        "challenge_test_list": [],
    },
    "mbpp_plus": {
        "task_id": 2, "code": "", "prompt": "Double.", "source_file": "x", "test_imports": ["import math"],
        "test_list": ["assert twice(2) == 4"], "test": "assert twice(2) == 4",
    },
    "mbpp_plus 0.2.0": PLUS | {
        "task_id": "Mbpp/2", "prompt": "Double.", "canonical_solution": "def twice(x): return 2 * x\n",
        "assertion": "assert twice(2) == 4",
    },
    "livecodebench": {
        "question_title": "Sum", "question_content": "Add.", "platform": "atcoder", "question_id": "abc1",
        "contest_id": "abc", "contest_date": "2024-09-01T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]', "private_test_cases": HIDDEN,
        "metadata": "{}",
    },
    "gpqa": {"Record ID": "r", "Question": "q", "Correct Answer": "a",
             **{f"Incorrect Answer {number}": f"b{number}" for number in (1, 2, 3)}},
    "mmlu": {"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1},
    "mmlu_pro": {
        "question_id": 1, "question": "q", "options": list("abcdefghij"), "answer": "B", "answer_index": 1,
        "cot_content": "", "category": "c", "src": "s",
    },
    "codeforces": {
        "id": "1/A", "contest_id": "1", "time_limit": 2.0, "memory_limit": 256.0, "title": "S", "description": "d",
        "input_format": "n", "output_format": "o", "interaction_format": None, "note": "n", "rating": 800,
        "examples": [{"input": "2", "output": "2"}], "official_tests": [{"input": "2\n", "output": "2\n"}],
        "official_tests_complete": True, "input_mode": "stdio", "generated_checker": None, "executable": True,
    },
    "swebench": {
        "repo": "a/b", "instance_id": "a__b-1", "base_commit": "x", "patch": "", "problem_statement": "p",
        "test_patch": "--- a/t.py\n+++ b/t.py\n@@ -1 +1 @@\n-a\n+b\n", "FAIL_TO_PASS": '["t.py::a"]',
        "PASS_TO_PASS": "[]",
    },
    "formal": {
        "name": "n", "informal_prefix": "/-- x -/", "formal_statement": "theorem a : 1 = 1 := by", "header": "h",
    },
    "port": {"id": "1", "problem": "p", "tests": [{"input": "1", "output": "1"}]},
    "puzzles": {
        "question": "q", "answer": "9+5-3", "numbers": [9, 5, 3], "target": 11, "family": "countdown", "level": 1,
        "language": "en",
    },
}  # fmt: skip
WRONG = [
    *(
        None,
        "",
        " ",
        0,
        -1,
        2.5,
        1e308,
        float("nan"),
        True,
        10**30,
        "nan",
        "null",
        "2 s",
        "..",
        "a b",
        "\ud800",
        "a\0b",
    ),
    *([], {}, [None], [1], ["a"], [[1]], [{}], {"a": 1}, [{"input": 1, "output": 2}], "[1]", "[" * 5_000, "x" * 5_000),
]


def test_every_benchmark_is_here():
    assert {name.split()[0] for name in ROWS} == set(TASKS)


@pytest.mark.parametrize("name", ROWS)
def test_a_field_that_is_mistyped_or_left_out_is_read_or_told_in_one_line(name, tmp_path):
    """A row of the published form is read. One whose field is another thing is read too and can be asked in every
    style, or is refused by a line that names the file and the line of it; nothing else is raised."""
    task, row, path = TASKS[name.split()[0]], ROWS[name], tmp_path / "rows.jsonl"

    def reads(changed):
        path.write_text(json.dumps(changed))
        try:
            (problem,) = task.problems(open_source(str(path)))
        except ValueError as told:
            assert str(told).startswith(f"{path}:1: ") and "\n" not in str(told) and len(str(told)) < 1_000, told
            return False
        for style in task.styles.values():
            assert style.write(problem).encode().strip()
        return True

    assert reads(row)
    for field in row:
        reads({key: value for key, value in row.items() if key != field})
        for wrong in WRONG:
            reads(row | {field: wrong})
