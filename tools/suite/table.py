"""Measured rows as a Markdown table, as JSON, and as a plot."""

import json
import math
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from tools.suite.case import Row

_HEAD = (
    "| suite | case | rate, median | x the peer, median (min to max) | peer | share of the ceiling | what bounds it |",
    "|---" * 7 + "|",
)
_PACKAGES = ("jax", "flax", "torch", "transformers", "trl")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most."""
    shown = [f"{of:.{digits}f}" for of in (statistics.median(values), min(values), max(values))]
    return "{} ({} to {})".format(*shown)


def machine() -> dict[str, Any]:
    """What was measured on: device, processor, versions, date."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": found,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def markdown(rows: Sequence[Row], on: dict[str, Any]) -> str:
    """Machine, ceilings and a line for every row."""
    held = ", ".join(f"{name} {number}" for name, number in on["versions"].items() if number)
    lines = [f"{on['device']}; {on['processor']}; Python {on['python']}, {held}; {on['date']}.", ""]
    if rows:
        products = spread([rate / 1e9 for row in rows for rate in row.flops_rate], 0)
        memory = spread([rate / 1e9 for row in rows for rate in row.bandwidth], 1)
        told = f"products {products} GFLOP/s, memory {memory} GB/s"
        lines += [f"Ceilings, measured before every round: {told}; median (min to max).", ""]
    return "\n".join([*lines, *_HEAD, *map(_line, rows)])


def _line(row: Row) -> str:
    known = row.flops or row.nbytes
    share = f"{100 * statistics.median(row.shares):.0f} %" if known else "-"
    ratio, peer = (spread(row.ratios), row.peer_name) if row.peer else ("-", row.alone or "none")
    cells = [row.suite, row.name, f"{_short(row.rate)} {row.unit}/s", ratio, peer, share, row.bound]
    return f"| {' | '.join(cells)} |"


def _short(value: float) -> str:
    """Three digits, as people write them."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def as_json(rows: Sequence[Row], on: dict[str, Any]) -> str:
    """Everything that was measured, and what follows from it."""
    told = [
        {**row._asdict(), "rate": row.rate, "ratios": row.ratios, "shares": row.shares, "bound": row.bound}
        for row in rows
    ]
    return json.dumps({"machine": on, "rows": told}, indent=1) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Two panels: times the peer's speed, with the spread of the rounds, and the share of the machine's ceiling."""
    names = [f"{row.suite}: {row.name}" for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(10, 1.2 + 0.34 * len(rows)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in zip(places, rows, strict=True):
        if row.ratios:
            middle = statistics.median(row.ratios)
            around = [[middle - min(row.ratios)], [max(row.ratios) - middle]]
            left.errorbar(middle, place, xerr=around, fmt="o", color="#0072b2", capsize=3)
        if row.flops or row.nbytes:
            right.barh(place, 100 * statistics.median(row.shares), color="#009e73")
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log")
    left.set_xlabel("times the peer's speed")
    left.set_yticks(list(places), names)
    left.invert_yaxis()
    right.axvline(100, color="black", linewidth=1)
    right.set_xlabel("share of the machine's ceiling, %")
    figure.savefig(path)
