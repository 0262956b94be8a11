"""Columns as public data sets name them, and those that a user names."""

import csv
import json
from pathlib import Path

import pytest

from deepseek_jax.data.prompts import DataConfig, Example, SourceConfig, open_prompts
from deepseek_jax.rewards.tests_column import parse_tests

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "checks"
USER = [{"role": "user", "content": "q"}]


def first(path: Path, **settings) -> Example:
    return open_prompts(DataConfig(sources=(SourceConfig(name=str(path), **settings),)))[0]


def rows_file(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"Problem": "q", "Answer": "7"}, "q", "7"),
        ({"Question": "q", "ANSWER": 7}, "q", "7"),
        ({"problem": "q", "answer": "7", "solution": r"so \boxed{7}"}, "q", "7"),
        ({"prompt": "q", "ground_truth": "7"}, "q", "7"),
        ({"prompt": USER, "solution": r"\boxed{7}"}, "q", "7"),
        ({"messages": USER, "solution": r"\boxed{7}"}, "q", "7"),
        ({"prompt": USER, "reward_model": {"style": "rule", "ground_truth": "7"}, "info": {"answer": "no"}}, "q", "7"),
        ({"problem": "q", "expected_answer": "7", "generated_solution": "no"}, "q", "7"),
        ({"Body": "There are 7.", "Question": "How many?", "Answer": 7.0}, "There are 7. How many?", "7.0"),
        ({"reward_model.ground_truth": "7", "question": "q"}, "q", "7"),
        ({"ID": "1", "Problem": "q", "Solution": "s", "Answer": 7}, "q", "7"),
        ({"problem": "q", "answer": "7", "url": "u"}, "q", "7"),
        ({"question": "q", "answer": "so 3+4\n#### 7"}, "q", "7"),
        ({"text": "q", "answer": "7"}, "q", "7"),
    ],
)  # fmt: skip
def test_rows_that_people_have_need_no_option(tmp_path, row, question, answer):
    found = first(rows_file(tmp_path / "rows.jsonl", row))
    assert (found.question, found.answer) == (question, answer)


@pytest.mark.parametrize(
    ("row", "settings", "question", "answer"),
    [
        ({"text": "q", "out": {"deep": {"est": "7"}}}, ("text", "out.deep.est"), "q", "7"),
        ({"in": {"text": "q"}, "gold": 7}, ("in.text", "gold"), "q", "7"),
        ({"a.b": "7", "a": {"b": "8"}, "q": "q"}, ("q", "a.b"), "q", "7"),
        ({"prompt": USER, "question": "no", "answer": "no", "truth": "7"}, ("prompt", "truth"), "q", "7"),
        ({"in": {"chat": USER}, "answer": "7"}, ("in.chat", None), "q", "7"),
    ],
)
def test_columns_are_named_by_option_with_dots_for_what_is_inside(tmp_path, row, settings, question, answer):
    path = rows_file(tmp_path / "rows.jsonl", row)
    found = first(path, question_columns=(settings[0],), answer_column=settings[1])
    assert (found.question, found.answer) == (question, answer)
    assert not any("." in name and name not in row for name in found.columns)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"question": "q", "answer": "1", "ground_truth": "2"},
            {},
            "answer, ground_truth, any .*; choose by --answer-col",
        ),
        ({"Problem": "q", "PROBLEM": "q", "answer": 1}, {}, "Problem, PROBLEM, any .*; choose by --question-columns"),
        ({"question": "q", "out": {"x": 1}}, {"answer_column": "out.y"}, "no column 'out.y', wanted one of out.x"),
        ({"question": "q", "out": {"x": 1}}, {"answer_column": "our.x"}, "no column 'our.x', wanted one of question"),
        ({"question": "q", "out": "x"}, {"answer_column": "out.x"}, "'out.x': got None"),
        ({"question": "q", "result": 1}, {}, "no answer column .* among question, result; name it by --answer-column"),
        ({"words": "q", "answer": 1}, {}, "no question column .* among words, answer; name it by --question-columns"),
        ({"question": "q", "options": ["a"], "answer": "A"}, {}, "'options': got .*, wanted 2 to 26 options"),
        ({"question": " \n", "answer": 1}, {}, "'question': got .*, wanted a question"),
    ],
)
def test_what_is_not_there_or_ambiguous_is_refused_by_an_option_that_exists(tmp_path, row, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        first(rows_file(tmp_path / "rows.jsonl", row), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"text": "q", "test_list": ["assert f() == 1"]}, {"question_columns": ("text",)}),
        ({"prompt": "q", "verification_info": {"language": "python", "test_cases": ["assert f() == 1"]}}, {}),
        ({"prompt": "q", "checks": {"it": ["assert f() == 1"]}}, {"tests_column": "checks.it"}),
        ({"problem": "q", "tests": ["assert f() == 1"], "solution": "def f():\n    return 1\n"}, {}),  # no final answer
        ({"problem": "q", "tests": ["assert f() == 1"], "answer": ["not", "one"]}, {}),
    ],
)
def test_hidden_tests_come_as_the_column_of_code_rewards(tmp_path, row, settings):
    found = first(rows_file(tmp_path / "rows.jsonl", row), need_answer=False, **settings)
    assert found.columns["tests"] == ["assert f() == 1"] and found.answer is None


CASES = [{"input": "1", "output": "2"}]
HUMAN_EVAL = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}


@pytest.mark.parametrize(
    ("row", "question", "tests"),
    [
        ({"text": "q", "code": "c", "test_list": ["assert f() == 1"]}, "q", ["assert f() == 1"]),
        ({"task_id": "0", **HUMAN_EVAL, "canonical_solution": "    return 1"}, HUMAN_EVAL["prompt"], HUMAN_EVAL),
        (
            {
                "question_title": "t",
                "question_content": "q",
                "starter_code": "",
                "public_test_cases": json.dumps(CASES),
            },
            "q",
            json.dumps(CASES),
        ),
        (
            {"title": "t", "description": "d", "input_format": "i", "output_format": None, "official_tests": CASES},
            "d i",
            CASES,
        ),
        ({"problem": "q", "tests": CASES}, "q", CASES),
        ({"problem": "q", "tests": {"functional": "def check(candidate): ..."}, "solutions": "c"}, "q", None),
        ({"prompt": USER, "verification_info": {"language": "python", "test_cases": CASES}}, "q", CASES),
    ],
    ids=["MBPP", "HumanEval", "LiveCodeBench", "Codeforces", "rllm", "LeetCode", "open-r1"],
)
def test_rows_of_programs_are_known_by_their_names_and_their_tests_can_be_read(tmp_path, row, question, tests):
    found = first(rows_file(tmp_path / "rows.jsonl", row), need_answer=False)
    assert found.question == question and found.columns["tests"] == (tests or row["tests"])
    assert parse_tests(found.columns["tests"])


def test_options_of_multiple_choice_are_asked_and_the_letter_is_the_answer(tmp_path):
    row = {"question": "q", "options": ["one", "two", "three"], "answer": "B", "answer_index": 1}
    found = first(rows_file(tmp_path / "rows.jsonl", row))
    assert (found.question, found.answer) == ("q\nA) one\nB) two\nC) three", "B")
    wrong = {f"Incorrect Answer {n}": f"It is wrong for reason {n}." for n in (1, 2, 3)}
    rows = [{"Question": f"q{n}", "Correct Answer": "It is right, as all see.", **wrong} for n in range(40)]
    data = open_prompts(DataConfig(sources=(SourceConfig(name=str(rows_file(tmp_path / "gpqa.jsonl", *rows))),)))
    assert all(f"\n{example.answer}) It is right" in example.question for example in data)
    assert {example.answer for example in data} == set("ABCD")
    again = open_prompts(DataConfig(sources=(SourceConfig(name=str(rows_file(tmp_path / "b.jsonl", *rows[::-1]))),)))
    assert sorted(example.question for example in again) == sorted(example.question for example in data)


def test_a_column_called_options_that_holds_something_else_is_no_options(tmp_path):
    assert first(rows_file(tmp_path / "rows.jsonl", {"question": "q", "options": "-v", "answer": "7"})).question == "q"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("question;answer\n3,5 + 1?;4,5\n", ("3,5 + 1?", "4,5")),
        ('question;answer\n"a;""b""\nc";7\n', ('a;"b"\nc', "7")),
        ('"question","answer;"\na;b,7\n', ("a;b", "7")),
        ("\ufeffquestion;answer\r\nq;7\r\n", ("q", "7")),
    ],
)
def test_tables_with_semicolons_are_read(tmp_path, text, wanted):
    (tmp_path / "a.csv").write_bytes(text.encode())
    column = "answer;" if '"answer;"' in text else None
    found = first(tmp_path / "a.csv", answer_column=column)
    assert (found.question, found.answer) == wanted


def test_tables_and_arrays_give_the_same_rows(tmp_path):
    rows = [{"question": 'a "b",\nc', "answer": "1"}, {"question": "é", "answer": "2"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["question", "answer"])
        table.writeheader()
        table.writerows(rows)
    (tmp_path / "a.tsv").write_text("question\tanswer\n" + "x\t1\ny\t2\n")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    rows_file(tmp_path / "b.json", *rows)
    read = lambda name: [
        (e.question, e.answer) for e in open_prompts(DataConfig(sources=(SourceConfig(name=str(tmp_path / name)),)))
    ]
    wanted = [(row["question"], row["answer"]) for row in rows]
    assert [read(name) for name in ("a.csv", "a.json", "b.json")] == [wanted] * 3
    assert read("a.tsv") == [("x", "1"), ("y", "2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\n1\n", "row 0: got 1 fields, wanted 2"),
        ("a.csv", b"question,question\n1,2\n", "two columns of one name"),
        ("a.csv", b'question,answer\n"open', "not a table in UTF-8"),
        ("a.csv", b"question,answer\n\xff,1\n", "not a table in UTF-8"),
        ("a.csv", b"question,answer\n", "the data set is empty"),
        ("a.json", b"[1]", "row 0: got a JSON int, wanted an object"),
        ("a.json", b'[{"a": 1}', "not JSON"),
        ("a.jsonl", b'[{"a": 1}]', "got a JSON list, wanted an object on a line of its own"),
        ("a.jsonl", b'{"question": "x", "question": "y"}', "'question' is there twice in one object"),
        ("a.jsonl", '{"question": "x"}'.encode("utf-16"), "save the file as UTF-8"),
    ],
)
def test_damaged_tables_arrays_and_lines_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        first(tmp_path / name)
    assert "\n" not in str(error.value)


def test_every_shared_file_gives_its_rows_or_one_line():
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data is not there")
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install -e '.[data]'")
    for path in sorted([*(SHARED / "data").iterdir(), SHARED / "verl_rows.parquet"]):
        try:
            assert first(path).question
        except ValueError as problem:
            assert str(problem).startswith(str(path)) and "\n" not in str(problem), path
    assert first(SHARED / "verl_rows.parquet").answer == "2"
