"""Time of the routed experts as their number doubles, interleaved in one run, medians as Markdown."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from deepseek_jax.cli import run
from deepseek_jax.ops.experts import expert_mlp


def experts(
    *,
    counts: tuple[int, ...] = (16, 32, 64, 128),
    rows: int = 4096,
    width: int = 256,
    inner: int = 128,
    k: int = 4,
    rounds: int = 15,
) -> None:
    """Time of the routed experts as their number doubles at a fixed number a token, forward and gradients.

    Gradients of the tokens and, beside them, of the weights too, which are as large as all experts are.

    Args:
        counts: numbers of experts.
        rows: tokens.
        width: model width.
        inner: expert width.
        k: experts a token.
        rounds: timed rounds, all counts in turn.
    """
    functions = {count: _expert_layer(count, rows, width, inner, k) for count in counts}
    times: dict[tuple[int, str], list[float]] = {}
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        for count, kinds in functions.items():
            for kind, function in kinds.items():
                times.setdefault((count, kind), []).append(_seconds(function))
    heads = ("forward ms", "with gradients of tokens ms", "and of weights ms")
    print(f"| experts | {' | x the half | '.join(heads)} | x the half |\n{'|---' * 7}|")
    for count in counts:
        cells = []
        for kind in functions[count]:
            now = statistics.median(times[count, kind])
            half = [b / a for a, b in zip(times.get((count // 2, kind), []), times[count, kind], strict=False)]
            cells += [f"{now * 1e3:.1f}", f"{statistics.median(half):.2f}" if half else "-"]
        print(f"| {count} | {' | '.join(cells)} |")


def _expert_layer(count: int, rows: int, width: int, inner: int, k: int) -> dict[str, Callable]:
    rng = np.random.default_rng(count)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, mixing = normal(rows, width), jnp.full((rows, k), 1 / k)
    chosen = jnp.asarray(np.argsort(rng.random((rows, count)), axis=1)[:, :k], jnp.int32)
    weights = normal(count, width, inner), normal(count, width, inner), normal(count, inner, width)
    forward = jax.jit(expert_mlp)
    loss = lambda x, mixing, chosen, *w: jnp.sum(expert_mlp(x, mixing, chosen, *w) ** 2)
    gradients = {"tokens": (0, 1), "weights": (0, 1, 3, 4, 5)}
    kinds = {"forward": forward} | {kind: jax.jit(jax.grad(loss, of)) for kind, of in gradients.items()}
    calls = {kind: lambda f=f: jax.block_until_ready(f(x, mixing, chosen, *weights)) for kind, f in kinds.items()}
    for call in calls.values():
        call()
    return calls


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(experts)
