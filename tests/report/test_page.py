import base64
import hashlib
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_jax
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.page import PANELS, smooth, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of the page: its elements, attributes and visible text."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make(folder: Path, *, summary=None, rows=(), samples=(), title="A run") -> tuple[str, Page]:
    path = write_report(folder, title=title, summary=summary or {}, rows=rows, samples=samples)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return source, page


def rows_of(values: dict[str, list[float]], stage: str = "grpo") -> list[dict]:
    length = len(next(iter(values.values())))
    return [{"stage": stage, "step": i + 1} | {n: v[i] for n, v in values.items()} for i in range(length)]


def captions(source: str) -> list[str]:
    return re.findall(r"<figcaption>([^<]*)", source)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></td></table><iframe src=//a.example></iframe>",
    "<!-- ",
    "&lt;b&gt;",
    "</style><script>",
    "<svg/onload=alert(1)>",
    r"$\nonsense{$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_never_run(tmp_path: Path, text: str):
    _, benign = make(
        tmp_path,
        title="t",
        summary={"t": "t"},
        rows=rows_of({"t": [1.0]}, stage="t"),
        samples=[{"prompt": "t", "completion": "t", "note": "t", "rewards": {"t": 1.0}}],
    )
    _, page = make(
        tmp_path,
        title=text,
        summary={text: text},
        rows=rows_of({text: [1.0]}, stage=text),
        samples=[{"prompt": text, "completion": text, "note": text, "rewards": {text: 1.0}}],
    )
    assert page.tags == benign.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert sum(text in chunk for chunk in page.text) >= 8


@given(text=st.text())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str):
    _, page = make(tmp_path_factory.mktemp("run"), samples=[{"prompt": "q", "completion": f"<{text}"}])
    assert page.tags.count("pre") == 2


def test_characters_no_page_may_hold_are_replaced(tmp_path: Path):
    source, _ = make(tmp_path, samples=[{"prompt": "a\x00b\ud800c", "completion": "d\x1b[0m\te"}])
    assert "a\ufffdb\ufffdc" in source and "d\ufffd[0m\te" in source


def test_the_page_asks_the_network_for_nothing(tmp_path: Path):
    rows = rows_of({"reward": [0.0, 1.0], "kl": [0.0, 0.1]})
    source, page = make(tmp_path, rows=rows, samples=[{"prompt": "p", "completion": "c"}])
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in source and "@import" not in source
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", source)
    assert references and all(value.startswith("#") for value in references)


def test_ids_are_unique_and_references_find_them(tmp_path: Path):
    values = {"reward": [0.0, 1.0], "kl": [0.0, 0.1], "entropy": [1.0, 0.5]}
    source, page = make(tmp_path, rows=rows_of(values, "sft") + rows_of(values, "grpo"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    wanted = set(re.findall(r"url\(#([^)]*)\)", source)) | set(re.findall(r'href="#([^"]*)"', source))
    assert wanted and wanted <= set(ids)


def test_every_metric_has_a_plot_under_its_stage(tmp_path: Path):
    names = [name.replace("*", "x") for panel in PANELS for name in panel.names]
    rows = rows_of({"loss": [2.0, 1.0], "learning_rate": [1e-4, 1e-5]}, stage="sft")
    rows += rows_of({name: [0.25, 0.75] for name in [*names, "my/own"]})
    source, page = make(tmp_path, rows=rows)
    sft, grpo = source.split("<section>")[1:]
    assert captions(sft) == ["Loss", "Learning rate"]
    assert captions(grpo) == [*(panel.title for panel in PANELS), "my/own"]
    assert "Other metrics (1)" in grpo and "<details>" not in sft
    for text in ("step", "nats per token", "tokens", "seconds", "mean reward"):
        assert any(chunk.strip() == text for chunk in page.text)


def test_only_the_metrics_that_exist_are_plotted(tmp_path: Path):
    source, _ = make(tmp_path, rows=rows_of({"entropy": [1.0, 0.5]}))
    assert captions(source) == ["Entropy"]


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path):
    with MetricLog(tmp_path) as log:
        for step, loss in enumerate([1.0, math.nan, math.inf, 0.5]):
            log.write(step, {"loss": loss, "kl": math.nan}, "sft")
    source, page = make(tmp_path, rows=read_metrics(tmp_path))
    assert "2 values not finite, left out" in source and "4 values not finite, left out" in source
    assert "nan" not in "".join(page.text).lower()


def test_the_summary_says_what_became_of_the_accuracy(tmp_path: Path):
    summary = {
        "accuracy_before": 0.1234,
        "stderr_before": 0.015,
        "accuracy_after": 0.71,
        "stderr_after": 0.02,
        "questions": 500,
        "tokens": 1234567,
        "wall_seconds": 312.3456,
        "note": None,
    }
    _, page = make(tmp_path, summary=summary)
    text = "".join(page.text)
    assert "Accuracy on 500 unseen questions: 12.3 % ± 1.5 before, 71.0 % ± 2.0 after." in text
    for shown in ("1\u202f234\u202f567", "312.3", "wall seconds", "–"):
        assert shown in text


def test_samples_have_a_column_for_every_reward(tmp_path: Path):
    samples = [
        {"prompt": "1+1", "completion": "2", "rewards": {"accuracy": 1.0}, "step": 3},
        {"prompt": "1+2", "completion": "4", "rewards": {"accuracy": 0.0, "format": None}},
    ]
    source, _ = make(tmp_path, samples=samples)
    assert re.findall(r"<th(?: [^>]*)?>([^<]*)", source) == [
        "prompt",
        "completion",
        "step",
        "accuracy",
        "format",
    ]
    cells = re.findall(r'<td class="number">([^<]*)', source)
    assert cells == ["3", "1", "–", "–", "0", "–"]


def test_an_empty_run_still_makes_a_page(tmp_path: Path):
    _, page = make(tmp_path / "new", title="Nothing yet")
    assert "Nothing yet" in page.text and "No metrics were written." in page.text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_a_long_run_keeps_the_page_small(tmp_path: Path):
    rng = np.random.default_rng(0)
    make(tmp_path, rows=rows_of({"reward": list(rng.normal(size=20_000))}))
    assert (tmp_path / "report.html").stat().st_size < 150_000


@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=30),
    window=st.integers(min_value=1, max_value=40),
)
def test_smoothing_is_the_mean_of_the_neighbours(values: list[float], window: int):
    half = window // 2
    plain = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smooth(np.array(values), window), plain, atol=1e-9)


def test_smoothing_keeps_a_constant_to_the_last_bit():
    np.testing.assert_array_equal(smooth(np.full(200, 1e-4), 13), np.full(200, 1e-4))


def course(text: str = "t", step: int = 1, **values) -> list[dict]:
    sample = {
        "completion": text,
        "rewards": {text: 1.0, "format": None},
        "reward": 0.5,
        "advantage": None,
        "length": 7,
        "finished": False,
        "extra": {text: text, "tries": 3},
    }
    return [
        {"stage": text, "step": step, "groups": [{"prompt": text, "answer": text, "samples": [sample | values] * 2}]}
    ]


def with_course(folder: Path, completions) -> tuple[str, Page]:
    path = write_report(folder, title="t", summary={}, rows=[], samples=[], completions=completions)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return source, page


@pytest.mark.parametrize("text", [*HOSTILE, "</script><script>alert(1)</script>", "</summary></details>"])
def test_hostile_completions_are_shown_and_never_run(tmp_path: Path, text: str):
    benign, hostile = (with_course(tmp_path, course(t)) for t in ("t", text))
    assert hostile[1].tags == benign[1].tags and hostile[1].tags.count("script") == 1
    assert not [name for name, _ in hostile[1].attributes if name.startswith("on")]
    assert sum(text in chunk for chunk in hostile[1].text) >= 6


def test_only_the_page_s_own_script_may_run(tmp_path: Path):
    source, page = with_course(tmp_path, course())
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert not re.search(r"fetch|XMLHttp|import|https?:|innerHTML|eval", script)
    assert not {name for name, _ in page.attributes} & {"src", "href"}


def test_completions_stand_under_their_step_with_every_number(tmp_path: Path):
    rows = course("first", 1) + course("second", 20, advantage=-1.25, finished=True)
    source, page = with_course(tmp_path, rows)
    text = [chunk.strip() for chunk in page.text]
    assert text.index("first, step 1") < text.index("second, step 20")
    assert page.tags.count("details") == 2 and "mean reward 0.5" in source
    assert re.findall(r'<th class="number">([^<]*)', source)[:6] == [
        *("first", "format", "reward", "advantage", "length", "finished")
    ]
    assert re.findall(r"<th>([^<]*)", source)[:3] == ["completion", "first", "tries"]
    cells = re.findall(r'<td class="number">([^<]*)', source)
    assert cells == [*("1", "–", "0.5", "–", "7", "cut off", "3") * 2, *("1", "–", "0.5", "-1.25", "7", "yes", "3") * 2]
    without = [{k: v for k, v in s.items() if k != "extra"} for s in rows[0]["groups"][0]["samples"]]
    rows[0]["groups"][0]["samples"] = without
    assert "tries" not in with_course(tmp_path, rows[:1])[0]
    assert text.count("Wanted") == 2 and ("type", "search") in page.attributes


def test_a_first_loss_of_zero_is_explained_where_it_is_drawn(tmp_path: Path):
    zero = rows_of({"reward": [0.1, 0.2], "loss": [0.0, 0.1]})
    source, page = make(tmp_path, rows=zero)
    figures = source.split("<figure")
    assert ["is right" in figure for figure in figures if "<figcaption>Loss" in figure] == [True]
    assert source.count("is right") == 1
    for rows in (zero[1:], rows_of({"reward": [0.1], "loss": [0.2]}), rows_of({"loss": [0.0]})):
        assert "is right" not in make(tmp_path, rows=rows)[0]


def test_an_installed_package_holds_every_file_that_is_not_python():
    package = Path(deepseek_jax.__file__).parent
    found = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    named = settings["tool"]["setuptools"]["package-data"]["deepseek_jax"]
    shipped = {path.relative_to(package).as_posix() for of in named for path in package.glob(of) if path.is_file()}
    assert {name for name in found if not name.endswith((".py", ".pyc"))} == shipped
