"""The loop of every stage: next batch, step, log, checkpoint; a killed run goes on where its checkpoint stands."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grain

from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.train.metrics import MetricLog
from deepseek_jax.train.progress import Progress

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
    """

    name: str
    steps: int
    save_every: int
    shown: Mapping[str, str]


def run_stage(
    stage: Stage, state: State, data: grain.DatasetIterator, step: StepFunction, *, folder: Path, log: MetricLog
) -> State:
    """Run a stage to its end, from its newest checkpoint if it has one.

    Args:
        stage: what to run.
        state: to start from, and the structure to restore into.
        data: endless batches; its position is saved and restored with the state.
        step: (state, batch, number of the step) to (state, metrics). The numbers count from 0.
        folder: of the run; checkpoints go to `checkpoints/<name>` below it.
        log: of the run.

    Returns:
        The state after the last step. A resumed stage gives the same, bit for bit, as an unbroken one.
    """
    with RunCheckpoints(folder / "checkpoints" / stage.name) as checkpoints:
        done = 0
        if checkpoints.latest() is not None:
            state, position, done = checkpoints.restore(state)
            data.set_state(position)
        if done >= stage.steps:
            return state
        log.truncate(stage.name, done)
        with Progress(stage.steps, stage.name, start=done) as progress:
            if done:
                progress.note(f"{stage.name}: going on after step {done} of {stage.steps}")
            for number in range(done, stage.steps):
                start = time.perf_counter()
                state, metrics = step(state, next(data), number)
                metrics = {**metrics, "step_time": time.perf_counter() - start}
                log.write(number + 1, metrics, stage.name)
                progress.update(number + 1, **{label: metrics[k] for k, label in stage.shown.items() if k in metrics})
                if (number + 1) % stage.save_every == 0 or number + 1 == stage.steps:
                    checkpoints.save(number + 1, state, data.get_state())
    return state
