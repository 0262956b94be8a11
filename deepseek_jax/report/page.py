"""A run's `report.html`: summary, curves and samples in one file that asks the network for nothing.

Sampled text is hostile input: all text is escaped, and the page's own policy forbids requests, and scripts but for the
one that searches completions (page.js), which it knows by its digest. Its looks are in page.css.
"""

import base64
import fnmatch
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.report.metrics import explain_first_loss
from deepseek_jax.report.tables import Table

# Drawn in colours that nothing else uses, and then exchanged for the page's own, which follow light and dark.
_PAGE_COLOURS = {
    "#010101": "var(--ink)",
    "#010102": "var(--faint)",
    "#010103": "var(--line)",
    "#020201": "var(--c1)",
    "#020202": "var(--c2)",
    "#020203": "var(--c3)",
    "#020204": "var(--c4)",
    "#020205": "var(--c5)",
    "#020206": "var(--c6)",
}
_INK, _FAINT, _LINE, *_CURVES = _PAGE_COLOURS

# More raw points than this are thinned out: the eye cannot tell, and the page stays small.
_MAX_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: a title, the unit of its axis, and the metrics on it, as names or patterns."""

    title: str
    unit: str
    names: tuple[str, ...]
    percent: bool = False
    log: bool = False
    exact: bool = False  # known rather than measured, so drawn without smoothing


PANELS = (
    Panel(title="Reward", unit="reward", names=("reward", "reward_std")),
    Panel(title="Accuracy", unit="%", names=("accuracy", "eval/accuracy", "eval_accuracy"), percent=True),
    Panel(
        title="Likeliest tokens that are right",
        unit="%",
        names=("mean_token_accuracy", "eval/mean_token_accuracy"),
        percent=True,
    ),
    Panel(
        title="Response length",
        unit="tokens",
        names=("completions/mean_length", "completions/min_length", "completions/max_length"),
    ),
    Panel(title="Length of finished responses", unit="tokens", names=("completions/*_terminated_length",)),
    Panel(title="KL to the reference", unit="nats per token", names=("kl",)),
    Panel(title="Entropy", unit="nats per token", names=("entropy",)),
    Panel(title="Reward parts", unit="mean reward", names=("rewards/*/mean",)),
    Panel(title="Spread of reward parts", unit="standard deviation", names=("rewards/*/std",)),
    Panel(title="Loss", unit="loss", names=("loss", "policy_loss", "eval/loss", "eval_loss")),
    Panel(title="Learning rate", unit="per update", names=("learning_rate", "lr"), exact=True),
    Panel(title="Gradient norm", unit="global norm", names=("grad_norm",)),
    Panel(
        title="Clipping, and groups of equal reward",
        unit="%",
        names=("clip_ratio", "clip_ratio/*", "completions/clipped_ratio", "frac_reward_zero_std"),
        percent=True,
    ),
    Panel(title="Ratio to the sampling policy", unit="ratio", names=("ratio",)),
    Panel(
        title="Sampler against trainer",
        unit="|difference|, nats",
        names=("sampling/sampling_logp_difference/*",),
        log=True,
    ),
    Panel(
        title="Importance sampling", unit="ratio, trainer to sampler", names=("sampling/importance_sampling_ratio/*",)
    ),
    Panel(title="Experts that differ", unit="%", names=("sampling/experts_differ",), percent=True),
    Panel(title="Tokens seen", unit="tokens", names=("num_tokens",), exact=True),
    Panel(title="Step time", unit="seconds", names=("step_time", "time/*", "timing/*")),
)


def write_report(
    folder: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    completions: Sequence[Mapping[str, Any]] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Writes `report.html` into a run's folder.

    Args:
        folder: The run's folder; made if absent.
        title: The page's heading.
        summary: What the run came to, by name; a number, text, None, or anything JSON can hold. Where
            `accuracy_before` and `accuracy_after` are there, one sentence tells them.
        rows: What `read_metrics` returns. Each stage becomes a section, each metric a curve over its steps;
            metrics that no panel names are folded away below the others.
        samples: What the model wrote: dicts with `prompt` and `completion` texts, optionally `rewards`, a
            mapping of reward names to numbers or None, and any further columns.
        completions: What `read_samples` returns: what the model wrote in the course of the training. All of it is in
            the page, so that a long run asks for `steps=3`, say: the first, a middle and the last line of each stage.
        tables: What else there is to tell, above the curves; folded ones below them.

    Returns:
        The path of the file. A reader never sees half of it.
    """
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    body = [
        f"<h1>{_text(title)}</h1>",
        _headline(summary),
        _summary(summary),
        *(_table(table) for table in tables if not table.folded),
        *(_stage(stage, [row for row in rows if row["stage"] == stage], i) for i, stage in enumerate(stages)),
        "" if rows else '<p class="note">No metrics were written.</p>',
        *(_table(table) for table in tables if table.folded),
        _samples(samples),
        _course(completions),
    ]
    style, script = (_packaged(f"page.{kind}") for kind in ("css", "js"))
    # No other script runs than this one, whatever a model wrote.
    policy = f" script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}';"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should any text ever slip through as markup, the browser still runs nothing and asks no one.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        f"{policy if completions else ''} style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + (f"\n<script>{script}</script>" if completions else "")
        + "\n</body>\n</html>\n"
    )
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return path


def _packaged(name: str) -> str:
    """A file of this package, from the line after its element's tag on."""
    return "\n" + resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Averages each value with its neighbours, so that the curve neither lags nor loses its ends.

    Args:
        values: [T] numbers.
        window: How many values are averaged, about; near an end only those that are there.

    Returns:
        [T] float64 means.
    """
    half = window // 2
    # Summed from the first value on, so that a constant stays exactly one and its axis shows no rounding.
    origin = values[:1].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values - origin)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return origin + (sums[high] - sums[low]) / (high - low)


def _stage(stage: str, rows: list[Mapping[str, Any]], number: int) -> str:
    """A stage's heading and its plots, the metrics that no panel names folded away."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step", "time")))
    taken: set[str] = set()
    known, other = [], []
    for panel, on_panel in _match(names):
        taken.update(on_panel)
        note = _first_loss(rows[0]) if "loss" in on_panel else ""
        known.append(_figure(panel, on_panel, rows, f"s{number}p{len(known)}", note))
    for name in names:
        if name not in taken:
            panel = Panel(title=name, unit="value", names=(name,))
            other.append(_figure(panel, [name], rows, f"s{number}o{len(other)}"))
    folded = (
        f'<details><summary>Other metrics ({len(other)})</summary><div class="plots">{"".join(other)}</div></details>'
    )
    steps = [row["step"] for row in rows]
    span = f"steps {min(steps)} to {max(steps)}"
    return (
        f'<section><h2>{_text(stage)} <small class="note">{span}</small></h2>\n<div class="plots">'
        f"{''.join(known)}</div>{folded if other else ''}</section>"
    )


def _match(names: list[str]) -> Iterator[tuple[Panel, list[str]]]:
    """The panels that have something to show, each with its metrics."""
    for panel in PANELS:
        found = [n for pattern in panel.names for n in names if fnmatch.fnmatchcase(n, pattern)]
        if found:
            yield panel, found


def _first_loss(row: Mapping[str, Any]) -> str:
    """What there is to say of the loss of a stage's first step."""
    if row["step"] > 1:
        return ""
    why = explain_first_loss({name: value for name, value in row.items() if isinstance(value, int | float)})
    return f'<p class="note">{_text(why)}</p>' if why else ""


def _figure(panel: Panel, names: list[str], rows: list[Mapping[str, Any]], key: str, told: str = "") -> str:
    """One plot as a figure element: faint points as measured, and a smoothed line through them."""
    curves = {name: _series(name, rows) for name in names}
    left_out = sum(absent for _, _, absent in curves.values())
    note = f" <small>{left_out} values not finite, left out</small>" if left_out else ""
    return (
        f'<figure class="card"><figcaption>{_text(panel.title)}{note}</figcaption>'
        f"{_svg(panel, {name: (x, y) for name, (x, y, _) in curves.items()}, key)}{told}</figure>"
    )


def _series(name: str, rows: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, int]:
    """A metric's steps and finite values, and how many values were not finite."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    x, y = np.array(finite, dtype=np.float64).reshape(-1, 2).T
    return x, y, len(points) - len(finite)


def _svg(panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]], key: str) -> str:
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour = _CURVES[i % len(_CURVES)]
        y = 100 * y if panel.percent else y
        shown = np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).astype(int)
        few = len(x) < 12
        if not panel.exact:
            size, alpha = (3.2, 0.9) if few else (2, 0.28)
            axes.plot(x[shown], y[shown], "o", color=colour, markersize=size, alpha=alpha, mew=0)
        line = y if few or panel.exact else smooth(y, max(5, len(y) // 15))
        # A dollar sign would start a formula.
        axes.plot(x[shown], line[shown], color=colour, linewidth=1.7, label=name.replace("$", r"\$"))
    if panel.log and any((y > 0).any() for _, y in curves.values()):
        axes.set_yscale("log", nonpositive="mask")
    elif max((np.abs(y).max(initial=0) for _, y in curves.values()), default=0) >= 100_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(which="both", colors=_FAINT, labelsize=9, length=0)
    axes.xaxis.label.set_color(_FAINT)
    axes.yaxis.label.set_color(_FAINT)
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.4)

    out = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text (smaller, in the page's own font); the salt makes ids differ from plot to plot.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 10}):
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, wanted in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, wanted)
    # Ids such as "axes_1" would repeat from plot to plot, and so would references find the wrong plot.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    label = html.escape(f"{panel.title}: {', '.join(curves)} over steps")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _headline(summary: Mapping[str, Any]) -> str:
    """One sentence on what the run did to the accuracy, where the summary knows it."""
    if not {"accuracy_before", "accuracy_after"} <= summary.keys():
        return ""
    ends = []
    for end in ("before", "after"):
        stderr = summary.get(f"stderr_{end}")
        margin = f" ± {100 * stderr:.1f}" if stderr is not None else ""
        ends.append(f"<strong>{100 * summary[f'accuracy_{end}']:.1f} %</strong>{margin}")
    questions = summary.get("questions")
    on = f" on {_text(_value(questions))} unseen questions" if questions is not None else ""
    return f'<p class="headline">Accuracy{on}: {ends[0]} before, {ends[1]} after.</p>'


def _summary(summary: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{_text(str(name).replace('_', ' '))}</dt><dd>{_text(_value(value))}</dd></div>"
        for name, value in summary.items()
    )
    return f'<dl class="summary card">{items}</dl>' if items else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    whole = f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    if table.folded:
        return f"<section><details><summary>{_text(table.title)}</summary>{note}{whole}</details></section>"
    return f"<section><h2>{_text(table.title)}</h2>\n{note}{whole}</section>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The table of what the model wrote: texts, then every reward in a column of its own."""
    if not samples:
        return ""
    rewards = list(dict.fromkeys(name for sample in samples for name in sample.get("rewards", {})))
    columns = list(dict.fromkeys(["prompt", "completion", *(n for s in samples for n in s if n != "rewards")]))
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    head += "".join(f'<th class="number">{_text(name)}</th>' for name in rewards)
    body = []
    for sample in samples:
        cells = [_cell(sample.get(name)) for name in columns]
        cells += [_cell(sample.get("rewards", {}).get(name)) for name in rewards]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<section><h2>Samples</h2>\n<div class="card scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _course(completions: Sequence[Mapping[str, Any]]) -> str:
    """What the model wrote step by step: a folded table for each prompt, with a box to search them all."""
    if not completions:
        return ""
    parts = [
        f"<h3>{_text(row['stage'])}, step {_text(_value(row['step']))}</h3>"
        + "".join(_group(group) for group in row["groups"])
        for row in completions
    ]
    return (
        '<section><h2>Completions over the training</h2>\n<div class="find">'
        '<input id="find" type="search" placeholder="Search prompts and completions" autocomplete="off">'
        '<button id="expand" type="button">Open or close all</button><span id="found" class="note"></span></div>\n'
        + "\n".join(parts)
        + "</section>"
    )


def _group(group: Mapping[str, Any]) -> str:
    samples = group["samples"]
    names = list(dict.fromkeys(name for sample in samples for name in sample["rewards"]))
    extra = list(dict.fromkeys(name for sample in samples for name in sample.get("extra", {})))
    numbers = [*names, "reward", "advantage", "length", "finished"]
    head = "<th>completion</th>" + "".join(f'<th class="number">{_text(name)}</th>' for name in numbers)
    head += "".join(f"<th>{_text(name)}</th>" for name in extra)
    body = []
    for sample in samples:
        cells = [_cell(sample["completion"])] + [_cell(sample["rewards"].get(name)) for name in names]
        cells += [_cell(sample[name]) for name in ("reward", "advantage", "length")]
        cells += [f'<td class="number">{"yes" if sample["finished"] else "cut off"}</td>']
        cells += [_cell(sample.get("extra", {}).get(name)) for name in extra]
        body.append(f"<tr>{''.join(cells)}</tr>")
    rewards = [sample["reward"] for sample in samples if sample["reward"] is not None]
    mean = f" <small class='note'>mean reward {_value(float(np.mean(rewards)))}</small>" if rewards else ""
    wanted = group.get("answer")
    answer = f'<h4>Wanted</h4><pre dir="auto">{_text(wanted)}</pre>' if wanted is not None else ""
    return (
        f'<details class="group card"><summary>{_text(_first_words(group["prompt"]))}{mean}</summary>'
        f'<h4>Prompt</h4><pre class="asked" dir="auto">{_text(group["prompt"])}</pre>{answer}'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _first_words(text: str) -> str:
    shown = " ".join(text[:400].split())
    return shown if len(shown) <= 120 else shown[:119] + "…"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f'<td><pre dir="auto">{_text(value)}</pre></td>'
    return f'<td class="number">{_text(_value(value))}</td>'


def _value(value: Any) -> str:
    """A summary's or a sample's value as text: thousands apart, floats to four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int | np.integer):
        # Years, seeds and small counts read better unseparated.
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float | np.floating):
        return f"{value:.1f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(text: str) -> str:
    """Escapes text for HTML, in content and in attributes, and shows what no page may hold as U+FFFD."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return html.escape(shown, quote=True)
