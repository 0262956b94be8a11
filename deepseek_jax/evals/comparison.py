"""Evaluations side by side, and beside published results: tables, settings that differ, paired tests, costs."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checkpoint.files import read_json
from deepseek_jax.evals.paired import Difference, difference
from deepseek_jax.evals.published import ACCESS, FIGURES, Figure, of_benchmark
from deepseek_jax.evals.samples import Samples

SUMMARY, CONFIG = "summary.json", "config.json"
_METRICS = ("pass@1", "elo")  # others of a summary are shown where something is published of them
_SETTINGS = ("prompt_style", "settings", "problems")
_OF_RUN = ("system", "chat", "dtype")


class Run(NamedTuple):
    """An evaluation's folder.

    name: to call it by. summary: by benchmark. config: what the folder keeps of its settings. samples: all of them.
    """

    name: str
    summary: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    samples: Samples

    def scores(self, benchmark: str) -> dict[str, list[float | None]]:
        """Of each problem, by its number and id, the scores of its samples without a budget of thinking: of those that
        the summary is of, for the folder may have more."""
        found: dict[str, list[float | None]] = {}
        problems, samples = (self.summary[benchmark].get(name, math.inf) for name in ("problems", "samples"))
        for record in self.samples.of(benchmark):
            if record["number"] >= problems or record["sample"] >= samples:
                continue
            found.setdefault(f"{record['number']}: {record['id']}", []).append(record["score"])
        return found


class Prices(NamedTuple):
    """Of a million tokens, in one currency; None where not told."""

    read: float | None = None
    written: float | None = None


class Section(NamedTuple):
    """A part of the report: a table, with a note above it. Cells are text; the first row is its head."""

    title: str
    note: str
    rows: list[list[str]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The evaluations of these folders, called by their last names where these differ, else by their whole ones.

    Raises:
        ValueError: a folder without a summary, or with one of another kind.
    """
    short = len({folder.resolve().name for folder in folders}) == len(folders)
    runs = []
    for folder in folders:
        path = folder / SUMMARY
        if not path.is_file():
            raise ValueError(f"{path}: no such file; wanted a folder that `deepseek-jax evaluate --output` wrote")
        summary = read_json(path)
        for name, values in summary.items():
            if not isinstance(values, dict) or not isinstance(values.get("pass@1", ""), float | int | None):
                raise ValueError(f"{path}: {name!r}: got no 'pass@1', wanted a summary that `evaluate` wrote")
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        name = folder.resolve().name if short else str(folder)
        runs.append(Run(name, summary, config, Samples(folder, mend=False)))
    return runs


def benchmarks_of(runs: Sequence[Run]) -> list[str]:
    """Those that some run has, in order."""
    return list(dict.fromkeys(name for run in runs for name in run.summary))


def sections(runs: Sequence[Run], prices: Prices) -> list[Section]:
    """The whole report, part by part."""
    parts = [scores_table(runs), *published_tables(runs), settings_table(runs)]
    if len(runs) > 1:
        parts.append(differences_table(runs))
    parts += [costs_table(runs, prices), access_table(runs), sources_table(runs)]
    return [part for part in parts if len(part.rows) > 1]


# --- scores -----------------------------------------------------------------------------------------


def scores_table(runs: Sequence[Run]) -> Section:
    """A row a benchmark and metric, a column a run."""
    rows = [["benchmark", "metric", *(run.name for run in runs)]]
    for name, metric in _measured(runs):
        rows.append([name, metric, *(_score(run.summary.get(name, {}), metric) for run in runs)])
    note = (
        "Means with standard errors over problems (clustered), in percent but for ratings. * marks settings that are "
        "not those of the published figures; samples that could not be graded are in no mean."
    )
    return Section("Scores", note, rows)


def _measured(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Benchmarks and their metrics: the usual ones, and those of which something is published."""
    for name in benchmarks_of(runs):
        known = dict.fromkeys([*_METRICS, *(figure.metric for figure in FIGURES if figure.benchmark == name)])
        for metric in known:
            if any(run.summary.get(name, {}).get(metric) is not None for run in runs):
                yield name, metric


def _score(values: Mapping[str, Any], metric: str) -> str:
    value = values.get(metric)
    if value is None:
        return "not graded" if values and metric == "pass@1" else "–"
    star = "*" if values.get("unlike_published") else ""
    if metric == "elo":
        low, high = values.get("elo_interval") or (None, None)
        return f"{value:.0f}{star}" + ("" if low is None else f" ({low:.0f} to {high:.0f})")
    error = values.get("stderr" if metric == "pass@1" else f"{metric}_stderr")
    ungraded = values.get("ungraded") or 0
    return (
        f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + star
        + f" (n={values.get('n')}" + (f", {ungraded} samples not graded)" if ungraded else ")")
    )  # fmt: skip


def published_tables(runs: Sequence[Run]) -> Iterator[Section]:
    """What is published of these benchmarks, beside the best run."""
    rows = [["benchmark", "metric", "model", "published", *(f"{run.name} less this" for run in runs), "source"]]
    for name, metric in _measured(runs):
        for figure in of_benchmark(name, metric):
            beside = [_beside(run.summary.get(name, {}).get(metric), figure) for run in runs]
            rows.append([name, metric, figure.model, f"{figure.value:g}", *beside, str(_number(figure.source))])
    note = (
        "Published figures come without their own errors, and of other prompts, samples and limits as their source "
        "tells; a difference from one is no test. Numbers name the sources below."
    )
    yield Section("Published results", note, rows)


def _beside(value: float | None, figure: Figure) -> str:
    if value is None:
        return "–"
    return f"{value - figure.value:+.0f}" if figure.metric == "elo" else f"{100 * value - figure.value:+.1f}"


_SOURCES = list(dict.fromkeys(figure.source for figure in FIGURES))


def _number(source: str) -> int:
    return _SOURCES.index(source) + 1


def sources_table(runs: Sequence[Run]) -> Section:
    """The sources of what is shown."""
    shown = {figure.source for name, metric in _measured(runs) for figure in of_benchmark(name, metric)}
    rows = [[str(_number(source)), source] for source in _SOURCES if source in shown]
    return Section("Sources", "Of the published figures.", [["number", "source"], *rows])


# --- settings ---------------------------------------------------------------------------------------


def settings_table(runs: Sequence[Run]) -> Section:
    """Settings in which runs differ from one another, and from those of the published figures."""
    rows = [["benchmark", "setting", *(run.name for run in runs), "published"]]
    for name in benchmarks_of(runs):
        told = [_settings(run, name) for run in runs]
        apart = {
            key: of[1] for run in runs for key, of in run.summary.get(name, {}).get("unlike_published", {}).items()
        }
        for key in dict.fromkeys(itertools.chain.from_iterable(of or () for of in told)):
            values = [None if of is None else of.get(key) for of in told]
            there = [value for value, of in zip(values, told, strict=True) if of is not None]
            if key in apart or any(value != there[0] for value in there):
                shown = ["–" if of is None else str(value) for value, of in zip(values, told, strict=True)]
                rows.append([name, key, *shown, str(apart.get(key, ""))])
    return Section("Settings that differ", "What is alike in all runs, and as published, is left out.", rows)


def _settings(run: Run, name: str) -> dict[str, Any] | None:
    values = run.summary.get(name)
    if values is None:
        return None
    found: dict[str, Any] = {}
    for key in _SETTINGS:
        value = values.get(key)
        found |= value if isinstance(value, dict) else {key: value}
    found |= {key: run.config.get(key) for key in (*_OF_RUN, "seed")}
    return found | {"data": _digest(run, name)}


def _digest(run: Run, name: str) -> Any:
    return run.config.get("benchmarks", {}).get(name, {}).get("digest")


# --- differences ------------------------------------------------------------------------------------


def differences_table(runs: Sequence[Run]) -> Section:
    """Each run less the first one, with a paired test."""
    rows = [["benchmark", "run", "less", "difference", "95 % interval", "better, worse, of", "p", "test"]]
    for name in benchmarks_of(runs):
        for run in runs[1:]:
            if name in run.summary and name in runs[0].summary:
                found = paired(runs[0], run, name)
                rows.append([name, run.name, runs[0].name, *_told(found)])
    note = (
        "Over the problems that both runs have graded. One right or wrong sample a problem: McNemar's exact test; "
        "several: permutation of the problems' signs. Both are two-sided; no p is corrected for how many there are."
    )
    return Section("Differences between runs", note, rows)


def paired(first: Run, second: Run, benchmark: str) -> Difference | str:
    """How a run differs from another on a benchmark, or why that cannot be said."""
    if _digest(first, benchmark) is None or _digest(first, benchmark) != _digest(second, benchmark):
        return "other data"
    theirs, ours = first.scores(benchmark), second.scores(benchmark)
    both = [problem for problem in theirs if problem in ours]
    found = difference([theirs[problem] for problem in both], [ours[problem] for problem in both])
    return "no problem graded in both" if found is None else found


def _told(found: Difference | str) -> list[str]:
    if isinstance(found, str):
        return [found, *([""] * 4)]
    return [
        f"{100 * found.mean:+.1f} ± {100 * found.stderr:.1f}",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
        f"{found.better}, {found.worse}, {found.n}",
        f"{found.p:.2g}",
        found.test,
    ]


# --- costs and access -------------------------------------------------------------------------------


def cost(values: Mapping[str, Any], prices: Prices) -> float | None:
    """Of one problem with all its samples, at these prices; None where a count or a price is not known."""
    told = values.get("mean_prompt_tokens"), values.get("mean_tokens")
    known = [(count, price) for count, price in zip(told, prices, strict=True) if price is not None]
    if not known or any(count is None for count, _ in known):
        return None
    return values["samples"] * sum(count * price for count, price in known) / 1e6


def costs_table(runs: Sequence[Run], prices: Prices) -> Section:
    """Tokens, time, memory and money."""
    rows = [["benchmark", "run", "prompt tokens", "tokens", "of thinking", "cut off", "tokens/s", "seconds", "memory",
             "cost a problem", "cost a right answer"]]  # fmt: skip
    for name in benchmarks_of(runs):
        for run in runs:
            if (values := run.summary.get(name)) is not None:
                rows.append([name, run.name, *_costs(values, prices)])
    missing = [f"--price-{of}" for of, price in zip(("in", "out"), prices, strict=True) if price is None]
    without = f" {' and '.join(missing)} not given: those tokens count for nothing." if missing else ""
    note = f"Means a sample; a problem's cost is that of all its samples, in the currency of the prices.{without}"
    return Section("Cost", note, rows)


def _costs(values: Mapping[str, Any], prices: Prices) -> list[str]:
    plain = lambda key, form: "–" if values.get(key) is None else form.format(values[key])
    spent, right = cost(values, prices), values.get("pass@1")
    of_right = None if spent is None or not right else spent / values["samples"] / right
    memory = values.get("peak_memory_bytes")
    return [
        plain("mean_prompt_tokens", "{:.0f}"),
        plain("mean_tokens", "{:.0f}"),
        plain("mean_thinking_tokens", "{:.0f}"),
        "–" if values.get("truncated") is None else f"{100 * values['truncated']:.1f} %",
        plain("tokens_per_second", "{:.1f}"),
        plain("wall_seconds", "{:.0f}"),
        "–" if memory is None else f"{memory / 2**30:.2f} GiB",
        "–" if spent is None else f"{spent:.6g}",
        "–" if of_right is None else f"{of_right:.6g}",
    ]


def access_table(runs: Sequence[Run]) -> Section:
    """How the models can be had and deployed."""
    rows = [["model", "parameters", "weights", "deployment", "source"]]
    for run in runs:
        where = f"server {run.config['server']}" if run.config.get("server") else "weights on this machine"
        dtype = run.config.get("dtype")
        rows.append([run.name, "", "", where + (f", {dtype}" if dtype else ""), "the run's config.json"])
    rows += [[of.model, of.parameters, of.weights, of.deployment, of.source] for of in ACCESS]
    return Section("Accessibility and deployment", "Empty where the source tells nothing.", rows)
