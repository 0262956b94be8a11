"""The engine beside static batches and transformers, interleaved in one run, medians and spreads as Markdown."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import BATCHES, bucket, sizes_that_pay
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.arranged import arranged_weights
from deepseek_jax.ops.low_rank import product
from deepseek_jax.ops.paged_attention import grouped_paged
from deepseek_jax.ops.pool import KVCache
from deepseek_jax.ops.transposed import Transposed
from deepseek_jax.plan.model_bytes import cache_bytes_per_token
from tools.suite.peers import Peer
from tools.suite.table import spread

MIB = 1 << 20
First = Literal["all", "engine", "none"]
# Static batches, by a checkout of this project from before the engine: jobs on its input, seconds on its output.
_BEFORE = """
import json, sys, time
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.generation.engine import Generator, SamplingConfig
config, graphdef, weights = load_model(sys.argv[1])
generator = Generator(config, graphdef)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    sampling = SamplingConfig(max_new_tokens=job["count"], temperature=job["temperature"])
    seeds = list(range(len(job["prompts"]) * job["samples"]))
    start = time.perf_counter()
    generator(weights, job["prompts"], sampling, seeds=seeds, samples=job["samples"])
    print(time.perf_counter() - start, flush=True)
"""


class Load(NamedTuple):
    """Requests: prompts, samples of each, and the new tokens of every sample, prompt by prompt."""

    prompts: list[list[int]]
    samples: int
    lengths: list[int]
    temperature: float


def mixed(
    model: Path,
    /,
    *,
    before: Path | None = None,
    transformers: bool = True,
    lengths: Literal["even", "skewed"] = "even",
    requests: int = 64,
    prompt: int = 32,
    rounds: int = 3,
    first: First = "all",
) -> None:
    """Seconds for requests of 8 to 512 new tokens each, all there from the start, greedy, float32.

    A static batch, and transformers' `generate`, draw as many tokens for all as the longest wants; the engine gives a
    place to the next one when one ends.

    Args:
        model: Hugging Face folder.
        before: a checkout of this project at a commit before the engine (3b74449); None leaves it out.
        transformers: beside its `generate` too.
        lengths: "even" between 8 and 512, or "skewed": even by their logarithm, so that most are short.
        requests: how many.
        prompt: tokens a prompt.
        rounds: timed rounds, all in turn.
        first: who runs once before, uncounted, to compile: "all", the "engine", or "none" where a compilation cache
            holds that; to load from it counts then.
    """
    rng = np.random.default_rng(0)
    share = np.linspace(0, 1, requests)
    of = 8 + share * 504 if lengths == "even" else 8 * 64**share
    new = rng.permutation(np.round(of)).astype(int).tolist()
    config, graphdef, weights = load_model(model)
    prompts = rng.integers(0, config.vocab_size, (requests, prompt)).tolist()
    load = Load(prompts, 1, new, 0.0)
    print(f"{requests} requests, {sum(new)} new tokens, {min(new)} to {max(new)}, median {statistics.median(new):g}\n")
    _compare(config, graphdef, weights, model, load, before, transformers, rounds, first)


def tail(
    model: Path,
    /,
    *,
    before: Path,
    prompts: int = 8,
    samples: int = 8,
    prompt: int = 64,
    most: int = 512,
    rounds: int = 3,
    first: First = "all",
) -> None:
    """Seconds of a GRPO rollout whose lengths have a long tail, temperature 1, float32, beside static batches.

    Lengths are drawn from a log-normal distribution (median an eighth of the most, sigma 0.8), as those of a trained
    model, of which a few samples think long. The law of them is an assumption, and is printed.

    Args:
        model: Hugging Face folder.
        before: a checkout of this project at a commit before the engine (3b74449).
        prompts: questions.
        samples: of each.
        prompt: tokens a question.
        most: new tokens at most.
        rounds: timed rounds, both in turn.
        first: who runs once before, uncounted, to compile: "all", the "engine", or "none" where a compilation cache
            holds that; to load from it counts then.
    """
    rng = np.random.default_rng(0)
    new = np.clip(np.exp(rng.normal(np.log(most / 8), 0.8, prompts * samples)), 8, most).astype(int)
    new[rng.integers(len(new))] = most
    config, graphdef, weights = load_model(model)
    of_prompts = rng.integers(0, config.vocab_size, (prompts, prompt)).tolist()
    load = Load(of_prompts, samples, new.tolist(), 1.0)
    quarters = np.percentile(new, [0, 25, 50, 75, 100]).round().astype(int).tolist()
    print(f"{prompts} x {samples} samples, {new.sum()} new tokens; least, quartiles and most: {quarters}\n")
    _compare(config, graphdef, weights, model, load, before, False, rounds, first)


def prefix(
    model: Path, /, *, requests: int = 64, shared: int = 512, own: int = 16, rounds: int = 5, first: bool = True
) -> None:
    """Seconds until all requests that begin alike have their first token, with the prefix cache and without.

    Args:
        model: Hugging Face folder.
        requests: how many.
        shared: tokens that their prompts have in common.
        own: further tokens of each prompt.
        rounds: timed rounds, both in turn.
        first: run both once before, uncounted, to compile.
    """
    config, graphdef, weights = load_model(model)
    rng = np.random.default_rng(0)
    begin = rng.integers(0, config.vocab_size, shared).tolist()
    prompts = [begin + rng.integers(0, config.vocab_size, own).tolist() for _ in range(requests)]
    load = Load(prompts, 1, [1] * requests, 0.0)
    contestants = {
        name: our_engine(config, graphdef, weights, load, prefix_caching=caches)
        for name, caches in (("with", True), ("without", False))
    }
    seconds = _timed(contestants, rounds, "all" if first else "none")
    shares = [100 * a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    print("| prefill with the cache, s | without, s | share, %, median (min to max) |\n|---|---|---|")
    print(f"| {spread(seconds['with'])} | {spread(seconds['without'])} | {spread(shares, 1)} |")


def memory(model: Path, /, *, sequences: int = 32, context: int = 1024) -> None:
    """Bytes of an engine's cache, by plan, in its arrays, and as the process's resident memory grows by it.

    Args:
        model: Hugging Face folder.
        sequences: places of the engine.
        context: tokens of each.
    """
    config, graphdef, weights = load_model(model)
    weights = arranged_weights(weights)  # else each engine makes a copy of its own
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (sequences, 32)).tolist()
    settings = dataclasses.replace(BATCHES, max_num_seqs=sequences, max_model_len=context, batch_sizes=(sequences,))

    def filled(settings: EngineConfig) -> Engine:
        engine = Engine(config, graphdef, weights, settings)
        for tokens in prompts:
            engine.add(tokens, SamplingConfig(max_new_tokens=8, temperature=0.0), seed=0)
        for _ in engine.run():
            pass
        return engine

    small = filled(dataclasses.replace(settings, max_model_len=64))  # compiles, and takes what is no cache
    del small
    before = _resident()
    engine = filled(settings)
    grown = _resident() - before
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.state.cache))
    planned = sequences * context * cache_bytes_per_token(config, "f32")
    print("| cache by plan, MiB | its arrays, MiB (of plan) | resident memory grew by, MiB (of plan) |\n|---|---|---|")
    shown = [f"{of / MIB:.1f} ({of / planned:.3f})" for of in (held, grown)]
    print(f"| {planned / MIB:.1f} | {' | '.join(shown)} |")


def products(
    *,
    shapes: tuple[tuple[int, int], ...] = ((576, 1536), (1536, 576)),
    rows: tuple[int, ...] = (1, 8, 32, 64, 256),
    rounds: int = 5,
) -> None:
    """GFLOP/s of rows times weights, as a program states it and with transposed weights (`ops.transposed`), float32.

    Args:
        shapes: inputs and outputs of the weights, of which there are so many that no cache of the processor holds them.
        rows: that are multiplied.
        rounds: timed rounds, both in turn.
    """
    print("| weights | rows | x @ w | transposed | ratio, median (min to max) |\n|---|---|---|---|---|")
    for inputs, outputs in shapes:
        plain = [jax.random.normal(jax.random.key(n), (inputs, outputs)) for n in range(30)]
        turned = [Transposed(jax.block_until_ready(weight.T)) for weight in plain]
        for count in rows:
            x = jax.random.normal(jax.random.key(0), (count, inputs))
            sides = {"plain": partial(_seconds, _chained, x, plain), "turned": partial(_seconds, _chained, x, turned)}
            found = _timed(sides, rounds, "all")
            flops = 2 * count * inputs * outputs * len(plain)
            speeds = [f"{flops / statistics.median(of) / 1e9:.0f}" for of in found.values()]
            ratios = [a / b for a, b in zip(found["plain"], found["turned"], strict=True)]
            print(f"| {inputs} x {outputs} | {count} | {' | '.join(speeds)} | {spread(ratios)} |", flush=True)


def attention(
    *,
    rows: tuple[int, ...] = (8, 32, 64),
    contexts: tuple[int, ...] = (64, 320),
    keys_at_once: tuple[int, ...] = (16, 64, 128, 320),
    layers: int = 30,
    rounds: int = 5,
) -> None:
    """Milliseconds of a decode step's attention over a paged cache: SmolLM2's heads, blocks of 16 tokens, float32.

    Args:
        rows: sequences of a step.
        contexts: tokens that each has.
        keys_at_once: of a row, that are joined at a time; what a program takes is `ops.paged_attention.KEYS_AT_ONCE`.
        layers: of the model; each has a pool of its own.
        rounds: timed rounds, all in turn.
    """
    heads, groups, width, size = 9, 3, 64, 16
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    print(f"| rows | context | {' | '.join(f'{keys} keys at once' for keys in keys_at_once)} |")
    print("|---" * (2 + len(keys_at_once)) + "|")
    for count in rows:
        blocks = count * -(-max(contexts) // size)
        pools = [KVCache(*(normal(blocks, groups, size, width) for _ in range(2))) for _ in range(layers)]
        table = jnp.asarray(rng.permutation(blocks).reshape(count, -1), jnp.int32)
        q = normal(count, 1, heads, width)
        for context in contexts:
            given = q, pools, table, jnp.full((count, 1), context, jnp.int32)
            sides = {str(keys): partial(_seconds, partial(_attended, keys=keys), *given) for keys in keys_at_once}
            found = _timed(sides, rounds, "all")
            told = (f"{1e3 * statistics.median(of):.0f}" for of in found.values())
            print(f"| {count} | {context} | {' | '.join(told)} |", flush=True)


@partial(jax.jit, static_argnames="keys")
def _attended(q: jax.Array, pools: Sequence[KVCache], table: jax.Array, seen: jax.Array, *, keys: int) -> jax.Array:
    """Attention of one layer after another."""
    for pool in pools:
        q = grouped_paged(q, pool, table, seen, 0.125, keys_at_once=keys)
    return q


@jax.jit
def _chained(x: jax.Array, weights: Sequence[jax.Array | Transposed]) -> jax.Array:
    """Products one after another, each of which waits for the one before."""
    for weight in weights:
        x = x * 0.5 + jnp.sum(product(x, weight)) * 1e-9
    return x


def _seconds(function: Callable, *given: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*given))
    return time.perf_counter() - start


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _compare(
    config,
    graphdef,
    weights,
    model: Path,
    load: Load,
    before: Path | None,
    transformers: bool,
    rounds: int,
    first: First,
):
    """Time the engine beside the others, and print a table."""
    contestants: dict[str, Callable[[], float]] = {"engine": our_engine(config, graphdef, weights, load)}
    with _static(before, model, load) as static:
        if static is not None:
            contestants["static batches"] = static
        if transformers:
            contestants["transformers"] = _theirs(model, load)
        seconds = _timed(contestants, rounds, first)
    total = sum(load.lengths)
    print("| | seconds, median (min to max) | tok/s | x the engine's time |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["engine"], strict=True)]
        print(f"| {name} | {spread(found)} | {total / statistics.median(found):.1f} | {spread(ratios)} |")


def _timed(contestants: dict[str, Callable[[], float]], rounds: int, first: First) -> dict[str, list[float]]:
    console = Console(stderr=True)
    compiling = [of for name, of in contestants.items() if first in ("all", name)]
    for contestant in track(compiling, description="compiling", transient=True, console=console):
        contestant()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in track(range(rounds), description="rounds", transient=True, console=console):
        for name, contestant in contestants.items():
            seconds[name].append(contestant())
    return seconds


def our_engine(
    config: ModelConfig, graphdef: nnx.GraphDef, weights: nnx.State, load: Load, *, prefix_caching: bool = True
) -> Callable[[], float]:
    """As a `Generator` runs it, with a limit of its own for every request."""
    count = len(load.lengths)
    slots = min(BATCHES.max_num_seqs, bucket(count, least=1))
    settings = dataclasses.replace(
        BATCHES,
        max_num_seqs=slots,
        batch_sizes=sizes_that_pay(weights, slots),
        max_model_len=bucket(max(map(len, load.prompts)) + max(load.lengths)),
        prefix_caching=prefix_caching,
    )

    def once() -> float:
        start = time.perf_counter()
        engine = Engine(config, graphdef, weights, settings)
        for number, length in enumerate(load.lengths):
            sampling = SamplingConfig(max_new_tokens=length, temperature=load.temperature)
            engine.add(load.prompts[number // load.samples], sampling, seed=number)
        drawn = sum(len(update.tokens) for update in engine.run())
        assert drawn == sum(load.lengths), f"drew {drawn} tokens"
        return time.perf_counter() - start

    return once


def _theirs(model: Path, load: Load) -> Callable[[], float]:
    peer, ids = Peer(model), np.asarray(load.prompts)

    def once() -> float:
        start = time.perf_counter()
        peer.generate(ids, max(load.lengths))
        return time.perf_counter() - start

    return once


@contextmanager
def _static(checkout: Path | None, model: Path, load: Load) -> Iterator[Callable[[], float] | None]:
    """One batch of all, in a process of its own that runs another version of this project."""
    if checkout is None:
        yield None
        return
    if not (checkout / "deepseek_jax/generation/draw.py").is_file():
        raise ValueError(
            f"before: {checkout}: got no deepseek_jax/generation/draw.py, wanted a checkout from before the engine; "
            "make one with git worktree add FOLDER 3b74449"
        )
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-c", _BEFORE, str(model.resolve())]
    job = {
        "prompts": load.prompts,
        "samples": load.samples,
        "count": max(load.lengths),
        "temperature": load.temperature,
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=checkout, **pipes) as process:

        def answer() -> str:
            line = process.stdout.readline()
            if not line:
                raise ValueError(
                    f"before: the process in {checkout} ended, status {process.wait()}; its error is above"
                )
            return line

        def once() -> float:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return float(answer())

        try:
            answer()
            yield once
        finally:
            process.stdin.close()


if __name__ == "__main__":
    parts = {"products": products, "attention": attention}
    run({"mixed": mixed, "tail": tail, "prefix": prefix, "memory": memory, **parts})
