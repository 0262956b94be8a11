"""Cost of reinforcement learning beside a peer or a law, interleaved in one run, printed as Markdown."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.config import preset
from deepseek_jax.generation.completion import Completion
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.ops.logprobs import logprobs_of_logits, token_logprobs
from deepseek_jax.rl.batch import Batch, make_batch, pack
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.rl.shared_rows import shared_shape, work_of
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.step import StepConfig, init_state, make_train_step
from experiments.ppo.critic import critic_from
from experiments.ppo.ppo import (
    PPOConfig,
    critic_objective,
    frozen_values,
    ppo_targets,
    ppo_update,
    with_targets,
)
from tools.suite.grpo_steps import OurSteps, StepLoad, repeated, tiny, trl_steps
from tools.suite.peers import why_none

GIB = 1 << 30


def step(
    model: Path | None = None,
    /,
    *,
    prompts: int = 2,
    group_size: int = 8,
    tokens: int = 64,
    prompt_tokens: int | None = None,
    rounds: int = 5,
    kl: float = 0.0,
    share_prompts: bool = True,
    experts: int | None = None,
) -> None:
    """Seconds of a whole GRPO step (sampling, reward, update) beside TRL's GRPOTrainer on the same weights, float32.

    Both draw exactly `tokens` tokens a sample, at temperature 1, and make one AdamW update, the gradient clipped at
    norm 1. The steps are made in turn.

    Args:
        model: Hugging Face folder; without it a tiny DeepSeek-V3 is made (preset `tiny`).
        prompts: questions a step.
        group_size: samples a question.
        tokens: new tokens a sample.
        prompt_tokens: tokens that questions are repeated to, at least; None leaves them as they are, of a few.
        rounds: timed pairs; one pair before them is not counted.
        share_prompts: as of the train command.
        kl: weight of the KL term; 0 spares both the reference model.
        experts: routed experts of the tiny model, 8 of them a token in 8 groups, as in R1 with its 256; None is the
            preset.
    """
    lacking = why_none("transformers", "trl")
    if lacking:
        raise ValueError(lacking)
    with tempfile.TemporaryDirectory() as name:
        folder = model or tiny(Path(name) / "model", experts)
        texts = ["12+34=?", "5+6+7+8=?"] if model is None else ["A train leaves the", "Four friends share"]
        texts = [texts[place % 2] for place in range(prompts)]
        if prompt_tokens is not None:
            texts = [repeated(f"{text} ", prompt_tokens, Tokenizer.from_folder(folder)) for text in texts]
        load = StepLoad(texts, group_size, tokens, kl)
        ours = OurSteps(folder, load, share_prompts=share_prompts)
        with trl_steps(folder, load) as theirs:
            calls = [ours, theirs]
            pairs = [tuple(call() for call in calls) for _ in range(rounds + 1)][1:]
    _print_pair("step", pairs, ("deepseek_jax", "TRL"))
    sampling, update = (statistics.median(part) for part in zip(*ours.parts[1:], strict=True))
    print(f"of ours {sampling:.3f} s are sampling and reward, {update:.3f} s the update")


def prompts(
    model: Path | None = None,
    /,
    *,
    questions: int = 2,
    group_size: int = 8,
    tokens: int = 64,
    prompt_tokens: int = 512,
    rounds: int = 3,
) -> None:
    """FLOPs and seconds of an update whose samples share prompts beside one whose samples have one each.

    XLA counts FLOPs, the bodies of loops once: give rows so short that log-probs and attention have none.

    Args:
        model: Hugging Face folder; without it the preset `tiny`.
        questions: of the update.
        group_size: samples a question.
        tokens: new tokens a sample.
        prompt_tokens: of each question.
        rounds: timed pairs; one pair before them is not counted. 0 times none.
    """
    if model is None:
        config = preset("tiny")
        graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    else:
        config, graphdef, weights = load_model(model)
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(0, config.vocab_size, count, dtype=np.int32)
    old = np.full(tokens, -np.log(config.vocab_size), np.float32)
    drawn = [Completion(draw(tokens), old, True) for _ in range(questions * group_size)]
    asked = [draw(prompt_tokens) for _ in range(questions)]
    samples = [of for of in asked for _ in range(group_size)], drawn, rng.normal(size=len(drawn)).astype(np.float32)
    shape = {"groups": questions, "group_size": group_size, "prompt": prompt_tokens, "completion": tokens}
    rows = shared_shape(work_of(config), **shape, width_of=8)
    sharing = {"width": rows.width, "per_row": rows.per_row, "rows_of": rows.rows, "share_prompts": True}
    width = prompt_tokens - 1 + tokens
    batches = {
        "shared": pack(*samples, **sharing, drawn=rows.per_row * tokens),
        "apart": make_batch(*samples, width=width, drawn=tokens),
    }
    objective = partial(grpo_objective, config=GRPOLossConfig(beta=0.0), temperature=1.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6, warmup_steps=1), 1000)
    update = make_train_step(graphdef, objective, optimizer, StepConfig())
    first = lambda: init_state(weights, optimizer)
    like = jax.eval_shape(first)
    print("| prompts | rows x columns | GFLOPs of an update |\n|---|---|---|")
    for name, batch in batches.items():
        found = update.lower(like, batch).cost_analysis()
        print(f"| {name} | {' x '.join(map(str, batch.mask_BT.shape))} | {found['flops'] / 1e9:.1f} |", flush=True)
    names, metrics = tuple(batches), {}
    held = {name: first() for name in names} if rounds else {}

    def run_one(name: str) -> None:
        held[name], found = jax.block_until_ready(update(held[name], batches[name]))
        metrics.setdefault(name, {key: float(found[key].value()) for key in ("loss", "grad_norm")})

    if rounds:
        _print_pair("update", _pairs([partial(run_one, name) for name in names], rounds), names)
        print(f"of the first update: {metrics}")


def logprobs(
    *, batch: int = 4, tokens: int = 2048, vocabulary: int = 129_280, hidden: int = 16, rounds: int = 0
) -> None:
    """Peak memory of log-probs and their gradient, chunked as in training beside all logits at once, and the values.

    Memory is what the compiled program asks for beyond its arguments and results.

    Args:
        batch: sequences.
        tokens: positions of each.
        vocabulary: size.
        hidden: width of the states.
        rounds: timed rounds of both; 0 times none.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, tokens, hidden)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(hidden, vocabulary)) / hidden**0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, (batch, tokens)), jnp.int32)

    def at_once(x, head, targets):
        return logprobs_of_logits((x @ head).astype(jnp.float32), targets)

    def of(function):
        def loss(x, head):
            logp, entropy = function(x, head, targets)[:2]
            return jnp.mean(logp) + 0.01 * jnp.mean(entropy), (logp, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(x, head).compile()

    compiled = {"chunked": of(token_logprobs), "all at once": of(at_once)}
    found, memory = {}, {}
    for name, program in compiled.items():
        memory[name] = program.memory_analysis().temp_size_in_bytes
        found[name] = jax.device_get(program(x, head))
    (one, in_chunks), (other, whole) = found["chunked"], found["all at once"]
    compare = lambda a, b: [float((np.abs(p - q) / np.abs(q).max()).max()) for p, q in zip(a, b, strict=True)]
    print("| | peak memory, GiB |\n|---|---|")
    for name, size in memory.items():
        print(f"| {name} | {size / GIB:.3f} |")
    print(
        f"\nratio {memory['chunked'] / memory['all at once']:.3f}; largest differences, over the largest value: "
        "log-probs {:.1e}, entropies {:.1e}, gradients {:.1e} and {:.1e}".format(
            *compare(one[1], other[1]), *compare(in_chunks, whole)
        )
    )
    if rounds:
        calls = [partial(lambda p: jax.block_until_ready(p(x, head)), p) for p in compiled.values()]
        _print_pair("log-probs and gradient", _pairs(calls, rounds), tuple(compiled))


def cost(*, samples: int = 16, tokens: int = 64, vocabulary: int = 4096, rounds: int = 7) -> None:
    """Seconds of a GRPO update beside a PPO update on the same samples: what the critic costs. Sampling is left out.

    Both score the samples with the reference model and make one AdamW step of the policy; PPO also values them, works
    out its targets, and makes one step of the critic, a second model of the policy's size.

    Args:
        samples: of an update.
        tokens: of a sample.
        vocabulary: of the model, else preset `tiny`.
        rounds: timed pairs; one pair before them is not counted.
    """
    config = dataclasses.replace(preset("tiny"), vocab_size=vocabulary)
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    critic_graphdef, critic_weights = critic_from(config, weights)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, warmup_steps=1), 1000)
    ppo = PPOConfig(ppo_epochs=1)
    batch, rewards_B = _random_batch(samples, tokens, vocabulary)
    objective = lambda **loss: partial(grpo_objective, config=GRPOLossConfig(**loss), temperature=1.0)
    grpo_step = make_train_step(graphdef, objective(beta=0.04), optimizer, StepConfig())
    policy_step = make_train_step(graphdef, objective(loss_type="dapo", beta=0.0), optimizer, StepConfig())
    critic_step = make_train_step(critic_graphdef, partial(critic_objective, config=ppo), optimizer, StepConfig())
    first = lambda: init_state(weights, optimizer)
    held: dict[str, Any] = {"grpo": first(), "ppo": (first(), init_state(critic_weights, optimizer))}

    def grpo() -> None:
        reference = frozen_scores(graphdef, weights, batch, temperature=1.0)
        held["grpo"] = jax.block_until_ready(grpo_step(held["grpo"], batch._replace(ref_logprobs_BT=reference))[0])

    def with_critic() -> None:
        policy, critic = held["ppo"]
        reference = frozen_scores(graphdef, weights, batch, temperature=1.0)
        values = frozen_values(critic_graphdef, critic.weights, batch.tokens_BT, batch.mask_BT)
        targets, _ = ppo_targets(rewards_B, batch.old_logprobs_BT, reference, values, batch.mask_BT, config=ppo)
        steps = {"policy_step": policy_step, "critic_step": critic_step, "config": ppo}
        updated = ppo_update(policy, critic, *with_targets(batch, values, targets), **steps)
        held["ppo"] = jax.block_until_ready(updated[:2])

    _print_pair("update", _pairs([grpo, with_critic], rounds), ("GRPO", "PPO"))


def _random_batch(samples: int, tokens: int, vocabulary: int) -> tuple[Batch, np.ndarray]:
    """Prompts of an eighth of the tokens, advantages of either sign."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, vocabulary, (samples, tokens + 1), dtype=np.int32)
    mask = np.broadcast_to(np.arange(tokens) >= tokens // 8, (samples, tokens))
    rewards_B = rng.normal(size=samples).astype(np.float32)
    old = np.full((samples, tokens), -np.log(vocabulary), np.float32)
    advantages = np.broadcast_to(rewards_B[:, None], mask.shape)
    return Batch(drawn[:, :-1], drawn[:, 1:], mask, old, old, advantages), rewards_B


def _pairs(calls: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each, all in turn a round; a call of each before them is not counted."""
    for call in calls:
        call()
    bar = track(range(rounds), description="rounds", transient=True, console=Console(stderr=True))
    return [tuple(_seconds(call) for call in calls) for _ in bar]


def _print_pair(what: str, pairs: Sequence[tuple[float, float]], names: tuple[str, str]) -> None:
    ratios = [second / first for first, second in pairs]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"| {what} | {names[0]}, s | {names[1]}, s | ratio, median (min to max) |\n|---|---|---|---|")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| | {mine:.3f} | {other:.3f} | {spread} |", flush=True)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    run({"step": step, "prompts": prompts, "cost": cost, "logprobs": logprobs})
