"""Speed beside a peer and beside this machine's own ceilings, everything in turn in one run; see docs/benchmarks.md."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.cli import run
from deepseek_jax.compilation_cache import keep_compiled
from tools.suite import kernel_cases, model_cases
from tools.suite.apart import ProcessDied, apart
from tools.suite.case import Row, measured
from tools.suite.ceilings import CEILINGS
from tools.suite.subject import subject
from tools.suite.table import as_json, machine, markdown, plot

Name = Literal["all", "decode", "prefill", "train", "grpo", "convert", "engine", "kernels"]
SUITES = [name for name in get_args(Name) if name != "all"]


def main(
    model: Path | None = None,
    /,
    *,
    suite: tuple[Name, ...] = ("all",),
    dtype: Literal["float32", "bfloat16"] | None = None,
    rounds: int = 3,
    quick: bool = False,
    json: bool = False,
    output: Path | None = None,
) -> None:
    """Measure, and print a table: rates, times the peer's speed, the share of the machine's ceiling, what bounds it.

    A round measures the machine's ceilings, then ours and the peer's, who take turns at being first; one round before
    is not counted. Peers are transformers (decode, prefill, engine), torch's AdamW (train), TRL (grpo), `cp -r`
    (convert), and torch or a dense product (kernels). They need the extra `oracle`; what lacks, the table says. Every
    case of a model runs in a process of its own; one that dies is told, and the others are measured all the same.

    Args:
        model: Hugging Face folder; without it a tiny random DeepSeek-V3, whose times are those of starting programs.
        suite: one or several of them.
        dtype: of weights and computation; float32 on a CPU, else bfloat16.
        rounds: counted ones of every case.
        quick: cases so small that they show only that everything runs.
        json: print JSON, every round's seconds in it, in the place of the table.
        output: a folder for table.md, rows.json and plot.svg, written anew after every case.

    Raises:
        ChildProcessError: not all was measured.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, wanted at least 1")
    chosen = SUITES if "all" in suite else [name for name in SUITES if name in suite]
    sizes = model_cases.QUICK if quick else model_cases.Sizes()
    (on,) = apart(_machine)  # this process leaves the accelerator to those that measure
    rows: list[Row] = []
    died = 0
    for name, of in [(each, of) for each in chosen for of in sizes.each(each)]:
        try:
            for row in apart(measured_rows, name, of, model, dtype, rounds, quick):
                rows.append(row)
                if output is not None:
                    _write(rows, on, output)
        except ProcessDied as problem:
            died += 1
            which = f"{name}, {of}".removesuffix(", ")
            print(f"error: {which}: {problem}; the others are measured all the same", file=sys.stderr)
    print(as_json(rows, on) if json else markdown(rows, on))
    if died:
        raise ChildProcessError(f"processes of {died} cases died: what they were to measure is not in the table")


def _machine() -> Iterator[dict]:
    yield machine()


def measured_rows(
    name: str, sizes: model_cases.Sizes, model: Path | None, dtype: str | None, rounds: int, quick: bool
) -> Iterator[Row]:
    """The rows of a suite, of cases of these sizes; for a process of their own."""
    keep_compiled()
    with subject(model, dtype) as of:
        if name == "kernels":
            cases = kernel_cases.kernels(of, shapes=kernel_cases.SHAPES["quick"] if quick else None)
        else:
            cases = getattr(model_cases, name)(of, sizes=sizes)
        for case in cases:
            yield measured(case, CEILINGS, rounds)


def _write(rows: list[Row], on: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.md", (markdown(rows, on) + "\n").encode())
    write_whole(folder / "rows.json", as_json(rows, on).encode())
    plot(rows, folder / "plot.svg")


if __name__ == "__main__":
    run(main)
