"""The command of rejection sampling, of samples that are there: what it writes, counts and refuses."""

import json
import sys

import pytest

from deepseek_jax.cli import run
from deepseek_jax.commands import evaluate, rejection
from deepseek_jax.data.conversations import conversation_of

ROWS = [{"question": f"What is {n} and 1?", "answer": str(n + 1)} for n in range(3)]


def record(number: int, sample: int, completion: str, **changes) -> dict:
    found = {"benchmark": "gsm8k", "number": number, "sample": sample, "budget": None, "asked": f"{number}+1?"}
    found |= {"opened": True, "completion": completion, "score": 1.0, "answer": str(number + 1), "tokens": 9}
    return found | {"truncated": False, **changes}


SAMPLES = [
    record(0, 0, "0+1=1</think>\\boxed{1}"),
    record(0, 1, "1=1, and the answer is 1</think>\\boxed{1}"),
    record(0, 2, "0+1=2</think>\\boxed{1}"),
    record(0, 3, "", score=0.0, answer=None),
    record(1, 0, "1+1=2</think>\\boxed{2}"),
    record(1, 1, "3</think>\\boxed{3}", score=0.0, answer="3"),
    record(1, 2, "3</think>\\boxed{3}", score=0.0, answer="3"),
    record(1, 3, "3", score=None, answer=None),
    *(record(2, sample, "4</think>\\boxed{4}", score=0.0, answer="4") for sample in range(4)),
]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command with samples that are drawn as evaluations are; its exit status."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = []

    def drawn(config):
        asked.append(config)
        config.output.mkdir(exist_ok=True)
        (config.output / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in SAMPLES))

    def call(*given: str) -> int:
        monkeypatch.setattr(evaluate, "main", drawn)
        fixed = [
            "model",
            "--output",
            str(tmp_path / "out"),
            "--data",
            str(data),
            "--benchmark",
            "gsm8k",
            "--samples",
            "4",
        ]
        monkeypatch.setattr(sys, "argv", ["rejection", *fixed, *given])
        try:
            run(rejection.main)
        except SystemExit as end:
            return end.code
        return 0

    call.asked = asked
    return call


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_what_is_kept_is_what_sft_reads_and_the_rest_has_reasons(call, tmp_path, capsys):
    assert call() == 0
    accepted, rejected = lines(tmp_path / "out" / "accepted.jsonl"), lines(tmp_path / "out" / "rejected.jsonl")
    assert [(row["number"], row["sample"]) for row in accepted] == [(0, 0), (0, 1), (1, 0)]
    assert conversation_of(accepted[0]).messages == (
        {"role": "user", "content": "0+1?"},
        {"role": "assistant", "content": "<think>0+1=1</think>\\boxed{1}"},
    )
    assert [row["reason"] for row in rejected] == [
        "false step",
        *["wrong answer"] * 3,
        "not graded",
        *["wrong answer"] * 4,
    ]
    counts = json.loads((tmp_path / "out" / "rejection.json").read_text())
    assert counts["rejected"] == {"not graded": 1, "wrong answer": 7, "false step": 1}
    assert (counts["samples"], counts["kept"], counts["prompts"], counts["prompts_kept"]) == (12, 3, 3, 2)
    assert counts["kept"] + sum(counts["rejected"].values()) == counts["samples"]
    assert "kept 3 of 12 samples, of 2 of 3 questions; left out: 7 wrong answer" in capsys.readouterr().out
    assert call.asked[0].asked.samples == 4 and call.asked[0].output == tmp_path / "out"


def test_half_a_surrogate_pair_is_written_as_its_escape(call, tmp_path, monkeypatch):
    """A server's JSON may hold one, and UTF-8 has none."""
    broken = lambda of: of["completion"].replace("</think>", " \ud800</think>") or "\ud800"
    samples = [of | {"completion": broken(of)} if place in (0, 3) else of for place, of in enumerate(SAMPLES)]
    monkeypatch.setattr(sys.modules[__name__], "SAMPLES", samples)
    assert call() == 0
    accepted, rejected = lines(tmp_path / "out" / "accepted.jsonl"), lines(tmp_path / "out" / "rejected.jsonl")
    assert "\ud800" in accepted[0]["messages"][1]["content"]
    assert any("\ud800" in row["messages"][1]["content"] for row in rejected)


def test_other_filters_begin_from_the_samples_that_are_there(call, tmp_path):
    assert call() == 0
    assert call("--min-agreement", "0.5") == 0
    assert [(row["number"], row["sample"]) for row in lines(tmp_path / "out" / "accepted.jsonl")] == [(0, 0), (0, 1)]


def test_nothing_kept_is_told_with_its_reasons_and_nothing_is_lost(call, tmp_path, capsys):
    assert call() == 0
    assert call("--min-tokens", "10") == 1
    told = capsys.readouterr().err
    assert "none of 12 samples is kept (7 wrong answer, 3 too short, " in told and "loosen a filter" in told
    assert not (tmp_path / "out" / "accepted.jsonl").exists() and len(lines(tmp_path / "out" / "rejected.jsonl")) == 12
    assert (tmp_path / "out" / "samples.jsonl").exists()


def test_an_own_model_of_texts_is_asked(call, tmp_path):
    file = tmp_path / "embed.py"
    file.write_text("def embed(texts):\n    return [[float('1=1' not in text), 0.5] for text in texts]\n")
    assert call("--embedding", f"{file}:embed", "--min-relevance", "0.9") == 0
    reasons = [row["reason"] for row in lines(tmp_path / "out" / "rejected.jsonl")]
    assert "far from the question" in reasons


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--benchmark", "gsm8k,math500"], "benchmark: got 'gsm8k,math500', wanted one name"),
        (["--thought-language", "row"], "rows.jsonl:1: language: got None, wanted two letters"),
        (["--embedding", "nothing.py:f"], "nothing.py: no such .py file"),
        (["--keep", "0"], "keep: got 0, wanted at least 1"),
        (["--thinking-budgets", "5"], "thinking_budgets: got some, wanted none"),
    ],
)
def test_what_cannot_work_is_one_line(call, capsys, given, says):
    assert call(*given) in (1, 2)
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
