"""From prompts to graded groups: sample a group for each prompt, and reward it while others are still sampled."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.completion import Completion, Record
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import seeds_for
from deepseek_jax.rewards.combine import CombinedReward, Graded
from deepseek_jax.rl.advantage import zero_variance
from deepseek_jax.text.tokenizer import Tokenizer


class Rollout(NamedTuple):
    """P prompts, their P x G completions prompt by prompt, the weighted rewards [P, G], and their parts by name.

    A reward that is not known, because no function applies or one raised and may, is NaN. extra and logged: what
    functions wrote with `log_extra`, a value a completion, and with `log_metric`.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    rewards: np.ndarray
    parts: dict[str, list[float | None]]
    extra: Mapping[str, list[Any]] = MappingProxyType({})
    logged: Mapping[str, list[float]] = MappingProxyType({})

    def groups(self, chosen: Sequence[int]) -> "Rollout":
        """The groups of these prompts, in this order."""
        G = self.rewards.shape[1]
        rows = [prompt * G + sample for prompt in chosen for sample in range(G)]
        return Rollout(
            [self.prompts[prompt] for prompt in chosen],
            [self.completions[row] for row in rows],
            self.rewards[list(chosen)],
            {name: [values[row] for row in rows] for name, values in self.parts.items()},
            {name: [values[row] for row in rows] for name, values in self.extra.items()},
            self.logged,
        )

    def prompts_of_samples(self) -> list[Prompt]:
        """The prompt of each completion."""
        return [prompt for prompt in self.prompts for _ in range(self.rewards.shape[1])]


@dataclass(frozen=True, kw_only=True)
class RolloutWorker:
    """Everything a rollout needs but the weights and the prompts.

    Args:
        generator, tokenizer: the sampler.
        sampling: how completions are drawn.
        group_size: samples a prompt, at least 2.
        reward: texts and columns to a weighted sum.
        at_once: prompts sampled at a time, the others as these end; None: as many as the generator has slots for.
        record: what sampling writes down for the trainer.
    """

    generator: Generator
    tokenizer: Tokenizer
    sampling: SamplingConfig
    group_size: int
    reward: CombinedReward
    at_once: int | None = None
    record: Record = Record()

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, wanted at least 2: a group of one learns nothing")
        kept = self.generator.settings.cache_dtype
        if kept != "auto":
            raise ValueError(
                f"cache_dtype: got {kept!r} to sample what is learned from, wanted auto, as the trainer computes"
            )
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once: got {self.at_once}, wanted at least 1 prompt, or None for all")

    def __call__(
        self, weights: nnx.State, prompts: Sequence[Prompt], *, seed: int, step: int, first: int = 0
    ) -> Rollout:
        """Sample and reward. The draws are a function of (seed, step, place of the prompt) alone.

        In several processes all call it alike and get the same: all hold all completions, the main one grades them.

        Args:
            weights: of the sampler.
            prompts: to answer.
            seed, step: of the run.
            first: place of the first prompt among those of the step.
        """
        G = self.group_size
        found: dict[int, Completion] = {}
        graded: dict[int, Future] = {}
        with ThreadPoolExecutor(1) as grader:
            for number, completion in self._sampled(weights, prompts, seed, step, first):
                found[number] = completion
                group = number // G
                members = range(G * group, G * group + G)
                # A grader may answer otherwise elsewhere (it has a clock, or a sandbox): one process grades for all.
                if distributed.is_main() and all(member in found for member in members):
                    _raise_early(graded.values())
                    graded[group] = grader.submit(self._grade, prompts[group], [found[member] for member in members])
            of_groups = lambda: _of_all([graded[group].result() for group in range(len(prompts))])
            all_of = Graded(*distributed.on_main(lambda: tuple(of_groups())))
        completions = [found[number] for number in range(len(found))]
        rewards = np.asarray(all_of.total, np.float32).reshape(len(prompts), self.group_size)
        return Rollout(list(prompts), completions, rewards, all_of.parts, all_of.extra, all_of.metrics)

    def _sampled(self, weights, prompts, seed, step, first) -> Iterator[tuple[int, Completion]]:
        seeds = [
            s for place in range(len(prompts)) for s in seeds_for(seed, step, first + place, count=self.group_size)
        ]
        return self.generator.each(
            weights,
            [p.tokens for p in prompts],
            self.sampling,
            seeds=seeds,
            samples=self.group_size,
            record=self.record,
            tokenizer=self.tokenizer,
            slots=None if self.at_once is None else self.at_once * self.group_size,
        )

    def _grade(self, prompt: Prompt, completions: Sequence[Completion]) -> Graded:
        """A group's rewards."""
        return self.reward.graded(
            prompts=[prompt.text] * len(completions),
            completions=[c.text for c in completions],
            completion_ids=[c.tokens.tolist() for c in completions],
            **{name: [value] * len(completions) for name, value in prompt.columns.items()},
        )


def _of_all(graded: Sequence[Graded]) -> Graded:
    return Graded(
        [total for of_part in graded for total in of_part.total],
        {name: [value for of_part in graded for value in of_part.parts[name]] for name in graded[0].parts},
        _columns([of_part.extra for of_part in graded], [len(of_part.total) for of_part in graded]),
        _numbers([of_part.metrics for of_part in graded]),
    )


def _columns(parts: Sequence[Mapping[str, list[Any]]], rows: Sequence[int]) -> dict[str, list[Any]]:
    """Columns of several parts as those of all; where a part lacks one, None stands in every row."""
    names = dict.fromkeys(name for part in parts for name in part)
    of = lambda part, name, count: part.get(name, [None] * count)
    return {name: [v for part, n in zip(parts, rows, strict=True) for v in of(part, name, n)] for name in names}


def _numbers(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [value for part in parts for value in part.get(name, [])] for name in names}


def _raise_early(graded: Iterable[Future]) -> None:
    """What grading has raised so far, before more is sampled; of several processes all raise together, at the end."""
    for answer in graded if distributed.process_count() == 1 else ():
        if answer.done():
            answer.result()


def dynamic_sampling(
    roll: RolloutWorker,
    weights: nnx.State,
    draw: Callable[[], Sequence[Prompt]],
    *,
    seed: int,
    step: int,
    rounds: int,
) -> tuple[Rollout, Rollout]:
    """Sample until enough groups have rewards that differ; a group whose rewards are all alike teaches nothing.

    Args:
        roll, weights, seed, step: as for a plain rollout.
        draw: the next prompts.
        rounds: at most so many times; what is then missing is filled with groups of equal rewards, in their order.

    Returns:
        Everything that was sampled, and of it as many groups as one draw has prompts: those that teach, first come
        first. Groups beyond that number are not used.

    Source: DAPO, arXiv 2503.14476 section 3.2 (dynamic sampling).
    """
    parts = [roll(weights, draw(), seed=seed, step=step)]
    wanted = len(parts[0].prompts)
    while len(parts) < rounds and sum(int(np.sum(~_flat(p.rewards))) for p in parts) < wanted:
        first = sum(len(p.prompts) for p in parts)
        parts.append(roll(weights, draw(), seed=seed, step=step, first=first))
    everything = joined(parts)
    flat = _flat(everything.rewards)
    chosen = sorted(range(len(flat)), key=lambda prompt: (bool(flat[prompt]), prompt))[:wanted]
    return everything, everything.groups(sorted(chosen))


def _flat(rewards_PG: np.ndarray) -> np.ndarray:
    return np.asarray(zero_variance(jnp.asarray(rewards_PG)))


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one."""
    return Rollout(
        [prompt for p in parts for prompt in p.prompts],
        [completion for p in parts for completion in p.completions],
        np.concatenate([p.rewards for p in parts]),
        {name: [value for p in parts for value in p.parts[name]] for name in parts[0].parts},
        _columns([p.extra for p in parts], [len(p.completions) for p in parts]),
        _numbers([p.logged for p in parts]),
    )


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What a dashboard shows of a rollout, under the names that TRL's users know and with its values.

    Rewards that are not known are left out of all but `frac_reward_unknown`, their share. Where none is known there is
    no `reward`, and the deviation of fewer than two is 0.

    Differs: `frac_reward_zero_std` is the share of groups that teach nothing, within `zero_variance`'s tolerance, also
    where TRL looks at the deviation of the batch.
    """
    rewards = rollout.rewards
    known = rewards[~np.isnan(rewards)]
    lengths = np.array([len(c.tokens) for c in rollout.completions])
    finished = np.array([c.finished for c in rollout.completions])
    metrics = _moments("reward", "reward_std", known)
    metrics |= {
        "frac_reward_zero_std": np.mean(_flat(rewards)),
        "frac_reward_unknown": np.mean(np.isnan(rewards)),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - finished.mean(),
    }
    if finished.any():
        ended = lengths[finished]
        metrics |= {f"completions/{name}_terminated_length": f(ended) for name, f in _SPREAD.items()}
    for name, values in rollout.parts.items():
        applicable = np.array([v for v in values if v is not None])
        metrics |= _moments(f"rewards/{name}/mean", f"rewards/{name}/std", applicable)
    metrics |= {name: np.mean(values) for name, values in rollout.logged.items() if name not in metrics}
    return {name: float(value) for name, value in metrics.items()}


def _moments(mean: str, std: str, values: np.ndarray) -> dict[str, Any]:
    if not values.size:
        return {}
    return {mean: values.mean(), std: values.std(ddof=1) if values.size > 1 else 0.0}


_SPREAD = {"mean": np.mean, "min": np.min, "max": np.max}
