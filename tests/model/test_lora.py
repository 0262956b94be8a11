"""Adapters beside frozen weights: their sums against NumPy, and the decoder on them, by layer and in stacks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.adapters import adapted_paths, new_adapter
from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.lora import (
    LoRAConfig,
    abstract_adapter,
    adapted,
    adapter_from_arrays,
    decoder_of,
    first_adapter,
    merge,
    with_adapter,
)
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.model.scan_layers import members, stack_layers, unstack_layers
from deepseek_jax.rl.batch import make_batch
from deepseek_jax.rl.objective import frozen_scores
from deepseek_jax.sharding import LOCAL, Layout
from tests.checkpoint.folders import QWEN2, V3

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = Layout(scan_layers=True)
# a dense layer, two with experts, and a module that no adapter reaches
MLA = dataclasses.replace(V3, num_hidden_layers=3, num_nextn_predict_layers=1)
CONFIGS = {"mla": MLA, "gqa": QWEN2}
DENSE_MLA = dataclasses.replace(
    V3,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    moe=dataclasses.replace(V3.moe, first_k_dense_replace=2),
)
LORA = LoRAConfig(rank=3, alpha=5.0, targets="all-linear")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 9)), jnp.int32)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def weights(config) -> nnx.State:
    config = dataclasses.replace(config, initializer_range=0.2)
    return jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()


def trained(config, lora=LORA, dtype=jnp.float32, layout=LOCAL) -> nnx.State:
    """An adapter of which B is not zero either; the same matrices under every layout."""
    first = new_adapter(config, lora, seed=1, dtype=dtype)
    random = np.random.default_rng(2)
    arrays = {path: random.normal(0, 0.3, leaf[...].shape).astype(dtype) for path, leaf in nnx.to_flat_state(first)}
    like = abstract_adapter(config, lora, adapted_paths(config, lora), dtype=dtype, layout=layout)
    return adapter_from_arrays(arrays, like, config)


def flat(weights) -> dict[names.Path, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(weights)}


def of_tokens(model, tokens=TOKENS):
    return model.logits(model(tokens).x_BTD)


# --- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "layout"),
    [(1, 1.0, False, LOCAL), (3, 5.0, False, STACKED), (4, 16, True, LOCAL), (40, 2, True, STACKED)],
    ids=["1-layers", "3-stacks", "4-rslora-layers", "40-rslora-stacks"],
)
def test_sums_equal_a_numpy_twin(config, weights, rank, alpha, rslora, layout):
    """In float64; matrices, stacks of them, experts and stacks of experts, and nothing but the adapted ones."""
    lora = LoRAConfig(rank=rank, alpha=alpha, targets="all-linear", rslora=rslora)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    base = stack_layers(weights, config, layout) if layout.scan_layers else weights
    adapter = trained(config, lora, layout=layout)
    before, parts, after = flat(base), flat(adapter), flat(merge(base, adapter, lora))
    assert before.keys() == after.keys()
    for path, w in before.items():
        if (*path, "a") in parts:
            a, b = (parts[*path, name].astype(np.float64) for name in ("a", "b"))
            wanted = w + scale * np.einsum("...ir,...ro->...io", a, b)
            np.testing.assert_allclose(after[path], wanted, rtol=1e-6, atol=2e-6, err_msg=str(path))
            assert np.abs(wanted - w).max() > 0.01
        else:
            np.testing.assert_array_equal(after[path], w, err_msg=str(path))
    ranks = {part.shape[-1] if path[-1] == "a" else part.shape[-2] for path, part in parts.items()}
    assert ranks == {rank}


def test_bfloat16_weights_are_rounded_once(config, weights):
    """The product of bfloat16 numbers in float32, and one rounding of the sum: half a unit in the last place."""
    base = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
    adapter = trained(config)
    before, parts, after = flat(base), flat(adapter), flat(merge(base, adapter, LORA))
    for path in {path[:-1] for path in parts}:
        a, b = (parts[*path, name].astype(jnp.bfloat16).astype(np.float64) for name in ("a", "b"))
        wanted = before[path].astype(np.float64) + LORA.scale * (a @ b)
        assert after[path].dtype == jnp.bfloat16
        np.testing.assert_allclose(after[path].astype(np.float64), wanted, rtol=2.0**-8 * 1.001, atol=1e-6)


@pytest.mark.parametrize(("layout", "dtype"), [(LOCAL, jnp.float32), (STACKED, jnp.bfloat16)])
def test_a_new_adapter_changes_no_bit(config, weights, layout, dtype):
    base = jax.tree.map(
        lambda a: a.astype(dtype), stack_layers(weights, config, layout) if layout.scan_layers else weights
    )
    found = merge(base, new_adapter(config, LORA, seed=3, layout=layout), LORA)
    wanted = flat(base)
    for path, value in flat(found).items():
        assert value.dtype == dtype and value.tobytes() == wanted[path].tobytes(), path


def test_merging_copies_no_weight_that_is_not_adapted(config, weights):
    lora = dataclasses.replace(LORA, targets=("o_proj",))
    merged = names.flat(merge(weights, new_adapter(config, lora, seed=0), lora))
    same = {
        key: merged[key].unsafe_buffer_pointer() == of.unsafe_buffer_pointer()
        for key, of in names.flat(weights).items()
    }
    adapted_ones = {f"layers.{layer}.attention.o" for layer in range(config.num_hidden_layers)}
    assert {key for key, is_same in same.items() if not is_same} == adapted_ones


def test_an_adapter_for_other_weights_is_refused(config, weights):
    with pytest.raises(ValueError, match="adapter: got stacks.0.* for which there is no weight"):
        adapted(weights, new_adapter(config, LORA, seed=0, layout=STACKED), LORA)


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LOCAL, STACKED], ids=["layers", "stacks"])
def test_a_decoder_beside_its_adapter_computes_what_merged_weights_do(config, weights, layout):
    """Logits in float32, to 3e-6 of the largest; by layer and in stacks, experts and latent attention among them."""
    base = stack_layers(weights, config, layout) if layout.scan_layers else weights
    adapter, graphdef = trained(config, layout=layout), abstract_weights(config, layout=layout)[0]
    forward = jax.jit(lambda weights: of_tokens(decoder_of(graphdef, weights)))
    got, wanted = forward(with_adapter(base, adapter, LORA)), forward(merge(base, adapter, LORA))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
    assert np.abs(got - forward(base)).max() > 0.1


def test_what_is_joined_is_one_tree_of_the_same_arrays(config, weights):
    """Every leaf a variable with axes and the very array that was given; and of shapes the same tree is made."""
    adapter, paths = trained(config), adapted_paths(config, LORA)
    joined = with_adapter(weights, adapter, LORA)
    given = {id(leaf) for tree in (weights, adapter) for leaf in jax.tree.leaves(tree)}
    assert {id(leaf) for leaf in jax.tree.leaves(joined)} == given
    names_of = {path[-1] for path, _ in nnx.to_flat_state(joined) if path[:-1] in set(paths)}
    assert names_of == {"weight", "a", "b"}
    for path, leaf in nnx.to_flat_state(joined):
        assert len(leaf.get_metadata()["axes"]) == leaf.get_raw_value().ndim, path
    like = with_adapter(abstract_weights(config)[1], abstract_adapter(config, LORA, paths), LORA)
    assert jax.tree.structure(like) == jax.tree.structure(joined)
    half = convert_dtype(joined, jnp.bfloat16)  # what goes through a tree leaf by leaf keeps what it is
    assert jax.tree.structure(half) == jax.tree.structure(joined)
    with pytest.raises(ValueError, match="adapter: got stacks.0.* for which there is no weight"):
        with_adapter(weights, new_adapter(config, LORA, seed=0, layout=STACKED), LORA)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_an_adapter_below_the_last_bit_of_bfloat16_weights_counts(kind):
    """Merged into them it changes no bit; beside them it moves the logits as it does in float32.

    Each logit moves by about a unit in the last place, up or down: the slope is over all of them. Without experts, of
    which rounding chooses others.
    """
    config = {"gqa": QWEN2, "mla": DENSE_MLA}[kind]
    random, lora = np.random.default_rng(0), LoRAConfig(rank=1, alpha=1, targets="all-linear")
    # half a unit in the last place is 2^-11 of such weights, and the adapter 2^-12 everywhere
    coarse = lambda a: jnp.asarray(random.choice([-1, 1], a.shape) * random.uniform(0.125, 0.25, a.shape), jnp.bfloat16)
    matrix = lambda path, leaf: leaf.replace(coarse(leaf.get_raw_value())) if leaf.get_raw_value().ndim > 1 else leaf
    shapes = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))[1])()
    weights = nnx.from_flat_state([(path, matrix(path, leaf)) for path, leaf in nnx.to_flat_state(shapes)])
    signs = lambda leaf: jnp.asarray(random.choice([-1, 1], leaf.get_raw_value().shape), jnp.float32)
    first = new_adapter(config, lora, seed=0)
    sized = lambda path, leaf: leaf.replace(signs(leaf) * (2.0**-12 if path[-1] == "b" else 1.0))
    adapter = nnx.from_flat_state([(path, sized(path, leaf)) for path, leaf in nnx.to_flat_state(first)])
    before, after = flat(weights), flat(merge(weights, adapter, lora))
    assert all(after[path].tobytes() == value.tobytes() for path, value in before.items())

    graphdef, tokens = abstract_weights(config)[0], jnp.asarray(random.integers(0, 60, (128, 16)), jnp.int32)
    forward = jax.jit(lambda weights: of_tokens(decoder_of(graphdef, weights), tokens))
    moved = lambda weights: np.asarray(
        forward(with_adapter(weights, convert_dtype(adapter, weights.norm.dtype), lora)) - forward(weights)
    )
    half, full = moved(weights), moved(convert_dtype(weights, jnp.float32))
    assert np.sum(half * full) / np.sum(full * full) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", [pytest.param("mla", marks=pytest.mark.slow), "gqa"])
def test_sampler_and_trainer_agree_in_bfloat16_as_without_an_adapter(kind):
    """Mean distance of their log-probs: latent attention samples absorbed and is scored spelled out, either way."""
    config = dataclasses.replace(CONFIGS[kind], initializer_range=0.2)
    weights = convert_dtype(jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])(), jnp.bfloat16)
    smaller = lambda path, leaf: leaf.replace(leaf[...] * (0.1 if path[-1] == "b" else 1.0))
    adapter = nnx.from_flat_state([(path, smaller(path, leaf)) for path, leaf in nnx.to_flat_state(trained(config))])
    graphdef = abstract_weights(config)[0]
    generator, sampling = Generator(config, graphdef), SamplingConfig(max_new_tokens=20)
    prompts = np.random.default_rng(0).integers(0, 60, (16, 5)).tolist()

    def distance(weights):
        found = generator(weights, prompts, sampling, seeds=range(64), samples=4)
        batch = make_batch([p for p in prompts for _ in range(4)], found, np.zeros(64, np.float32))
        scores = np.asarray(frozen_scores(graphdef, weights, batch, temperature=1.0))
        return np.abs(scores - batch.old_logprobs_BT)[batch.mask_BT].mean()

    plain, adapted_policy = (
        distance(weights),
        distance(with_adapter(weights, convert_dtype(adapter, jnp.bfloat16), LORA)),
    )
    assert adapted_policy <= 1.2 * plain, (adapted_policy, plain)  # jax 0.12 rounds both alike: 0


def test_the_gradient_is_that_of_the_weights_by_the_chain_rule(config, weights):
    """dA = s dW B', dB = s A' dW, in float64."""
    adapter, random = trained(config), np.random.default_rng(4)
    of_weights = jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32), weights)
    _, back = jax.vjp(lambda adapter: merge(weights, adapter, LORA), adapter)
    got, parts, slopes = flat(back(of_weights)[0]), flat(adapter), flat(of_weights)
    assert got.keys() == parts.keys()
    for path in {path[:-1] for path in parts}:
        a, b, d = (of.astype(np.float64) for of in (parts[*path, "a"], parts[*path, "b"], slopes[path]))
        for name, wanted in (("a", d @ np.swapaxes(b, -1, -2)), ("b", np.swapaxes(a, -1, -2) @ d)):
            np.testing.assert_allclose(got[*path, name], LORA.scale * wanted, rtol=1e-6, atol=2e-6)


# --- in stacks, and at first ---------------------------------------------------------------------


def test_stacks_are_adapted_as_layers_are(config, weights):
    """The same first values, and after training the same sums, bit for bit."""
    by_layer, in_stacks = (new_adapter(config, LORA, seed=5, layout=layout) for layout in (LOCAL, STACKED))
    layers, stacks = flat(by_layer), flat(in_stacks)
    for path, value in stacks.items():
        for got, member in zip(value, members(path, config), strict=True):
            np.testing.assert_array_equal(got, layers[member], err_msg=str(path))
    sums = merge(stack_layers(weights, config, STACKED), trained(config, layout=STACKED), LORA)
    wanted = flat(merge(weights, trained(config), LORA))
    for path, value in flat(unstack_layers(sums, config, LOCAL)).items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=str(path))


def test_first_values_are_pefts(config):
    """A uniform within 1 / sqrt(in) and of that variance, each matrix another; B zero."""
    wide = dataclasses.replace(config, hidden_size=256)
    found = flat(new_adapter(wide, dataclasses.replace(LORA, rank=64), seed=0))
    seen = set()
    for path, value in found.items():
        if path[-1] == "b":
            assert not value.any()
            continue
        seen.add(value.tobytes())
        bound = 1 / math.sqrt(value.shape[-2])
        assert np.abs(value).max() <= bound
        if value.shape[-2] == 256:
            assert value.var() == pytest.approx(bound**2 / 3, rel=0.05)
            assert abs(value.mean()) < bound / 30
    assert len(seen) == len(found) / 2
    other = flat(new_adapter(wide, dataclasses.replace(LORA, rank=64), seed=1))
    assert all((other[path] != value).any() for path, value in found.items() if path[-1] == "a")


def test_a_matrix_and_its_adapter_are_cut_alike(config):
    """A by the rows' logical axis and B by the columns', which is all that a mesh asks for."""
    weights = dict(nnx.to_flat_state(abstract_weights(config)[1]))
    adapter = first_adapter(config, LORA, adapted_paths(config, LORA), seed=0)
    for path, leaf in nnx.to_flat_state(adapter):
        *kinds, inner, outer = weights[path[:-1]].get_metadata()["axes"]
        wanted = (*kinds, inner, None) if path[-1] == "a" else (*kinds, None, outer)
        assert leaf.get_metadata()["axes"] == wanted and isinstance(leaf, nnx.Param)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 2.0}, "rank: got 2.0"),
        ({"alpha": 0}, "alpha: got 0,"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"alpha": "16"}, "alpha: got '16'"),
        ({"targets": ()}, r"targets: got \(\)"),
        ({"targets": "q_proj"}, "targets: got 'q_proj', wanted a tuple of module names or 'all-linear'"),
        ({"targets": ("q_proj", 3)}, "targets: got"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**{"rank": 4, "alpha": 8, "targets": ("q_proj",), **bad})
