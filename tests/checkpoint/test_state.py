"""A run's state comes back exactly, another model's is refused, and what a killed run left half-written is ignored."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.config import preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.train.step import TrainState, init_state

POSITION = {"epoch": 2, "row": 17, "order": [3, 1, 2], "note": "naïve", "shuffle": {"seed": 5}}


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A train state of every kind of leaf: weights in two dtypes, router biases, moments, counts."""
    rng = np.random.RandomState(0)
    _, abstract = abstract_weights(preset("tiny"), jnp.bfloat16)
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), abstract)
    state = init_state(weights, optax.adamw(1e-3))
    noise = lambda leaf: jnp.asarray(100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    return TrainState(state.weights, jax.tree.map(noise, state.moments), jnp.int32(41))


@pytest.fixture
def checkpoints(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path / "run")
    yield checkpoints
    checkpoints.close()


def test_a_state_comes_back_bit_for_bit(checkpoints, state):
    checkpoints.save(41, state, POSITION)
    back, position, step = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert (step, position) == (41, POSITION)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {"bfloat16", "float32", "int32"}
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert got.dtype == wanted.dtype and np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def test_the_newest_are_kept(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path / "run", keep=3)
    assert checkpoints.latest() is None
    for step in (1, 2, 5, 10, 40):
        checkpoints.save(step, {"step": jnp.int32(step)}, {})
    back, _, step = checkpoints.restore({"step": jnp.int32(0)})
    assert (checkpoints.latest(), step, int(back["step"])) == (40, 40, 40)
    checkpoints.close()
    assert {folder.name for folder in (tmp_path / "run").iterdir()} == {"5", "10", "40"}


@pytest.mark.parametrize(
    "like, says",
    [
        ({"w": jnp.zeros((2, 4))}, r"array \['w'\]: got float32\[2, 3\], wanted float32\[2, 4\]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"array \['w'\]: got float32\[2, 3\], wanted bfloat16\[2, 3\]"),
        ({"w": jnp.zeros((2, 3)), "v": jnp.zeros(1)}, r"array \['v'\]: got nothing, wanted float32\[1\]"),
        ({}, r"array \['w'\]: got float32\[2, 3\], wanted nothing"),
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_another_models_checkpoint_is_refused(checkpoints, like, says):
    checkpoints.save(1, {"w": jnp.ones((2, 3))}, {})
    with pytest.raises(ValueError, match=says):
        checkpoints.restore(like)


def test_restoring_where_nothing_was_saved_is_refused(checkpoints):
    with pytest.raises(ValueError, match="run: holds no whole checkpoint"):
        checkpoints.restore({"w": jnp.ones(2)})


def test_what_a_killed_run_left_half_written_is_ignored_and_removed(tmp_path: Path):
    """A save that SIGKILL interrupts leaves exactly these names, seen by killing one."""
    folder = tmp_path / "run"
    first = RunCheckpoints(folder)
    first.save(7, {"w": jnp.arange(3.0)}, POSITION)
    first.close()
    partial = folder / "8.orbax-checkpoint-tmp"
    (partial / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (partial / "_CHECKPOINT_METADATA").write_text("{")
    again = RunCheckpoints(folder)
    back, position, step = again.restore({"w": jnp.zeros(3)})
    assert (again.latest(), step, position, back["w"].tolist()) == (7, 7, POSITION, [0, 1, 2])
    again.save(9, {"w": jnp.zeros(3)}, {})
    again.close()
    assert {entry.name for entry in folder.iterdir()} == {"7", "9"}
