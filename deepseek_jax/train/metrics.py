"""A run's numbers: one JSON line a step, right through kills and resumes, and TensorBoard events beside."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

from deepseek_jax import processes

RESERVED = ("stage", "step", "time", "nonfinite")

# A kill loses at most these last seconds of TensorBoard events, and nothing of metrics.jsonl.
_EVENT_FLUSH_SECONDS = 5


class MetricLog:
    """Appends metrics to `metrics.jsonl` and to TensorBoard event files, so that no step is there twice.

    A line is `{"stage": ..., "step": ..., "time": ..., <name>: <value>, ...}` in strict JSON, with `time` in
    seconds since 1970. JSON has no NaN or infinity: such a value is null in its place, and a last key
    `"nonfinite"` maps its name to "nan", "inf" or "-inf".

    Each stage has a TensorBoard run of its own, `tensorboard/<stage>`, because TensorBoard purges a resumed
    run by step alone, and the stages of a training count their steps each from the beginning. A tag is
    `<stage>/<name>`.

    What is there already stays, but for a last line that a kill cut short. A run that goes on from a checkpoint
    calls `truncate` with the checkpoint's stage and step.

    In several processes all may make one and call it alike: the main process alone reads and writes files.

    Args:
        folder: Where `metrics.jsonl` and `tensorboard/` live; made if absent.

    Raises:
        ValueError: A line other than the last is not JSON.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self._writers: dict[str, SummaryWriter] = {}
        self._last_step: dict[str, int] = {}
        if not processes.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, ends = _scan(self.path)
        self._cut(rows, ends, keep=len(rows))

    def write(self, step: int, values: Mapping[str, Any], stage: str) -> None:
        """Adds one line, which outlives a kill of the process from the moment this returns.

        Args:
            step: Of the stage, from 0 or 1 upwards; never smaller than the last one written for the stage.
            values: Scalars by metric name: Python, numpy or jax numbers.
            stage: For example "sft" or "grpo"; letters, digits, "_", "-" and "." only, for it names a folder.

        Raises:
            ValueError: A name is one of `RESERVED`, the stage cannot name a folder, or the step goes back.
        """
        if taken := [name for name in values if name in RESERVED]:
            raise ValueError(f"metric name {taken[0]!r} is reserved: rename the metric")
        if not stage.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"stage must be letters, digits, '_', '-' and '.', got {stage!r}")
        if step < (last := self._last_step.get(stage, step)):
            raise ValueError(f"{stage} step {step} comes after step {last}: call truncate({stage!r}, {step - 1})")

        if not processes.is_main():
            return
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        row = {"stage": stage, "step": int(step), "time": now}
        row |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        if odd := {name: str(number) for name, number in numbers.items() if not math.isfinite(number)}:
            row["nonfinite"] = odd
        # Closed at each line, so that a kill can cut the last line short and do nothing worse.
        with self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._last_step[stage] = int(step)

        writer = self._writers.get(stage) or self._open_writer(stage, purge_step=int(step))
        for name, number in numbers.items():
            # TensorBoard draws no point for these, and its writer would warn at each.
            if math.isfinite(number):
                writer.add_scalar(f"{stage}/{name}", number, int(step), now)

    def truncate(self, stage: str, step: int) -> None:
        """Forgets what followed a step: later steps of its stage, and everything written after them.

        Earlier stages stay whole. Stages that began after this step go, since they will be run again.
        """
        if processes.is_main():
            rows, ends = _scan(self.path)
            self._cut(rows, ends, keep=_kept(rows, stage, step))

    def close(self) -> None:
        """Writes out and closes the TensorBoard files. A later `write` opens new ones."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, rows: list[dict[str, Any]], ends: list[int], keep: int) -> None:
        """Keeps the first lines of the file, and hides the events of the others from TensorBoard."""
        if self.path.exists():
            # What is kept is always a prefix, so one truncation does it and no kill can come in between.
            os.truncate(self.path, ends[keep - 1] if keep else 0)
        self._last_step = {row["stage"]: row["step"] for row in rows[:keep]}
        self.close()
        for run in sorted((self.folder / "tensorboard").glob("*/")):
            self._open_writer(run.name, purge_step=self._last_step.get(run.name, -1) + 1)

    def _open_writer(self, stage: str, purge_step: int) -> SummaryWriter:
        run = self.folder / "tensorboard" / stage
        # Files are named by the second: the number keeps two resumes within one second apart, and in order.
        number = len(list(run.glob("events*")))
        self._writers[stage] = SummaryWriter(
            str(run),
            purge_step=purge_step,
            flush_secs=_EVENT_FLUSH_SECONDS,
            filename_suffix=f".{number:04d}",
        )
        return self._writers[stage]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`, also one that is being written or whose writer was killed.

    Args:
        path: The file, or the run's folder that holds it.

    Returns:
        One dict a line in file order, with the NaN and infinite values put back; a last line that was cut
        short is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A whole line is not a JSON object with a stage and a step.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: pass a metrics.jsonl or the folder of a run")
    rows, _ = _scan(path)
    for row in rows:
        row |= {name: float(text) for name, text in row.pop("nonfinite", {}).items()}
    return rows


def _scan(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Reads all whole lines, each with the byte offset where it ends; nothing of a file that is not there."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    if not path.exists():
        return rows, ends
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        rows.append(_parse(line, f"{path}, line {number}"))
        ends.append(end)
    return rows, ends


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}): delete the line or the file") from error
    if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
        raise ValueError(f"{where}: wanted an object with 'stage' and 'step', got {line[:80]!r}")
    return row


def _kept(rows: list[dict[str, Any]], stage: str, step: int) -> int:
    """How many leading rows stay when a run goes on from this step of this stage."""
    for index, row in enumerate(rows):
        if row["stage"] == stage and row["step"] > step:
            return index
    ours = [index for index, row in enumerate(rows) if row["stage"] == stage]
    return ours[-1] + 1 if ours else len(rows)
