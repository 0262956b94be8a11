"""The loop of every stage: next batch, step, log, checkpoint; a killed run goes on where its checkpoint stands."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grain
import jax

from deepseek_jax import distributed
from deepseek_jax.checkpoint.state import RunCheckpoints, shapes
from deepseek_jax.generation.live import NonFiniteLogitsError
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.progress import Progress

State = TypeVar("State")
StepFunction = Callable[[State, Any, int], tuple[State, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        name: of its metrics and its checkpoint folder.
        steps: to run in all.
        save_every: steps between checkpoints; the last step is always saved.
        shown: metrics for the progress bar, by the name shown there.
        keep_best: the metric, higher is better, by which the best checkpoint is kept beside the newest; None keeps
            the newest alone. A step that does not have it, or has no finite one, has no score.
        profile_steps: "A:B" traces the steps A to B, both included and counted from 1 as in metrics.jsonl, for
            TensorBoard or Perfetto, into `profile` in the run's folder; None traces none. Of several processes the
            main one is traced. A resumed stage traces those of them that it still runs.

    Raises:
        ValueError: `profile_steps` is no such range, or reaches beyond `steps`.
    """

    name: str
    steps: int
    save_every: int
    shown: Mapping[str, str]
    keep_best: str | None = None
    profile_steps: str | None = None

    def __post_init__(self) -> None:
        if self.profile_steps is not None:
            profiled_steps(self.profile_steps, self.steps)


def profiled_steps(text: str, steps: int) -> range:
    """The steps that "A:B" names, from A to B inclusive.

    >>> profiled_steps("3:5", 10)
    range(3, 6)

    Args:
        text: what `--profile-steps` was given.
        steps: there are.

    Raises:
        ValueError: not two whole numbers with 1 <= A <= B <= steps.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= steps):
        raise ValueError(f"profile_steps: got {text!r}, wanted A:B with 1 <= A <= B <= {steps}, steps to trace")
    return range(int(first), int(last) + 1)


def run_stage(
    stage: Stage, state: State, data: grain.DatasetIterator, step: StepFunction, *, folder: Path, log: MetricLog
) -> State:
    """Run a stage to its end, from its newest checkpoint if it has one.

    SIGTERM, which is how clusters announce that a machine is taken away, makes the stage save at the end of the step
    and end the program. In several processes it is enough that one gets it; all call this alike, with the same data.

    Args:
        stage: what to run.
        state: to start from, and the structure to restore into.
        data: endless batches; its position is saved and restored with the state.
        step: (state, batch, number of the step) to (state, metrics). The numbers count from 0.
        folder: of the run; checkpoints go to `checkpoints/<name>` below it. Several processes share it.
        log: of the run.

    Returns:
        The state after the last step. A resumed stage gives the same, bit for bit, as an unbroken one.

    Raises:
        SystemExit: with status `distributed.PREEMPTED`, after SIGTERM.
        NonFiniteError: a step had a loss, a gradient, weights or logits that are not finite. It is logged, not saved.
    """
    with (
        distributed.preemption() as preempted,
        RunCheckpoints(kept := folder / "checkpoints" / stage.name) as checkpoints,
    ):
        done = 0
        if checkpoints.latest() is not None:
            state = shapes(state)  # else there would be two of it for a while
            state, position, done = checkpoints.restore(state)
            data.set_state(position)
        if done >= stage.steps:
            return state
        log.truncate(stage.name, done)
        with Progress(stage.steps, stage.name, start=done) as progress, _Trace(stage, folder) as trace:
            if done:
                progress.note(f"{stage.name}: going on after step {done} of {stage.steps}")
            for number in range(done, stage.steps):
                trace.before(number + 1)
                start = time.perf_counter()
                try:
                    state, metrics = step(state, next(data), number)
                except NonFiniteLogitsError:  # weights that are too large, though finite
                    metrics = {"nonfinite_updates": 1.0}
                metrics = {**metrics, "step_time": time.perf_counter() - start}
                trace.after(number + 1, state)
                log.write(number + 1, metrics, stage.name)
                if _is_bad(metrics):
                    good = checkpoints.latest()
                    raise NonFiniteError(
                        _stopped(stage, number + 1, metrics, None if good is None else kept / str(good))
                    )
                progress.update(number + 1, **{label: metrics[k] for k, label in stage.shown.items() if k in metrics})
                stop = preempted()
                if stop or (number + 1) % stage.save_every == 0 or number + 1 == stage.steps:
                    checkpoints.save(number + 1, state, data.get_state(), score=_score(stage, metrics))
                if stop:
                    checkpoints.wait()
                    progress.note(
                        f"{stage.name}: got SIGTERM, saved step {number + 1} of {stage.steps}; "
                        "the same command goes on from there"
                    )
                    raise SystemExit(distributed.PREEMPTED)
    return state


class NonFiniteError(ValueError):
    """Training came to numbers that are not finite; the message says where, and what is left to go on from."""


def ended_nonfinite(folder: Path) -> bool:
    """Whether the last step in a run's folder is one that `NonFiniteError` ended the run for."""
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return bool(rows) and _is_bad(rows[-1])


def _is_bad(metrics: Mapping[str, float]) -> bool:
    """Whether weights may have been spoiled: what a step left out did not spoil them."""
    if metrics.get("nonfinite_updates"):
        return True
    watched = (metrics.get(name, 0.0) for name in ("loss", "grad_norm"))
    return not metrics.get("skipped_updates") and not all(map(math.isfinite, watched))


def _stopped(stage: Stage, step: int, metrics: Mapping[str, float], good: Path | None) -> str:
    found = [f"{name} {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    what = " and ".join(found) or "weights or logits"
    return (
        f"{stage.name}: step {step} of {stage.steps}: {what} not finite, not saved; "
        f"last good checkpoint: {'none' if good is None else good}; go on in the same folder with a lower learning "
        "rate, or leave updates out that spike (skip_grad_norm)"
    )


def _score(stage: Stage, metrics: Mapping[str, float]) -> float | None:
    if stage.keep_best is None or stage.keep_best not in metrics:
        return None
    value = float(metrics[stage.keep_best])
    return value if math.isfinite(value) else None


class _Trace:
    """The profiler, running while the steps that a stage wants traced run."""

    def __init__(self, stage: Stage, folder: Path):
        wanted = stage.profile_steps is not None and distributed.is_main()
        self._steps = profiled_steps(stage.profile_steps, stage.steps) if wanted else range(0)
        self._folder = folder / "profile"
        self._running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(state)  # or the trace would end before the devices do
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()
