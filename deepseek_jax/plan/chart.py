"""A plan's memory against the context, drawn: what the weights take, what sequences add, where the chip ends."""

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from deepseek_jax.config import ModelConfig
from deepseek_jax.plan.chips import GB, Chip
from deepseek_jax.plan.planner import Plan, memory_at

_COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7")  # told apart without red-green vision
_POINTS = 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body {{ font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
img {{ max-width: 100% }} td, th {{ padding: 0.2rem 1rem 0.2rem 0; text-align: left }}</style></head>
<body><h1>{title}</h1><img alt="Memory a device against context" src="data:image/png;base64,{image}">
<table><tr><th>memory a device</th><th>GB</th></tr>{rows}</table></body></html>
"""


def contexts(config: ModelConfig) -> list[int]:
    """Where the curves are worked out: the model's whole context, half of it, and so on."""
    longest = config.max_position_embeddings
    return sorted({max(1, longest >> halved) for halved in range(_POINTS)})


def curves(plan: Plan, config: ModelConfig, chip: Chip) -> dict[int, list[int]]:
    """Bytes a device at each of `contexts`, by batch: a quarter of the plan's, its own, two and four times it.

    All on the plan's mesh. Training cannot have less than its mesh has batch shards, so that it begins at its own.
    """
    first = plan.batch if plan.workload != "serve" else max(1, plan.batch // 4)
    batches = dict.fromkeys((first, plan.batch, 2 * plan.batch, 4 * plan.batch))
    return {
        batch: [memory_at(plan, config, chip, batch, length).total for length in contexts(config)] for batch in batches
    }


def draw(plan: Plan, config: ModelConfig, chip: Chip) -> Figure:
    """Weights and the chip's memory as level lines, a curve for each batch."""
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="tokens of context", ylabel="GB a device")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    lengths = contexts(config)
    for (batch, totals), colour in zip(curves(plan, config, chip).items(), _COLOURS, strict=False):
        mine = " (the plan)" if batch == plan.batch else ""
        axes.plot(lengths, [total / GB for total in totals], color=colour, marker="o", label=f"batch {batch}{mine}")
    axes.axhline(plan.memory.weights / GB, color="#555555", linestyle=":", label="weights")
    axes.axhline(plan.hbm / GB, color="black", label=f"memory of {plan.chip}")
    axes.axhline(plan.limit / GB, color="black", linestyle="--", label="usable share of it")
    axes.axvline(plan.context, color="#bbbbbb", linewidth=1)
    axes.set_xticks(lengths, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in lengths], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(title(plan))
    axes.legend(loc="upper left", fontsize=8)
    return figure


def title(plan: Plan) -> str:
    return f"{plan.model}, {plan.workload}, {plan.dtype}, {plan.chips} x {plan.chip}"


def write_chart(path: Path, plan: Plan, config: ModelConfig, chip: Chip) -> None:
    """Write the chart as PNG, or as one HTML page that asks the network for nothing.

    Raises:
        ValueError: the name ends in neither .png nor .html.
    """
    check_path(path)
    image = io.BytesIO()
    draw(plan, config, chip).savefig(image, format="png")
    if path.suffix == ".png":
        path.write_bytes(image.getvalue())
        return
    kinds = plan.as_json()["memory"].items()
    rows = "".join(f"<tr><td>{kind}</td><td>{size / GB:.2f}</td></tr>" for kind, size in kinds)
    encoded = base64.b64encode(image.getvalue()).decode()
    path.write_text(_PAGE.format(title=html.escape(title(plan)), image=encoded, rows=rows), encoding="utf-8")


def check_path(path: Path) -> None:
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"chart: got {str(path)!r}, wanted a name that ends in .png or .html")
