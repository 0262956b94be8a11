"""Samples packed into rows against the same samples in rows of their own."""

import dataclasses
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import IndexerConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scan_layers import stack_layers, unstack_layers
from deepseek_jax.model.scoring import score
from deepseek_jax.ops.attention import positions_within, same_segment
from deepseek_jax.parallel import causal_attention
from deepseek_jax.sharding import LOCAL, Layout
from tests.checkpoint.folders import QWEN2, V3

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 2e-5  # float32
WIDTH, PER_ROW = 16, 4
# Columns of the samples of each row. The last row is empty, and no row has as many samples as it can hold.
ROWS = ((5, 3, 6), (7, 1, 8), (16,), ())
LENGTHS = [length for row in ROWS for length in row]

MLA = dataclasses.replace(V3, initializer_range=0.3, vocab_size=40)
# Longer samples leave keys out; 16 heads, because relu leaves few of them with equal scores, between which rounding
# would decide.
SPARSE = dataclasses.replace(
    MLA,
    model_type="deepseek_v32",
    attention=dataclasses.replace(
        MLA.attention, indexer=IndexerConfig(index_n_heads=16, index_head_dim=16, index_topk=4)
    ),
)
GQA = dataclasses.replace(QWEN2, initializer_range=0.3, vocab_size=40)
CONFIGS = {"mla": MLA, "sparse": SPARSE, "gqa": GQA}


class Texts(NamedTuple):
    """Samples in rows, one or several; numbers [B, T] and [B, T, 2]."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    seeds: np.ndarray  # of the gradient: what a log-prob and an entropy count for
    numbers: np.ndarray  # which sample's which target, 0 for none: to find the same in another arrangement


def texts(*, packed: bool) -> Texts:
    """The same samples either way; some targets at the end of a sample, or all of one's, do not count."""
    rng = np.random.default_rng(0)
    rows = ROWS if packed else [(length,) for length in LENGTHS]
    shape = len(rows), WIDTH
    found = Texts(
        *(np.zeros(shape, kind) for kind in (np.int32, np.int32, bool, np.int32)),
        np.zeros((*shape, 2), np.float32),
        np.zeros(shape, int),
    )
    sample = 0
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            of = row, slice(start, start + length)
            text = rng.integers(0, 40, length + 1)
            found.tokens[of], found.targets[of], found.segments[of] = text[:-1], text[1:], number
            found.seeds[of] = rng.normal(size=(length, 2))
            found.numbers[of] = 1 + 100 * sample + np.arange(length)
            counted = np.arange(length) >= 1
            if sample % 3 == 1:
                counted &= np.arange(length) < length - 2  # a sample of three columns counts nothing at all
            found.mask[of] = counted
            start += length
            sample += 1
    return found


@cache
def weights_of(kind: str) -> nnx.State:
    weights = jax.jit(lambda: split(Decoder(CONFIGS[kind], rngs=nnx.Rngs(1)))[1])()
    if CONFIGS[kind].moe is not None:
        weights.layers[1].mlp.bias = RouterBias(0.02 * jnp.arange(8.0), axes=(None,))
    return weights


def laid(kind: str, layout: Layout) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's description and weights under a layout."""
    graphdef, like = abstract_weights(CONFIGS[kind], layout=layout)
    if layout.scan_layers:
        return graphdef, stack_layers(weights_of(kind), CONFIGS[kind], layout)
    if layout.mesh is None:
        return graphdef, weights_of(kind)
    return graphdef, jax.tree.map(lambda a, of: jax.device_put(a, of.sharding), weights_of(kind), like)


def scored(kind: str, layout: Layout, of: Texts, *, gradients: bool = True, **given) -> dict[str, np.ndarray]:
    """Scores of the counted targets in the order of their numbers, balance, load, and perhaps all gradients."""
    graphdef, weights = laid(kind, layout)
    params, rest = nnx.split_state(weights, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        found = score(model, *cut(arrays), temperature=0.8, **cut(given_arrays), **given_numbers)
        both = jnp.stack([found.logprobs_BT, found.entropy_BT], axis=-1)
        return jnp.sum(jnp.where(of.mask[..., None], both * of.seeds, 0)) + 3 * found.balance, found

    arrays = tuple(map(jnp.asarray, of[:3]))
    lay = lambda a: layout.constrain(a, "batch", "sequence", *(None,) * (a.ndim - 2))
    cut = lambda tree: jax.tree.map(lay, tree)
    given_numbers = {name: value for name, value in given.items() if isinstance(value, int | None)}
    given_arrays = {name: jnp.asarray(value) for name, value in given.items() if name not in given_numbers}
    wanted = jax.grad(loss, has_aux=True) if gradients else loss
    gradient, found = jax.jit(wanted)(params)
    order = np.argsort(of.numbers[of.mask])
    counted = {"logprobs": found.logprobs_BT, "entropy": found.entropy_BT}
    if found.load_LE is not None:
        counted["experts"] = found.experts_BTLA
    values = {name: np.asarray(value)[of.mask][order] for name, value in counted.items()}
    values |= {"balance": found.balance} | ({} if found.load_LE is None else {"load": found.load_LE})
    if not gradients:
        return {name: np.asarray(value) for name, value in values.items()}
    gradient = nnx.merge_state(gradient, rest)
    named = names.flat(unstack_layers(gradient, CONFIGS[kind], LOCAL) if layout.scan_layers else gradient)
    return {name: np.asarray(value) for name, value in (values | named).items()}


@cache
def alone(kind: str) -> dict[str, np.ndarray]:
    return scored(kind, LOCAL, texts(packed=False))


def in_rows(kind: str, layout: Layout) -> dict[str, np.ndarray]:
    of = texts(packed=True)
    return scored(kind, layout, of, segments_BT=of.segments, per_row=PER_ROW)


def same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(1.0, float(np.abs(value).max()))  # a gradient's rounding is that of its largest terms
        np.testing.assert_allclose(got[name], value, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "layout", "blocks"),
    [
        ("mla", LOCAL, False),
        ("sparse", Layout(scan_layers=True, remat="all_but_attention"), True),
        ("gqa", LOCAL, True),
        pytest.param("mla", Layout(scan_layers=True, remat="layers"), True, marks=pytest.mark.slow),
        pytest.param("mla", LOCAL, True, marks=pytest.mark.slow),
        pytest.param("sparse", LOCAL, False, marks=pytest.mark.slow),
        pytest.param("gqa", Layout(scan_layers=True, remat="layers"), False, marks=pytest.mark.slow),
    ],
)
def test_a_packed_batch_is_its_samples_one_a_row(kind, layout, blocks, monkeypatch):
    """Log-probs, entropies, the experts' choice, load, balance, and the gradient of every weight."""
    wanted = alone(kind)
    if blocks:  # tiles of eight
        monkeypatch.setattr(causal_attention, "_ALL_PAIRS", 0)
        monkeypatch.setattr(causal_attention, "_SIDES", (8,))
    same(in_rows(kind, layout), wanted)
    assert np.abs(wanted["logprobs"]).max() > 2  # and they say something


def test_rows_without_segments_are_one_text():
    """What the law above would miss: without them the samples do see each other."""
    of = texts(packed=True)
    assert np.abs(scored("mla", LOCAL, of, gradients=False)["logprobs"] - alone("mla")["logprobs"]).max() > 0.1


def test_balance_leaves_out_samples_beyond_the_bound():
    of = texts(packed=True)
    some = scored("mla", LOCAL, of, gradients=False, segments_BT=of.segments, per_row=1)
    np.testing.assert_array_equal(some["load"], alone("mla")["load"])
    assert 0 < some["balance"] < 0.7 * alone("mla")["balance"]


def test_segments_want_a_bound():
    of = texts(packed=True)
    with pytest.raises(ValueError, match="per_row: got none beside segments_BT, wanted"):
        scored("mla", LOCAL, of, segments_BT=of.segments, per_row=None)


def test_positions_start_anew_with_each_sample():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8, [0] * 8], jnp.int32)
    wanted = [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8)), list(range(8))]
    np.testing.assert_array_equal(positions_within(segments), wanted)


def test_queries_see_keys_of_their_own_sample():
    segments = jnp.asarray([[1, 1, 2, 0]], jnp.int32)
    seen = same_segment(jnp.ones((1, 2, 4), bool), segments[:, 1:3], segments)
    np.testing.assert_array_equal(seen, [[[1, 1, 0, 0], [0, 0, 1, 0]]])
    assert not same_segment(jnp.zeros((1, 2, 4), bool), segments[:, 1:3], segments).any()
