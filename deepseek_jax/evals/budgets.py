"""Accuracy against the length of thinking: thoughts are closed at budgets, and from one run comes what can.

A token is a function of its seed and place. So under a budget a sample is the one without it, unless it thought longer;
only those that did are drawn again, by the engine that closes their thoughts.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.evals.run import Benchmark
from deepseek_jax.evals.samples import Key, Samples

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart without red-green vision


def cut_by(benchmark: Benchmark, held: Samples, budget: int) -> list[Key]:
    """The samples under a budget that are other ones than without it, and are not there yet."""
    found = []
    for key in benchmark.keys(budget):
        whole = held.get(key._replace(budget=-1))
        assert whole is not None, key
        if (whole["thinking_tokens"] or 0) > budget and held.get(key) is None:
            found.append(key)
    return found


def curve(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of thinking tokens and accuracy, the shortest first.

    Args:
        found: summaries by their budget, as text; "none" has none.
    """
    points = [
        {
            "budget": None if budget == "none" else int(budget),
            "thinking_tokens": values["mean_thinking_tokens"],
            "pass@1": values["pass@1"],
            "stderr": values["stderr"],
        }
        for budget, values in found.items()
    ]
    return sorted(points, key=lambda point: (point["budget"] is None, point["budget"]))


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy with its standard error against mean thinking tokens, a line a benchmark, as a PNG."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        known = [point for point in points if point["pass@1"] is not None and point["thinking_tokens"] is not None]
        axes.errorbar(
            [point["thinking_tokens"] for point in known],
            [100 * point["pass@1"] for point in known],
            [100 * point["stderr"] for point in known],
            marker="o",
            capsize=3,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
        )
        for point in known:
            told = "no budget" if point["budget"] is None else str(point["budget"])
            axes.annotate(told, (point["thinking_tokens"], 100 * point["pass@1"]), fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("thinking tokens (mean)")
    axes.set_ylabel("pass@1 (%), with standard error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    write_whole(path, drawn.getvalue())
