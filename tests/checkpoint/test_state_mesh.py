"""A state that was saved on one mesh comes back on another, bit for bit; in a process of its own, with four devices."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.config import preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.step import TrainState, init_state
from tests.laws import fixture_of


def mesh_of(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def divided(leaf: jax.Array, mesh: Mesh) -> NamedSharding:
    """Each axis of the mesh divides the first axis of the leaf that it can."""
    names: list[str | None] = [None] * leaf.ndim
    for name, parts in mesh.shape.items():
        free = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0 and names[axis] is None]
        if free:
            names[free[0]] = name
    return NamedSharding(mesh, PartitionSpec(*names))


def on(mesh: Mesh, tree):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, divided(leaf, mesh)), tree)


def drawn_state() -> TrainState:
    """A tiny state, with something else than zeros in every leaf."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(np.asarray(100 * rng.standard_normal(leaf.shape), leaf.dtype))
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=2)
    _, abstract = abstract_weights(config, jnp.bfloat16)
    state = init_state(jax.tree.map(draw, abstract), make_optimizer(OptimizerConfig(learning_rate=1e-3), 10))
    return TrainState(state.weights, jax.tree.map(draw, state.moments), jnp.int32(41))


def assert_same(found, wanted) -> None:
    for (path, want), got in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        assert got.dtype == want.dtype and np.asarray(got).tobytes() == np.asarray(want).tobytes(), name


def a_state_of_one_mesh_comes_back_on_another_and_on_one_device(folders: Path) -> None:
    wanted = {"train": drawn_state(), "key": jax.random.key(3)}
    biases = [leaf for _, leaf in nnx.to_flat_state(wanted["train"].weights) if isinstance(leaf, RouterBias)]
    assert biases and all(np.any(bias[...]) for bias in biases)
    saved = on(mesh_of(4, 1), wanted)
    split = [leaf for leaf in jax.tree.leaves(saved) if not leaf.is_fully_replicated]
    assert len(split) > len(jax.tree.leaves(saved)) / 2, "the mesh divides too little to prove anything"

    zeros, key = jax.tree.map(jnp.zeros_like, wanted["train"]), jax.random.key(0)
    last = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=last), zeros)
    likes = {
        "another mesh": on(mesh_of(2, 2), {"train": zeros, "key": key}),
        "the default device": {"train": zeros, "key": key},
        "the last device": {"train": shapes, "key": jax.device_put(key, last)},
    }
    with RunCheckpoints(folders / "first") as checkpoints:
        checkpoints.save(1, saved, {"row": 7})
        for name, like in likes.items():
            found, position, _ = checkpoints.restore(like)
            assert position == {"row": 7}
            assert_same(found["train"], wanted["train"])
            assert_same(jax.random.key_data(found["key"]), jax.random.key_data(wanted["key"]))
            for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
                assert got.sharding == want.sharding, (name, got.sharding, want.sharding)


def a_state_that_came_back_can_be_an_argument_as_before(folders: Path) -> None:
    """`init_state` makes its counts on no device in particular, also for weights that lie on a mesh."""
    state = {"weights": on(mesh_of(2, 2), jnp.arange(8.0)), "step": jnp.int32(41)}
    change = jax.jit(lambda state: state["weights"] * state["step"])
    with RunCheckpoints(folders / "second") as checkpoints:
        checkpoints.save(1, state, {})
        found, _, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert_same(change(found), change(state))


LAWS = [
    a_state_of_one_mesh_comes_back_on_another_and_on_one_device,
    a_state_that_came_back_can_be_an_argument_as_before,
]
found = fixture_of(LAWS, lambda folder: None, devices=4)


@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_on_four_devices(law, found):
    assert found[law] == "", found[law]
