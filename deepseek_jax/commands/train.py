"""Train a model by GRPO with rule-based rewards, or a small one from nothing, as R1-Zero was."""

import time
from functools import partial

import jax
import numpy as np
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.checkpoint.adapters import save_adapter
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.owned import write_owned
from deepseek_jax.commands.options import command
from deepseek_jax.commands.run_options import enter
from deepseek_jax.commands.settings_file import with_values
from deepseek_jax.commands.train_report import evaluate, evaluate_once, report, write_model
from deepseek_jax.commands.train_settings import (
    COMMON,
    DECIDING,
    Config,
    check,
    defaults,
    repeatable,
    run_settings,
    stated,
)
from deepseek_jax.commands.train_setup import Setup, example_width, prepare
from deepseek_jax.commands.train_tasks import check_tasks
from deepseek_jax.data.prompts import batches
from deepseek_jax.evals.graders import GraderConfig, Graders
from deepseek_jax.evals.rewarding import task_reward
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.report.metrics import MetricLog
from deepseek_jax.rewards.recipe import rewards
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.grpo_stage import run_grpo
from deepseek_jax.train.runs import held_folder, room_needed
from deepseek_jax.train.sft import SFTTrainer, run_sft
from deepseek_jax.train.sft_config import SFTConfig
from deepseek_jax.train.sft_loss import completion_tokens


@command(Config, common=COMMON, deciding=DECIDING, defaults=defaults)
def main(config: Config) -> None:
    """Train by reinforcement learning with rule-based rewards; docs and examples are in the README."""
    train_with(GRPOTrainer, config)


def train_with(trainer: type[GRPOTrainer], config: Config) -> None:
    """The whole run, by GRPO or by an algorithm that differs in what it learns from a rollout."""
    start = time.perf_counter()
    if config.base.model is not None:
        config = with_values(config, {"model": model_folder(config.base.model)})
    with room_needed(config.output), held_folder(config.output):
        base = distributed.on_main(lambda: check(config))
        limits = GraderConfig(allow_unsandboxed=config.rewards.allow_unsandboxed)
        with Graders(limits) as graders:  # starts nothing before a benchmark's row is graded
            check_tasks(config, graders)
            given = {"max_new_tokens": config.grpo.max_new_tokens, "by_task": task_reward(graders)}
            with rewards(config.rewards, **given) as graded:
                stages(trainer, config, prepare(config, graded), base, start)


def stages(trainer: type[GRPOTrainer], config: Config, setup: Setup, base: str | None, start: float) -> None:
    """Cold start, GRPO, and the accuracies before and after it."""
    run_id = distributed.on_main(lambda: enter(config.output, run_settings(config, base), repeatable(config)))
    if distributed.is_main():
        for line in (*stated(config), computing(config)):
            print(distributed.printable(line))
    log = MetricLog(config.output, wandb=config.logging.wandb)
    weights = cold_start(config, setup, log) if setup.cold_start else setup.model.weights
    before = evaluate_once(config, setup, weights, "before")
    print(f"accuracy before GRPO: {before['accuracy']:.1%} +- {before['stderr']:.1%}")
    weights = reinforce(trainer, config, setup, weights, log, run_id)
    after = evaluate(config, setup, setup.to_sampler(weights))
    print(f"accuracy after GRPO: {after.mean:.1%} +- {after.stderr:.1%}")
    log.close()
    write_model(config, setup, weights, run_id)
    distributed.on_main(lambda: report(config, setup, before, after, time.perf_counter() - start))


def computing(config: Config) -> str:
    """What a run computes in, and where, in a line."""
    dtype, kept = dtype_of(config.grpo.dtype).name, "an adapter of" if config.grpo.lora_rank else "weights of"
    given = " (--dtype auto)" if config.grpo.dtype == "auto" else ""
    device = jax.devices()[0]
    where = f"{jax.device_count()} x {device.device_kind}" if device.platform != "cpu" else "the CPU"
    return f"computes in {dtype}{given} on {where}, and updates {kept} float32"


# --- the two stages ------------------------------------------------------------------------------


def cold_start(config: Config, setup: Setup, log: MetricLog) -> nnx.State:
    """Supervised epochs over worked examples: the form of an answer, and some skill to reinforce."""
    settings = SFTConfig(
        steps=config.toy.cold_start_epochs * len(setup.cold_start) // config.toy.cold_start_batch,
        batch_size=config.toy.cold_start_batch,
        loss_mean="examples",
        lr=config.toy.cold_start_lr,
        warmup=20,
        micro_batches=config.grpo.micro_batches,
        balance_alpha=config.grpo.balance_alpha,
        bias_gamma=config.grpo.bias_gamma,  # the weights themselves are trained here, whatever GRPO trains
        dtype=config.grpo.dtype,
        moments=config.grpo.moments,
        skip_grad_norm=config.grpo.skip_grad_norm,
        save_every=200,
    )
    examples = [completion_tokens(prompt, completion) for prompt, completion in setup.cold_start]
    width = example_width(setup.cold_start)
    sizes = {"steps": settings.steps, "width": width}
    trainer = SFTTrainer(settings, setup.model, **sizes, donate=True)
    data = batches(examples, size=settings.batch_size, seed=config.seed)
    return run_sft(trainer, data, folder=config.output, log=log, name="cold_start").weights


def reinforce(
    trainer: type[GRPOTrainer], config: Config, setup: Setup, weights: nnx.State, log: MetricLog, run_id: str
) -> nnx.State:
    """GRPO: sample a group for each question, reward, compare, update. An adapter is saved as PEFT has it."""
    shuffled = partial(shuffle_rewards, seed=config.seed)
    held_out = lambda weights: evaluate(config, setup, weights, most=128).mean
    of = trainer(
        config.grpo,
        setup.model._replace(weights=weights),
        setup.tokenizer,
        setup.generator,
        setup.rewards.total,
        width=setup.width,
        seed=config.seed,
        donate=True,
        alter_rewards=shuffled if config.control == "shuffled" else None,
        take_metrics=setup.rewards.take_metrics,
    )
    state = run_grpo(of, setup.prompts, folder=config.output, log=log, evaluate=held_out)
    if of.lora is not None:
        base = None if config.base.model is None else str(config.base.model)
        save = lambda target: save_adapter(state.train.weights, of.lora, setup.model.config, target, base=base)
        write_owned(config.output / "adapter", run=run_id, steps=config.grpo.steps, write=save)
    return of.trained(state)


def shuffle_rewards(rewards_PG: np.ndarray, step: int, *, seed: int) -> np.ndarray:
    """The control: each group's rewards in random order, so that they say nothing of the samples."""
    return np.random.default_rng((seed, step)).permuted(rewards_PG, axis=1)
