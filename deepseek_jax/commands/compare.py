"""Hold evaluations against one another and against published results, as Markdown and HTML."""

import math
from pathlib import Path

from deepseek_jax.distributed import printable
from deepseek_jax.evals.comparison import Prices, read_runs, sections
from deepseek_jax.evals.comparison_page import markdown, write_comparison
from deepseek_jax.train.runs import write_json


def main(
    runs: tuple[Path, ...],
    /,
    *,
    output: Path = Path("runs/compare"),
    price_in: float | None = None,
    price_out: float | None = None,
) -> None:
    """Compare RUNS: scores beside published ones, settings that differ, paired tests, costs; a table of each.

    Args:
        runs: folders that `evaluate --output` wrote; every other one is held against the first.
        output: folder for compare.md, compare.html, compare.json and the plots.
        price_in: of a million tokens of prompts, in any currency.
        price_out: of a million tokens of completions, thinking included.
    """
    for name, price in {"price_in": price_in, "price_out": price_out}.items():
        if price is not None and not 0 <= price < math.inf:
            raise ValueError(f"{name}: got {price}, wanted 0 or more")
    if not runs:
        raise ValueError("runs: got none, wanted folders that `deepseek-jax evaluate --output` wrote")
    found = read_runs(runs)
    parts = sections(found, Prices(price_in, price_out))
    files = write_comparison(found, parts, output)
    write_json(output / "compare.json", {part.title: part.rows for part in parts})
    print(printable(markdown([part for part in parts if part.title.startswith(("Scores", "Differences", "Settings"))])))
    print(printable(f"wrote {', '.join(map(str, files))}"))
