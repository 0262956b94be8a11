"""Questions from files, and the order in which training sees them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import distributed
from deepseek_jax.data.prompts import (
    DataConfig,
    EasyToHard,
    SourceConfig,
    Staged,
    batches,
    open_prompts,
    prompt_batches,
)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[tuple[str, str | None]]:
    return [(e.question, e.answer) for e in open_prompts(DataConfig(sources=(SourceConfig(name=str(path)),)))]


def test_gsm8k_rows_are_cut_down_to_their_final_answer(tmp_path):
    solution = "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 altogether.\n#### 72"
    path = write(
        tmp_path,
        json.dumps({"question": "How many clips?", "answer": solution}),
        "",
        json.dumps({"question": "And in dollars – π?", "answer": " 1,080 ", "level": 3}, ensure_ascii=False),
        json.dumps({"question": "As a number?", "answer": 7}),
    )
    assert read(path) == [
        ("How many clips?", "72"),
        ("And in dollars – π?", "1,080"),
        ("As a number?", "7"),
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
        ('{"question": ["1"], "answer": "2"}', "'question': got '1' in a chat"),
        ('{"question": "1+1=?", "answer": "it is ####  "}', "'answer': got 'it is ####  '"),
        ('{"question": "1+1=?", "answer": " "}', "'answer': got ' ', wanted a final answer"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: not JSON: 'utf-8'"):
        read(path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_data_set_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: the data set is empty"):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: no such file"):
        read(tmp_path / "nothing.jsonl")


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
    rows = [(i, str(i)) for i in range(10)]
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


# --- prompts: columns -----------------------------------------------------------------------------


def rows_file(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(*sources: SourceConfig | str, **settings) -> DataConfig:
    wanted = tuple(SourceConfig(name=s) if isinstance(s, str) else s for s in sources)
    return DataConfig(sources=wanted, **settings)


def numbered(count: int, **columns) -> list[dict]:
    return [{"question": f"{n}?", "answer": n, **{k: f(n) for k, f in columns.items()}} for n in range(count)]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "a", "problem": "b", "answer": "1", "solution": "2"}, "a", "1"),
        ({"problem": "b", "solution": r"so \boxed{1} and \boxed{2}"}, "b", "2"),
        ({"prompt": "c", "answer": "thus #### 3"}, "c", "3"),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path, row, question, answer):
    (example,) = open_prompts(config(rows_file(tmp_path / "a.jsonl", [row])))
    assert (example.question, example.answer, example.messages) == (question, answer, None)


def test_columns_may_be_named_and_the_others_stay_as_they_are(tmp_path):
    row = {"Body": "Two apples.", "Question": "How many?", "Answer": 2.0, "tests": ["a", {"b": None}]}
    source = SourceConfig(
        name=rows_file(tmp_path / "a.jsonl", [row]), question_columns=("Body", "Question"), answer_column="Answer"
    )
    (example,) = open_prompts(config(source))
    assert (example.question, example.answer) == ("Two apples. How many?", "2.0")
    assert example.columns == {"answer": "2.0", "Answer": 2.0, "tests": ["a", {"b": None}]}


def test_a_chat_is_kept_whole_and_asks_its_last_message(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    (example,) = open_prompts(config(rows_file(tmp_path / "a.jsonl", [{"prompt": chat, "answer": "1"}])))
    assert (example.question, example.messages) == ("q", tuple(chat))


def test_all_examples_of_a_mixture_have_the_same_columns(tmp_path):
    maths = rows_file(tmp_path / "a.jsonl", [{"question": "1", "answer": "1", "level": 3}])
    code = SourceConfig(name=rows_file(tmp_path / "b.jsonl", [{"prompt": "f", "tests": ["t"]}]), need_answer=False)
    first, second = open_prompts(config(maths, code))
    assert first.columns == {"answer": "1", "level": 3, "tests": None}
    assert second.columns == {"answer": None, "level": None, "tests": ["t"]}
    assert list(first.columns) == list(second.columns) and (second.source, second.row) == (1, 0)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"words": "q", "answer": "1"}, {}, "no question column .*, prompt, text. among words, answer"),
        ({"question": "q", "code": "1"}, {}, r"no answer column \(answer, solution\) among question, code"),
        ({"question": "q", "answer": 1}, {"question_columns": ("Q",)}, "no column 'Q', wanted one of question, answer"),
        ({"question": "q", "answer": 1}, {"answer_column": "A"}, "no column 'A', wanted one of question, answer"),
        ({"question": "q", "answer": 1, "prompts": 1}, {}, "a.jsonl:1: column 'prompts' has the name of a reward"),
        ({"question": "\ud800", "answer": 1}, {}, "a.jsonl:1: 'question': holds half a surrogate pair"),
        ({"question": [], "answer": 1}, {}, "got a chat of 0 messages"),
        ({"question": [{"role": "assistant", "content": ""}], "answer": 1}, {}, "wanted one that ends with the user's"),
        ({"question": ["q"], "answer": 1}, {}, "got 'q' in a chat"),
        ({"question": [{"role": "user", "content": None}], "answer": 1}, {}, "'content' of a message: got None"),
        ({"question": "q", "answer": 1} | {f"c{n}": 0 for n in range(300)}, {}, "got over 256 columns"),
    ],
)
def test_columns_that_make_no_prompt_are_refused(tmp_path, row, settings, message):
    path = rows_file(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message) as error:
        open_prompts(config(SourceConfig(name=path, **settings)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(sources=()), "sources: got 0"),
        (lambda: config(SourceConfig(name="a", first_step=3)), "wanted at least one with first_step 0"),
        (lambda: SourceConfig(name="a", weight=0), "a: weight: got 0"),
        (lambda: SourceConfig(name="a", first_step=-1), "a: first_step: got -1"),
        (lambda: config("a", pass_rate_above=0.5, pass_rate_below=0.5), "pass_rate_above 0.5: wanted less"),
        (lambda: config("a", min_difficulty=2, max_difficulty=1), "min_difficulty: got 2, wanted at most"),
        (lambda: config("a", min_prompt_tokens=2, max_prompt_tokens=1), "min_prompt_tokens: got 2"),
        (lambda: EasyToHard(window=0), "window: got 0"),
        (lambda: Staged(limits=()), "limits: got"),
        (lambda: Staged(limits=((5, 1.0), (5, 2.0))), "limits: got"),
        (lambda: Staged(limits=((5, 2.0), (9, 1.0))), "limits: got"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- prompts: filters -----------------------------------------------------------------------------


def dropped(data) -> list[tuple[str, int, int]]:
    return [(d.reason, d.rows, d.before) for d in data.report]


def asked(data) -> list[str]:
    return [example.question for example in data]


def test_every_filter_says_what_it_dropped(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [*numbered(12, level=lambda n: f"Level {n}"), *numbered(4, level=int)])
    rates = rows_file(tmp_path / "r.jsonl", [{"index": n, "pass_rate": n / 8} for n in range(9)])
    held = rows_file(tmp_path / "h.jsonl", [{"problem": " 5? ", "solution": "1"}])
    data = open_prompts(
        config(
            SourceConfig(name=path, pass_rates=Path(rates)),
            difficulty_column="level",
            min_difficulty=1,
            max_difficulty=10,
            max_prompt_tokens=6,
            held_out=(SourceConfig(name=held),),
        ),
        count_tokens=lambda example: int(example.answer),
    )
    assert asked(data) == ["1?", "2?", "3?", "4?", "6?"]
    assert dropped(data) == [
        ("difficulty below 1", 2, 16),
        ("difficulty above 10", 1, 14),
        ("no measured pass rate", 5, 13),  # the ninth and tenth row, and the three that come again
        ("pass rate not above 0 and below 1", 1, 8),
        ("prompt tokens above 6", 1, 7),
        ("question asked before", 0, 6),
        ("question is held out", 1, 6),
    ]
    assert str(data.report[0]) == f"{path}: dropped 2 of 16 rows: difficulty below 1"


def test_the_same_question_in_other_letters_is_a_duplicate_in_any_source(tmp_path):
    first = rows_file(
        tmp_path / "a.jsonl", [{"question": "What  is\tＡ?", "answer": 1}, {"question": "b", "answer": 2}]
    )
    second = rows_file(tmp_path / "b.jsonl", [{"question": " what is a?", "answer": 3}, {"question": "c", "answer": 4}])
    assert [e.answer for e in open_prompts(config(first, second))] == ["1", "2", "4"]
    assert [e.answer for e in open_prompts(config(first, second, duplicates="keep"))] == ["1", "2", "3", "4"]


def test_a_chat_is_a_duplicate_by_all_that_was_said(tmp_path):
    chats = [[("user", "a"), ("assistant", x), ("user", "go on")] for x in "bcb"]
    rows = [{"prompt": [{"role": r, "content": c} for r, c in chat], "answer": "1"} for chat in chats]
    assert [e.row for e in open_prompts(config(rows_file(tmp_path / "a.jsonl", rows)))] == [0, 1]


def test_contamination_can_be_refused(tmp_path):
    path, held = (rows_file(tmp_path / name, numbered(3)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"a.jsonl:1: asks the same as .*b.jsonl:1, which is held out, and 3 rows do"):
        open_prompts(config(path, held_out=(SourceConfig(name=held),), contamination="refuse"))


def test_pass_rates_may_go_by_id(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(4, id=lambda n: f"q{n}"))
    rates = rows_file(tmp_path / "r.jsonl", [{"id": "q2", "pass_rate": 0.5}, {"id": "q3", "pass_rate": 1}])
    assert asked(open_prompts(config(SourceConfig(name=path, pass_rates=Path(rates))))) == ["2?"]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([{"index": 0, "pass_rate": 1.5}], "r.jsonl:1: 'pass_rate': got 1.5"),
        ([{"index": 0, "pass_rate": None}], "r.jsonl:1: 'pass_rate': got None"),
        ([{"pass_rate": 0.5}], "r.jsonl:1: wanted an 'index' or 'id'"),
        ([{"index": 1, "pass_rate": 0.5}] * 2, "r.jsonl:2: wanted an 'index' or 'id' that no row before has, got 1"),
        ([{"index": 1, "pass_rate": 0.5}, {"id": 1, "pass_rate": 0.5}], "some rows have an 'index' and some an 'id'"),
        ([{"index": 77, "pass_rate": 0.5}], "none of its rows belongs to"),
        ([{"index": 1, "pass_rate": 0}, {"index": 2, "pass_rate": 1}], "no rows left: the last 2 fell to 'pass rate"),
    ],
)
def test_pass_rates_that_cannot_be_meant_are_refused(tmp_path, rates, message):
    path = rows_file(tmp_path / "a.jsonl", numbered(4))
    rates = Path(rows_file(tmp_path / "r.jsonl", rates))
    with pytest.raises(ValueError, match=message):
        open_prompts(config(SourceConfig(name=path, pass_rates=rates)))


@pytest.mark.parametrize("level", [None, "hard", True, float("nan"), [1]])
def test_a_difficulty_that_is_no_number_is_named(tmp_path, level):
    path = rows_file(tmp_path / "a.jsonl", [{"question": "q", "answer": "1", "level": level}])
    with pytest.raises(ValueError, match="a.jsonl:1: difficulty 'level': got"):
        open_prompts(config(path, difficulty_column="level"))


def test_bounds_without_their_measure_are_refused(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(3))
    with pytest.raises(ValueError, match="max_prompt_tokens: got a bound, but no count_tokens"):
        open_prompts(config(path, max_prompt_tokens=5))
    with pytest.raises(ValueError, match="a bound on difficulty, but no difficulty_column"):
        open_prompts(config(path, max_difficulty=5))


@settings(max_examples=15)
@given(
    levels=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    low=st.integers(0, 5),
    held=st.sets(st.integers(0, 5)),
    keep=st.sampled_from(["keep", "drop"]),
)
def test_what_filters_left_they_leave_again(tmp_path_factory, levels, low, held, keep):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"{level}?", "answer": n, "level": level} for n, level in enumerate(levels)]
    held_rows = [{"question": f"{level}?", "answer": 0} for level in held] or [{"question": "none", "answer": 0}]
    filters = {
        "difficulty_column": "level",
        "min_difficulty": low,
        "duplicates": keep,
        "held_out": (SourceConfig(name=rows_file(folder / "h.jsonl", held_rows)),),
    }
    # By hand: at least the bound, not held out, and the first of its kind.
    wanted = [r for r in rows if r["level"] >= low and r["level"] not in held]
    if keep == "drop":
        wanted = [r for n, r in enumerate(wanted) if r["level"] not in [w["level"] for w in wanted[:n]]]
    path = rows_file(folder / "a.jsonl", rows)
    if not wanted:
        with pytest.raises(ValueError, match="no rows left"):
            open_prompts(config(path, **filters))
        return
    once = open_prompts(config(path, **filters))
    assert [e.answer for e in once] == [str(r["answer"]) for r in wanted]
    twice = open_prompts(config(rows_file(folder / "b.jsonl", wanted), **filters))
    assert asked(twice) == asked(once) and sum(d.rows for d in twice.report) == 0


# --- prompts: the order ---------------------------------------------------------------------------


def places(iterator, count: int) -> list[list[tuple[int, int]]]:
    return [[(e.source, e.row) for e in next(iterator)] for _ in range(count)]


@settings(max_examples=15)
@given(count=st.integers(1, 30), size=st.integers(1, 8), seed=st.integers(0, 2**40), window=st.integers(0, 9))
def test_every_row_comes_once_an_epoch(tmp_path_factory, count, size, seed, window):
    size = min(size, count)
    path = rows_file(tmp_path_factory.mktemp("rows") / "a.jsonl", numbered(count, level=lambda n: n % 4))
    curriculum = EasyToHard(window=window) if window else None
    data = open_prompts(config(path, difficulty_column="level", curriculum=curriculum))
    seen = [
        row for batch in places(prompt_batches(data, size=size, seed=seed), -(-3 * count // size)) for _, row in batch
    ]
    epochs = [seen[k : k + count] for k in range(0, len(seen) - count + 1, count)]
    assert len(epochs) >= 3 and all(sorted(epoch) == list(range(count)) for epoch in epochs)


CASES = {
    "shuffled": {},
    "easy to hard": {"curriculum": EasyToHard(window=3)},
    "staged": {"curriculum": Staged(limits=((2, 1), (5, 2)))},
}


def mixture(folder: Path, **settings) -> DataConfig:
    maths = rows_file(folder / "maths.jsonl", numbered(17, level=lambda n: n % 4))
    other = [{"prompt": f"say {n}", "level": n % 3} for n in range(11)]
    general = SourceConfig(name=rows_file(folder / "general.jsonl", other), weight=0.5, first_step=4, need_answer=False)
    return config(maths, general, difficulty_column="level", **settings)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4)
@given(done=st.integers(0, 10), seed=st.integers(0, 9))
def test_a_mixture_goes_on_from_any_position_as_it_would_have(tmp_path_factory, case, done, seed):
    wanted = mixture(tmp_path_factory.mktemp("rows"), **CASES[case])
    iterator = prompt_batches(open_prompts(wanted), size=4, seed=seed)
    places(iterator, done)
    position = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    following = [next(iterator) for _ in range(6)]
    resumed = prompt_batches(open_prompts(wanted), size=4, seed=seed)
    places(resumed, 1)
    resumed.set_state(position)
    assert [next(resumed) for _ in range(6)] == following
    assert json.loads(json.dumps(resumed.get_state())) == json.loads(json.dumps(iterator.get_state()))


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_prompts_is_a_function_of_the_seed(tmp_path, case):
    data = open_prompts(mixture(tmp_path, **CASES[case]))
    orders = [places(prompt_batches(data, size=4, seed=seed), 6) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_mixture_keeps_its_weights_and_each_source_its_epochs(tmp_path):
    data = open_prompts(mixture(tmp_path))
    drawn = places(prompt_batches(data, size=6, seed=0), 44)
    first, later = sum(drawn[:4], []), sum(drawn[4:], [])
    assert {source for source, _ in first} == {0}
    assert [sum(s == n for s, _ in later) for n in (0, 1)] == [160, 80]
    # Source 0 goes on where it was when source 1 joined: its epochs run through both phases.
    for number, count in ((0, 17), (1, 11)):
        rows = [row for source, row in first + later if source == number]
        epochs = [rows[k : k + count] for k in range(0, len(rows) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_easy_rows_come_before_hard_ones_within_a_window(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(40, level=lambda n: 39 - n))
    data = open_prompts(config(path, difficulty_column="level", curriculum=EasyToHard(window=8)))
    batches_of_8 = places(prompt_batches(data, size=8, seed=0), 10)
    for k, batch in enumerate(batches_of_8):
        rank = [39 - row for _, row in batch]
        assert sorted(rank) == list(range(8 * (k % 5), 8 * (k % 5) + 8)) and rank != sorted(rank)
    assert batches_of_8[0] != batches_of_8[5]


def test_rows_of_equal_difficulty_stand_in_no_order_of_the_file(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(20, level=lambda n: n % 2))
    data = open_prompts(config(path, difficulty_column="level", curriculum=EasyToHard(window=1)))
    rows = [row for _, row in places(prompt_batches(data, size=20, seed=0), 1)[0]]
    assert sorted(rows[:10]) == list(range(0, 20, 2)) != rows[:10]


def test_stages_let_harder_rows_in_when_their_step_comes(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(20, level=lambda n: n))
    data = open_prompts(config(path, difficulty_column="level", curriculum=Staged(limits=((2, 3), (6, 9)))))
    drawn = places(prompt_batches(data, size=4, seed=0), 30)
    hardest = [max(row for _, row in batch) for batch in drawn]
    assert max(hardest[:2]) == 3 and max(hardest[2:6]) == 9 and max(hardest[6:11]) == 19
    assert sorted(row for batch in drawn[6:11] for _, row in batch) == list(range(20))


def test_pass_rates_can_order_a_curriculum(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", numbered(5))
    rates = rows_file(tmp_path / "r.jsonl", [{"index": n, "pass_rate": (n + 1) / 7} for n in range(5)])
    source = SourceConfig(name=path, pass_rates=Path(rates))
    data = open_prompts(config(source, curriculum=EasyToHard(window=1)))
    assert places(prompt_batches(data, size=5, seed=0), 1) == [[(0, n) for n in (4, 3, 2, 1, 0)]]


def test_prompts_are_made_as_they_are_drawn(tmp_path):
    data = open_prompts(config(rows_file(tmp_path / "a.jsonl", numbered(6))))
    made = prompt_batches(data, size=3, seed=0, make=lambda example: example.question.upper())
    assert sorted(next(made) + next(made)) == [f"{n}?" for n in range(6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 18}, "maths.jsonl: got 17 rows, wanted at least 18"),
        ({"size": 0}, "got size 0"),
        ({"size": 4, "curriculum": Staged(limits=((3, -1.0),))}, "got 0 rows up to difficulty -1, wanted at least 4"),
    ],
)
def test_too_few_rows_are_refused(tmp_path, settings, message):
    size = settings.pop("size")
    with pytest.raises(ValueError, match=message):
        prompt_batches(open_prompts(mixture(tmp_path, **settings)), size=size, seed=0)


def test_a_curriculum_without_difficulties_is_refused(tmp_path):
    data = open_prompts(config(rows_file(tmp_path / "a.jsonl", numbered(5)), curriculum=EasyToHard(window=2)))
    with pytest.raises(ValueError, match="a curriculum needs a difficulty of every row"):
        prompt_batches(data, size=2, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 77}, "a.jsonl: changed since the checkpoint: got 9 rows with digest .*; put the old back"),
        ({"max_difficulty": 2}, "got 7 rows after filters .* the checkpoint has 9"),
        ({"curriculum": EasyToHard(window=3)}, "data: curriculum: got EasyToHard"),
        ({"size": 3}, "data: size: got 3, the checkpoint has 4"),
        ({"seed": 1}, "data: seed: got 1, the checkpoint has 0"),
        ({"weight": 2.0}, r"data: weights: got \[2.0\], the checkpoint has \[1.0\]"),
    ],
)
def test_the_position_of_other_data_is_refused(tmp_path, change, message):
    settings = {"difficulty_column": "level", "curriculum": None, "max_difficulty": None}
    order = {"size": 4, "seed": 0}

    def opened(extra):
        rows = numbered(9, level=lambda n: n % 4)
        rows[3]["answer"] = extra.get("answer", 3)
        source = SourceConfig(name=rows_file(tmp_path / "a.jsonl", rows), weight=extra.get("weight", 1.0))
        data = open_prompts(config(source, **(settings | {k: v for k, v in extra.items() if k in settings})))
        return prompt_batches(data, **(order | {k: v for k, v in extra.items() if k in order}))

    before = opened({})
    next(before)
    position = json.loads(json.dumps(before.get_state()))
    opened({}).set_state(position)
    with pytest.raises(ValueError, match=message) as error:
        opened(change).set_state(position)
    assert "\n" not in str(error.value)


def test_a_position_from_a_plain_list_is_refused(tmp_path):
    data = open_prompts(config(rows_file(tmp_path / "a.jsonl", numbered(5))))
    with pytest.raises(ValueError, match="the checkpoint holds a position in other data"):
        prompt_batches(data, size=2, seed=0).set_state(batches(list(range(5)), size=2, seed=0).get_state())


def test_a_data_file_may_move(tmp_path):
    old = prompt_batches(open_prompts(config(rows_file(tmp_path / "a.jsonl", numbered(9)))), size=2, seed=0)
    next(old)
    new = prompt_batches(open_prompts(config(rows_file(tmp_path / "b.jsonl", numbered(9)))), size=2, seed=0)
    new.set_state(old.get_state())
    assert places(new, 5) == places(old, 5)


def test_processes_with_other_rows_refuse_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, [["other", "rows"]]])
    with pytest.raises(ValueError, match="process 1 has other rows than process 0"):
        open_prompts(config(rows_file(tmp_path / "a.jsonl", numbered(5))))


REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not (REAL / "gsm8k").is_dir(), reason="needs GSM8K beside the repository")
def test_gsm8k_has_7473_questions_and_none_of_its_own_test():
    held = (SourceConfig(name=str(REAL / "gsm8k" / "test.jsonl")),)
    data = open_prompts(config(str(REAL / "gsm8k" / "train.jsonl"), held_out=held))
    assert len(data) == 7473 and [d.rows for d in data.report] == [0, 0]
    seen = places(prompt_batches(data, size=53, seed=0), 141)
    assert sorted(row for batch in seen for _, row in batch) == list(range(7473))
    assert data[0].answer == "72"
