"""From prompts to a scored batch: sample a group for each prompt, reward it, compare it with its group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import processes
from deepseek_jax.generate.engine import Generator, SamplingConfig, bucket
from deepseek_jax.generate.text import TextCompletion, complete, seeds_for
from deepseek_jax.rewards.combine import CombinedReward
from deepseek_jax.rl.advantage import group_advantages
from deepseek_jax.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """A question as text and tokens, and the columns that reward functions look at (`answer`, say)."""

    text: str
    tokens: list[int]
    columns: Mapping[str, object]


class Batch(NamedTuple):
    """Samples for an update, padded on the right. Column t speaks of the token that position t predicts.

    tokens_BT int32: prompt and completion, without the last token; targets_BT: the same one step on;
    mask_BT: true where the target belongs to the completion; old_logprobs_BT: the sampler's; ref_logprobs_BT: the
    reference model's (zeros until someone scores them); advantages_B.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    old_logprobs_BT: np.ndarray
    ref_logprobs_BT: np.ndarray
    advantages_B: np.ndarray


class Rollout(NamedTuple):
    """A batch, its completions prompt by prompt, the weighted reward of each, and its parts by name."""

    batch: Batch
    completions: list[TextCompletion]
    rewards: np.ndarray
    parts: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Roller:
    """Everything a rollout needs but the weights and the prompts.

    Args:
        generator, tokenizer: the sampler.
        sampling: how completions are drawn.
        group_size: samples a prompt, at least 2.
        reward: texts and columns to a weighted sum.
        width: columns of the batch; fixed, so that the update compiles once. None: the next power of two.
        alter_rewards: applied to the rewards [P, G] before advantages (controls: shuffling them, say).
    """

    generator: Generator
    tokenizer: Tokenizer
    sampling: SamplingConfig
    group_size: int
    reward: CombinedReward
    width: int | None = None
    alter_rewards: Callable[[np.ndarray, int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, wanted at least 2: a group of one learns nothing")

    def __call__(self, weights: nnx.State, prompts: Sequence[Prompt], *, seed: int, step: int) -> Rollout:
        """Sample, reward, and compare. The draws are a function of (seed, step, place of the prompt) alone.

        In several processes all call it alike and get the same: all hold all completions, the main one grades them.
        """
        G = self.group_size
        seeds = [s for place in range(len(prompts)) for s in seeds_for(seed, step, place, count=G)]
        tokens = [p.tokens for p in prompts]
        found = complete(self.generator, weights, self.tokenizer, tokens, self.sampling, seeds=seeds, samples=G)
        repeated = [p for p in prompts for _ in range(G)]
        # A grader may answer otherwise elsewhere (it has a clock, or a sandbox): one process grades for all.
        totals, parts = processes.on_main(
            lambda: self.reward(
                prompts=[p.text for p in repeated],
                completions=[c.text for c in found],
                completion_ids=[c.tokens.tolist() for c in found],
                **{name: [p.columns[name] for p in repeated] for name in prompts[0].columns},
            )
        )
        rewards = np.asarray(totals, np.float32).reshape(len(prompts), G)
        used = rewards if self.alter_rewards is None else self.alter_rewards(rewards, step)
        advantages = np.asarray(group_advantages(jnp.asarray(used)))
        batch = make_batch([p.tokens for p in repeated], found, advantages.reshape(-1), width=self.width)
        return Rollout(batch, found, rewards, parts)


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[TextCompletion],
    advantages: np.ndarray,
    *,
    width: int | None = None,
) -> Batch:
    """Lay samples out for an update.

    Args:
        prompts, completions: one of each a sample.
        advantages: float32 [B].
        width: columns; None takes the next power of two. ValueError when a sample is longer.
    """
    longest = max(len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)) - 1
    width = bucket(longest) if width is None else width
    if longest > width:
        raise ValueError(f"width: got {width}, wanted at least {longest}, the longest prompt and completion")
    B = len(prompts)
    tokens = np.zeros((B, width + 1), np.int32)
    mask = np.zeros((B, width), bool)
    old = np.zeros((B, width), np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion.tokens)
        tokens[row, :start] = prompt
        tokens[row, start:end] = completion.tokens
        mask[row, start - 1 : end - 1] = True
        old[row, start - 1 : end - 1] = completion.logprobs
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, old, np.zeros_like(old), advantages.astype(np.float32))


def rollout_metrics(rollout: Rollout, group_size: int) -> dict[str, float]:
    """What a dashboard shows of a rollout, under the names that TRL's users know."""
    groups = rollout.rewards.reshape(-1, group_size)
    lengths = [len(c.tokens) for c in rollout.completions]
    spread = groups.std(axis=1, ddof=1)
    metrics = {
        "reward": groups.mean(),
        "reward_std": spread.mean(),
        "frac_reward_zero_std": (np.ptp(groups, axis=1) == 0).mean(),
        "completions/mean_length": np.mean(lengths),
        "completions/max_length": np.max(lengths),
        "completions/clipped_ratio": np.mean([not c.finished for c in rollout.completions]),
    }
    for name, values in rollout.parts.items():
        applicable = [v for v in values if v is not None]
        if applicable:
            metrics[f"rewards/{name}/mean"] = np.mean(applicable)
    return {name: float(value) for name, value in metrics.items()}
