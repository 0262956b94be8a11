"""Questions from files, and the order in which training sees them."""

import json
from pathlib import Path

import pytest

from deepseek_jax.train.data import Question, batches, read_questions


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_gsm8k_rows_are_cut_down_to_their_final_answer(tmp_path):
    solution = "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 altogether.\n#### 72"
    path = write(
        tmp_path,
        json.dumps({"question": "How many clips?", "answer": solution}),
        "",
        json.dumps({"question": "And in dollars – π?", "answer": " 1,080 ", "level": 3}, ensure_ascii=False),
        json.dumps({"question": "As a number?", "answer": 7}),
    )
    assert read_questions(path) == [
        Question("How many clips?", "72"),
        Question("And in dollars – π?", "1,080"),
        Question("As a number?", "7"),
    ]


GOOD = '{"question": "1+1=?", "answer": "2"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "1+1=?"', "not JSON"),
        ("[1, 2]", "got a JSON list, wanted an object"),
        ('{"answer": "2"}', "'question': got None"),
        ('{"question": "1+1=?"}', "'answer': got None"),
        ('{"question": "1+1=?", "answer": null}', "'answer': got None"),
        ('{"question": ["1"], "answer": "2"}', r"'question': got \['1'\]"),
        ('{"question": "1+1=?", "answer": "it is ####  "}', "'answer': got 'it is ####  '"),
        ('{"question": "1+1=?", "answer": " "}', "'answer': got ' ', wanted a final answer"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: not JSON: 'utf-8'"):
        read_questions(path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_data_set_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: the data set is empty"):
        read_questions(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: no such file"):
        read_questions(tmp_path / "nothing.jsonl")


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="data set: got 3 rows, wanted at least 4"):
        batches(list("abc"), size=4, seed=0)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_every_epoch_sees_every_row_once_in_another_order():
    rows = list(range(12))
    seen = take(batches(rows, size=4, seed=0), 9)
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_no_row_is_lost_or_repeated_where_epochs_do_not_divide():
    rows = list(range(7))
    seen = sum(take(batches(rows, size=3, seed=0), 7), [])  # 21 rows, three epochs
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [rows] * 3


def test_the_order_is_a_function_of_the_seed():
    rows = list(range(20))
    first, second, other = (take(batches(rows, size=4, seed=seed), 8) for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("done", [0, 1, 2, 5, 7])
def test_a_saved_position_gives_the_same_batches_that_would_have_followed(done):
    rows = [Question(str(i), str(i)) for i in range(10)]
    iterator = batches(rows, size=4, seed=3)
    take(iterator, done)
    position = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    following = take(iterator, 6)
    resumed = batches(rows, size=4, seed=3)
    take(resumed, 1)
    resumed.set_state(position)
    assert take(resumed, 6) == following


def test_a_batch_may_be_one_row():
    iterator = batches(list(range(6)), size=1, seed=0)
    assert sorted(row for _ in range(6) for row in next(iterator)) == list(range(6))
