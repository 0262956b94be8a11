"""How cost grows with context, experts, batch and layers: exponents measured here and counted by the TPU's compiler."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from deepseek_jax.cli import run
from deepseek_jax.config import MLAConfig, ModelConfig, preset
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.plan.chips import chip
from deepseek_jax.plan.compiled import Task, compile_step
from deepseek_jax.plan.model_bytes import decode_bytes, experts_touched
from deepseek_jax.plan.model_flops import Flops, decode_flops, prefill_flops
from deepseek_jax.plan.topology import topology as device_topology
from deepseek_jax.sharding import Layout, lanes_of, make_mesh
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.sft_loss import SFTBatch, sft_objective
from deepseek_jax.train.step import StepConfig, init_state, make_train_step

Step = Literal["prefill", "decode", "train"]


class Setting(NamedTuple):
    """One point: what is varied is written over the default."""

    context: int = 4096
    experts: int = 64
    batch: int = 1
    layers: int = 2


class Sweep(NamedTuple):
    """One axis at a step; the others stay at `at`."""

    step: Step
    axis: str
    values: tuple[int, ...]
    at: Setting


def doubled(first: int, last: int, times: int = 1) -> tuple[int, ...]:
    """From one number to another, each the one before it doubled so many times; the last one fewer times, if need be.

    >>> doubled(8, 64)
    (8, 16, 32, 64)
    >>> doubled(8, 64, 2)
    (8, 32, 64)
    """
    once = [first << n for n in range(int(math.log2(last // first)) + 1)]
    return tuple(sorted({*once[::times], once[-1]}))


def exponents(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Of cost ~ value^e: fitted to all points by least squares of logarithms, and between the last two.

    >>> exponents([1, 2, 4], [3, 12, 48])
    (2.0, 2.0)
    """
    x, y = np.log2(values), np.log2(costs)
    return float(round(np.polyfit(x, y, 1)[0], 3)), float(round((y[-1] - y[-2]) / (x[-1] - x[-2]), 3))


def measured(*, rounds: int = 3, longest: int = 16_384) -> None:
    """Seconds on this machine, float32, of a small model of R1's proportions; medians of interleaved rounds.

    Args:
        rounds: counted ones, all values of an axis in turn; one before them is not counted.
        longest: tokens of context at most.
    """
    _check_longest(longest, 4096)
    small = Setting(context=256, experts=16, batch=4, layers=2)
    alone = small._replace(batch=1)
    sweeps = [
        Sweep("prefill", "context", doubled(1024, longest), alone),
        Sweep("train", "context", doubled(1024, longest // 2), alone),
        Sweep("decode", "context", doubled(1024, longest), alone),
        Sweep("prefill", "experts", doubled(16, 256), small),
        Sweep("train", "experts", doubled(16, 256), small),
        Sweep("prefill", "batch", doubled(1, 32), small),
        Sweep("decode", "batch", doubled(1, 32), small),
        Sweep("prefill", "layers", doubled(1, 16), small),
        Sweep("train", "layers", doubled(1, 16), small),
    ]
    _print_head("seconds")
    for sweep in sweeps:
        calls = [_call(sweep.step, sweep.at._replace(**{sweep.axis: value})) for value in sweep.values]
        for call in calls:
            call()
        bar = track(range(rounds), f"{sweep.step}: {sweep.axis}", transient=True, console=Console(stderr=True))
        found = [[call() for call in calls] for _ in bar]
        _print_sweep(sweep, [statistics.median(of) for of in zip(*found, strict=True)])


def compiled(*, topology: str = "v5p:2x2x1", longest: int = 65_536) -> None:
    """FLOPs and bytes a chip that the TPU's compiler counts, bfloat16, of R1's own widths with few layers and experts.

    Values are four times those before them: most take the compiler half a minute or more.

    Args:
        topology: as for compile_pod.py.
        longest: tokens of context at most.
    """
    _check_longest(longest, 16_384)
    jax.config.update("jax_platforms", "cpu")
    of_chip, devices = device_topology(topology)
    base = Setting(context=4096, experts=8, batch=len(devices), layers=2)
    sweeps = [
        Sweep("prefill", "context", doubled(1024, longest, 2), base),
        Sweep("train", "context", doubled(1024, longest // 4, 2), base),
        Sweep("decode", "context", doubled(1024, longest, 2), base._replace(batch=8 * len(devices))),
        Sweep("prefill", "experts", doubled(16, 256, 2), base),
        Sweep("decode", "batch", doubled(len(devices), 64 * len(devices), 2), base),
        Sweep("prefill", "layers", doubled(2, 16, 2), base),
    ]
    _print_head("figures")
    for sweep in sweeps:
        found = []
        bar = track(sweep.values, f"{sweep.step}: {sweep.axis}", transient=True, console=Console(stderr=True))
        for value in bar:
            setting = sweep.at._replace(**{sweep.axis: value})
            expert = math.gcd(len(devices), setting.experts)
            sizes = {"expert": expert, "fsdp": len(devices) // expert}
            mesh = make_mesh(devices, **(sizes if sweep.step == "train" else {"expert": expert}))
            workload = {"workload": "train"} if sweep.step == "train" else {"workload": "serve", "remat": "nothing"}
            layout = Layout(mesh=mesh, lanes=lanes_of(devices[0].platform), scan_layers=True, **workload)
            wide = _shaped(preset("r1-671b"), setting)
            task = Task(config=wide, layout=layout, step=sweep.step, batch=setting.batch, context=setting.context)
            found.append(compile_step(task, of_chip))
        held = [of for of in found if of.flops is not None]
        kept = sweep._replace(values=sweep.values[: len(held)])  # what does not fit has no figures
        _print_sweep(kept, [of.flops for of in held], " FLOPs")
        _print_sweep(kept, [of.bytes_accessed for of in held], " bytes")


def crossings(*, models: tuple[str, ...] = ("r1-671b", "v2-lite", "distill-qwen-7b"), on: str = "v5p") -> None:
    """Where one cost overtakes another, in closed form: what to know before choosing a context or a batch.

    Args:
        models: names of published configurations.
        on: a chip, for what its memory and its products can do.
    """
    of_chip = chip(on)
    print("| | " + " | ".join(models) + " |\n|---" + "|---" * len(models) + "|")
    lines: Mapping[str, Callable[[ModelConfig], int | None]] = {
        "prefill: tokens from which attention takes more FLOPs than all else": lambda c: first_where(
            lambda n: _attends_more(prefill_flops(c, 1, n))
        ),
        "decode of one sequence: tokens of context from which attention takes more FLOPs than all else": lambda c: (
            first_where(lambda n: _attends_more(decode_flops(c, 1, n)))
        ),
        "decode of 64 sequences: tokens of context from which the cache is read more than the weights": lambda c: (
            first_where(lambda n: _reads_more_cache(c, 64, n))
        ),
        f"decode at 4,096 tokens: sequences from which products and not memory bound {on}, bf16": lambda c: first_where(
            lambda n: (
                decode_flops(c, n, 4096).total / of_chip.bf16_flops
                > decode_bytes(c, n, 4096, "bf16").total / of_chip.bandwidth
            )
        ),
        "tokens of a step from which 95 % of the experts are met": lambda c: (
            None if c.moe is None else first_where(lambda n: experts_touched(c, n) >= 0.95)
        ),
    }
    for line, of in lines.items():
        found = [of(preset(name)) for name in models]
        print(f"| {line} | " + " | ".join("never" if n is None else f"{n:,}" for n in found) + " |")


def first_where(holds: Callable[[int], bool], most: int = 1 << 24) -> int | None:
    """The least number from 1 on where something begins to hold for good; None if not up to `most`.

    >>> first_where(lambda n: n * n > 50)
    8
    """
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check_longest(longest: int, least: int) -> None:
    """So that every axis has two values, between which there is an exponent."""
    if longest < least:
        raise ValueError(f"longest: got {longest}, wanted at least {least}")


def _attends_more(flops: Flops) -> bool:
    mixed = flops.attention + flops.indexer
    return mixed > flops.total - mixed


def _reads_more_cache(config: ModelConfig, sequences: int, context: int) -> bool:
    traffic = decode_bytes(config, sequences, context, "bf16")
    return traffic.cache_read > traffic.weights


def _shaped(base: ModelConfig, setting: Setting) -> ModelConfig:
    moe = dataclasses.replace(
        base.moe,
        n_routed_experts=setting.experts,
        num_experts_per_tok=min(8, setting.experts // 2),
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
    )
    return dataclasses.replace(
        base, moe=moe, num_hidden_layers=setting.layers, num_nextn_predict_layers=0, quantization=None
    )


def _small(setting: Setting) -> ModelConfig:
    base = preset("tiny")
    attention = MLAConfig(q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    wider = dataclasses.replace(
        base,
        vocab_size=512,
        hidden_size=256,
        num_attention_heads=2,
        attention=attention,
        max_position_embeddings=2 * setting.context + 1024,
        moe=dataclasses.replace(base.moe, moe_intermediate_size=64),
    )
    return _shaped(wider, setting)


def _call(step: Step, setting: Setting) -> Callable[[], float]:
    """A step of a random model, whose seconds it gives."""
    config = _small(setting)
    graphdef, _ = abstract_weights(config)
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (setting.batch, setting.context + 1), np.int32)
    if step == "train":
        return _updating(graphdef, weights, ids)
    generator, prompts = Generator(config, graphdef), ids[:, :-1].tolist()

    def draw(count: int) -> None:
        sampling = SamplingConfig(max_new_tokens=count, temperature=0.0)
        generator(weights, prompts, sampling, seeds=list(range(len(prompts))))

    if step == "prefill":
        return lambda: _seconds(lambda: draw(1))
    return lambda: max(1e-9, (_seconds(lambda: draw(33)) - _seconds(lambda: draw(1))) / 32)


def _updating(graphdef: nnx.GraphDef, weights: nnx.State, ids: np.ndarray) -> Callable[[], float]:
    batch = SFTBatch(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:], bool))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6, warmup_steps=1), 1_000_000)
    update = make_train_step(graphdef, sft_objective, optimizer, StepConfig())
    held = [init_state(weights, optimizer)]

    def once() -> None:
        held[0], metrics = update(held[0], batch)
        jax.block_until_ready(metrics)

    return lambda: _seconds(once)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _print_head(unit: str) -> None:
    print(f"| step | axis | {unit} at each value | exponent | between the last two |\n|---|---|---|---|---|")


def _print_sweep(sweep: Sweep, costs: Sequence[float], what: str = "") -> None:
    of = [f"{found:.2f}" for found in exponents(sweep.values, costs)] if len(costs) > 1 else ["-", "-"]
    shown = ", ".join(f"{value}: {cost:.3g}" for value, cost in zip(sweep.values, costs, strict=True))
    print(f"| {sweep.step}{what} | {sweep.axis} | {shown} | {' | '.join(of)} |", flush=True)


if __name__ == "__main__":
    run({"measured": measured, "compiled": compiled, "crossings": crossings})
