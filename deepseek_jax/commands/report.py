"""Write the report of a run of r1 anew, from its files alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.files import read_json
from deepseek_jax.commands.evaluate import SUMMARY as EVALUATED
from deepseek_jax.commands.r1_stages import EVALUATION, read_rows
from deepseek_jax.commands.rejection import REJECTED
from deepseek_jax.distributed import printable
from deepseek_jax.evals.samples import Samples
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.report.samples import read_samples
from deepseek_jax.report.tables import Table
from deepseek_jax.train.runs import SUMMARY, write_json
from deepseek_jax.train.stages import marks

_QUANTILES = (0.1, 0.5, 0.9)
_SHOWN = 12  # answers of the last model
_OF_REASON = 3  # samples that were left out
Mark = Mapping[str, Any]


def main(run: Path, /) -> None:
    """Write report.html and summary.json of RUN, a folder of `r1`, from what its stages left there; run nothing.

    Args:
        run: the run's folder.
    """
    print(printable(f"report: {write_run_report(run)}   summary: {run / SUMMARY}"))


def write_run_report(run: Path) -> Path:
    """The report's path.

    Raises:
        ValueError: no stage was begun there.
    """
    held = marks(run)
    if not held:
        raise ValueError(f"{run}: got no folder with a stage.json in it, wanted the --output of a run of r1")
    scored = [mark for mark in held if mark.get("report", {}).get("accuracy") is not None]
    summary = {
        "stages": [
            {
                "name": mark["name"],
                **_chosen(mark["report"], "accuracy", "stderr", "questions"),
                "seconds": mark["seconds"],
            }
            for mark in scored
        ],
        "data_stages": [
            {"name": mark["name"], "report": mark.get("report"), "seconds": mark["seconds"]}
            for mark in held
            if mark not in scored
        ],
        "finished": all("outputs" in mark for mark in held),
        "seconds": round(sum(mark["seconds"] for mark in held), 1),
    }
    tables = [_stages(run, scored), *_parts(run, scored), *_reasons(held), *_left_out(run, held), _cost(run, held)]
    tables += [_lineage(held), _settings(held)]
    path = write_report(
        run,
        title="R1, stage by stage",
        summary=_headline(summary),
        rows=[*_course(scored), *_metrics(run, held)],
        samples=_answers(run, scored),
        completions=_transcripts(run, held),
        tables=tables,
    )
    write_json(run / SUMMARY, summary)
    return path


def _chosen(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values.get(name) for name in names}


def _headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    stages = summary["stages"]
    found = {f"accuracy {of['name']}": _share(of["accuracy"], of["stderr"]) for of in stages}
    return found | {"questions": stages[-1]["questions"] if stages else None, "seconds": summary["seconds"]}


def _share(mean: float, stderr: float | None) -> str:
    return f"{100 * mean:.1f} ± {100 * (stderr or 0):.1f} %"


def _stages(run: Path, scored: Sequence[Mark]) -> Table:
    """What every model came to on the held-out questions."""
    columns = ("stage", "accuracy", "± s.e.", "questions", "samples", "thinking tokens 10 / 50 / 90 %", "cut off")
    columns += ("format", "language", "tokens", "seconds")
    rows = []
    for mark in scored:
        found, lengths = _evaluated(run, mark), _thinking(run, mark)
        told = " / ".join(f"{np.quantile(lengths, q):.0f}" for q in _QUANTILES) if lengths else None
        report, percent = mark["report"], lambda value: None if value is None else f"{100 * value:.1f} %"
        rows.append(
            [
                mark["name"],
                percent(report["accuracy"]),
                percent(report["stderr"]),
                report["questions"],
                report["samples"],
            ]
            + [told, percent(found.get("truncated")), percent(found.get("parts/format"))]
            + [percent(found.get("parts/language")), found.get("tokens"), mark["seconds"]]
        )
    return Table("Stages", columns, rows, note="Every model on the same held-out questions; errors are over questions.")


def _parts(run: Path, scored: Sequence[Mark]) -> Iterator[Table]:
    """Accuracies by level and family, where the questions have such."""
    found = {mark["name"]: _evaluated(run, mark) for mark in scored}
    names = [name for of in found.values() for name in of if name.startswith(("parts/level", "parts/family"))]
    if kinds := sorted(dict.fromkeys(names)):
        percent = lambda value: None if value is None else f"{100 * value:.1f} %"
        rows = [[stage, *(percent(of.get(kind)) for kind in kinds)] for stage, of in found.items()]
        yield Table("Accuracy by level and family", ("stage", *(k.removeprefix("parts/") for k in kinds)), rows)


def _reasons(held: Sequence[Mark]) -> Iterator[Table]:
    """What rejection sampling left out, and why."""
    for mark in held:
        report = mark.get("report", {})
        if "rejected" in report:
            share = lambda count, of=report: f"{100 * count / of['samples']:.1f} %"
            rows = [["kept", report["kept"], share(report["kept"])]]
            rows += [[name, count, share(count)] for name, count in report["rejected"].items()]
            note = (
                f"{report['samples']} samples of {report['prompts']} questions, {report['prompts_kept']} with one kept."
            )
            yield Table("Rejection sampling", ("reason", "samples", "share"), rows, note=note)


def _left_out(run: Path, held: Sequence[Mark]) -> Iterator[Table]:
    """The first samples that rejection sampling left out for each reason."""
    for mark in held:
        path = run / mark["folder"] / REJECTED
        if path.exists() and path.stat().st_size:  # nothing may have been left out
            of_reasons: dict[str, list[Mapping[str, Any]]] = {}
            for row in read_rows(path):
                of_reasons.setdefault(row["reason"], []).append(row)
            said = lambda row, place: row["messages"][place]["content"]
            rows = [
                [reason, said(row, -2), said(row, -1), row["answer"]]
                for reason, found in of_reasons.items()
                for row in found[:_OF_REASON]
            ]
            yield Table("Left out", ("reason", "question", "sample", "wanted"), rows, folded=True)


def _cost(run: Path, held: Sequence[Mark]) -> Table:
    """Seconds, tokens and memory of every stage, those of data too."""
    columns = ("stage", "seconds", "of these scoring", "updates", "seconds of one", "tokens", "peak memory, GB")
    rows: list[list[Any]] = []
    for mark in held:
        folder, found = run / mark["folder"], _evaluated(run, mark)
        steps = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        times = [row["step_time"] for row in steps if "step_time" in row]
        own = read_json(folder / SUMMARY) if times and (folder / SUMMARY).exists() else {}
        peak = found.get("peak_memory_bytes")
        rows.append(
            [mark["name"], mark["seconds"], found.get("wall_seconds"), len(times) or None]
            + [round(float(np.median(times)), 3) if times else None, own.get("tokens")]
            + [None if peak is None else round(peak / 1e9, 1)]
        )
    rows.append(["all", round(sum(mark["seconds"] for mark in held), 1), *[None] * (len(columns) - 2)])
    note = "Of an update the median. Tokens are those of the data of a fine-tuning, and all that a reinforcement saw."
    return Table("Cost", columns, rows, note=note)


def _lineage(held: Sequence[Mark]) -> Table:
    """What every stage was given and gave, by fingerprints."""
    rows = []
    for mark in held:
        origin = mark["from"]
        for name, digest in mark["inputs"].items():
            source = origin["model"] if name == "model" else origin["data"][name.removeprefix("data ")]
            rows.append([mark["name"], "takes", f"{name} of {source}", digest])
        rows += [[mark["name"], "gives", *of] for of in mark.get("outputs", {}).get("digests", {}).items()]
    return Table("Lineage", ("stage", "", "what", "fingerprint"), rows, folded=True)


def _settings(held: Sequence[Mark]) -> Table:
    rows = [[mark["name"], name, value] for mark in held for name, value in mark["settings"].items()]
    return Table("Settings", ("stage", "setting", "value"), rows, folded=True)


def _course(scored: Sequence[Mark]) -> list[dict[str, Any]]:
    """The accuracy after every stage, as a curve of its own."""
    name = "accuracy after each stage: " + ", ".join(f"{place} {mark['name']}" for place, mark in enumerate(scored, 1))
    return [
        {"stage": name, "step": place, "eval/accuracy": mark["report"]["accuracy"]}
        for place, mark in enumerate(scored, 1)
    ]


def _metrics(run: Path, held: Sequence[Mark]) -> list[dict[str, Any]]:
    rows = []
    for mark in held:
        if (run / mark["folder"] / "metrics.jsonl").exists():
            rows += [row | {"stage": f"{mark['name']}: {row['stage']}"} for row in read_metrics(run / mark["folder"])]
    return rows


def _transcripts(run: Path, held: Sequence[Mark]) -> list[dict[str, Any]]:
    """What was written in the course of each RL: at its beginning, its middle and its end."""
    return [
        row | {"stage": f"{mark['name']}: {row['stage']}"}
        for mark in held
        if (run / mark["folder"] / "metrics.jsonl").exists()  # other stages' samples have another form
        for row in read_samples(run / mark["folder"], steps=3)
    ]


def _answers(run: Path, scored: Sequence[Mark]) -> list[dict[str, Any]]:
    """The first answers of the last model, beside those of the first one."""
    if not scored:
        return []
    first, last = (_records(run, mark) for mark in (scored[0], scored[-1]))
    return [
        {
            "prompt": new["asked"],
            "completion": new["completion"],
            f"by {scored[0]['name']}": old["completion"],
            "wanted": new["right"],
            "rewards": {"accuracy": new["score"]},
        }
        for old, new in zip(first[:_SHOWN], last[:_SHOWN], strict=False)
    ]


def _evaluated(run: Path, mark: Mark) -> Mapping[str, Any]:
    """A stage's evaluation, the only benchmark of it."""
    path = run / mark["folder"] / EVALUATION / EVALUATED
    return next(iter(read_json(path).values()), {}) if path.exists() else {}


def _records(run: Path, mark: Mark) -> list[dict[str, Any]]:
    folder = run / mark["folder"] / EVALUATION
    names = read_json(folder / EVALUATED) if (folder / EVALUATED).exists() else {}
    return [record for name in names for record in Samples(folder, mend=False).of(name)]


def _thinking(run: Path, mark: Mark) -> list[int]:
    return [of["thinking_tokens"] for of in _records(run, mark) if of["thinking_tokens"] is not None]
