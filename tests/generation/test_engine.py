"""The law of the engine: whatever runs beside it, and however it is run, a request draws what it draws alone."""

import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import IndexerConfig
from deepseek_jax.generation.completion import NO_RECORD, Record
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, split
from tests.generation.test_generator import CONTEXT, DENSE, MOE, V

pytestmark = pytest.mark.usefixtures("quick_compilation")

MTP = dataclasses.replace(MOE, num_nextn_predict_layers=2)  # the second module waits for nothing
SPARSE = dataclasses.replace(
    MOE,
    model_type="deepseek_v32",
    attention=dataclasses.replace(
        MOE.attention, indexer=IndexerConfig(index_n_heads=16, index_head_dim=12, index_topk=6)
    ),
)
KINDS = {"mla-moe": MTP, "v3.2": SPARSE, "gqa": DENSE}
# one shape of each program
SMALL = dict(max_num_seqs=4, max_num_batched_tokens=64, chunk=16, block_size=4, num_blocks=61, decode_steps=3)
SMALL |= dict(batch_sizes=(4,))


class Asked(NamedTuple):
    prompt: list[int]
    sampling: SamplingConfig
    seed: int


@cache
def model(kind: str):
    graphdef, weights = jax.jit(lambda: split(Decoder(KINDS[kind], rngs=nnx.Rngs(3))))()
    return graphdef, weights


def engine(kind: str, *, record: Record = NO_RECORD, tokenizer=None, **settings) -> Engine:
    given = {"record": record, "tokenizer": tokenizer}
    return Engine(KINDS[kind], *model(kind), EngineConfig(**(SMALL | settings)), **given)


def some_requests(seed: int, count: int) -> list[Asked]:
    """Prompts that often begin alike, some as long as whole blocks; greedy and sampled, with stops and filters."""
    rng = random.Random(seed)
    stems = [[rng.randrange(1, V) for _ in range(n)] for n in (4, 8, 13)]
    found = []
    for number in range(count):
        tail = [rng.randrange(1, V) for _ in range(rng.choice([0, 1, 3, 9]))]
        prompt = (rng.choice([[], *stems]) + tail) or [rng.randrange(1, V)]
        settings = dict(max_new_tokens=rng.randrange(1, min(14, CONTEXT - len(prompt))))
        settings |= rng.choice([dict(temperature=0.0), dict(), dict(temperature=0.7, top_p=0.9), dict(top_k=3)])
        settings |= rng.choice([{}, dict(stop_ids=(2, 5)), dict(repetition_penalty=1.3), dict(presence_penalty=0.5)])
        found.append(Asked(prompt, SamplingConfig(**settings), seed=number))
    return found


def alone(kind: str, asked: Sequence[Asked], **settings) -> list[tuple[list[int], list[float]]]:
    """Each by itself, in the plainest way."""
    plain = engine(kind, overlap=False, prefix_caching=False, **settings)
    found = []
    for of in asked:
        plain.add(of.prompt, of.sampling, seed=of.seed)
        *_, last = plain.run()
        found.append((last.live.request.tokens[len(of.prompt) :], last.live.logprobs))
    return found


@cache
def wanted(kind: str):
    asked = some_requests(0, 24)
    return asked, alone(kind, asked)


def together(kind: str, asked: Sequence[Asked], seed: int, **settings):
    """All of them, arriving at random, while others come and are cancelled."""
    rng, of = random.Random(seed), engine(kind, **settings)
    waiting, ours, others, found = list(enumerate(asked)), {}, [], {}
    while waiting or of.has_work:
        while waiting and rng.random() < 0.5:
            number, each = waiting.pop(rng.randrange(len(waiting)))
            ours[of.add(each.prompt, each.sampling, seed=each.seed)] = number
        if waiting and rng.random() < 0.3:
            others.append(
                of.add([rng.randrange(1, V)] * rng.randrange(1, 20), SamplingConfig(max_new_tokens=9), seed=99)
            )
        if others and rng.random() < 0.3:
            of.cancel(others.pop(rng.randrange(len(others))))
        for update in of.step():
            if update.finished and update.id in ours:
                found[ours[update.id]] = update.live
    (pool,) = of.scheduler.cache.pools
    assert pool.used == 0 and pool.free + pool.cached == pool.num_blocks - 1  # no block is left behind
    return [found[number] for number in range(len(asked))], of


def same(found, expected, prompts: Sequence[Asked]):
    for sequence, (tokens, logprobs), of in zip(found, expected, prompts, strict=True):
        assert sequence.request.tokens[len(of.prompt) :] == tokens
        np.testing.assert_allclose(sequence.logprobs, logprobs, rtol=0, atol=2e-5)


WAYS = {
    "plain": dict(),
    "chunks": dict(chunk=3),
    "no-overlap": dict(overlap=False, chunk=5),
    "no-reuse": dict(prefix_caching=False),
    "one-step": dict(decode_steps=1),
    "preempted": dict(admission="preempt", num_blocks=14),
    "scarce": dict(num_blocks=12),
}


# one way at least of every kind; the others take longer
SOON = {*(("gqa", way) for way in WAYS if way != "one-step"), ("mla-moe", "plain"), ("mla-moe", "preempted")}
SOON |= {("v3.2", "plain"), ("mla-moe", "mtp"), ("gqa", "lookup")}
cases = lambda *of: [pytest.param(*case, marks=() if case in SOON else pytest.mark.slow) for case in of]


@pytest.mark.parametrize("kind, way", cases(*((kind, way) for kind in KINDS for way in WAYS)))
def test_a_request_draws_what_it_draws_alone(kind, way):
    asked, expected = wanted(kind)
    found, of = together(kind, asked, seed=1, **WAYS[way])
    same(found, expected, asked)
    if way == "preempted":
        assert sum(sequence.request.preemptions for sequence in found) > 0


@pytest.mark.parametrize(
    "kind, drafts", cases(("mla-moe", "mtp"), ("mla-moe", "lookup"), ("v3.2", "lookup"), ("gqa", "lookup"))
)
def test_drafts_change_no_token(kind, drafts):
    """Greedy and sampled, with penalties and stops inside the drafts."""
    asked, expected = wanted(kind)
    for seed, way in enumerate((dict(), dict(chunk=3, overlap=False), dict(admission="preempt", num_blocks=14))):
        found, of = together(kind, asked, seed, drafts=drafts, draft_tokens=2, **way)
        same(found, expected, asked)
