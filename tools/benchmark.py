"""Speed beside a peer or a law, everything interleaved in one run, medians and spreads printed as Markdown."""

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.generate.engine import Generator, SamplingConfig
from deepseek_jax.ops.experts import expert_mlp


def decode(
    model: Path, /, *, batches: tuple[int, ...] = (1, 8, 32), tokens: int = 64, prompt: int = 32, rounds: int = 5
) -> None:
    """Decode tokens a second, greedy, float32, beside transformers' `generate` on the same weights.

    Both start from the same random prompts and draw the same number of tokens. A decode rate is the tokens after
    the first divided by the time beyond that of drawing one token alone, so that prefill does not count.

    Args:
        model: Hugging Face folder.
        batches: sequences at a time.
        tokens: new tokens a sequence.
        prompt: tokens a prompt.
        rounds: timed pairs a batch size, the two in turn.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install torch==2.13.0, then pip install -e '.[oracle]'")
    config, graphdef, weights = load_model(model)
    generator = Generator(config, graphdef)
    peer = _transformers(model)
    rng = np.random.default_rng(0)
    print("| batch | deepseek_jax tok/s | transformers tok/s | ratio, median (min to max) |\n|---|---|---|---|")
    for batch in batches:
        ids = rng.integers(0, config.vocab_size, (batch, prompt))
        prompts = ids.tolist()

        def ours(count: int, prompts: list = prompts) -> None:
            found = generator(
                weights, prompts, SamplingConfig(max_new_tokens=count, temperature=0.0), seeds=[0] * len(prompts)
            )
            assert all(len(c.tokens) == count for c in found)

        def theirs(count: int, ids: np.ndarray = ids) -> None:
            peer(ids, count)

        rates = _paired_rates([ours, theirs], tokens, batch, rounds)
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        mine, other = (statistics.median(r) for r in rates)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {batch} | {mine:.1f} | {other:.1f} | {spread} |", flush=True)


def _paired_rates(contestants: list[Callable], tokens: int, batch: int, rounds: int) -> list[list[float]]:
    for contestant in contestants:  # compilation and first touches
        contestant(1), contestant(tokens)
    rates: list[list[float]] = [[] for _ in contestants]
    for _ in track(range(rounds), description=f"batch {batch}", transient=True, console=Console(stderr=True)):
        for contestant, found in zip(contestants, rates, strict=True):
            one, all_ = _seconds(lambda c=contestant: c(1)), _seconds(lambda c=contestant: c(tokens))
            found.append(batch * (tokens - 1) / (all_ - one))
    return rates


def _transformers(model: Path) -> Callable[[np.ndarray, int], None]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None  # both draw every token asked for

    def generate(ids: np.ndarray, count: int) -> None:
        tokens = torch.from_numpy(ids)
        with torch.inference_mode():
            out = loaded.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + count

    return generate


def experts(
    *,
    counts: tuple[int, ...] = (16, 32, 64, 128),
    rows: int = 4096,
    width: int = 256,
    inner: int = 128,
    k: int = 4,
    rounds: int = 15,
) -> None:
    """Time of the routed experts as their number doubles at a fixed number a token, forward and gradient.

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
    print("| experts | forward ms | x the half | forward and gradient ms | x the half |\n|---|---|---|---|---|")
    for count in counts:
        cells = []
        for kind in ("forward", "gradient"):
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
    gradient = jax.jit(
        jax.grad(lambda x, mixing, chosen, *w: jnp.sum(expert_mlp(x, mixing, chosen, *w) ** 2), (0, 3, 4, 5))
    )
    kinds = {"forward": forward, "gradient": gradient}
    calls = {kind: lambda f=f: jax.block_until_ready(f(x, mixing, chosen, *weights)) for kind, f in kinds.items()}
    for call in calls.values():
        call()
    return calls


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run({"decode": decode, "experts": experts})
