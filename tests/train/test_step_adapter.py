"""Steps that train an adapter beside frozen weights, and steps of objectives without a forward pass to speak of."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.adapters import new_adapter
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.lora import LoRAConfig, adapted, decoder_of, with_adapter
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.ops.metrics import values
from deepseek_jax.sharding import LOCAL, Layout
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.sft_loss import SFTBatch, sft_objective
from deepseek_jax.train.step import StepConfig, batch_totals, init_state, make_adapter_step, make_train_step
from tests.checkpoint.folders import QWEN2, V3

B, T = 4, 8
CONFIG = dataclasses.replace(QWEN2, initializer_range=0.2)
ROUTED = dataclasses.replace(
    V3,
    num_hidden_layers=1,
    initializer_range=0.2,
    attention=dataclasses.replace(V3.attention, q_lora_rank=None),
    moe=dataclasses.replace(V3.moe, first_k_dense_replace=0),
)
LORA = LoRAConfig(rank=2, alpha=4, targets="all-linear")
SGD = optax.sgd(1.0)
STACKED = Layout(scan_layers=True)


@cache
def frozen(config=CONFIG) -> nnx.State:
    return jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()


def batch() -> SFTBatch:
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, CONFIG.vocab_size, (B, T + 1)), rng.integers(3, T + 1, B)
    mask = (np.arange(T) >= 2) & (np.arange(T) < lengths[:, None])
    return SFTBatch(*(a.astype(np.int32) for a in (tokens[:, :-1], tokens[:, 1:])), mask)


def adapter_of(config=CONFIG, layout=LOCAL) -> nnx.State:
    """B is not zero, so that A has a gradient too; the same numbers under every layout."""
    first = new_adapter(config, LORA, seed=0, layout=layout)
    shifted = lambda path, leaf: leaf.replace(leaf[...] + (0.02 if path[-1] == "b" else 0.0))
    return nnx.from_flat_state([(path, shifted(path, leaf)) for path, leaf in nnx.to_flat_state(first)])


def step_of(optimizer=SGD, config=CONFIG, layout=LOCAL, **settings):
    graphdef, _ = abstract_weights(config, layout=layout)
    return make_adapter_step(graphdef, sft_objective, optimizer, StepConfig(**settings), LORA)


def flat(state) -> dict:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


@cache
def reference():
    """The adapter after one step of plain gradient descent, and the metrics."""
    state, metrics = step_of()(init_state(adapter_of(), SGD), batch(), frozen=frozen())
    return flat(state.weights), values(metrics)


def test_only_the_adapter_moves_and_only_it_has_moments():
    """The base is the very same arrays afterwards, router biases included; the step gives back no copy of it."""
    weights, optimizer = frozen(ROUTED), optax.adamw(1e-2)
    assert any(isinstance(leaf, RouterBias) for _, leaf in nnx.to_flat_state(weights))
    arrays = jax.tree.leaves(weights)
    before, places = [np.array(a) for a in arrays], [a.unsafe_buffer_pointer() for a in arrays]
    start = init_state(adapter_of(ROUTED), optimizer)
    first, size = flat(start.weights), sum(a.nbytes for a in jax.tree.leaves(start))
    update = step_of(optimizer, ROUTED, balance_alpha=0.01)
    compiled = update.lower(start, batch(), frozen=weights).compile()
    assert size <= compiled.memory_analysis().output_size_in_bytes < size + 2000 < sum(a.nbytes for a in arrays)
    state, metrics = compiled(start, batch(), frozen=weights)
    assert not any(a.is_deleted() for a in arrays)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(weights)] == places
    for now, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(now, then)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(state.weights) == shapes(state.moments[0].mu) == shapes(state.moments[0].nu)
    assert shapes(state.weights) == shapes(adapter_of(ROUTED))
    moved = {path[-1]: (value != first[path]).any() for path, value in flat(state.weights).items()}
    assert moved == {"a": True, "b": True} and int(state.step) == 1
    assert "router/balance_loss" in metrics


@cache
def gradient_of(config, weights_of):
    """Loss and gradient in the adapter, of a module that is made of the base and it."""
    (graphdef, _), base = abstract_weights(config), frozen(config)

    def loss(adapter):
        model = decoder_of(graphdef, weights_of(base, adapter, LORA))
        return sft_objective(model, jax.tree.map(jnp.asarray, batch()), batch_totals(batch()))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter_of(config))
    return float(value), flat(gradient)


def test_the_update_is_the_gradient_of_the_loss_beside_the_adapter():
    """Against a gradient taken by hand."""
    (value, gradient), (weights, metrics) = gradient_of(CONFIG, with_adapter), reference()
    assert max(np.abs(g).max() for g in gradient.values()) > 0.01
    for path, start in flat(adapter_of()).items():
        np.testing.assert_allclose(weights[path], start - gradient[path], rtol=0, atol=1e-6, err_msg=str(path))
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["loss"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "experts"])
def test_loss_and_gradient_are_those_of_adapted_weights(config):
    """In float32, where W + s A B loses little: the loss to 1e-6, each gradient to 1e-5 of its norm."""
    (loss, got), (of_sums, wanted) = gradient_of(config, with_adapter), gradient_of(config, adapted)
    assert loss == pytest.approx(of_sums, rel=1e-6)
    norm = lambda g: np.linalg.norm(g.astype(np.float64))
    for path, value in wanted.items():
        assert norm(got[path] - value) <= 1e-5 * norm(value), path
        assert norm(value) > 0, path


@pytest.mark.parametrize("layout", [LOCAL, Layout(scan_layers=True, remat="layers")], ids=["layers", "stacks"])
def test_the_gradient_holds_no_matrix_as_large_as_a_frozen_one(layout):
    """Against adapted weights, which exist twice, with a gradient each: what a program keeps falls by more than one."""
    config = dataclasses.replace(ROUTED, num_hidden_layers=2 if layout.scan_layers else 1, hidden_size=256)
    graphdef, weights = abstract_weights(config, layout=layout)
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    adapter = jax.tree.map(shape, new_adapter(config, LORA, seed=0, layout=layout))

    def kept(weights_of) -> int:
        def loss(adapter, weights, batch):
            return sft_objective(decoder_of(graphdef, weights_of(weights, adapter, LORA)), batch, batch_totals(batch))[
                0
            ]

        given = adapter, weights, jax.tree.map(shape, batch())
        return jax.jit(jax.grad(loss)).lower(*given).compile().memory_analysis().temp_size_in_bytes

    leaves = dict(nnx.to_flat_state(weights))
    shapes = [leaves[path[:-1]].get_raw_value().shape for path, _ in nnx.to_flat_state(adapter) if path[-1] == "a"]
    frozen_bytes = sum(4 * math.prod(of) for of in shapes)
    assert kept(with_adapter) + frozen_bytes < kept(adapted)


def test_micro_batches_change_nothing():
    weights, metrics = reference()
    state, parted = step_of(micro_batches=4)(init_state(adapter_of(), SGD), batch(), frozen=frozen())
    assert values(parted) == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for path, value in flat(state.weights).items():
        np.testing.assert_allclose(value, weights[path], rtol=0, atol=1e-6, err_msg=str(path))


def test_an_adapter_of_stacks_learns_as_one_of_layers():
    layers, metrics = reference()
    start, there = init_state(adapter_of(layout=STACKED), SGD, STACKED), stack_layers(frozen(), CONFIG, STACKED)
    state, of_stacks = step_of(layout=STACKED)(start, batch(), frozen=there)
    assert values(of_stacks) == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for path, value in flat(state.weights).items():
        assert len(value) == 2
        for layer, got in enumerate(value):
            np.testing.assert_allclose(got, layers["layers", layer, *path[2:]], rtol=0, atol=2e-6, err_msg=str(path))


def test_one_compilation_serves_all_steps_and_the_loss_falls():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-2), 10)
    update, state, losses = step_of(optimizer), init_state(new_adapter(CONFIG, LORA, seed=0), optimizer), []
    for _ in range(8):
        state, metrics = update(state, batch(), frozen=frozen())
        losses.append(values(metrics)["loss"])
    assert update._cache_size() == 1
    assert losses[-1] < losses[0] - 0.3


def test_router_biases_cannot_be_moved_beside_an_adapter():
    with pytest.raises(ValueError, match="bias_gamma: got 0.001 with an adapter, wanted 0"):
        step_of(bias_gamma=1e-3)


class Critic(nnx.Module):
    """One number a token, of a table, and a router bias that nobody is to move."""

    def __init__(self):
        self.table = nnx.Param(jnp.linspace(-1, 1, QWEN2.vocab_size))
        self.bias = RouterBias(jnp.ones(8))


def test_an_objective_may_say_nothing_of_the_forward_pass():
    """A critic's: no balance loss, no metrics of routing, and biases that stay, whatever the settings say."""

    def objective(model, batch, whole):
        error = jnp.where(batch.mask_BT, model.table[...][batch.tokens_BT] - 0.5, 0)
        return jnp.sum(error**2) / whole.tokens, {}, None

    graphdef, weights = nnx.split(Critic())
    config = StepConfig(balance_alpha=0.01, bias_gamma=0.1, micro_batches=2)
    state, metrics = make_train_step(graphdef, objective, SGD, config)(init_state(weights, SGD), batch())
    table, mask = np.asarray(weights.table[...]), batch().mask_BT
    slope = np.zeros_like(table)
    np.add.at(slope, batch().tokens_BT[mask], 2 * (table[batch().tokens_BT[mask]] - 0.5) / mask.sum())
    np.testing.assert_allclose(state.weights.table[...], table - slope, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(state.weights.bias[...], np.ones(8))
    assert metrics.keys() == {"loss", "grad_norm", "nonfinite_updates"}
    assert values(metrics)["loss"] == pytest.approx(((table[batch().tokens_BT] - 0.5)[mask] ** 2).mean(), rel=1e-5)
