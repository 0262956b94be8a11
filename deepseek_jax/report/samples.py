"""What the model wrote in training: prompts, completions, rewards, a JSON line a step, right through resumes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import distributed
from deepseek_jax.report.metrics import StepLines, read_lines
from deepseek_jax.rl.rollout import Rollout


class Sample(NamedTuple):
    """A completion: its reward parts by name (None: does not apply), their weighted sum, and what came of it.

    `length` is in tokens; `finished` says that it ended by itself and was not cut off. `extra` is what reward
    functions wrote of it with `log_extra`, by column, as JSON has it.
    """

    completion: str
    rewards: Mapping[str, float | None]
    reward: float
    advantage: float
    length: int
    finished: bool
    extra: Mapping[str, Any] = MappingProxyType({})


class SampleGroup(NamedTuple):
    """A prompt, the answer that was wanted (None: none is known), and samples of it."""

    prompt: str
    answer: str | None
    samples: Sequence[Sample]


def sample_groups(
    rollout: Rollout, advantages_PG: np.ndarray, *, prompts: int, samples: int | None = None
) -> list[SampleGroup]:
    """The first prompts of a rollout with their samples.

    Args:
        rollout: P prompts with G completions each.
        advantages_PG: float [P, G], as the loss gets them.
        prompts: at most so many.
        samples: of each prompt, at most so many; None is all.

    Raises:
        ValueError: advantages that are not [P, G].
    """
    advantages = np.asarray(advantages_PG)
    if advantages.shape != rollout.rewards.shape:
        raise ValueError(
            f"advantages: got shape {advantages.shape}, wanted {rollout.rewards.shape}, as the rewards; reshape them"
        )
    _, G = rollout.rewards.shape
    groups = []
    for p, prompt in enumerate(rollout.prompts[:prompts]):
        found = []
        for g in range(G if samples is None else min(samples, G)):
            row = p * G + g
            drawn = rollout.completions[row]
            parts = {name: values[row] for name, values in rollout.parts.items()}
            reward, advantage = float(rollout.rewards[p, g]), float(advantages[p, g])
            extra = {name: values[row] for name, values in rollout.extra.items() if values[row] is not None}
            found.append(Sample(drawn.text, parts, reward, advantage, len(drawn.tokens), bool(drawn.finished), extra))
        answer = prompt.columns.get("answer")
        groups.append(SampleGroup(prompt.text, None if answer is None else str(answer), found))
    return groups


class SampleLog:
    """Appends groups of samples to `samples.jsonl`: one line a step, there once however often a run is killed.

    A line is `{"stage", "step", "groups": [{"prompt", "answer", "samples": [{"completion", "rewards", "reward",
    "advantage", "length", "finished"}]}]}` in strict JSON; a number that is not finite is null. A sample of which
    reward functions logged columns has them as `"extra"`. `truncate` has the law of `MetricLog.truncate`: what a
    resumed run will write again goes.

    In several processes all may make one and call it alike: the main process alone reads and writes files.

    Args:
        folder: of the run; made if absent.
        every: steps between lines; the first step of a stage has one too.

    Raises:
        ValueError: `every` below 1, or a line other than the last that is not JSON.
    """

    def __init__(self, folder: str | Path, *, every: int = 10):
        if every < 1:
            raise ValueError(f"every: got {every}, wanted at least 1 step")
        self.every = every
        self.path = Path(folder) / "samples.jsonl"
        if distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = StepLines(self.path)

    def wants(self, step: int) -> bool:
        """Whether a line is due at this step, counted from 1."""
        return step == 1 or step % self.every == 0

    def write(self, step: int, groups: Sequence[SampleGroup], stage: str) -> None:
        """Adds one line, which outlives a kill of the process from the moment this returns.

        Raises:
            ValueError: the stage cannot name a folder, or the step goes back.
        """
        if distributed.is_main():
            self._lines.append({"stage": stage, "step": int(step), "groups": [_group(group) for group in groups]})

    def truncate(self, stage: str, step: int) -> None:
        """Forgets later steps of this stage, and everything written after them; call it where the metrics' is."""
        if distributed.is_main():
            self._lines.truncate(stage, step)


def read_samples(path: str | Path, *, steps: int | None = None) -> list[dict[str, Any]]:
    """Reads a `samples.jsonl`, also one that is being written or whose writer was killed.

    Args:
        path: the file, or the run's folder; a file that is not there has no lines.
        steps: of each stage, only so many of its lines, from the first to the last at even distances; None is all.

    Returns:
        One dict a line, in file order.

    Raises:
        ValueError: `steps` below 1, or a whole line that is not a JSON object with a stage and a step.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps: got {steps}, wanted at least 1, or None for all")
    path = Path(path)
    path = path / "samples.jsonl" if path.is_dir() else path
    if steps is None:
        return [row for row, _ in read_lines(path)]
    # Twice through the file, and never all of it in memory: completions are long.
    stages: dict[str, list[int]] = {}
    for number, (row, _) in enumerate(read_lines(path)):
        stages.setdefault(row["stage"], []).append(number)
    chosen = {numbers[k] for numbers in stages.values() for k in _spread(len(numbers), steps)}
    return [row for number, (row, _) in enumerate(read_lines(path)) if number in chosen]


def _spread(count: int, wanted: int) -> list[int]:
    """Places from the first to the last; the last alone where one is wanted."""
    if wanted == 1:
        return [count - 1]
    return sorted({round(k * (count - 1) / (wanted - 1)) for k in range(wanted)})


def _group(group: SampleGroup) -> dict[str, Any]:
    return {"prompt": group.prompt, "answer": group.answer, "samples": [_sample(sample) for sample in group.samples]}


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "completion": sample.completion,
        "rewards": {name: _number(value) for name, value in sample.rewards.items()},
        "reward": _number(sample.reward),
        "advantage": _number(sample.advantage),
        "length": int(sample.length),
        "finished": bool(sample.finished),
        **({"extra": dict(sample.extra)} if sample.extra else {}),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
