"""A run's numbers: one JSON line a step, right through kills and resumes; TensorBoard events and W&B beside."""

import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, write_whole, writing
from deepseek_jax.report.events import EventFile

RESERVED = ("stage", "step", "time", "nonfinite")

# A loss that prints as 0.0000. Rounding leaves 1e-8 or so of a sum of advantages that is 0.
_SMALL_LOSS = 5e-5


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where Weights & Biases shows a run. The library is an extra; nothing is sent unless this is given.

    Args:
        project: of the run; made there if absent.
        entity: user or team; None is the user's own.
        name: of the run there; None lets W&B choose.
        offline: write into the run's folder only, for `wandb sync` later. WANDB_MODE can ask for the same.

    Raises:
        ValueError: an empty project.
    """

    project: str
    entity: str | None = None
    name: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError("wandb project: got an empty name, wanted one; leave the whole setting out for no W&B")


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

    With W&B, a line is a step there, by its number in the file, and each stage's curves run over `<stage>/step`. The
    run's id is kept in `wandb.json` with the number of lines sent, so that a resumed run goes on in the same W&B run
    and sends no step twice: those that it runs again are the same, and are passed over. A kill may cost W&B one line.

    In several processes all may make one and call it alike: the main process alone reads and writes files.

    Args:
        folder: Where `metrics.jsonl` and `tensorboard/` live; made if absent.
        wandb: None for none.

    Raises:
        ValueError: A line other than the last is not JSON; or W&B is asked for and is not installed or cannot start.
    """

    def __init__(self, folder: str | Path, *, wandb: WandbConfig | None = None):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self._writers: dict[str, EventFile] = {}
        self._wandb: _WandbRun | None = None
        if not distributed.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lines = StepLines(self.path)
        if wandb is not None:
            self._wandb = _WandbRun(self.folder, wandb)
        self._purge()

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
        if not distributed.is_main():
            return
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        row = {"stage": stage, "step": int(step), "time": now}
        row |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        if odd := {name: str(number) for name, number in numbers.items() if not math.isfinite(number)}:
            row["nonfinite"] = odd
        place = len(self._lines)
        self._lines.append(row)

        writer = self._writers.get(stage) or self._open_writer(stage, purge_step=int(step))
        # TensorBoard draws no point for what is not finite.
        drawn = {f"{stage}/{name}": number for name, number in numbers.items() if math.isfinite(number)}
        writer.add(drawn, int(step), now)

        if self._wandb is not None:
            self._wandb.send(place, stage, int(step), numbers)

    def truncate(self, stage: str, step: int) -> None:
        """Forgets what followed a step: later steps of its stage, and everything written after them.

        Earlier stages stay whole. Stages that began after this step go, since they will be run again.
        """
        if distributed.is_main():
            self._lines.truncate(stage, step)
            self._purge()

    def close(self) -> None:
        """Writes out and closes the TensorBoard files and the W&B run. A later `write` opens them again."""
        self._close_writers()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _purge(self) -> None:
        """Hides from TensorBoard the events of lines that are gone."""
        self._close_writers()
        for run in sorted((self.folder / "tensorboard").glob("*/")):
            self._open_writer(run.name, purge_step=self._lines.last_step.get(run.name, -1) + 1)

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _open_writer(self, stage: str, purge_step: int) -> EventFile:
        self._writers[stage] = EventFile(self.folder / "tensorboard" / stage, purge_step=purge_step)
        return self._writers[stage]


class _WandbRun:
    """A W&B run that outlives the process: its id, and how many lines of `metrics.jsonl` it got."""

    def __init__(self, folder: Path, config: WandbConfig):
        if find_spec("wandb") is None:
            raise ValueError("wandb: not installed, but a project was given: pip install 'deepseek_jax[wandb]'")
        self._folder, self._config = folder, config
        self._path = folder / "wandb.json"
        held = read_json(self._path) if self._path.exists() else {"id": secrets.token_hex(4), "sent": 0}
        self._id, self._sent = held["id"], held["sent"]
        self._open()

    def _open(self) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                name=self._config.name,
                id=self._id,
                resume="allow",
                dir=str(self._folder),
                mode="offline" if self._config.offline else None,  # None leaves it to WANDB_MODE
            )
        except wandb.errors.Error as problem:
            why = " ".join(str(problem).split())
            raise ValueError(f"wandb: cannot start: {why}; log in, or keep it offline") from None
        self._stages: set[str] = set()
        self._note()

    def send(self, place: int, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Sends a line by its place in the file, unless that was sent before."""
        if place < self._sent:
            return
        if self._run is None:
            self._open()
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        # Noted first: a kill in between loses W&B a step, and shows none twice.
        self._sent = place + 1
        self._note()
        self._run.log(
            {f"{stage}/{name}": number for name, number in numbers.items()} | {f"{stage}/step": step}, step=place
        )

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _note(self) -> None:
        write_whole(self._path, json.dumps({"id": self._id, "sent": self._sent}).encode())


class _Mark(NamedTuple):
    stage: str
    step: int
    end: int


class StepLines:
    """A file of JSON lines that each belong to a step of a stage, in which no step is twice.

    What is there already stays, but for a last line that a kill cut short.

    Args:
        path: of the file, in a folder that is there.

    Attributes:
        last_step: the last step written, by stage.

    Raises:
        ValueError: a whole line is not a JSON object with a stage and a step.
    """

    def __init__(self, path: Path):
        self.path = path
        self._marks = [_Mark(row["stage"], row["step"], end) for row, end in read_lines(path)]
        self._cut(len(self._marks))

    def __len__(self) -> int:
        return len(self._marks)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a line, which outlives a kill of the process from the moment this returns.

        Args:
            row: what strict JSON can hold, with `stage` and `step`.

        Raises:
            ValueError: the stage cannot name a folder, or the step goes back.
            OSError: the line cannot be written, with the file's name.
        """
        stage, step = row["stage"], row["step"]
        if not stage.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"stage must be letters, digits, '_', '-' and '.', got {stage!r}")
        if step < (last := self.last_step.get(stage, step)):
            raise ValueError(f"{stage} step {step} comes after step {last}: call truncate({stage!r}, {step - 1})")
        # Closed at each line, so that a kill can cut the last line short and do nothing worse.
        with writing(self.path), self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            end = file.tell()
        self._marks.append(_Mark(stage, step, end))
        self.last_step[stage] = step

    def truncate(self, stage: str, step: int) -> None:
        """Forgets later steps of this stage, and everything written after them; see `MetricLog.truncate`."""
        self._cut(_kept(self._marks, stage, step))

    def _cut(self, keep: int) -> None:
        del self._marks[keep:]
        if self.path.exists():
            # What is kept is always a prefix, so one truncation does it and no kill can come in between.
            os.truncate(self.path, self._marks[-1].end if self._marks else 0)
        self.last_step = {mark.stage: mark.step for mark in self._marks}


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
    rows = [row for row, _ in read_lines(path)]
    for row in rows:
        row |= {name: float(text) for name, text in row.pop("nonfinite", {}).items()}
    return rows


def explain_first_loss(metrics: Mapping[str, float]) -> str | None:
    """Says why the first GRPO step has a loss of 0, which looks like a failure and is none; or when it is one.

    Args:
        metrics: of a stage's first step, by the names that `MetricLog` gets.

    Returns:
        A sentence for whoever watches; None where the loss is not 0 (another loss than GRPO's, tokens averaged over
        samples of unequal length, a balance loss) or the metrics are not those of RL.

    Source: arXiv 2402.03300 equation 3 at a ratio of 1.
    """
    loss = metrics.get("loss")
    if loss is None or "reward" not in metrics or not abs(loss) < _SMALL_LOSS:
        return None
    if metrics.get("frac_reward_zero_std", 0.0) >= 1:
        return (
            "The first loss is 0 because all answers to each question got the same reward: there was nothing to learn "
            "from. If it stays so, change the questions, the temperature or the reward."
        )
    return (
        "A first loss of 0 is right: the policy is still the one that sampled, so every ratio is 1 and the advantages "
        "of each group sum to 0, as does the KL. Its gradient is not 0; watch the reward."
    )


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """All whole lines, each with the byte offset where it ends; nothing of a file that is not there."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield _parse(line, f"{path}, line {number}"), end


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}): delete the line or the file") from error
    if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
        raise ValueError(f"{where}: wanted an object with 'stage' and 'step', got {line[:80]!r}")
    return row


def _kept(marks: list[_Mark], stage: str, step: int) -> int:
    """How many leading lines stay when a run goes on from this step of this stage."""
    for index, mark in enumerate(marks):
        if mark.stage == stage and mark.step > step:
            return index
    ours = [index for index, mark in enumerate(marks) if mark.stage == stage]
    return ours[-1] + 1 if ours else len(marks)
