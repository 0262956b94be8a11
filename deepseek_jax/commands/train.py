"""R1-Zero's run: the cold start of a small model, or a given one, then GRPO, and what is written of both."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.checkpoint.adapters import save_adapter
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.folder import Model, lay_out, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.opened import named_dtype
from deepseek_jax.checkpoint.owned import write_owned
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains, trace
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import (
    DataConfig,
    EasyToHard,
    Example,
    SourceConfig,
    batches,
    open_prompts,
    prompt_batches,
)
from deepseek_jax.evals.accuracy import Accuracy, greedy_accuracy
from deepseek_jax.generation.engine import Generator, bucket
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.precision import Precision, computed, dtype_of
from deepseek_jax.model.transfer import Transfer, sampled_config, serving_layout
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.report.metrics import MetricLog, WandbConfig, read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.report.samples import read_samples
from deepseek_jax.rewards.recipe import RewardConfig, Rewards, check_columns, rewards
from deepseek_jax.sharding import AXES, Layout, Remat, lanes_of, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.grpo_stage import run_grpo
from deepseek_jax.train.loop import Stage, run_stage
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deepseek_jax.train.runs import RunSettings, check_folder, enter_folder, held_folder, room_needed, write_json
from deepseek_jax.train.sft_loss import sft_batch, sft_objective
from deepseek_jax.train.step import TrainState, init_state, make_train_step


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Where questions come from that are not generated.

    Args:
        data: files (.jsonl, .jsonl.gz, .json, .csv, .parquet), folders or patterns of such, or hub data sets
            (owner/name:config), with a question and an answer in every row, as GSM8K has them.
        question_columns: of `data`: what is asked. Without it the columns are found by the names in use: question,
            Body and Question, problem, prompt, messages.
        answer_column: of `data`, with dots for what is inside a column. Without it: answer, ground_truth,
            reward_model.ground_truth, solution, ...
        tests_column: of `data`: the hidden tests for --accuracy code. Without it: tests, test_list, ...
        without_answer: what to do where a row has no final answer: refuse the data, or drop such rows and say how many.
        held_out: as `data`, for the accuracies before and after; without it the first rows of `data` are held out.
        held_out_question_columns: of `held_out`, where its names are others.
        held_out_answer_column: of `held_out`, where its name is another.
        held_out_tests_column: of `held_out`, where its name is another.
        pass_rates: JSON Lines of {"index", "pass_rate"} as measured; questions always or never solved are left out.
        difficulty_column: of `data`; numbers, or text such as "Level 3".
        min_difficulty: of the questions to train on.
        max_difficulty: of the questions to train on.
        max_prompt_tokens: longer questions are left out.
        easy_to_hard: train from easy to hard questions, shuffled among so many neighbours; None shuffles all.
    """

    data: tuple[str, ...] = ()
    question_columns: tuple[str, ...] = ()
    answer_column: str | None = None
    tests_column: str | None = None
    without_answer: Literal["refuse", "drop"] = "refuse"
    held_out: tuple[str, ...] = ()
    held_out_question_columns: tuple[str, ...] = ()
    held_out_answer_column: str | None = None
    held_out_tests_column: str | None = None
    pass_rates: Path | None = None
    difficulty_column: str | None = None
    min_difficulty: float | None = None
    max_difficulty: float | None = None
    max_prompt_tokens: int | None = None
    easy_to_hard: int | None = None

    def __post_init__(self) -> None:
        if self.pass_rates is not None and len(self.data) != 1:
            raise ValueError(f"pass_rates: got rates by row with {len(self.data)} data sets, wanted one --data")
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        given = [name for name, value in vars(self).items() if value != plain[name] and name != "data"]
        if given and not self.data:
            raise ValueError(f"{given[0]}: got a setting for data, but no --data; give both, or neither")
        of_held_out = [name for name in given if name.startswith("held_out_")]
        if of_held_out and not self.held_out:
            raise ValueError(f"{of_held_out[0]}: got a setting for held-out data, but no --held-out; give both")

    def config(self, *, need_answer: bool) -> DataConfig:
        """As the data's own settings. Where programs are graded by hidden tests, no answers are needed."""
        source = partial(
            SourceConfig,
            need_answer=need_answer,
            question_columns=self.question_columns,
            answer_column=self.answer_column,
            tests_column=self.tests_column,
        )
        of_held_out = {
            "question_columns": self.held_out_question_columns or self.question_columns,
            "answer_column": self.held_out_answer_column or self.answer_column,
            "tests_column": self.held_out_tests_column or self.tests_column,
        }
        return DataConfig(
            sources=tuple(source(name=name, pass_rates=self.pass_rates) for name in self.data),
            held_out=tuple(source(name=name, **of_held_out) for name in self.held_out),
            without_answer=self.without_answer,
            difficulty_column=self.difficulty_column,
            min_difficulty=self.min_difficulty,
            max_difficulty=self.max_difficulty,
            max_prompt_tokens=self.max_prompt_tokens,
            curriculum=None if self.easy_to_hard is None else EasyToHard(window=self.easy_to_hard),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run: metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json, report.html.
        seed: of weights, data and sampling; the same seed gives the same run.
        quick: a short run for a first look and for CI: a smaller cold start, few steps, few questions. What is given
            beside it counts.
        model: Hugging Face or converted folder to start from, or a name on the hub; without it a small model is made
            from nothing.
        questions: of the data; without any, chains of arithmetic are generated.
        prompt: what a given model is asked; {question} stands for the question.
        chat: put the prompt into the model's chat template; base models, which have none, want --no-chat.
        terms: numbers in a generated question.
        largest: largest number in a generated question.
        operators: of generated questions, read from left to right: "+", "*" or "+*".
        modulus: generated questions keep remainders only; None keeps whole numbers.
        train_questions: generated questions to train on.
        eval_questions: held-out questions for the accuracies before and after.
        cold_start_examples: answers that a small model imitates before GRPO.
        cold_start_worked: share of them whose thoughts go step by step; the others only guess.
        cold_start_epochs: passes over them.
        cold_start_batch: examples an update.
        cold_start_lr: peak learning rate of the cold start.
        grpo: of the GRPO stage.
        rewards: of the samples.
        wandb_project: log to this project of Weights & Biases as well (pip install 'deepseek_jax[wandb]').
        wandb_offline: keep its files in the run's folder, for `wandb sync`.
        control: "shuffled" hands every reward to a random sample of its group: nothing should be learnt.
        mesh_data: replicas of the model. The product of the five sizes of the mesh must be the number of devices of
            all processes; all 1 in one process is a run on its first device, however many there are.
        mesh_fsdp: parts that weights are cut into by their width, and batches by sample.
        mesh_expert: groups of devices that the experts are divided between; batches are cut by them as well.
        mesh_context: parts of every sequence, and of the weights' width.
        mesh_tensor: parts of heads, inner widths and vocabulary.
        serve_expert: groups that whole experts are divided between, with serve_tensor, while samples are drawn: on a
            mesh weights are moved to a layout of its own for that, in which none is gathered. None chooses what suits
            the model; what is left of the devices are replicas.
        serve_tensor: parts of heads, inner widths and vocabulary while samples are drawn; None chooses.
        serve_unrolled: draw samples from layers one by one, also with --scan-layers: on GPUs faster, slower to compile.
        scan_layers: layers of one kind are one stack, run by a scan: a deep model compiles in the time of one layer.
        remat: what the backward pass works out again: nothing, whole layers, or all of a layer but its attention.
        save_dtype: of the model's folder at the end; auto is that of the model to start from, and float32 without one.
    """

    output: Path = Path("runs/r1_zero")
    seed: int = 0
    quick: bool = False
    model: Path | None = None
    questions: Questions = Questions()
    prompt: str = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
    chat: bool = True
    terms: int = 4
    largest: int = 9
    operators: str = "+"
    modulus: int | None = 10
    train_questions: int = 4_000
    eval_questions: int = 512
    cold_start_examples: int = 1_500
    cold_start_worked: float = 0.4
    cold_start_epochs: int = 12
    cold_start_batch: int = 32
    cold_start_lr: float = 2e-3
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardConfig = RewardConfig()
    wandb_project: str | None = None
    wandb_offline: bool = False
    control: Literal["none", "shuffled"] = "none"
    mesh_data: int = 1
    mesh_fsdp: int = 1
    mesh_expert: int = 1
    mesh_context: int = 1
    mesh_tensor: int = 1
    serve_expert: int | None = None
    serve_tensor: int | None = None
    serve_unrolled: bool = False
    scan_layers: bool = False
    remat: Remat = "nothing"
    save_dtype: Precision = "auto"


QUICK = {"cold_start_epochs": 4, "eval_questions": 64}
QUICK_GRPO = {"steps": 8, "eval_every": 4, "save_every": 4}
# What may change when a run goes on, because its weights do not depend on it: names, where and how it is computed, and
# how often it saves and reports. The model's name is free, but not its fingerprint. `steps` may be raised.
NAMES = {"output", "model", "quick", "wandb_project", "wandb_offline", "save_dtype"}
PLACE = {"remat", "at_once", "profile_steps", *(f"mesh_{axis}" for axis in AXES)}
PLACE |= {"serve_expert", "serve_tensor", "serve_unrolled"}
INTERVALS = {"save_every", "eval_every", "samples_every"}
# What may change too where numbers that were not finite ended the run: what such a run wants changed.
REMEDIES = {"lr", "cold_start_lr", "skip_grad_norm"}


class Setup(NamedTuple):
    """What both stages work with. `to_sampler` lays weights out for the generator; they stay where they are too."""

    layout: Layout
    model: Model
    tokenizer: Tokenizer
    generator: Generator
    to_sampler: Callable[[nnx.State], nnx.State]
    prompts: grain.DatasetIterator
    width: int
    held_out: list[Prompt]
    cold_start: list[tuple[list[int], list[int]]]
    rewards: Rewards


def main(config: Config) -> None:
    """Train by reinforcement learning with rule-based rewards; see the top of this file."""
    start = time.perf_counter()
    config = shortened(config, sys.argv[1:]) if config.quick else config
    if config.model is not None:
        config = dataclasses.replace(config, model=model_folder(config.model))
    with room_needed(config.output), held_folder(config.output):
        base = distributed.on_main(lambda: check(config))
        with rewards(config.rewards, max_new_tokens=config.grpo.max_new_tokens) as graded:
            stages(config, prepare(config, graded), base, start)


def shortened(config: Config, arguments: Sequence[str]) -> Config:
    """The settings of `--quick`, but for those that are given themselves."""
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    plain = Config()
    free = lambda name, now, default: name not in given and getattr(now, name) == getattr(default, name)
    grpo = {name: value for name, value in QUICK_GRPO.items() if free(name, config.grpo, plain.grpo)}
    rest = {name: value for name, value in QUICK.items() if free(name, config, plain)}
    return dataclasses.replace(config, **rest, grpo=dataclasses.replace(config.grpo, **grpo))


def stages(config: Config, setup: Setup, base: str | None, start: float) -> None:
    """Cold start, GRPO, and the accuracies before and after it."""
    run_id = distributed.on_main(lambda: enter_folder(config.output, run_settings(config, base)))
    wandb = config.wandb_project and WandbConfig(project=config.wandb_project, offline=config.wandb_offline)
    print(computing(config))
    log = MetricLog(config.output, wandb=wandb or None)
    weights = cold_start(config, setup, log) if setup.cold_start else setup.model.weights
    before = evaluate_once(config, setup, weights, "before")
    print(f"accuracy before GRPO: {before['accuracy']:.1%} +- {before['stderr']:.1%}")
    weights = reinforce(config, setup, weights, log, run_id)
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
    return distributed.printable(f"computes in {dtype}{given} on {where}, and updates {kept} float32")


def check(config: Config) -> str | None:
    """Refuse settings that cannot work, and a folder with a run that cannot go on with them; what `base_of` gives."""
    if "{question}" not in config.prompt:
        raise ValueError(f"prompt: got {config.prompt!r}, wanted {{question}} somewhere in it")
    if config.eval_questions < 1:
        raise ValueError(f"eval_questions: got {config.eval_questions}, wanted at least 1")
    base = base_of(config)
    writes = ("model", "adapter") if config.grpo.lora_rank else ("model",)
    check_folder(config.output, run_settings(config, base), stage="grpo", writes=writes)
    return base


def base_of(config: Config) -> str | None:
    """What the model to start from is known by, if there is one."""
    if config.model is None:
        return None
    return fingerprint(config.model)


def run_settings(config: Config, base: str | None) -> RunSettings:
    return RunSettings(settings(config), settings(Config()), NAMES | PLACE | INTERVALS, base, REMEDIES)


def settings(config: Config) -> dict[str, Any]:
    """All settings by the names of their options; files by their whole paths."""
    flat = json.loads(json.dumps(_flat(dataclasses.asdict(config)), default=str))
    whole = lambda name: os.path.realpath(name) if os.path.exists(name) else name
    flat |= {name: [whole(file) for file in flat[name]] for name in ("data", "held_out")}
    flat["dtype"] = dtype_of(config.grpo.dtype).name  # what "auto" is here: elsewhere it may be another
    return flat | {"pass_rates": flat["pass_rates"] and whole(flat["pass_rates"])}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


# --- model and questions -------------------------------------------------------------------------


def layout_of(config: Config) -> Layout:
    """How the model lies on the devices and runs there."""
    sizes = {axis: getattr(config, f"mesh_{axis}") for axis in AXES}
    one_device = distributed.count() == 1 and all(size == 1 for size in sizes.values())
    return Layout(
        mesh=None if one_device else make_mesh(**sizes),
        scan_layers=config.scan_layers,
        remat=config.remat,
        lanes=lanes_of(jax.default_backend()),
    )


def prepare(config: Config, graded: Rewards) -> Setup:
    """The model, its tokenizer, and questions split into training and held-out ones."""
    layout = layout_of(config)
    if config.model is None:
        tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
        model = lay_out(small_model(config, tokenizer), layout)
    else:
        tokenizer = Tokenizer.from_folder(config.model)
        if not tokenizer.eos_ids:
            raise ValueError(
                f"{config.model}: names no end-of-sequence token, wanted one for completions to end with; add "
                "eos_token to tokenizer_config.json or eos_token_id to generation_config.json"
            )
        # what an adapter leaves as it is needs no float32
        dtype = dtype_of(config.grpo.dtype if config.grpo.lora_rank else "float32")
        model = load_model(config.model, dtype=dtype, layout=layout)
    asked = read if config.questions.data else generated
    prompts, longest, held_out, examples = asked(config, tokenizer)
    # whole multiples of 32 columns, so that what differs little compiles to the same
    width = -(-(longest + config.grpo.max_new_tokens - 1) // 32) * 32
    config.grpo.check_model(model.config, longest)
    parts = config.grpo.updates_per_rollout * config.grpo.micro_batches
    layout.check_batch(config.grpo.prompts_per_step * config.grpo.group_size // parts, width)
    if examples:
        layout.check_batch(config.cold_start_batch // config.grpo.micro_batches, example_width(examples))
    generator = make_sampler(config, model.config, layout)
    to_sampler = Transfer(generator.config, layout, generator.layout, dtype_of(config.grpo.dtype))
    return Setup(layout, model, tokenizer, generator, to_sampler, prompts, width, held_out, examples, graded)


def make_sampler(config: Config, architecture: ModelConfig, layout: Layout) -> Generator:
    """The generator, in a layout of its own on the devices of training."""
    given = {"expert": config.serve_expert, "tensor": config.serve_tensor, "unrolled": config.serve_unrolled}
    serving = serving_layout(architecture, layout, **given)
    sampled = sampled_config(architecture)
    return Generator(sampled, abstract_weights(sampled, layout=serving)[0])


class Asked(NamedTuple):
    """Endless batches of prompts, the longest one's tokens, held-out prompts, and examples for the cold start."""

    prompts: grain.DatasetIterator
    longest: int
    held_out: list[Prompt]
    examples: list[tuple[list[int], list[int]]]


def generated(config: Config, tokenizer: Tokenizer) -> Asked:
    """Chains of arithmetic."""
    chains = draw_chains(
        config.train_questions + config.eval_questions,
        terms=config.terms,
        largest=config.largest,
        operators=config.operators,
        modulus=config.modulus,
        seed=config.seed,
    )
    as_example = lambda chain: Example(chain.question, chain.answer, None, {"answer": chain.answer}, 0, 0)
    prompts = [make_prompt(config, tokenizer, as_example(chain)) for chain in chains]
    for prompt in prompts:
        check_columns(config.rewards, prompt.columns)
    held_out, train = prompts[: config.eval_questions], prompts[config.eval_questions :]
    examples: list[tuple[list[int], list[int]]] = []
    if config.model is None:
        shown = chains[config.eval_questions :][: config.cold_start_examples]
        end = [tokenizer.eos_ids[0]]
        worked = np.random.default_rng(config.seed).random(len(shown)) < config.cold_start_worked
        examples = [
            (ask(config, tokenizer, s.question), tokenizer.encode(trace(s, worked=w), add_bos=False) + end)
            for s, w in zip(shown, worked, strict=True)
        ]
    drawn = batches(train, size=config.grpo.prompts_per_step, seed=config.seed)
    return Asked(drawn, max(len(p.tokens) for p in train), held_out, examples)


def read(config: Config, tokenizer: Tokenizer) -> Asked:
    """Questions of data sets."""
    of = config.questions.config(need_answer=config.rewards.accuracy != "code")
    make = partial(make_prompt, config, tokenizer)
    data = open_prompts(of, count_tokens=lambda example: len(make(example).tokens))
    if of.held_out:
        alone = DataConfig(sources=of.held_out, without_answer=of.without_answer)
        held_out = list(open_prompts(alone))[: config.eval_questions]
    else:
        held_out, data = data.split(config.eval_questions)
    if distributed.is_main():
        for line in data.report:
            print(distributed.printable(line))
    for examples in (held_out, data):
        for example in examples:
            check_columns(config.rewards, example.columns)
    longest = max(len(make(example).tokens) for example in data)
    drawn = prompt_batches(data, size=config.grpo.prompts_per_step, seed=config.seed, make=make)
    return Asked(drawn, longest, [make(example) for example in held_out], [])


def small_model(config: Config, tokenizer: Tokenizer) -> Model:
    """The preset `tiny` with the task's vocabulary, from random weights."""
    architecture = dataclasses.replace(
        preset("tiny"), vocab_size=32, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0]
    )
    graphdef, weights = split(Decoder(architecture, rngs=nnx.Rngs(config.seed)))
    return Model(architecture, graphdef, weights)


def example_width(examples: Sequence[tuple[list[int], list[int]]]) -> int:
    """Columns of a cold start's batch."""
    return bucket(max(len(p) + len(c) for p, c in examples) - 1)


def ask(config: Config, tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's tokens: the user's turn of a chat, or the text as it is."""
    if config.chat:
        return tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(text, add_bos=True)


def make_prompt(config: Config, tokenizer: Tokenizer, example: Example) -> Prompt:
    # not str.format, to which the braces of \boxed{} would be fields
    text = config.prompt.replace("{question}", example.question) if config.model else example.question
    tokens = tokenizer.chat(list(example.messages)) if example.messages else ask(config, tokenizer, text)
    return Prompt(tokenizer.decode(tokens, skip_special=False), tokens, example.columns)


# --- the two stages ------------------------------------------------------------------------------


def cold_start(config: Config, setup: Setup, log: MetricLog) -> nnx.State:
    """Supervised epochs over worked examples: the form of an answer, and some skill to reinforce."""
    steps = config.cold_start_epochs * len(setup.cold_start) // config.cold_start_batch
    adamw = OptimizerConfig(
        learning_rate=config.cold_start_lr,
        warmup_steps=20,
        final_ratio=0.1,
        weight_decay=0.1,
        moments=config.grpo.moments,
    )
    optimizer = make_optimizer(adamw, steps)
    # the weights themselves are trained here, whatever GRPO trains: biases move
    of_step = dataclasses.replace(config.grpo.step_config, bias_gamma=config.grpo.bias_gamma)
    update = make_train_step(setup.model.graphdef, sft_objective, optimizer, of_step)
    width = example_width(setup.cold_start)

    def step(state: TrainState, examples: Sequence, number: int) -> tuple[TrainState, Mapping[str, float]]:
        state, metrics = update(state, setup.layout.put(sft_batch(examples, width=width)))
        rate = float(schedule(adamw, steps)(number))
        return state, ops_metrics.values(metrics) | {"learning_rate": rate}

    stage = Stage(name="cold_start", steps=steps, save_every=200, shown={"loss": "loss"})
    data = batches(setup.cold_start, size=config.cold_start_batch, seed=config.seed)
    state = init_state(setup.model.weights, optimizer, setup.layout, donate=True)
    return run_stage(stage, state, data, step, folder=config.output, log=log).weights


def reinforce(config: Config, setup: Setup, weights: nnx.State, log: MetricLog, run_id: str) -> nnx.State:
    """GRPO: sample a group for each question, reward, compare, update. An adapter is saved as PEFT has it."""
    shuffled = partial(shuffle_rewards, seed=config.seed)
    held_out = lambda weights: evaluate(config, setup, weights, most=128).mean
    trainer = GRPOTrainer(
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
    state = run_grpo(trainer, setup.prompts, folder=config.output, log=log, evaluate=held_out)
    if trainer.lora is not None:
        base = None if config.model is None else str(config.model)
        save = lambda target: save_adapter(state.train.weights, trainer.lora, setup.model.config, target, base=base)
        write_owned(config.output / "adapter", run=run_id, steps=config.grpo.steps, write=save)
    return trainer.trained(state)


def shuffle_rewards(rewards_PG: np.ndarray, step: int, *, seed: int) -> np.ndarray:
    """The control: each group's rewards in random order, so that they say nothing of the samples."""
    return np.random.default_rng((seed, step)).permuted(rewards_PG, axis=1)


# --- evaluation and reports ----------------------------------------------------------------------


def evaluate(config: Config, setup: Setup, weights: nnx.State, most: int | None = None) -> Accuracy:
    """Greedy accuracy of weights in the sampler's layout on the held-out questions, or on the first `most` of them."""
    return greedy_accuracy(
        setup.generator,
        weights,
        setup.tokenizer,
        setup.held_out[:most],
        max_new_tokens=config.grpo.max_new_tokens,
        stop_ids=setup.tokenizer.eos_ids,
        grade=setup.rewards.accuracy,
    )


def evaluate_once(config: Config, setup: Setup, weights: nnx.State, name: str) -> dict[str, float]:
    """An evaluation that a resumed run reads back instead of repeating."""
    path = config.output / f"accuracy_{name}.json"
    if not distributed.on_main(path.exists):
        found = evaluate(config, setup, setup.to_sampler(weights))
        distributed.on_main(lambda: write_json(path, {"accuracy": found.mean, "stderr": found.stderr}))
    return distributed.on_main(lambda: json.loads(path.read_text(encoding="utf-8")))


def write_model(config: Config, setup: Setup, weights: nnx.State, run_id: str) -> None:
    """As a Hugging Face folder, in the place of the one that the run wrote when it had fewer steps."""
    trained = setup.model._replace(weights=computed(weights, saved_dtype(config)))
    save = lambda target: save_model(trained, target, source=config.model, tokenizer=setup.tokenizer.files)
    write_owned(config.output / "model", run=run_id, steps=config.grpo.steps, write=save)


def saved_dtype(config: Config) -> jnp.dtype:
    """What the model's folder is written in."""
    if config.save_dtype != "auto" or config.model is None:
        return jnp.dtype("float32" if config.save_dtype == "auto" else config.save_dtype)
    return jnp.dtype("bfloat16" if named_dtype(config.model) == "bfloat16" else "float32")


def report(config: Config, setup: Setup, before: dict[str, float], after: Accuracy, seconds: float) -> None:
    """The report, and last the summary, which says that the run is whole."""
    rows = read_metrics(config.output / "metrics.jsonl")
    summary: dict[str, Any] = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after.mean,
        "stderr_before": before["stderr"],
        "stderr_after": after.stderr,
        "questions": len(setup.held_out),
        "wall_seconds": round(seconds, 1),
        "tokens": int(rows[-1]["num_tokens"]),
        "seed": config.seed,
        "control": config.control,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.model.weights)),
    }
    samples = [
        {"prompt": p.text, "completion": c.text, "rewards": {"accuracy": s}, "answer": p.columns.get("answer")}
        for p, c, s in zip(setup.held_out[:16], after.completions, after.scores, strict=False)
    ]
    drawn = read_samples(config.output, steps=3)
    write_report(config.output, title="R1-Zero", summary=summary, rows=rows, samples=samples, completions=drawn)
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(distributed.printable(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}"))
