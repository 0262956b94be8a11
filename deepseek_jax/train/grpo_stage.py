"""The GRPO stage of a run: draw prompts, step, evaluate, show samples; resumable."""

from collections.abc import Callable, Mapping
from pathlib import Path

import grain
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.data.examples import Prompt
from deepseek_jax.report.metrics import MetricLog, explain_first_loss
from deepseek_jax.report.samples import SampleLog, sample_groups
from deepseek_jax.train.grpo import GRPOState, GRPOTrainer
from deepseek_jax.train.loop import Stage, run_stage


def run_grpo(
    trainer: GRPOTrainer,
    prompts: grain.DatasetIterator,
    *,
    folder: Path,
    log: MetricLog,
    evaluate: Callable[[nnx.State], float] | None = None,
) -> GRPOState:
    """The whole stage; it goes on from its newest checkpoint if it has one.

    Args:
        trainer: of the model.
        prompts: endless batches of prompts, `prompts_per_step` each.
        folder: of the run. Of its checkpoints the newest stay, and the one of the best accuracy.
        log: of the run.
        evaluate: accuracy of weights in the sampler's layout on held-out questions, for every `eval_every` steps.

    Returns:
        The state after the last step.
    """
    config = trainer.config
    samples = SampleLog(folder, every=config.samples_every)
    went_on = False

    def step(state: GRPOState, first: list[Prompt], number: int) -> tuple[GRPOState, Mapping[str, float]]:
        nonlocal went_on
        if not went_on:
            samples.truncate(_STAGE, number)
            went_on = True
        drawn = [first]
        # What dynamic sampling draws beyond the first moves the iterator, and so is in the position that is saved.
        learned = trainer.step(state, lambda: drawn.pop() if drawn else next(prompts), number)
        values = learned.metrics
        if evaluate is not None and (number + 1) % config.eval_every == 0:
            values["eval/accuracy"] = evaluate(trainer.policy(learned.state))
        if samples.wants(number + 1):
            advantages = trainer.advantages(learned.rollout.rewards, number, learned.rollout.parts)
            samples.write(number + 1, sample_groups(learned.rollout, advantages, prompts=_SHOWN), _STAGE)
        if number == 0 and distributed.is_main() and (explanation := explain_first_loss(values)):
            print(explanation)
        return learned.state, values

    stage = Stage(
        name=_STAGE,
        steps=config.steps,
        save_every=config.save_every,
        shown=_BAR,
        keep_best=None if evaluate is None else "eval/accuracy",
        profile_steps=config.profile_steps,
    )
    return run_stage(stage, trainer.first_state(), prompts, step, folder=folder, log=log)


_STAGE = "grpo"
_SHOWN = 4  # prompts in an entry of the table of samples
_BAR = {
    "reward": "reward",
    "rewards/accuracy/mean": "accuracy",
    "completions/mean_length": "length",
    "kl": "kl",
    "entropy": "entropy",
    "eval/accuracy": "held-out",
}
