"""On-policy distillation: the student samples, and learns what its teachers would have said at every token of it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import seeds_for
from deepseek_jax.model.lora import with_adapter
from deepseek_jax.model.precision import computed
from deepseek_jax.model.transfer import Transfer
from deepseek_jax.report.metrics import MetricLog
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.loop import Stage, run_stage
from deepseek_jax.train.sft import SFTTrainer
from deepseek_jax.train.sft_loss import completion_tokens
from deepseek_jax.train.step import TrainState


class OnPolicyTrainer:
    """Samples of the student, and an update from them.

    What is sampled is given: no gradient goes through the choice of a token. At each context that was sampled the
    gradient is that of the divergence over the whole vocabulary, not an estimate from the token drawn.

    Args:
        learner: of the student, with the objective of `train.distill_loss` and the teachers; `batch_size` of its
            configuration are samples an update.
        generator: the sampler, in a layout of its own or that of the student (`model.transfer.serving_layout`).
        tokenizer: the student's.
        sampling: how it samples.
        samples: of each prompt.
        seed: of sampling.

    Raises:
        ValueError: samples that do not divide the batch.

    Source: Agarwal et al., arXiv 2306.13649 (on-policy, reverse KL), and DeepSeek's report of V4 (several teachers).
    """

    def __init__(
        self,
        learner: SFTTrainer,
        generator: Generator,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        samples: int,
        seed: int,
    ):
        if learner.config.batch_size % samples:
            raise ValueError(
                f"samples: got {samples} of each prompt, wanted a divisor of --batch-size {learner.config.batch_size}"
            )
        self.learner, self.generator, self.tokenizer, self.sampling = learner, generator, tokenizer, sampling
        self.samples, self.seed = samples, seed
        self._dtype = jnp.dtype(learner.config.step_config.dtype)
        self._to_sampler = Transfer(generator.config, learner.layout, generator.layout, self._dtype)

    def policy(self, state: TrainState) -> nnx.State:
        """The weights that sample, in the sampler's layout and as they are computed in."""
        if self.learner.lora is None:
            return self._to_sampler(state.weights)
        adapter = computed(state.weights, self._dtype)
        return self._to_sampler(with_adapter(self.learner.frozen, adapter, self.learner.lora))

    def sample(self, state: TrainState, prompts: Sequence[Prompt], number: int) -> list[Completion]:
        """Completions of prompts, prompt by prompt: a function of weights, seed, step and place of the prompt alone."""
        places = range(len(prompts))
        seeds = [seed for place in places for seed in seeds_for(self.seed, number, place, count=self.samples)]
        return self.generator(
            self.policy(state),
            [prompt.tokens for prompt in prompts],
            self.sampling,
            seeds=seeds,
            samples=self.samples,
            tokenizer=self.tokenizer,
        )

    def step(self, state: TrainState, prompts: Sequence[Prompt], number: int) -> tuple[TrainState, Mapping[str, float]]:
        """Samples and one update; `number` counts from 0."""
        start = time.perf_counter()
        completions = self.sample(state, prompts, number)
        rolled = time.perf_counter()
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        examples = [completion_tokens(p.tokens, c.tokens) for p, c in zip(asked, completions, strict=True)]
        state, values = self.learner.step(state, examples, number)
        lengths = np.array([len(completion.tokens) for completion in completions])
        return state, values | {
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": 1 - float(np.mean([completion.finished for completion in completions])),
            "rollout_time": rolled - start,
        }


def run_on_policy(
    trainer: OnPolicyTrainer, prompts: grain.DatasetIterator, *, folder: Path, log: MetricLog, name: str = "distill"
) -> TrainState:
    """The whole stage; it goes on from its newest checkpoint if it has one.

    Args:
        trainer: of the student.
        prompts: endless batches of prompts, `batch_size` / `samples` each.
        folder: of the run.
        log: of the run.
        name: of the stage.

    Returns:
        The state after the last step.
    """
    config = trainer.learner.config
    stage = Stage(
        name=name,
        steps=trainer.learner.steps,
        save_every=config.save_every,
        shown=_BAR,
        profile_steps=config.profile_steps,
    )
    return run_stage(stage, trainer.learner.first_state(), prompts, trainer.step, folder=folder, log=log)


_BAR = {
    "loss": "loss",
    "kl": "from the teachers",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "learning_rate": "rate",
}
