"""Find problems of a benchmark in training data, and write the data without them."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checkpoint.files import refuse_existing, write_whole
from deepseek_jax.data.sources import Row, Source, open_source
from deepseek_jax.distributed import printable
from deepseek_jax.evals.contamination import LEAST, SHARE, Overlap, overlaps
from deepseek_jax.evals.task import Problem
from deepseek_jax.evals.tasks import files_of, task_named
from deepseek_jax.report.progress import Progress

_SHOWN = 5


class _Compared(NamedTuple):
    """A benchmark beside the data: which of the overlaps are as large as was asked."""

    name: str
    problems: Sequence[Problem]
    found: list[Overlap]
    held: list[Overlap]


def main(
    data: tuple[str, ...],
    /,
    *,
    benchmark: str,
    benchmark_data: tuple[str, ...] = (),
    ngram: int = LEAST,
    share: float = SHARE,
    report: Path | None = None,
    decontaminate: Path | None = None,
) -> None:
    """Say which rows of DATA hold problems of --benchmark: runs of 8 to 13 words that both have, case and marks aside.

    Args:
        data: training data: files (.jsonl, .json, .csv, .parquet), folders of such, or names on the hub.
        benchmark: names with commas, as of `evaluate`, such as math500,aime24.
        benchmark_data: NAME=FILE of each benchmark whose rows are not to be fetched from the hub; a plain FILE of a
            single one.
        ngram: words of a run, 8 to 13; longer ones miss more problems that were told in other words.
        share: a row holds a problem when runs that both have cover this share of the problem's words; 0 takes any run.
        report: a .jsonl file to write, a line an overlap of any share: row, benchmark, problem, share, shared words.
        decontaminate: a .jsonl file to write, the rows that hold no problem.
    """
    if not data:
        raise ValueError("data: got none, wanted files of training data, folders of such, or names on the hub")
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, wanted 0 to 1")
    outputs = [path for path in (report, decontaminate) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"report: got {report}, which --decontaminate writes too, wanted two files")
    for path in outputs:
        refuse_existing(path)
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}, wanted one that is there; make it")
    tasks = [task_named(name) for name in dict.fromkeys(benchmark.replace(" ", "").split(","))]
    files = files_of([task.name for task in tasks], benchmark_data, "benchmark_data")
    sources = [open_source(name) for name in data]
    rows = [(source, number) for source in sources for number in range(len(source))]
    compared = []
    for task in tasks:
        problems = task.problems(open_source(files.get(task.name, task.hub)))
        with Progress(len(rows), task.name) as progress:
            found = overlaps(_told(rows, progress), problems, ngram=ngram)
        compared.append(_Compared(task.name, problems, found, [of for of in found if of.share >= share]))
    for of in compared:
        print(printable("\n".join(_lines(of, rows, ngram, share))))
    if report is not None:
        write_whole(report, "".join(_records(compared, rows)).encode("utf-8", "backslashreplace"))
        print(printable(f"wrote {report}"))
    if decontaminate is not None:
        dirty = {overlap.row for of in compared for overlap in of.held}
        _write(decontaminate, [place for number, place in enumerate(rows) if number not in dirty])
        print(printable(f"wrote {decontaminate}: {len(rows) - len(dirty)} of {len(rows)} rows, {len(dirty)} left out"))


def _told(rows: Sequence[tuple[Source, int]], progress: Progress) -> Iterator[Row]:
    for source, number in rows:
        yield source[number]
        progress.advance(1)


def _lines(of: _Compared, rows: Sequence[tuple[Source, int]], ngram: int, share: float) -> Iterator[str]:
    held = of.held
    yield (
        f"{of.name}: {len({o.row for o in held})} of {len(rows)} rows hold {len({o.problem for o in held})} of "
        f"{len(of.problems)} problems (runs of {ngram} words over {100 * share:g} % of a problem or more; "
        f"{len({o.row for o in of.found})} rows have a run at all)"
    )
    for overlap in sorted(held, key=lambda o: -o.share)[:_SHOWN]:
        source, number = rows[overlap.row]
        problem = of.problems[overlap.problem].id
        yield f"  {source.where(number)}: {100 * overlap.share:.0f} % of {problem}: {overlap.shared[:160]}"
    if len(held) > _SHOWN:
        yield f"  and {len(held) - _SHOWN} more: --report FILE has all"


def _records(compared: Sequence[_Compared], rows: Sequence[tuple[Source, int]]) -> Iterator[str]:
    for of in compared:
        for overlap in of.found:
            source, number = rows[overlap.row]
            record = {"where": source.where(number), "row": overlap.row, "benchmark": of.name}
            record |= {"problem": of.problems[overlap.problem].id, "share": round(overlap.share, 4)}
            yield json.dumps(record | {"shared": overlap.shared}, ensure_ascii=False) + "\n"


def _write(path: Path, rows: Sequence[tuple[Source, int]]) -> None:
    """Rows as JSON Lines, in a file that is never seen half-written."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for source, number in rows:
                try:
                    file.write(json.dumps(source[number], ensure_ascii=False, allow_nan=False) + "\n")
                except (TypeError, ValueError) as problem:
                    raise ValueError(f"{source.where(number)}: cannot be JSON ({problem}); drop that column") from None
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
