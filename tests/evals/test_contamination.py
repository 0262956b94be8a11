"""Problems of a benchmark in training data: what is found, what is no more than a phrase, and what is left."""

import json
from pathlib import Path

import pytest

from deepseek_jax.commands.contamination import main
from deepseek_jax.commands.train_data import overlapping
from deepseek_jax.data.examples import Example
from deepseek_jax.evals.contamination import overlaps, words
from deepseek_jax.evals.task import Problem

ASKED = (
    "Natalia sold clips to forty eight of her friends in the month of April, and then she sold half as many clips "
    "in May; how many clips did she sell altogether?"
)
OTHER = "A robe takes two bolts of blue fibre and half that much of white fibre, so how many bolts does it take?"
PHRASE = "can be written in the form where m and n are relatively prime positive integers, so find the sum m plus n"


def problems(*asked: str) -> list[Problem]:
    return [Problem(id=str(number), question=question) for number, question in enumerate(asked)]


def found(rows, *asked: str, **settings):
    return [(of.row, of.problem, of.share) for of in overlaps(rows, problems(*asked), **settings)]


def test_a_copy_is_found_whatever_its_case_marks_and_place():
    rows = [
        {"question": "What is 2 + 2?"},
        {"messages": [{"role": "user", "content": f"Q:  {ASKED.upper().replace(';', ' --')}"}]},
        {"text": [f"{OTHER} It takes three."]},
    ]
    assert found(rows, ASKED, OTHER) == [(1, 0, 1.0), (2, 1, 1.0)]


def test_the_share_is_of_the_words_that_runs_cover():
    said = words(ASKED)
    assert len(said) == 31
    changed = " ".join([*said[:14], "November", *said[15:]])  # runs of 13 on both sides of the other word
    assert found([changed], ASKED, ngram=13) == [(0, 0, 30 / 31)]
    assert found([" ".join(said[3:15])], ASKED, ngram=13) == []
    assert found([" ".join(said[3:16])], ASKED, ngram=13) == [(0, 0, 13 / 31)]
    assert found([" ".join(said[3:15])], ASKED, ngram=8) == [(0, 0, 12 / 31)]


def test_a_formula_of_the_field_is_a_small_share_and_a_copy_a_whole_one():
    asked = f"The chance that two of these seven coins show heads {PHRASE}"
    rows = [f"{number} {PHRASE}" for number in range(40)] + [f"{asked}? {number}" for number in range(40)]
    shares = [share for _, _, share in found(rows, asked)]
    assert shares == [22 / 32] * 40 + [1.0] * 40
    long = f"{ASKED} {asked}"
    assert {share for _, _, share in found(rows[:40], long)} == {22 / 63}


def test_short_problems():
    short, tiny = "What is the sum of the first twelve odd numbers?", "Evaluate 2 + 2."
    assert found([f"Tell me: {short} Thanks."], short, ngram=13) == [(0, 0, 1.0)]
    assert found(["Please evaluate 2 + 2. Thanks"], tiny) == []
    assert found(["EVALUATE $2+2$"], tiny) == [(0, 0, 1.0)]


def test_the_length_of_runs_is_bounded():
    with pytest.raises(ValueError, match="ngram: got 7, wanted 8 to 13 words"):
        overlaps([], problems(ASKED), ngram=7)


def test_scripts_without_spaces_are_compared_by_their_characters():
    asked = "小明有三个苹果，他又买了五个苹果，现在一共有几个苹果？"
    assert found([f"问题：{asked}答案是八。"], asked) == [(0, 0, 1.0)]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_writes_what_is_left(tmp_path, capsys):
    rows = [{"question": ASKED, "answer": "72"}, {"question": "Äpfel?", "answer": "3"}, {"question": f"So. {OTHER}"}]
    data = write(tmp_path / "train.jsonl", rows)
    test = write(
        tmp_path / "test.jsonl", [{"question": ASKED, "answer": "#### 72"}, {"question": OTHER, "answer": "3"}]
    )
    out, report = tmp_path / "clean.jsonl", tmp_path / "report.jsonl"
    given = {"benchmark": "gsm8k", "benchmark_data": (f"gsm8k={test}",)}
    main((data,), **given, decontaminate=out, report=report)
    said = capsys.readouterr().out
    assert "gsm8k: 2 of 3 rows hold 2 of 2 problems" in said and "1 of 3 rows, 2 left out" in said
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[1:2]
    told = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(of["where"], of["problem"], of["share"]) for of in told] == [
        (f"{data}:1", "0", 1.0),
        (f"{data}:3", "1", 1.0),
    ]
    with pytest.raises(ValueError, match="exists already"):
        main((data,), **given, decontaminate=out)
    with pytest.raises(ValueError, match="benchmark_data: got 'aime24=x', wanted data of gsm8k"):
        main((data,), benchmark="gsm8k", benchmark_data=("aime24=x",))
    with pytest.raises(ValueError, match="x, which --decontaminate writes too, wanted two files"):
        main((data,), **given, decontaminate=tmp_path / "x", report=tmp_path / "no" / ".." / "x")
    with pytest.raises(ValueError, match="there is no folder .*no, wanted one that is there"):
        main((data,), **given, decontaminate=tmp_path / "no" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clean.jsonl",
        "report.jsonl",
        "test.jsonl",
        "train.jsonl",
    ]


def test_a_training_run_says_what_its_held_out_data_has_in_common():
    asked = lambda *texts: [Example(text, None, None, {}, 0, row) for row, text in enumerate(texts)]
    changed = ASKED.replace("April", "June")
    said = overlapping(asked("What is 2 + 2?", changed, changed), asked(OTHER, ASKED))
    assert said.startswith("held_out: 2 training questions share half the words of a held-out one or more, such as")
    assert overlapping(asked("What is 2 + 2?", OTHER), asked(ASKED)) is None


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data beside the project")
def test_real_pairs():
    """GSM8K's training part has two of its test problems, one of them twice, with other numbers; MATH none of AIME."""
    from deepseek_jax.data.sources import open_source
    from deepseek_jax.evals.tasks import task_named

    def held(data: str, name: str, test: str):
        asked = task_named(name).problems(open_source(str(SHARED / test)))
        source = open_source(str(SHARED / data))
        rows = (source[number] for number in range(len(source)))
        return [(of.row, of.problem) for of in overlaps(rows, asked) if of.share >= 0.5]

    assert held("gsm8k/train.jsonl", "gsm8k", "gsm8k/test.jsonl") == [(20, 632), (1314, 602), (5162, 602)]
    assert held("math_train/train.json", "aime24", "aime24/test.jsonl") == []
