"""Evaluations side by side: figures, settings, paired tests and costs of folders whose samples are known."""

import json
from pathlib import Path

import pytest

from deepseek_jax.commands.compare import main
from deepseek_jax.evals.comparison import Prices, Run, cost, paired, read_runs, sections
from deepseek_jax.evals.measures import clustered
from deepseek_jax.evals.published import FIGURES, of_benchmark

FREE = Prices()
PUBLISHED = {"samples": 64, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768}


def folder(path: Path, scores, *, digest="d1", temperature=0.6, tokens=100.0, benchmark="aime24") -> Path:
    """As `evaluate` leaves it, of problems with these scores of their samples."""
    path.mkdir()
    samples = len(scores[0])
    found = clustered(scores)
    settings = {**PUBLISHED, "temperature": temperature, "samples": samples}
    values = {
        "pass@1": found.mean, "stderr": found.stderr, "n": found.n, "problems": len(scores), "samples": samples,
        "ungraded": sum(score is None for of in scores for score in of), "mean_prompt_tokens": 50.0,
        "mean_tokens": tokens, "mean_thinking_tokens": 40.0, "truncated": 0.25, "tokens_per_second": 12.0,
        "wall_seconds": 60.0, "peak_memory_bytes": 2**30, "prompt_style": "deepseek", "settings": settings,
        "unlike_published": {k: [settings[k], v] for k, v in PUBLISHED.items() if settings[k] != v},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps({benchmark: values}))
    config = {"benchmarks": {benchmark: {"digest": digest}}, "dtype": "float32", "seed": 0}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "samples.jsonl").open("w") as file:
        for number, of in enumerate(scores):
            for sample, score in enumerate(of):
                record = {"benchmark": benchmark, "number": number, "id": f"p{number}", "sample": sample}
                file.write(json.dumps({**record, "budget": None, "score": score}) + "\n")
        file.write(json.dumps({**record, "budget": 0, "score": 1.0}) + "\n")
        file.write('{"benchmark": "aime24", "num')  # another process is writing it
    return path


def table(runs: list[Run], title: str, prices: Prices = FREE) -> list[list[str]]:
    return next(part.rows for part in sections(runs, prices) if part.title == title)


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    first = folder(tmp_path / "one", [[0.0], [1.0], [0.0], [0.0], [0.0], [0.0], [0.0]])
    second = folder(tmp_path / "two", [[1.0], [0.0], [1.0], [1.0], [1.0], [1.0], [None]], temperature=1.0, tokens=400.0)
    return read_runs([first, second])


def test_scores_stand_beside_published_ones(runs):
    (row,) = table(runs, "Scores")[1:]
    assert row[:2] == ["aime24", "pass@1"]
    assert row[2] == "14.3 ± 13.2* (n=7)" and row[3] == "83.3 ± 15.2* (n=6, 1 samples not graded)"
    published = {row[2]: row for row in table(runs, "Published results")[1:]}
    assert published["DeepSeek-R1"][3:6] == ["79.8", "-65.5", "+3.5"]
    assert published["OpenAI o1-1217"][3] == "79.2" and "GPT-4o-0513" in published
    sources = dict(table(runs, "Sources")[1:])
    assert all(row[-1] in sources for row in published.values())


def test_settings_that_differ_are_told(runs):
    rows = table(runs, "Settings that differ")
    assert rows[0] == ["benchmark", "setting", "one", "two", "published"]
    assert rows[1:] == [["aime24", "samples", "1", "1", "64"], ["aime24", "temperature", "0.6", "1.0", "0.6"]]


def test_a_difference_has_a_paired_test(runs):
    found = paired(*runs, "aime24")
    assert (found.n, found.better, found.worse, found.test) == (6, 5, 1, "mcnemar") and found.p == 2 * 7 / 64
    (row,) = table(runs, "Differences between runs")[1:]
    assert row[:3] == ["aime24", "two", "one"] and row[5:] == ["5, 1, 6", "0.22", "mcnemar"]
    assert row[3].startswith("+66.7 ± ")


def test_a_test_is_of_the_samples_that_the_summary_is_of(tmp_path, runs):
    """The folder may have more, of a run with more samples or a higher limit."""
    more = folder(
        tmp_path / "more", [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    )
    summary = json.loads((more / "summary.json").read_text())
    summary["aime24"] |= {"problems": 5, "samples": 1}
    (more / "summary.json").write_text(json.dumps(summary))
    (run,) = read_runs([more])
    assert run.scores("aime24") == {f"{number}: p{number}": [float(number == 1)] for number in range(5)}
    found = paired(runs[0], run, "aime24")
    assert (found.n, found.mean, found.p, found.test) == (5, 0.0, 1.0, "mcnemar")


def test_other_data_are_not_paired(tmp_path, runs):
    (other,) = read_runs([folder(tmp_path / "three", [[1.0]] * 7, digest="d2")])
    assert paired(runs[0], other, "aime24") == "other data"
    assert ["aime24", "data", "d1", "d2", ""] in table([runs[0], other], "Settings that differ")


def test_a_problem_costs_what_its_tokens_cost(runs):
    values = runs[1].summary["aime24"]
    assert cost(values, Prices(0.55, 2.19)) == pytest.approx((50 * 0.55 + 400 * 2.19) / 1e6, rel=1e-15)
    assert cost({**values, "samples": 4}, Prices(None, 2.0)) == pytest.approx(4 * 400 * 2 / 1e6, rel=1e-15)
    assert cost(values, Prices()) is None
    assert cost({**values, "mean_prompt_tokens": None}, Prices(0.5, 2.0)) is None
    rows = table(runs, "Cost", Prices(0.0, 2.0))
    assert rows[2][2:] == ["50", "400", "40", "25.0 %", "12.0", "60", "1.00 GiB", "0.0008", "0.00096"]


def test_the_command_writes_a_report_that_holds_text_as_text(tmp_path, capsys):
    folders = folder(tmp_path / "a", [[1.0], [0.0]]), folder(tmp_path / "<b>|x", [[1.0], [1.0]])
    before = [(each / "samples.jsonl").read_bytes() for each in folders]
    main(folders, output=tmp_path / "out", price_out=2.0)
    assert [(each / "samples.jsonl").read_bytes() for each in folders] == before  # a running evaluation goes on
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["compare.html", "compare.json", "compare.md", "scores.png", "tokens.png"]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;b&gt;|x" in page and "<b>|x" not in page and "<script" not in page and "http://" not in page
    text = (tmp_path / "out" / "compare.md").read_text()
    assert r"\<b\>\|x" in text and "## Accessibility and deployment" in text
    assert r"\<b\>\|x" in capsys.readouterr().out
    with pytest.raises(ValueError, match="summary.json: no such file; wanted a folder that"):
        main((tmp_path,))
    with pytest.raises(ValueError, match="price_in: got -1, wanted 0 or more"):
        main(folders, price_in=-1)


def test_every_published_figure_has_a_source_and_is_there_once():
    keys = [(figure.model, figure.benchmark, figure.metric) for figure in FIGURES]
    assert len(set(keys)) == len(keys) and all(figure.source for figure in FIGURES)
    assert [of.value for of in of_benchmark("math500", "pass@1")][:2] == [97.3, 96.4]
    assert all(0 < of.value <= (3000 if of.metric == "elo" else 100) for of in FIGURES)
