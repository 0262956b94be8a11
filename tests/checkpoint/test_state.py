"""A run's state comes back exactly as it was when its save began, whatever goes on or goes wrong meanwhile."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from deepseek_jax.checkpoint.state import RunCheckpoints, shapes
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


def opened(folder: Path, at_commit: Callable[[], None], keep: int = 2) -> RunCheckpoints:
    """One whose saves call `at_commit` in the background, when all is written and only the renaming is left."""
    context = ocp.Context()
    context.asynchronous.post_finalization_callback = at_commit
    with context:
        return RunCheckpoints(folder, keep=keep)


def steps(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def assert_same(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype and np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_a_state_comes_back_bit_for_bit(checkpoints, state):
    checkpoints.save(41, state, POSITION)
    back, position, step = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert_same(checkpoints.restore(shapes(state))[0], state)
    assert (step, position) == (41, POSITION)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {"bfloat16", "float32", "int32"}
    assert_same(back, state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_come_back(checkpoints, impl):
    keys = lambda seed: {"one": jax.random.key(seed, impl=impl), "many": jax.random.split(jax.random.key(seed), 3)}
    checkpoints.save(1, keys(5), {})
    back, _, _ = checkpoints.restore(keys(0))
    for name, key in keys(5).items():
        assert back[name].dtype == key.dtype
        assert_same(jax.random.key_data(back[name]), jax.random.key_data(key))


def test_an_array_comes_back_committed_to_a_device_only_where_it_was(checkpoints):
    """One that is committed to a device cannot be an argument beside arrays on a mesh of several."""
    free, held = jnp.int32(1), jax.device_put(jnp.float32(2), jax.devices()[0])
    checkpoints.save(1, {"free": free, "held": held}, {})
    back, _, _ = checkpoints.restore(shapes({"free": free, "held": held}))
    assert (back["free"].committed, back["held"].committed) == (False, True)


# --- saving in the background --------------------------------------------------------------------


def test_save_returns_before_the_checkpoint_is_there(tmp_path):
    """So does everything that the next steps do; the methods that ask for checkpoints wait."""
    go_on = threading.Event()
    with opened(tmp_path, lambda: go_on.wait(60)) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(3.0)}, POSITION)
        assert "1" not in steps(tmp_path)
        go_on.set()
        assert checkpoints.latest() == 1
        assert steps(tmp_path) == {"1"}


def test_a_state_may_be_donated_and_changed_as_soon_as_save_returns(tmp_path, state):
    change = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    now, wanted = jax.tree.map(jnp.copy, state), []
    with RunCheckpoints(tmp_path, keep=4) as checkpoints:
        for step in range(4):
            wanted.append(jax.tree.map(np.array, now))
            checkpoints.save(step, now, {})
            for _ in range(25):
                given, now = now, change(now)
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # else nothing was overwritten
        for step in range(4):
            assert_same(checkpoints.restore(state, step=step)[0], wanted[step])


def test_overwriting_the_memory_of_a_state_does_not_change_its_checkpoint(checkpoints):
    """On the CPU a view of an array for numpy is its memory, and saving reads such a view in the background."""
    leaf = jax.random.normal(jax.random.key(0), (4_000_000,))
    wanted = np.array(leaf)
    checkpoints.save(1, {"w": leaf}, {})
    ctypes.memset(leaf.unsafe_buffer_pointer(), 0, leaf.nbytes)
    assert_same(checkpoints.restore({"w": leaf})[0]["w"], wanted)


def test_the_position_is_that_of_the_save(checkpoints):
    position = {"row": 1, "order": [1]}
    checkpoints.save(1, {"w": jnp.ones(2)}, position)
    position["row"], position["more"] = 2, True
    position["order"].append(2)
    assert checkpoints.restore({"w": jnp.ones(2)})[1] == {"row": 1, "order": [1]}


def test_a_save_waits_for_the_one_before(tmp_path):
    with opened(tmp_path, lambda: time.sleep(0.3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.ones(2)}, {})
            assert {name for name in steps(tmp_path) if name.isdigit()} == {str(s) for s in range(1, step)} - {"0"}


def test_close_waits_for_the_save_under_way_and_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    checkpoints = opened(tmp_path, lambda: time.sleep(0.3))
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.ones(2)}, {})
    checkpoints.close()
    assert steps(tmp_path) == {"1", "2"}
    assert set(threading.enumerate()) <= before


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_wait_loses_no_save(tmp_path, ctrl_c):
    checkpoints = opened(tmp_path, lambda: time.sleep(1))
    checkpoints.save(1, {"w": jnp.ones(2)}, {})
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, {"w": jnp.ones(2)}, {})
    assert checkpoints.latest() == 1
    checkpoints.close()
    assert steps(tmp_path) == {"1"}


LIKE = {"w": jnp.zeros(2)}
CALLS = {
    "save": lambda checkpoints: checkpoints.save(3, LIKE, {}),
    "wait": lambda checkpoints: checkpoints.wait(),
    "latest": lambda checkpoints: checkpoints.latest(),
    "best": lambda checkpoints: checkpoints.best(),
    "restore": lambda checkpoints: checkpoints.restore(LIKE),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_goes_wrong_in_the_background_is_raised_once_by_the_next_call(tmp_path, call):
    """The checkpoint that the failed one was to replace is still there, on disk and in what is known of it."""
    problems = []

    def at_commit():
        if problems:
            raise problems.pop()

    with opened(tmp_path, at_commit, keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {}, score=0.5)
        checkpoints.wait()
        problems.append(OSError("disk full"))
        checkpoints.save(2, {"w": jnp.full(2, 2.0)}, {}, score=0.7)
        with pytest.raises(OSError, match="disk full"):
            call(checkpoints)
        assert (checkpoints.latest(), checkpoints.best()) == (1, 1)
        assert checkpoints.restore(LIKE)[0]["w"].tolist() == [1, 1]
        checkpoints.save(2, {"w": jnp.full(2, 3.0)}, {}, score=0.7)
        assert checkpoints.restore(LIKE)[0]["w"].tolist() == [3, 3]
    assert steps(tmp_path) == {"2"}


def test_what_goes_wrong_in_the_last_save_is_raised_by_close(tmp_path):
    def at_commit():
        raise OSError("disk full")

    checkpoints = opened(tmp_path, at_commit)
    checkpoints.save(1, {"w": jnp.ones(2)}, {})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.close()
    checkpoints.close()
    with RunCheckpoints(tmp_path) as again:
        assert again.latest() is None


# --- which are kept ------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path / "run", keep=3)
    assert checkpoints.latest() is None
    for step in (1, 2, 5, 10, 40):
        checkpoints.save(step, {"step": jnp.int32(step)}, {})
    back, _, step = checkpoints.restore({"step": jnp.int32(0)})
    assert (checkpoints.latest(), step, int(back["step"])) == (40, 40, 40)
    checkpoints.close()
    assert steps(tmp_path / "run") == {"5", "10", "40"}


def test_the_best_is_kept_beside_the_newest_over_restarts(tmp_path):
    """Each save is a process of its own, as far as what it knows goes. Steps without a score are never the best."""
    scores = {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: None, 6: 0.9, 7: -1.0, 8: None}
    best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 6, 7: 6, 8: 6}  # of equal ones the newest
    for step, score in scores.items():
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(step, {"step": jnp.int32(step)}, {"row": step}, score=score)
            assert checkpoints.best() == best[step]
            back, position, found = checkpoints.restore({"step": jnp.int32(0)}, step=checkpoints.best())
            assert (int(back["step"]), position, found) == (best[step], {"row": best[step]}, best[step])
        assert steps(tmp_path) == {str(s) for s in (best[step], step - 1, step) if s > 0}


def test_the_best_is_kept_within_one_process(tmp_path):
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best() is None
        for step, score in enumerate([0.2, 0.8, 0.5, 0.6, 0.1]):
            checkpoints.save(step, {"w": jnp.ones(2)}, {}, score=jnp.float32(score))
        assert (checkpoints.best(), checkpoints.latest()) == (1, 4)
    assert steps(tmp_path) == {"1", "4"}


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_cannot_be_compared_is_refused(checkpoints, score):
    with pytest.raises(ValueError, match=f"score: got {score}, wanted a finite number"):
        checkpoints.save(1, {"w": jnp.ones(2)}, {}, score=score)
    assert checkpoints.latest() is None


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep: got 0, wanted at least 1"):
        RunCheckpoints(tmp_path, keep=0)


# --- what is refused -----------------------------------------------------------------------------


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


def test_a_step_that_is_not_held_is_refused(checkpoints):
    for step in (3, 7):
        checkpoints.save(step, {"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match=r"run: got step 5, wanted one that is held: \[3, 7\]"):
        checkpoints.restore({"w": jnp.ones(2)}, step=5)


def test_a_leaf_that_does_not_say_where_to_is_refused(checkpoints):
    checkpoints.save(1, {"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match=r"array \['w'\]: got no sharding, wanted one"):
        checkpoints.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


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
    assert steps(folder) == {"7", "9"}


FULL = """
import resource, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from deepseek_jax.checkpoint.state import RunCheckpoints

try:
    with RunCheckpoints(Path(sys.argv[1])) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(4.0)}, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
        checkpoints.save(2, {"a": jax.random.normal(jax.random.key(0), 50_000)}, {})
except OSError as problem:
    print(problem, file=sys.stderr)
"""


@pytest.mark.parametrize("room", [20, 3_000])  # not even the save's metadata; all but the array
def test_what_cannot_be_written_is_said_once(tmp_path, room):
    """And not by Orbax as well, with a traceback of each of its threads. What was whole before stays."""
    # What it compiles it could not write either, and would leave torn for others.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", FULL, str(tmp_path), str(room)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, f"[Errno 27] File too large: '{tmp_path}'\n")
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
