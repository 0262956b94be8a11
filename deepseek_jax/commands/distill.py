"""Distil a teacher into a student: by its text, by its logits on that text, or on-policy by those on the student's."""

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import distributed
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.distill_samples import prompts_of, questions, teach
from deepseek_jax.commands.distill_settings import (
    COMMON,
    DECIDING,
    Config,
    check,
    defaults,
    repeatable,
    run_settings,
)
from deepseek_jax.commands.options import command
from deepseek_jax.commands.run_options import enter
from deepseek_jax.commands.sft import Run, check_run, learn, load_trained, save_trained
from deepseek_jax.commands.sft_settings import Config as SFTRunConfig
from deepseek_jax.commands.train_setup import make_sampler
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import PromptBatches, batches
from deepseek_jax.generation.text import encode_prompt
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.vocabulary import vocabulary_difference
from deepseek_jax.train.distill_loss import make_distill_objective
from deepseek_jax.train.on_policy import OnPolicyTrainer, run_on_policy
from deepseek_jax.train.runs import RunSettings, held_folder, room_needed, write_json
from deepseek_jax.train.sft import SFTTrainer
from deepseek_jax.train.step import Objective

_UNKNOWN = 2**31  # steps, while rows are not there to be counted: more than any run has
_TITLES = {
    "sequence": "Distillation by a teacher's text",
    "forward-kl": "Distillation by a teacher's logits",
    "reverse-kl": "On-policy distillation",
}


@command(Config, common=COMMON, deciding=DECIDING, defaults=defaults)
def main(config: Config) -> None:
    """Distil a teacher into a student; the student is trained by the code of `sft`."""
    start = time.perf_counter()
    check(config)
    config = dataclasses.replace(config, student=model_folder(config.student))
    with room_needed(config.output), held_folder(config.output):
        student = _Read(load_config(config.student), Tokenizer.from_folder(config.student))
        teachers = (
            [] if config.taught_by.server else [_teacher(config, name, student) for name in config.taught_by.teacher]
        )
        if config.loss.loss == "reverse-kl":
            on_policy(config, student, teachers, start)
        else:
            on_text(config, student, teachers, start)


class _Read(NamedTuple):
    """What a folder says of a model before its weights are read."""

    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path = Path()


def _teacher(config: Config, name: str, student: _Read) -> _Read:
    """A teacher that may teach the student; says what is to be known of it."""
    folder = model_folder(name)
    teacher = _Read(load_config(folder), Tokenizer.from_folder(folder), folder)
    difference = vocabulary_difference(student.tokenizer, teacher.tokenizer)
    by_logits = config.loss.loss != "sequence"
    if difference is not None and by_logits:
        raise ValueError(
            f"teacher: {name} has other tokens than the student ({difference}), wanted the same for --loss "
            f"{config.loss.loss}; take --loss sequence, which learns its text by the student's own tokens"
        )
    if difference is not None:
        _note("the teacher has other tokens: its text is cut into tokens again, by the student's tokenizer")
    elif by_logits and config.asked.chat and teacher.tokenizer.chat_template != student.tokenizer.chat_template:
        _note(f"{name} has another chat template; it judges conversations in the student's")
    return teacher


def _note(text: str) -> None:
    if distributed.is_main():
        print(distributed.printable(f"note: {text}"))


def on_text(config: Config, student: _Read, teachers: Sequence[_Read], start: float) -> None:
    """Learn what a teacher wrote, or its distribution at every token of that."""
    if config.draws:
        _check_unsampled(config)
        taught = teach(config)
        rows, known, counts = [str(taught.rows)], [taught.teacher], taught.counts
    else:
        rows, counts = config.taught_by.teacher_samples, {}
        known = distributed.on_main(lambda: [fingerprint(teacher.folder) for teacher in teachers])
    if not config.draws and config.loss.loss == "sequence":
        _note("samples of a file: its text is cut into tokens by the student's tokenizer, whoever wrote it")
    by_logits = config.loss.loss == "forward-kl"
    contexts = [of.config.max_position_embeddings for of in (student, *(teachers if by_logits else ()))]
    of_sft = config.of_sft(rows, min(contexts))
    run = Run(
        _TITLES[config.loss.loss],
        partial(run_settings, config, known),
        repeatable(config),
        objective=partial(_objective, config, teachers) if by_logits else None,
        summary={"objective": config.loss.loss, "taught_by": known, **counts},
    )
    learn(of_sft, run, start)


def _check_unsampled(config: Config) -> None:
    """Refuse, before a teacher writes for hours, a folder that training could not go on in."""
    settings = run_settings(config, (), _UNKNOWN)
    known = {name: value for name, value in settings.values.items() if name != "taught_by"}
    check_run(config.of_sft((), config.max_length or 2), settings._replace(values=known))


def _objective(config: Config, teachers: Sequence[_Read], student: Model) -> tuple[Objective, tuple[Any, ...]]:
    """The loss beside teachers, which lie as the student does, in what it is computed in."""
    models = [load_model(of.folder, dtype=dtype_of(config.sft.dtype), layout=student.layout) for of in teachers]
    objective = make_distill_objective(
        [model.graphdef for model in models],
        config.loss.divergence(len(models)),
        hard_share=config.loss.hard_share,
        mean=config.sft.mean,
    )
    return objective, (tuple(model.weights for model in models),)


# --- on-policy -----------------------------------------------------------------------------------


def on_policy(config: Config, student: _Read, teachers: Sequence[_Read], start: float) -> None:
    """Learn what teachers would have said at every token of the student's own samples."""
    if config.sft.batch_size % config.asked.samples:
        raise ValueError(
            f"samples: got {config.asked.samples}, wanted a divisor of the samples of an update, --batch-size "
            f"{config.sft.batch_size}"
        )
    of_sft = config.of_sft((), student.config.max_position_embeddings)
    config.sft.check_model(student.config)
    prompts, count, longest = _prompts(config, student.tokenizer)
    steps = config.sft.steps_of(count * config.asked.samples)
    known = distributed.on_main(lambda: [fingerprint(teacher.folder) for teacher in teachers])
    settings = distributed.on_main(lambda: check_run(of_sft, run_settings(config, known, steps), stage="distill"))
    trainer = _on_policy_trainer(config, of_sft, student, teachers, steps, longest)
    run_id = distributed.on_main(lambda: enter(config.output, RunSettings(*settings), repeatable(config)))
    with MetricLog(config.output, wandb=config.logging.wandb) as log:
        state = run_on_policy(trainer, prompts, folder=config.output, log=log)
    save_trained(of_sft, trainer.learner, student.tokenizer, state, run_id)
    distributed.on_main(lambda: _report(config, known, count, steps, time.perf_counter() - start))


def _on_policy_trainer(
    config: Config, of_sft: SFTRunConfig, student: _Read, teachers: Sequence[_Read], steps: int, longest: int
) -> OnPolicyTrainer:
    """The student with its teachers and its sampler; `longest` are the tokens of a prompt."""
    context = min(of.config.max_position_embeddings for of in (student, *teachers))
    if longest >= context:
        raise ValueError(f"prompt: got {longest} tokens, wanted fewer than the context of {context} that models have")
    sampling = config.asked.sampling(student.tokenizer.eos_ids, on_policy=True, most=context - longest)
    layout, size = config.mesh.layout, config.sft.batch_size
    whole = int(np.lcm(32, layout.parts("tokens")))
    width = -(-(longest + sampling.max_new_tokens - 1) // whole) * whole
    if not config.sft.pack:
        layout.check_batch(size // config.sft.micro_batches, width)
    model = load_trained(of_sft, layout)
    objective, given = _objective(config, teachers, model)
    learner = SFTTrainer(
        config.sft, model, steps=steps, width=width, seed=config.seed, donate=True, objective=objective, given=given
    )
    return OnPolicyTrainer(
        learner,
        make_sampler(config.mesh, student.config, layout),
        student.tokenizer,
        sampling,
        samples=config.asked.samples,
        seed=config.seed,
    )


def _prompts(config: Config, tokenizer: Tokenizer) -> tuple[PromptBatches, int, int]:
    """Endless batches of prompts, how many prompts there are, and the tokens of the longest."""
    data = prompts_of(config)
    how = {"system": config.asked.system, "chat": config.asked.chat}
    tokens = [encode_prompt(tokenizer, asked, **how) for asked in questions(config, data)]
    prompts = [Prompt("", of, {}) for of in tokens]
    size = config.sft.batch_size // config.asked.samples
    order = {"size": size, "seed": config.seed}
    return PromptBatches(batches(prompts, **order), order, data.identity()), len(prompts), max(map(len, tokens))


def _report(config: Config, known: Sequence[str], prompts: int, steps: int, seconds: float) -> None:
    """The report, and last the summary, which says that the run is whole."""
    metrics = read_metrics(config.output / "metrics.jsonl")
    summary = {
        "objective": config.loss.loss,
        "taught_by": list(known),
        "loss": metrics[-1]["loss"],
        "kl_before": metrics[0]["kl"],
        "kl_after": metrics[-1]["kl"],
        "prompts": prompts,
        "steps": steps,
        "wall_seconds": round(seconds, 1),
        "seed": config.seed,
    }
    write_report(config.output, title=_TITLES[config.loss.loss], summary=summary, rows=metrics, samples=())
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(distributed.printable(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}"))
