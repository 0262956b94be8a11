"""Public data sets through the grader: every row's answer is right beside itself, and those of other rows are wrong.

Needs the data sets beside the repository; run with -m slow -s to see the figures.
"""

import json
import re
from pathlib import Path

import pytest

from deepseek_jax.data.prompts import DataConfig, SourceConfig, open_prompts
from deepseek_jax.rewards.math import MathGrader
from deepseek_jax.rewards.pool import PoolConfig
from deepseek_jax.text.answers import solution_answer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason="needs GSM8K, MATH, SVAMP, AMC and AIME beside the repository"),
]

SOURCES = {
    "gsm8k train": {"name": "gsm8k/train.jsonl"},
    "gsm8k test": {"name": "gsm8k/test.jsonl"},
    "svamp": {"name": "svamp/test.jsonl", "question_columns": ("Body", "Question"), "answer_column": "Answer"},
    "amc23": {"name": "amc23/test.jsonl"},
    "aime24": {"name": "aime24/test.jsonl", "answer_column": "answer"},
    "math train": {"name": "math_train/train.json"},
}


@pytest.fixture(scope="module")
def grader():
    with MathGrader(PoolConfig(workers=2)) as grader:
        yield grader


def answers_of(name: str, folder: Path) -> list[str]:
    """The final answers that training would use; MATH is one JSON list, which is written as lines first."""
    settings = dict(SOURCES[name])
    path = REAL / settings.pop("name")
    if path.suffix == ".json":
        lines = (json.dumps(row) for row in json.loads(path.read_text(encoding="utf-8")))
        path = folder / "rows.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
    source = SourceConfig(name=str(path), **settings)
    data = open_prompts(DataConfig(sources=(source,), duplicates="keep", without_answer="drop"))
    print(*data.report, sep="\n")
    return [example.answer for example in data]


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_is_right_beside_itself_and_wrong_beside_the_next(name, grader, tmp_path):
    answers = answers_of(name, tmp_path)
    itself = grader.grade([(answer, answer) for answer in answers])
    refused = [answer for answer, verdict in zip(answers, itself, strict=True) if not verdict.right]
    turned = [*answers[1:], answers[0]]
    beside = grader.grade(list(zip(answers, turned, strict=True)))
    both = grader.grade(list(zip(turned, answers, strict=True)))
    taken = [(a, g) for a, g, verdict in zip(answers, turned, beside, strict=True) if verdict.right]
    # A pair of different answers that is right either way is one value in two notations; one that is not is a slip.
    onesided = sum(x.right != y.right for x, y in zip(beside, both, strict=True))
    different = [(a, g) for a, g in taken if a.replace(" ", "") != g.replace(" ", "")]
    print(
        f"{name}: {len(answers)} rows; right beside itself {len(answers) - len(refused)};"
        f" beside the next {len(taken)}, of them in other words {len(different)}: {different[:8]};"
        f" one way only {onesided}"
    )
    assert refused == []
    assert onesided <= len(answers) // 1000
    assert all(_one_value(a, g) for a, g in different), different


def _one_value(answer: str, gold: str) -> bool:
    """Judged apart from the grader: the same digits, signs, points and strokes."""
    first, second = (re.sub(r"[^0-9./-]", "", text) for text in (answer, gold))
    return first == second != ""


def test_reference_solutions_of_gsm8k_and_aime_end_in_their_answers(grader):
    for folder in ("gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        rows = [json.loads(line) for line in (REAL / folder).read_text(encoding="utf-8").splitlines()]
        marked = [row["answer"].rpartition("#### ")[2] for row in rows]
        assert [solution_answer(row["answer"], bare=False) for row in rows] == marked
    rows = [json.loads(line) for line in (REAL / "aime24" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(solution_answer(row["solution"], bare=False) or "", row["answer"]) for row in rows]
    found = [pair for pair in pairs if pair[0]]
    verdicts = grader.grade(found)
    print(f"aime24: {len(found)} of {len(rows)} solutions hold a box, {sum(v.right for v in verdicts)} are right")
    print([pair for pair, verdict in zip(found, verdicts, strict=True) if not verdict.right])
