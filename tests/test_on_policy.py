"""The sampler is the trainer: the same experts for every token and log-probs within 1e-5, in float32.

After the weights went through a checkpoint, at another temperature than 1, within the support of top-p; and on a mesh
of eight devices, in a process of its own, sampled as weights lie to be served and scored as they lie to be trained.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.config import IndexerConfig, ModelConfig, preset
from deepseek_jax.generation.completion import Completion, Record
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.model.scoring import Scored, check_routes, score
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from tests.laws import fixture_of
from tests.model import test_packing as packing
from tests.model import test_shared_prompts as sharing

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEMPERATURE = 0.7
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=TEMPERATURE, top_p=0.8, stop_ids=(2,))
PROMPTS = [[1, 17, 5], [1, 9, 33, 21, 8, 40, 3], [1, 60]]
SAMPLES, WIDTH, PER_ROW = 2, 32, 3

TINY = preset("tiny")
# Every query from the fifth on leaves keys out. 16 heads, because relu leaves few of them with equal scores, between
# which rounding would decide.
SPARSE = dataclasses.replace(
    TINY,
    model_type="deepseek_v32",
    attention=dataclasses.replace(
        TINY.attention, indexer=IndexerConfig(index_n_heads=16, index_head_dim=16, index_topk=4)
    ),
)
CONFIGS = {"tiny": TINY, "sparse": SPARSE}


class Texts(NamedTuple):
    """Completions for a trainer, two of them packed into a row."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    segments: np.ndarray
    routes: np.ndarray
    support: np.ndarray


def texts_of(config: ModelConfig, completions: Sequence[Completion], *, rows: int = 3) -> Texts:
    """In so many rows; those that no completion needs are empty."""
    shape = rows, WIDTH
    kinds = (np.int32, np.int32, bool, np.float32, np.int32)
    found = Texts(
        *(np.zeros(shape, kind) for kind in kinds),
        np.zeros((*shape, *completions[0].routes.shape[1:]), np.int16),
        np.full((*shape, -(-config.vocab_size // 32)), 2**32 - 1, np.uint32),
    )
    ends = np.zeros(rows, int)
    for number, completion in enumerate(completions):
        row, prompt = number // 2, PROMPTS[number // SAMPLES]
        text = np.concatenate([prompt, completion.tokens])
        start, end = ends[row], ends[row] + len(text) - 1
        every, drawn = (row, slice(start, end)), (row, slice(start + len(prompt) - 1, end))
        found.tokens[every], found.targets[every], found.segments[every] = text[:-1], text[1:], 1 + number % 2
        found.routes[every] = completion.routes
        found.mask[drawn], found.logprobs[drawn], found.support[drawn] = True, completion.logprobs, completion.support
        ends[row] = end
    return found


def scored(graphdef: nnx.GraphDef, weights: nnx.State, texts: Texts, *, replay: np.ndarray | None = None) -> Scored:
    """By a trainer, with the support; and with given experts."""
    return jax.tree.map(np.asarray, _scored(graphdef, weights, texts, replay))


@partial(jax.jit, static_argnums=0)
def _scored(graphdef, weights, texts, routes):
    model = nnx.merge(graphdef, weights)
    given = {"segments_BT": texts.segments, "per_row": PER_ROW, "support_BTW": texts.support}
    of = texts.tokens, texts.targets, texts.mask
    return score(model, *of, temperature=TEMPERATURE, routes_BTLA=routes, **given)


def first_weights(config: ModelConfig) -> nnx.State:
    """With biases that move the routing away from the scores' own best."""
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(5)))[1])()
    for layer in (1, 2):
        weights.layers[layer].mlp.bias = RouterBias(0.05 * jnp.cos(layer + jnp.arange(8.0)), axes=(None,))
    return weights


def on_host(completions: list[Completion], config: ModelConfig) -> list[Completion]:
    for completion in completions:
        check_routes(completion.routes, config)
    return completions


def sampled(config: ModelConfig, graphdef: nnx.GraphDef, weights: nnx.State, layout: Layout = LOCAL):
    generator = Generator(config, graphdef)
    record = Record(routes=True, support=True)
    seeds = list(range(SAMPLES * len(PROMPTS)))
    return on_host(generator(weights, PROMPTS, SAMPLING, seeds=seeds, samples=SAMPLES, record=record), config)


def assert_on_policy(texts: Texts, found: Scored) -> None:
    """Every log-prob within 1e-5, and every token of prompt and completion through the same experts."""
    np.testing.assert_allclose(found.logprobs_BT[texts.mask], texts.logprobs[texts.mask], rtol=0, atol=1e-5)
    fed = texts.segments > 0
    np.testing.assert_array_equal(np.sort(found.experts_BTLA[fed]), np.sort(texts.routes[fed]))


class Subject(NamedTuple):
    """A sampler and a trainer that restored the same checkpoint."""

    graphdef: nnx.GraphDef
    weights: nnx.State
    texts: Texts
    found: Scored


@cache
def subject_of(kind: str, folder: Path) -> Subject:
    config = CONFIGS[kind]
    weights = first_weights(config)
    with RunCheckpoints(folder / kind) as checkpoints:
        checkpoints.save(1, weights, {})
        weights, _, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, weights))
    graphdef, _ = abstract_weights(config)
    texts = texts_of(config, sampled(config, graphdef, weights))
    return Subject(graphdef, weights, texts, scored(graphdef, weights, texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module", params=CONFIGS)
def subject(request, folder) -> Subject:
    return subject_of(request.param, folder)


@pytest.fixture(scope="module")
def tiny(folder) -> Subject:
    return subject_of("tiny", folder)


def test_after_a_checkpoint_the_sampler_is_the_trainer(subject):
    assert_on_policy(subject.texts, subject.found)
    assert subject.texts.logprobs.min() < -1 and len(np.unique(subject.found.experts_BTLA)) == 8  # it had a choice


def test_without_the_support_it_would_not_be(tiny):
    texts = tiny.texts._replace(support=np.full_like(tiny.texts.support, 2**32 - 1))
    difference = np.abs(scored(tiny.graphdef, tiny.weights, texts).logprobs_BT - texts.logprobs)[texts.mask]
    assert difference.max() > 0.1


def test_replaying_what_was_recorded_changes_nothing_and_anything_else_does(tiny):
    mask = tiny.texts.mask
    same = scored(tiny.graphdef, tiny.weights, tiny.texts, replay=tiny.texts.routes)
    np.testing.assert_allclose(same.logprobs_BT[mask], tiny.found.logprobs_BT[mask], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(same.load_LE, tiny.found.load_LE)
    other = scored(tiny.graphdef, tiny.weights, tiny.texts, replay=(tiny.texts.routes + 1) % 8)
    np.testing.assert_array_equal(other.load_LE, np.roll(tiny.found.load_LE, 1, axis=1))
    assert np.abs(other.logprobs_BT - tiny.found.logprobs_BT)[mask].max() > 1e-2


def test_replay_keeps_the_experts_of_weights_that_have_moved(tiny):
    """So far that many tokens would go elsewhere now: they do, unless they are told."""
    rng = np.random.default_rng(0)
    move = lambda a: a + 0.3 * np.asarray(a).std() * rng.normal(size=a.shape).astype(np.float32)
    moved = jax.tree.map(lambda a: jnp.asarray(move(a)), tiny.weights)
    free = scored(tiny.graphdef, moved, tiny.texts)
    kept = scored(tiny.graphdef, moved, tiny.texts, replay=tiny.texts.routes)
    real = tiny.texts.segments > 0
    elsewhere = np.any(np.sort(free.experts_BTLA[real]) != np.sort(tiny.texts.routes[real]), axis=(1, 2))
    assert elsewhere.mean() > 0.2
    assert np.abs(free.load_LE - tiny.found.load_LE).max() > 0
    np.testing.assert_array_equal(kept.load_LE, tiny.found.load_LE)
    assert np.abs(kept.logprobs_BT - free.logprobs_BT)[tiny.texts.mask].max() > 1e-3


# --- laws that need eight devices ----------------------------------------------------------------

MESHES = {
    "tiny": (
        {"data": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "expert": 2, "context": 2},
        {"scan_layers": True, "remat": "all_but_attention"},
    ),
    "sparse": ({"expert": 4, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}, {"scan_layers": False}),
}


def laid(config: ModelConfig, weights: nnx.State, layout: Layout) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, like = abstract_weights(config, layout=layout)
    if layout.scan_layers:
        return graphdef, stack_layers(weights, config, layout)
    return graphdef, jax.tree.map(lambda a, of: jax.device_put(a, of.sharding), weights, like)


def on_a_mesh_the_sampler_is_the_trainer():
    """Sampled and scored on meshes of other shapes, with the weights laid out otherwise; replay changes nothing."""
    for kind, (of_sampler, of_trainer, further) in MESHES.items():
        config, weights = CONFIGS[kind], first_weights(CONFIGS[kind])
        serve = Layout(mesh=make_mesh(**of_sampler), workload="serve", **further)
        train = Layout(mesh=make_mesh(**of_trainer), workload="train", **further)
        completions = sampled(config, *laid(config, weights, serve), serve)
        texts = texts_of(config, completions, rows=8)
        trainer = laid(config, weights, train)
        found = scored(*trainer, texts)
        assert_on_policy(texts, found)
        same = scored(*trainer, texts, replay=texts.routes)
        np.testing.assert_allclose(same.logprobs_BT[texts.mask], texts.logprobs[texts.mask], rtol=0, atol=1e-5)
        alone = sampled(config, abstract_weights(config)[0], weights)
        for one, other in zip(completions, alone, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.support, other.support)
            np.testing.assert_array_equal(np.sort(one.routes), np.sort(other.routes))


def a_packed_batch_on_a_mesh_is_its_samples_one_a_row():
    """Scores, statistics and gradients against rows of their own on one device."""
    for kind, sizes, further in (
        ("mla", {"fsdp": 2, "expert": 2, "context": 2}, {"scan_layers": True, "remat": "layers"}),
        ("sparse", {"data": 2, "context": 2, "tensor": 2}, {"remat": "all_but_attention"}),
        ("gqa", {"data": 4, "tensor": 2}, {"scan_layers": True}),
    ):
        packing.same(packing.in_rows(kind, Layout(mesh=make_mesh(**sizes), **further)), packing.alone(kind))


def samples_behind_one_prompt_on_a_mesh_are_samples_behind_their_own():
    """The same, where the samples of a group share a prompt; rows are filled up with empty ones."""
    for kind, sizes, further, alone_scored in (
        ("mla", {"fsdp": 2, "expert": 2, "context": 2}, {"scan_layers": True, "remat": "layers"}, False),
        ("sparse", {"data": 2, "context": 2, "tensor": 2}, {"remat": "all_but_attention"}, False),
        ("gqa", {"data": 4, "tensor": 2}, {"scan_layers": True}, True),
    ):
        layout = Layout(mesh=make_mesh(**sizes), **further)
        drawn = {"drawn_BU": sharing.drawn()} if alone_scored else {}
        sharing.same(sharing.in_shared_rows(kind, layout, **drawn), sharing.alone(kind))


LAWS = [
    on_a_mesh_the_sampler_is_the_trainer,
    a_packed_batch_on_a_mesh_is_its_samples_one_a_row,
    samples_behind_one_prompt_on_a_mesh_are_samples_behind_their_own,
]


of_laws = fixture_of(LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_on_eight_devices(law, of_laws):
    assert of_laws[law] == "", of_laws[law]
