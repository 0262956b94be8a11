"""A comparison as Markdown, and as one HTML file that asks the network for nothing."""

import base64
import html
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.evals.comparison import Run, Section, benchmarks_of
from deepseek_jax.evals.published import THINKING, of_benchmark

MARKDOWN, PAGE, SCORES, TOKENS = "compare.md", "compare.html", "scores.png", "tokens.png"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart without red-green vision
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_TITLE = "Evaluations compared"


def write_comparison(runs: Sequence[Run], parts: Sequence[Section], folder: Path) -> list[Path]:
    """Writes the report and its plots; the files.

    Args:
        runs: what is compared.
        parts: the report's tables.
        folder: made if absent; files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = {SCORES: _png(scores_figure(runs)), TOKENS: _png(tokens_figure(runs))}
    texts = {MARKDOWN: markdown(parts, list(plots)), PAGE: page(parts, plots)}
    for name, content in {**plots, **{name: text.encode() for name, text in texts.items()}}.items():
        write_whole(folder / name, content)
    return [folder / name for name in (MARKDOWN, PAGE, *plots)]


def markdown(parts: Sequence[Section], images: Sequence[str] = ()) -> str:
    """The report's tables; text of files cannot end a cell or begin markup."""
    lines = [f"# {_TITLE}", ""]
    for part in parts:
        head, *rows = [[_plain(cell) for cell in row] for row in part.rows]
        lines += [f"## {part.title}", "", part.note, "", _row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in images)]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    for sign in "\\|<>[]`*_":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def page(parts: Sequence[Section], plots: dict[str, bytes]) -> str:
    """The same as HTML, with its plots inside."""
    style = resources.files("deepseek_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    body = [f"<h1>{_TITLE}</h1>"]
    for name, drawn in plots.items():
        image = base64.b64encode(drawn).decode()
        body.append(f'<figure class="card"><img alt="{name}" style="width: 100%" src="data:image/png;base64,{image}">'
                    "</figure>")  # fmt: skip
    for part in parts:
        head, *rows = part.rows
        cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
        body.append(
            f'<h2>{html.escape(part.title)}</h2>\n<p class="note">{html.escape(part.note)}</p>\n'
            f'<div class="card scroll"><table>\n{chr(10).join(lines)}\n</table></div>'
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_TITLE}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def scores_figure(runs: Sequence[Run]) -> Figure:
    """pass@1 of each run with its standard error, and published figures as marks beside."""
    names = benchmarks_of(runs)
    figure = Figure(figsize=(max(5.0, 1.6 * len(names) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        known = [(place, run.summary[name]) for place, name in enumerate(names) if run.summary.get(name)]
        known = [(place, values) for place, values in known if values["pass@1"] is not None]
        axes.bar(
            [place - 0.4 + width * (number + 0.5) for place, _ in known],
            [100 * values["pass@1"] for _, values in known],
            width,
            yerr=[100 * (values.get("stderr") or 0.0) for _, values in known],
            capsize=3,
            label=_label(run),
            color=_COLOURS[number % len(_COLOURS)],
        )
    for place, name in enumerate(names):
        for mark, model in (("D", "DeepSeek-R1"), ("o", "GPT-4o-0513")):
            found = [of.value for of in of_benchmark(name, "pass@1") if of.model == model]
            axes.plot([place] * len(found), found, mark, markerfacecolor="white", markeredgecolor="black",
                      label=None if place else f"{model} (published)")  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("pass@1 (%), with standard error")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def tokens_figure(runs: Sequence[Run]) -> Figure:
    """pass@1 against mean tokens of a sample, a mark a benchmark and run; R1's published points where AIME 2025 is."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        known = [(name, of) for name, of in run.summary.items() if of["pass@1"] is not None and of.get("mean_tokens")]
        axes.errorbar(
            [of["mean_tokens"] for _, of in known],
            [100 * of["pass@1"] for _, of in known],
            [100 * (of.get("stderr") or 0.0) for _, of in known],
            fmt="o",
            capsize=3,
            label=_label(run),
            color=_COLOURS[number % len(_COLOURS)],
        )
        for name, of in known:
            axes.annotate(name, (of["mean_tokens"], 100 * of["pass@1"]), fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    if "aime25" in benchmarks_of(runs):
        for tokens, accuracy, model in THINKING:
            axes.plot([tokens], [accuracy], "D", color="black", label=f"{model}, aime25 (published)")
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a sample (mean)")
    axes.set_ylabel("pass@1 (%), with standard error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _label(run: Run) -> str:
    """A run's name; matplotlib would read dollars as mathematics, and leave out a name that begins with _."""
    return f"run {run.name}".replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    return drawn.getvalue()
