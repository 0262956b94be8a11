"""Cases of a whole model: decode, prefill, train, grpo, engine, convert."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.plan.model_bytes import StateDTypes, decode_bytes, prefill_bytes, train_bytes
from deepseek_jax.plan.model_flops import decode_flops, prefill_flops, train_flops
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.sft_loss import SFTBatch, sft_objective
from deepseek_jax.train.step import StepConfig, init_state, make_train_step
from tools.benchmark_convert import TOOLS, sized_config, timed, write_checkpoint
from tools.benchmark_engine import Load, our_engine
from tools.suite.case import Case, Timed, Work, beyond_the_first, clocked
from tools.suite.grpo_steps import OurSteps, StepLoad, repeated, trl_steps
from tools.suite.peers import why_none
from tools.suite.subject import Subject


class Sizes(NamedTuple):
    """How large the cases are.

    Attributes:
        batches: sequences at a time, of decode.
        tokens: new ones a sequence.
        prompt: tokens a prompt, of decode.
        prefill: sequences and tokens of each.
        rows, length: of an update.
        group: samples of the one prompt of a GRPO step.
        grpo_prompts: tokens of that prompt, a case each.
        gigabytes: of the checkpoint that is converted.
        parts: micro-batches of an update on a CPU, which loses much time to memory that it is given anew every step.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    tokens: int = 64
    prompt: int = 32
    prefill: tuple[tuple[int, int], ...] = ((8, 128), (1, 1024))
    rows: int = 8
    length: int = 256
    group: int = 8
    grpo_prompts: tuple[int, ...] = (8, 512)
    gigabytes: float = 0.5
    parts: int = 4

    def __str__(self) -> str:
        """What differs from the usual."""
        usual = self._field_defaults
        return ", ".join(f"{name}={of}" for name, of in self._asdict().items() if of != usual[name])

    def each(self, suite: str) -> "list[Sizes]":
        """For every case of a suite, sizes by which it has that one alone."""
        name = {"decode": "batches", "prefill": "prefill", "grpo": "grpo_prompts"}.get(suite)
        return [self._replace(**{name: (of,)}) for of in getattr(self, name)] if name else [self]


QUICK = Sizes((2,), 8, 8, ((2, 16),), 2, 16, 2, (8,), 0.003, 2)
"""To see that everything runs."""


def decode(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Tokens a second beyond the first, greedy, beside transformers' `generate`."""
    config, count = of.model[0], sizes.tokens
    for batch in sizes.batches:
        ids = of.prompts(batch, sizes.prompt)
        contexts = range(sizes.prompt + 1, sizes.prompt + count)
        steps = [
            Work(decode_flops(config, batch, c).total, decode_bytes(config, batch, c, of.plan_dtype).total)
            for c in contexts
        ]
        peer = lambda ids=ids: beyond_the_first(lambda n: of.peer.generate(ids, n), count)
        yield Case(
            suite="decode",
            name=f"batch {batch}",
            unit="tokens",
            amount=batch * (count - 1),
            work=Work(sum(s.flops for s in steps), sum(s.nbytes for s in steps)),
            ours=beyond_the_first(_drawer(of, ids), count),
            dtype=of.dtype,
            **_beside(of.no_peer, "transformers", peer),
        )


def prefill(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Prompt tokens a second until the first new token is there, beside transformers'."""
    config = of.model[0]
    for batch, length in sizes.prefill:
        ids = of.prompts(batch, length)
        flops, nbytes = prefill_flops(config, batch, length), prefill_bytes(config, batch, length, of.plan_dtype)
        yield Case(
            suite="prefill",
            name=f"{batch} x {length}",
            unit="tokens",
            amount=batch * length,
            work=Work(flops.total, nbytes.total),
            ours=clocked(partial(_drawer(of, ids), 1)),
            dtype=of.dtype,
            **_beside(of.no_peer, "transformers", lambda ids=ids: clocked(lambda: of.peer.generate(ids, 1))),
        )


def train(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Tokens a second of an update by AdamW, the gradient clipped, beside the same with transformers and torch."""
    config, graphdef, weights = of.model
    ids = of.prompts(sizes.rows, sizes.length + 1)
    tokens = ids.astype(np.int32)
    batch = SFTBatch(tokens[:, :-1], tokens[:, 1:], np.ones((sizes.rows, sizes.length), bool))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6, warmup_steps=1), 1_000_000)
    parts = sizes.parts if jax.default_backend() == "cpu" else 1
    update = make_train_step(graphdef, sft_objective, optimizer, StepConfig(dtype=of.dtype, micro_batches=parts))
    held = [init_state(convert_dtype(weights, jnp.float32), optimizer)]

    def step():
        held[0], metrics = update(held[0], batch)
        return metrics

    kept = StateDTypes(compute=of.plan_dtype)
    yield Case(
        suite="train",
        name=f"{sizes.rows} x {sizes.length}" + f", {parts} micro-batches" * (parts > 1),
        unit="tokens",
        amount=sizes.rows * sizes.length,
        work=Work(
            train_flops(config, sizes.rows, sizes.length, mtp=False).total, train_bytes(config, kept, mtp=False).total
        ),
        ours=clocked(step),
        dtype=of.dtype,
        **_beside(of.no_peer, "torch AdamW", lambda: clocked(lambda: of.trained_peer.update(ids, of.dtype))),
    )


def grpo(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Samples a second of whole GRPO steps: one question of few and of many tokens, beside TRL's GRPOTrainer."""
    tokenizer = Tokenizer.from_folder(of.folder)
    for length in sizes.grpo_prompts:
        load = StepLoad([repeated("1+2=?", length, tokenizer)], sizes.group, sizes.tokens)
        lacking = why_none("transformers", "trl")
        case = lambda load=load, length=length, **peer: Case(
            suite="grpo",
            name=f"1 prompt of {length} x {sizes.group} samples of {sizes.tokens}",
            unit="samples",
            amount=sizes.group,
            work=None,
            ours=OurSteps(of.folder, load, dtype=of.dtype),
            dtype=of.dtype,
            **peer,
        )
        if lacking:
            yield case(alone=lacking)
            continue
        with trl_steps(of.folder, load, of.dtype) as theirs:
            yield case(peer=theirs, peer_name="TRL")


def engine(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Tokens a second of requests of mixed lengths, beside transformers' `generate`, all as long as the longest."""
    longest = 4 * sizes.tokens
    lengths = np.linspace(max(1, longest // 16), longest, 2 * max(sizes.batches)).round().astype(int)
    lengths = np.random.default_rng(0).permutation(lengths).tolist()
    ids = of.prompts(len(lengths), sizes.prompt)
    load = Load(ids.tolist(), 1, lengths, 0.0)
    yield Case(
        suite="engine",
        name=f"{len(lengths)} requests of {min(lengths)} to {longest}",
        unit="tokens",
        amount=sum(lengths),
        work=None,
        ours=our_engine(*of.model, load),
        dtype=of.dtype,
        **_beside(of.no_peer, "transformers", lambda: clocked(lambda: of.peer.generate(ids, longest))),
    )


def convert(of: Subject, sizes: Sizes) -> Iterator[Case]:
    """Bytes a second of convert_hf.py on an FP8 checkpoint of R1's layout, beside `cp -r` of it."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        config = sized_config(sizes.gigabytes)
        write_checkpoint(config, folder / "source", 0)
        size = sum(file.stat().st_size for file in (folder / "source").iterdir())

        def run(*command: str | Path) -> Callable[[], float]:
            def once() -> float:
                seconds = timed([*command, folder / "source", folder / "target"], folder, folder / "source").seconds
                shutil.rmtree(folder / "target")
                return seconds

            return once

        yield Case(
            suite="convert",
            name=f"{size / 1e9:.2g} GB of FP8",
            unit="MB",
            amount=size / 1e6,
            work=None,
            ours=run(sys.executable, TOOLS / "convert_hf.py"),
            peer=run("cp", "-r", "--reflink=never"),
            peer_name="cp -r",
        )


def _drawer(of: Subject, ids: np.ndarray) -> Callable[[int], None]:
    """Draws so many greedy tokens after prompts."""
    config, graphdef, weights = of.model
    generator, prompts = Generator(config, graphdef), ids.tolist()

    def draw(count: int) -> None:
        sampling = SamplingConfig(max_new_tokens=count, temperature=0.0)
        found = generator(weights, prompts, sampling, seeds=[0] * len(prompts))
        assert all(len(c.tokens) == count for c in found)

    return draw


def _beside(lacking: str, name: str, peer: Callable[[], Timed]) -> dict[str, Any]:
    """A case's peer, or why it has none."""
    return {"alone": lacking} if lacking else {"peer": peer(), "peer_name": name}
