"""R1-Zero: does reinforcement learning with rule-based rewards teach a model to reason?

Without arguments: a small DeepSeek-architecture model (latent attention, grouped experts, a shared expert) is made
from nothing and imitates answers to chains of arithmetic (the cold start). Most of those answers only guess, some
work it out step by step. Then GRPO alone has to find out that thinking pays, and to do it right. With
`--model FOLDER --data FILE.jsonl` the same loop trains a Hugging Face checkpoint.

Cost: three to seven minutes on two CPU cores without arguments; `--quick` shows the whole path in one or two.
Expected: held-out accuracy rises by 20 points and more over the cold start; with `--control shuffled` it does not
(see LOG.md). A killed run goes on from its last checkpoint when the same command is given again. The `--mesh-*` flags
divide the model over several devices, and over those of several processes (docs/pods.md).
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import processes
from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.checkpoint.folder import Model, lay_out, load_model, save_hf
from deepseek_jax.cli import run
from deepseek_jax.config import preset
from deepseek_jax.evals.accuracy import Accuracy, greedy_accuracy
from deepseek_jax.generate.engine import Generator, SamplingConfig, bucket
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rewards.format import format_reward
from deepseek_jax.rewards.structure import structure_reward
from deepseek_jax.rl.loss import GRPOConfig
from deepseek_jax.rl.objective import grpo_objective, reference_logprobs
from deepseek_jax.rl.rollout import Prompt, Roller, rollout_metrics
from deepseek_jax.sharding import AXES, Layout, Remat, lanes_of, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.arithmetic import ALPHABET, TEMPLATE, draw_chains, trace
from deepseek_jax.train.data import Question, batches, read_questions
from deepseek_jax.train.loop import Stage, profiled_steps, run_stage
from deepseek_jax.train.metrics import MetricLog, read_metrics
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deepseek_jax.train.report import write_report
from deepseek_jax.train.sft import sft_batch, sft_objective
from deepseek_jax.train.step import StepConfig, TrainState, init_state, make_train_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run: metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json, report.html.
        seed: of weights, data and sampling; the same seed gives the same run.
        quick: a short run for a first look and for CI: a smaller cold start, few steps, few questions.
        model: Hugging Face or converted folder to start from; without it a small model is made from nothing.
        data: JSONL rows with `question` and `answer`; without it chains of arithmetic are generated.
        prompt: what a given model is asked; {question} stands for the question.
        chat: put the prompt into the model's chat template, where it has one; base models want --no-chat.
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
        steps: GRPO steps.
        prompts_per_step: questions a step.
        group_size: samples a question (R1: 16).
        max_new_tokens: limit a sample.
        temperature: of the samples.
        lr: learning rate of GRPO.
        warmup: GRPO steps over which the learning rate rises.
        beta: weight of the KL term (R1-Zero: 0.001).
        epsilon: clipping of the probability ratio.
        epsilon_high: upper clipping; None is epsilon.
        updates_per_rollout: parts of a rollout, an optimizer step each.
        micro_batches: parts of an update, computed one after another to save memory.
        reference_every: steps after which the policy becomes the reference (R1-Zero: 400).
        balance_alpha: weight of the sequence-wise balance loss of the experts.
        bias_gamma: speed of the router bias.
        weight_accuracy: weight of the accuracy reward.
        weight_format: weight of the <think>/<answer> format reward.
        weight_structure: weight of the reasoning-structure score, which can be gamed (R1: 0).
        eval_every: steps between evaluations on part of the held-out questions.
        save_every: steps between checkpoints.
        control: "shuffled" hands every reward to a random sample of its group: nothing should be learnt.
        mesh_data: replicas of the model. The product of the five sizes of the mesh must be the number of devices of
            all processes; all 1 in one process is a run on its first device, however many there are.
        mesh_fsdp: parts that weights are cut into by their width, and batches by sample.
        mesh_expert: groups of devices that the experts are divided between; batches are cut by them as well.
        mesh_context: parts of every sequence, and of the weights' width.
        mesh_tensor: parts of heads, inner widths and vocabulary.
        stacked: layers of one kind are one stack: a deep model compiles in the time of one layer.
        remat: what the backward pass works out again: nothing, whole layers, or all of a layer but its attention.
        profile_steps: "A:B" traces the GRPO steps A to B, counted from 1, into profile/.
    """

    output: Path = Path("runs/r1_zero")
    seed: int = 0
    quick: bool = False
    model: Path | None = None
    data: Path | None = None
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
    steps: int = 60
    prompts_per_step: int = 16
    group_size: int = 16
    max_new_tokens: int = 48
    temperature: float = 1.0
    lr: float = 2e-4
    warmup: int = 5
    beta: float = 0.001
    epsilon: float = 0.2
    epsilon_high: float | None = None
    updates_per_rollout: int = 1
    micro_batches: int = 1
    reference_every: int = 400
    balance_alpha: float = 1e-4
    bias_gamma: float = 1e-3
    weight_accuracy: float = 1.0
    weight_format: float = 0.3
    weight_structure: float = 0.0
    eval_every: int = 10
    save_every: int = 20
    control: Literal["none", "shuffled"] = "none"
    mesh_data: int = 1
    mesh_fsdp: int = 1
    mesh_expert: int = 1
    mesh_context: int = 1
    mesh_tensor: int = 1
    stacked: bool = False
    remat: Remat = "nothing"
    profile_steps: str | None = None


QUICK = {"cold_start_epochs": 4, "steps": 8, "eval_questions": 64, "eval_every": 4, "save_every": 4}
# Where and how a run is computed: may change when it goes on.
PLACE = {"remat", "profile_steps", *(f"mesh_{axis}" for axis in AXES)}


class Setup(NamedTuple):
    """What both stages work with."""

    layout: Layout
    model: Model
    tokenizer: Tokenizer
    generator: Generator
    train: list[Prompt]
    held_out: list[Prompt]
    cold_start: list[tuple[list[int], list[int]]]


def main(config: Config) -> None:
    """Train by reinforcement learning with rule-based rewards; see the top of this file."""
    start = time.perf_counter()
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    processes.on_main(lambda: check(config))
    setup = prepare(config)
    processes.on_main(lambda: write_json(config.output / "config.json", settings(config)))
    log = MetricLog(config.output)
    weights = cold_start(config, setup, log) if setup.cold_start else setup.model.weights
    before = evaluate_once(config, setup, weights, "before")
    print(f"accuracy before GRPO: {before['accuracy']:.1%} +- {before['stderr']:.1%}")
    weights = reinforce(config, setup, weights, log)
    after = evaluate(config, setup, weights)
    print(f"accuracy after GRPO: {after.mean:.1%} +- {after.stderr:.1%}")
    log.close()
    save_model(config, setup, weights)
    processes.on_main(lambda: report(config, setup, before, after, time.perf_counter() - start))


def check(config: Config) -> None:
    """Settings that cannot work, a folder with a finished run, or with an unfinished one of other settings."""
    if config.group_size < 2:
        raise ValueError(f"group_size: got {config.group_size}, wanted at least 2: a group of one learns nothing")
    samples, parts = config.prompts_per_step * config.group_size, config.updates_per_rollout * config.micro_batches
    if parts < 1 or samples % parts:
        raise ValueError(
            f"updates_per_rollout {config.updates_per_rollout} x micro_batches {config.micro_batches} "
            f"does not divide the {samples} samples of a step"
        )
    if "{question}" not in config.prompt:
        raise ValueError(f"prompt: got {config.prompt!r}, wanted {{question}} somewhere in it")
    for name in ("steps", "prompts_per_step", "eval_questions", "eval_every", "save_every", "reference_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}, wanted at least 1")
    if config.profile_steps is not None:
        profiled_steps(config.profile_steps, config.steps)
    if (config.output / "summary.json").exists():
        raise ValueError(f"{config.output}: holds a finished run; choose another --output or remove it")
    path = config.output / "config.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings(config)
    for name, value in settings(config).items():
        if name not in PLACE and held.get(name) != value:
            raise ValueError(
                f"{path}: the unfinished run there has {name} {held.get(name)!r}, not {value!r}; "
                "give the same settings to go on with it, or another --output"
            )


def settings(config: Config) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(values, indent=2).encode())


# --- model and questions -------------------------------------------------------------------------


def layout_of(config: Config) -> Layout:
    """How the model lies on the devices and runs there."""
    sizes = {axis: getattr(config, f"mesh_{axis}") for axis in AXES}
    one_device = processes.count() == 1 and all(size == 1 for size in sizes.values())
    return Layout(
        mesh=None if one_device else make_mesh(**sizes),
        stacked=config.stacked,
        remat=config.remat,
        lanes=lanes_of(jax.default_backend()),
    )


def prepare(config: Config) -> Setup:
    """The model, its tokenizer, and questions split into training and held-out ones."""
    layout = layout_of(config)
    if config.model is None:
        tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
        model = lay_out(small_model(config, tokenizer), layout)
    else:
        tokenizer = Tokenizer.from_folder(config.model)
        model = load_model(config.model, layout=layout)
    questions = read_questions(config.data) if config.data else None
    examples: list[tuple[list[int], list[int]]] = []
    if questions is None:
        chains = draw_chains(
            config.train_questions + config.eval_questions,
            terms=config.terms,
            largest=config.largest,
            operators=config.operators,
            modulus=config.modulus,
            seed=config.seed,
        )
        questions = [Question(s.question, s.answer) for s in chains]
        if config.model is None:
            shown = chains[config.eval_questions :][: config.cold_start_examples]
            end = [tokenizer.eos_ids[0]]
            worked = np.random.default_rng(config.seed).random(len(shown)) < config.cold_start_worked
            examples = [
                (ask(config, tokenizer, s.question), tokenizer.encode(trace(s, worked=w), add_bos=False) + end)
                for s, w in zip(shown, worked, strict=True)
            ]
    if len(questions) < config.eval_questions + config.prompts_per_step:
        raise ValueError(
            f"{config.data}: got {len(questions)} rows, wanted at least {config.eval_questions} held-out ones and "
            f"{config.prompts_per_step} to train on; lower --eval-questions"
        )
    prompts = [make_prompt(config, tokenizer, q) for q in questions]
    generator = Generator(model.config, model.graphdef, layout=layout)
    held_out, train = prompts[: config.eval_questions], prompts[config.eval_questions :]
    parts = config.updates_per_rollout * config.micro_batches
    layout.check_batch(config.prompts_per_step * config.group_size // parts, rollout_width(config, train))
    if examples:
        layout.check_batch(config.cold_start_batch // config.micro_batches, example_width(examples))
    return Setup(layout, model, tokenizer, generator, train, held_out, examples)


def small_model(config: Config, tokenizer: Tokenizer) -> Model:
    """The preset `tiny` with the task's vocabulary, from random weights."""
    architecture = dataclasses.replace(
        preset("tiny"), vocab_size=32, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0]
    )
    graphdef, weights = split(Decoder(architecture, rngs=nnx.Rngs(config.seed)))
    return Model(architecture, graphdef, weights)


def rollout_width(config: Config, prompts: Sequence[Prompt]) -> int:
    """Columns of a rollout's batch."""
    return -(-(max(len(p.tokens) for p in prompts) + config.max_new_tokens - 1) // 32) * 32


def example_width(examples: Sequence[tuple[list[int], list[int]]]) -> int:
    """Columns of a cold start's batch."""
    return bucket(max(len(p) + len(c) for p, c in examples) - 1)


def ask(config: Config, tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's tokens: the chat template's user turn, or the text as it is."""
    if config.chat and tokenizer.chat_template is not None:
        return tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(text, add_bos=True)


def make_prompt(config: Config, tokenizer: Tokenizer, question: Question) -> Prompt:
    # not str.format, to which the braces of \boxed{} would be fields
    text = config.prompt.replace("{question}", question.question) if config.model else question.question
    tokens = ask(config, tokenizer, text)
    return Prompt(tokenizer.decode(tokens, skip_special=False), tokens, {"answer": question.answer})


# --- the two stages ------------------------------------------------------------------------------


def cold_start(config: Config, setup: Setup, log: MetricLog) -> nnx.State:
    """Supervised epochs over worked examples: the form of an answer, and some skill to reinforce."""
    steps = config.cold_start_epochs * len(setup.cold_start) // config.cold_start_batch
    adamw = OptimizerConfig(learning_rate=config.cold_start_lr, warmup_steps=20, final_ratio=0.1, weight_decay=0.1)
    optimizer = make_optimizer(adamw, steps)
    update = make_train_step(setup.model.graphdef, sft_objective, optimizer, step_config(config), setup.layout)
    width = example_width(setup.cold_start)

    def step(state: TrainState, examples: Sequence, number: int) -> tuple[TrainState, Mapping[str, float]]:
        state, metrics = update(state, sft_batch(examples, width=width))
        rate = float(schedule(adamw, steps)(number))
        return state, ops_metrics.values(metrics) | {"learning_rate": rate}

    stage = Stage(name="cold_start", steps=steps, save_every=200, shown={"loss": "loss"})
    data = batches(setup.cold_start, size=config.cold_start_batch, seed=config.seed)
    state = init_state(setup.model.weights, optimizer, setup.layout)
    return run_stage(stage, state, data, step, folder=config.output, log=log).weights


class Reinforced(NamedTuple):
    """State of the GRPO stage: the policy's training, the reference model, and the tokens sampled so far."""

    train: TrainState
    reference: nnx.State
    tokens: jax.Array


def reinforce(config: Config, setup: Setup, weights: nnx.State, log: MetricLog) -> nnx.State:
    """GRPO: sample a group for each question, reward, compare, update."""
    adamw = OptimizerConfig(learning_rate=config.lr, warmup_steps=config.warmup)
    updates = config.steps * config.updates_per_rollout
    optimizer, rate = make_optimizer(adamw, updates), schedule(adamw, updates)
    loss = GRPOConfig(epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta)
    objective = partial(grpo_objective, config=loss, temperature=config.temperature)
    update = make_train_step(setup.model.graphdef, objective, optimizer, step_config(config), setup.layout)
    roll = roller(config, setup)

    def step(state: Reinforced, prompts: list[Prompt], number: int) -> tuple[Reinforced, Mapping[str, float]]:
        rollout = roll(state.train.weights, prompts, seed=config.seed, step=number)
        batch = rollout.batch
        if config.beta:
            scored = reference_logprobs(setup.model.graphdef, state.reference, batch, temperature=config.temperature)
            batch = batch._replace(ref_logprobs_BT=scored)
        train, total = state.train, None
        for part in range(config.updates_per_rollout):
            rows = slice(part, None, config.updates_per_rollout)
            train, metrics = update(train, jax.tree.map(lambda a, rows=rows: a[rows], batch))
            total = metrics if total is None else ops_metrics.merge(total, metrics)
        sampled = sum(len(p.tokens) for p in prompts) * config.group_size + sum(
            len(c.tokens) for c in rollout.completions
        )
        reference = state.reference
        if (number + 1) % config.reference_every == 0:
            reference = jax.tree.map(jnp.copy, train.weights)
        state = Reinforced(train, reference, state.tokens + sampled)
        values = rollout_metrics(rollout, config.group_size) | ops_metrics.values(total)
        last = (number + 1) * config.updates_per_rollout - 1
        values |= {"learning_rate": float(rate(last)), "num_tokens": int(state.tokens)}
        if (number + 1) % config.eval_every == 0:
            values["eval/accuracy"] = evaluate(config, setup, train.weights, most=128).mean
        return state, values

    stage = Stage(
        name="grpo",
        steps=config.steps,
        save_every=config.save_every,
        shown={
            "reward": "reward",
            "rewards/accuracy/mean": "accuracy",
            "completions/mean_length": "length",
            "kl": "kl",
            "entropy": "entropy",
            "eval/accuracy": "held-out",
        },
        profile_steps=config.profile_steps,
    )
    data = batches(setup.train, size=config.prompts_per_step, seed=config.seed)
    first = init_state(weights, optimizer, setup.layout)
    state = Reinforced(first, jax.tree.map(jnp.copy, weights), jnp.int32(0))
    return run_stage(stage, state, data, step, folder=config.output, log=log).train.weights


def step_config(config: Config) -> StepConfig:
    return StepConfig(
        micro_batches=config.micro_batches, balance_alpha=config.balance_alpha, bias_gamma=config.bias_gamma
    )


def roller(config: Config, setup: Setup) -> Roller:
    """Sampling and rewards of a GRPO step."""
    weights = {"accuracy": config.weight_accuracy, "format": config.weight_format, "structure": config.weight_structure}
    functions = {"accuracy": accuracy_reward, "format": format_reward, "structure": structure_reward}
    used = {name: weight for name, weight in weights.items() if weight}
    return Roller(
        generator=setup.generator,
        tokenizer=setup.tokenizer,
        sampling=SamplingConfig(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop_ids=setup.tokenizer.eos_ids
        ),
        group_size=config.group_size,
        reward=combine({name: functions[name] for name in used}, used),
        width=rollout_width(config, setup.train),
        alter_rewards=partial(shuffle_rewards, seed=config.seed) if config.control == "shuffled" else None,
    )


def shuffle_rewards(rewards_PG: np.ndarray, step: int, *, seed: int) -> np.ndarray:
    """The control: each group's rewards in random order, so that they say nothing of the samples."""
    return np.random.default_rng((seed, step)).permuted(rewards_PG, axis=1)


# --- evaluation and reports ----------------------------------------------------------------------


def evaluate(config: Config, setup: Setup, weights: nnx.State, most: int | None = None) -> Accuracy:
    """Greedy accuracy on the held-out questions, or on the first `most` of them."""
    return greedy_accuracy(
        setup.generator,
        weights,
        setup.tokenizer,
        setup.held_out[:most],
        max_new_tokens=config.max_new_tokens,
        stop_ids=setup.tokenizer.eos_ids,
    )


def evaluate_once(config: Config, setup: Setup, weights: nnx.State, name: str) -> dict[str, float]:
    """An evaluation that a resumed run reads back instead of repeating."""
    path = config.output / f"accuracy_{name}.json"
    if not processes.on_main(path.exists):
        found = evaluate(config, setup, weights)
        processes.on_main(lambda: write_json(path, {"accuracy": found.mean, "stderr": found.stderr}))
    return processes.on_main(lambda: json.loads(path.read_text(encoding="utf-8")))


def save_model(config: Config, setup: Setup, weights: nnx.State) -> None:
    """As a Hugging Face folder, if a run before this one did not."""
    target = config.output / "model"
    if not processes.on_main(target.exists):
        trained = setup.model._replace(weights=weights)
        save_hf(trained, target, source=config.model, tokenizer=setup.tokenizer.files)


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
        {"prompt": p.text, "completion": c.text, "rewards": {"accuracy": s}, "answer": p.columns["answer"]}
        for p, c, s in zip(setup.held_out[:16], after.completions, after.scores, strict=False)
    ]
    write_report(config.output, title="R1-Zero", summary=summary, rows=rows, samples=samples)
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}")


if __name__ == "__main__":
    run(main)
