"""Right answers of rows: found, or the row is refused in one line or left out, counted and shown."""

import json

import pytest

from deepseek_jax.data.prompts import DataConfig, SourceConfig, open_prompts

GOOD = '{"question": "1+1?", "answer": "so\\n#### 2"}'


def opened(path, *lines, config=None, **settings):
    path.write_text("\n".join([GOOD, *lines]) + "\n", encoding="utf-8")
    return open_prompts(DataConfig(sources=(SourceConfig(name=str(path), **settings),), **(config or {})))


NOTHING_FOUND = {
    "NaN": ("NaN", "got nan"),
    "infinite": ("1e999", "got inf"),
    "minus infinite": ("-1e999", "got -inf"),
    "text nan": ('"nan"', "got 'nan'"),
    "true": ("true", "got True"),
    "null": ("null", "got None"),
    "list": ('["5", "6"]', "got ['5', '6']"),
    "object": ('{"value": 5}', "got {'value': 5}"),
    "empty": ('""', "got ''"),
    "empty mark": ('"work #### "', "got 'work #### '"),
    "heading": (r'"#### Step 1: add\nso it is ten"', "#### Step 1: add"),
    "last heading": (r'"five and five\n#### Step 2: add them"', "Step 2: add them"),
    "empty box": (r'"so \\boxed{}"', "boxed{}"),
    "open box": (r'"so \\boxed{5"', "boxed{5"),
    "prose": ('"We add the numbers and get ten, as one sees."', "We add the numbers"),
    "long prose": (json.dumps("word " * 5000), " ... "),
    "huge": ("9" * 4200, "an integer of 13"),
    "half a pair": (r'"\ud800"', r"got '\ud800'"),
}


@pytest.mark.parametrize("kind", NOTHING_FOUND)
def test_a_row_without_an_answer_is_refused_in_one_line_or_left_out(kind, tmp_path):
    value, quoted = NOTHING_FOUND[kind]
    row = f'{{"question": "q?", "answer": {value}}}'
    with pytest.raises(ValueError) as caught:
        opened(tmp_path / "rows.jsonl", row)
    message = str(caught.value)
    assert "rows.jsonl:2: 'answer': " in message and quoted in message and "--without-answer drop" in message
    assert "\n" not in message and len(message) < 500
    data = opened(tmp_path / "rows.jsonl", row, config={"without_answer": "drop"})
    assert [example.answer for example in data] == ["2"]
    (dropped,) = [found for found in data.report if "no final answer" in found.reason]
    assert (dropped.rows, dropped.before) == (1, 2)
    assert "dropped 1 of 2 rows: no final answer found; the first: " in str(dropped) and quoted in str(dropped)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("5", "5"),
        ("5.5", "5.5"),
        ("-3", "-3"),
        ("12345678901234567890", "12345678901234567890"),
        ('"east"', "east"),
        (r'"so \\fbox{5}"', "5"),
        (r'"so $\\boxed 5$"', "5"),
        (r'"#### Step 1\nadd\n#### Step 2\nso \\boxed{7}"', "7"),
        (r'"#### Step 1\nadd\n#### 7\n"', "7"),
    ],
)
def test_answers_that_are_found(value, answer, tmp_path):
    data = opened(tmp_path / "rows.jsonl", f'{{"question": "q?", "answer": {value}}}')
    assert data[1].answer == answer


def test_words_are_no_answer_in_a_column_of_solutions(tmp_path):
    lines = ['{"problem": "p", "solution": "a long proof without"}', '{"problem": "q", "solution": "so \\\\boxed{4}"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    source = SourceConfig(name=str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="b.jsonl:1: 'solution': got 'a long proof without'"):
        open_prompts(DataConfig(sources=(source,)))
    data = open_prompts(DataConfig(sources=(source,), without_answer="drop"))
    assert [example.answer for example in data] == ["4"]


def test_numbers_filters_and_order_are_of_the_rows_that_stay(tmp_path):
    rows = [f'{{"question": "q{n}?", "answer": {"null" if n % 2 else n}, "level": {n}}}' for n in range(10)]
    config = {"without_answer": "drop", "difficulty_column": "level", "min_difficulty": 4}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    data = open_prompts(DataConfig(sources=(SourceConfig(name=str(path)),), **config))
    assert [(example.row, example.answer) for example in data] == [(4, "4"), (6, "6"), (8, "8")]
    assert [(found.rows, found.before) for found in data.report][:2] == [(5, 10), (2, 5)]


def test_held_out_questions_count_without_an_answer(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"question": "1+1?", "answer": null}\n')
    row = '{"question": "2+2?", "answer": "4"}'
    data = opened(tmp_path / "rows.jsonl", row, config={"held_out": (SourceConfig(name=str(held)),)})
    assert [example.question for example in data] == ["2+2?"]


def test_data_without_any_answer_is_refused_also_where_rows_may_be_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q?", "answer": null}\n')
    with pytest.raises(ValueError, match="no rows left: the last 1 fell to .*no final answer found"):
        open_prompts(DataConfig(sources=(SourceConfig(name=str(path)),), without_answer="drop"))
