"""What a cache keeps, and in blocks of what size: codes keep the engine's law, and blocks of any size are alike."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.cache import empty_cache
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.plan.memory import serve_memory
from deepseek_jax.plan.meshes import Sizes
from deepseek_jax.rl.rollout import RolloutWorker
from deepseek_jax.sharding import Layout, make_mesh
from tests.generation.test_engine import KINDS, SMALL, WAYS, alone, model, same, some_requests, together
from tests.generation.test_generator import CONTEXT, V
from tests.laws import fixture_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = (1, 3, 16, 24, 2 * CONTEXT)  # the last is longer than every sequence
DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8"}
GREEDY = SamplingConfig(max_new_tokens=9, temperature=0.0)


# --- codes ---------------------------------------------------------------------------------------


@cache
def wanted(kind: str, cache_dtype: str):
    asked = some_requests(0, 24)
    return asked, alone(kind, asked, cache_dtype=cache_dtype)


SOON = {("mla-moe", "fp8", "preempted"), ("gqa", "int8", "chunks"), ("gqa", "int8", "preempted")}
SOON |= {("gqa", "bfloat16", "preempted")}
CASES = [
    pytest.param(kind, dtype, way, marks=() if (kind, dtype, way) in SOON else pytest.mark.slow)
    for kind in KINDS
    for dtype in ("bfloat16", "fp8", "int8")
    for way in ("plain", "chunks", "preempted", "no-reuse")
]


@pytest.mark.parametrize("kind, dtype, way", CASES)
def test_a_request_draws_what_it_draws_alone(kind, dtype, way):
    """Chunks, blocks found again and recomputed ones: a token sees what the cache keeps, of its own chunk too."""
    asked, expected = wanted(kind, dtype)
    found, of = together(kind, asked, seed=1, cache_dtype=dtype, **WAYS[way])
    same(found, expected, asked)
    assert of.runner.state.cache.layers[0][0].dtype == of.settings.dtype_of_cache(None)


@pytest.mark.parametrize("kind", [pytest.param("mla-moe", marks=pytest.mark.slow), "gqa"])
def test_codes_change_little(kind):
    """Log-probs of the same tokens: int8 is nearer to float32 than fp8, and both are near, but not the same."""
    asked = [dataclasses.replace(GREEDY, prompt_logprobs=True)] * 6
    prompts = [(of.prompt * 9)[:30] for of in some_requests(0, 6)]
    found = {}
    for dtype in ("auto", "int8", "fp8"):
        engine = Engine(KINDS[kind], *model(kind), EngineConfig(**SMALL, cache_dtype=dtype))
        numbers = [engine.add(prompt, of, seed=0) for prompt, of in zip(prompts, asked, strict=True)]
        lives = {update.id: update.live for update in engine.run() if update.finished}
        found[dtype] = np.concatenate([lives[number].prompt_logprobs[1:] for number in numbers]).astype(float)
    int8, fp8 = (np.abs(found[dtype] - found["auto"]).mean() for dtype in ("int8", "fp8"))
    assert 0 < int8 < fp8 < 0.1


def test_what_is_learned_from_is_sampled_with_the_exact_cache():
    generator = Generator(KINDS["gqa"], model("gqa")[0], settings=EngineConfig(cache_dtype="int8"))
    with pytest.raises(ValueError, match="cache_dtype: got 'int8' to sample what is learned from, wanted auto"):
        RolloutWorker(generator=generator, tokenizer=None, sampling=GREEDY, group_size=2, reward=None)


def test_an_unknown_cache_is_refused():
    with pytest.raises(ValueError, match="cache_dtype: got 'fp4', wanted auto, bfloat16, fp8, int8"):
        EngineConfig(cache_dtype="fp4")


# --- blocks --------------------------------------------------------------------------------------


STEM = [1 + number * 7 % (V - 1) for number in range(26)]
PROMPTS = [
    [*STEM[:length], *range(1, 1 + own)]
    for length, own in ((26, 1), (26, 4), (13, 2), (26, 2), (2, 0), (25, 5), (26, 4))
]


def drawn(config: ModelConfig, graphdef, weights, **settings) -> list[list[int]]:
    """What is drawn, greedily, after prompts that begin alike: first of one, then of all others, some of which wait."""
    given = SMALL | {"num_blocks": None} | settings
    engine = Engine(config, graphdef, weights, EngineConfig(**given))
    size, reuse = engine.settings.block_size, engine.settings.prefix_caching
    pools, lives = engine.scheduler.cache.pools, {}
    for number, prompt in enumerate(PROMPTS):
        assert engine.add(prompt, GREEDY, seed=0) == number
        if number == 0:
            lives |= {update.id: update.live for update in engine.run() if update.finished}
            assert any(pool.match(PROMPTS[1]) for pool in pools) == (reuse and size <= len(STEM))
    lives |= {update.id: update.live for update in engine.run() if update.finished}
    assert all(pool.used == 0 for pool in pools)
    return [lives[number].request.tokens for number in range(len(PROMPTS))]


@cache
def greedy(kind: str):
    return drawn(KINDS[kind], *model(kind), prefix_caching=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [pytest.param("mla-moe", marks=pytest.mark.slow), "gqa"])
def test_blocks_of_any_size_are_alike(kind, size):
    for reuse in (False, True):
        assert drawn(KINDS[kind], *model(kind), block_size=size, prefix_caching=reuse) == greedy(kind)


def test_blocks_of_nothing_are_refused():
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"block_size: got {size}, wanted at least 1"):
            drawn(KINDS["gqa"], *model("gqa"), block_size=size)


# --- laws that need two devices ------------------------------------------------------------------


def laid(kind: str, **sizes: int):
    layout = Layout(mesh=make_mesh(**sizes), workload="serve")
    graphdef, like = abstract_weights(KINDS[kind], layout=layout)
    return graphdef, jax.tree.map(lambda a, of: jax.device_put(a, of.sharding), model(kind)[1], like)


def blocks_of_any_size_are_alike_on_two_data_shards(*sizes: int) -> None:
    placed = laid("gqa", data=2)
    for size in sizes or SIZES:
        for reuse in (False, True):
            assert drawn(KINDS["gqa"], *placed, block_size=size, prefix_caching=reuse) == greedy("gqa"), (size, reuse)


def blocks_of_a_few_sizes_are_alike_on_two_data_shards() -> None:
    """One that divides nothing, and one that holds everything."""
    blocks_of_any_size_are_alike_on_two_data_shards(SIZES[1], SIZES[-1])


def codes_on_two_devices_are_those_of_one() -> None:
    """Heads on each, and sequences on each."""
    codes_are_those_of_one(("gqa", "int8", {"tensor": 2}), ("mla-moe", "int8", {"data": 2}))


def smaller_codes_on_two_devices_are_those_of_one() -> None:
    codes_are_those_of_one(("gqa", "fp8", {"data": 2}))


def codes_are_those_of_one(*cases) -> None:
    for kind, dtype, sizes in cases:
        one = drawn(KINDS[kind], *model(kind), cache_dtype=dtype)
        assert drawn(KINDS[kind], *laid(kind, **sizes), cache_dtype=dtype, chunk=5) == one, (kind, dtype, sizes)


def the_planned_bytes_are_those_of_a_device() -> None:
    for kind, sizes in (("gqa", {"tensor": 2}), ("gqa", {"data": 2}), ("mla-moe", {"tensor": 2})):
        for dtype, name in DTYPES.items():
            layout = Layout(mesh=make_mesh(**sizes), workload="serve", lanes=8)
            of_cache = EngineConfig(cache_dtype=name).dtype_of_cache(None)
            config = dataclasses.replace(KINDS[kind], num_nextn_predict_layers=0)
            held = jax.jit(lambda config=config, of=of_cache, to=layout: empty_cache(config, 6, 4, of, to))()
            [device, _] = jax.devices()
            parts = [of.data for a in jax.tree.leaves(held) for of in a.addressable_shards if of.device == device]
            # only what is padded in the arrays too can be counted so
            planned = serve_memory(config, "f32", Sizes(**layout.mesh.shape), 6, 4, multiple=8, cache_dtype=dtype)
            assert sum(part.nbytes for part in parts) == planned.cache, (kind, sizes, dtype)


QUICK = [
    blocks_of_a_few_sizes_are_alike_on_two_data_shards,
    codes_on_two_devices_are_those_of_one,
    the_planned_bytes_are_those_of_a_device,
]
THOROUGH = [blocks_of_any_size_are_alike_on_two_data_shards, smaller_codes_on_two_devices_are_those_of_one]
quick = fixture_of(QUICK, devices=2)


@pytest.mark.parametrize("law", [law.__name__ for law in QUICK])
def test_on_two_devices(law, quick):
    assert quick[law] == "", quick[law]


thorough = fixture_of(THOROUGH, devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law.__name__ for law in THOROUGH])
def test_on_two_devices_at_length(law, thorough):
    assert thorough[law] == "", thorough[law]
