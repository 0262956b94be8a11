"""A stage that was killed goes on from its checkpoint and ends as an unbroken one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.data.prompts import batches
from deepseek_jax.distributed import PREEMPTED, preemption
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.train.loop import Stage, profiled_steps, run_stage

STEPS, SAVE_EVERY = 9, 3
ROWS = [float(i) for i in range(10)]  # 2.5 batches an epoch


class Toy(NamedTuple):
    """A state whose every bit depends on every batch and their order."""

    weights: jax.Array
    key: jax.Array
    step: jax.Array


def start() -> Toy:
    return Toy(jnp.arange(4.0), jax.random.key_data(jax.random.key(7)), jnp.int32(0))


@jax.jit
def update(state: Toy, rows: jax.Array) -> tuple[Toy, jax.Array]:
    key, draw = jax.random.split(jax.random.wrap_key_data(state.key))
    loss = jnp.mean(rows) + jnp.sum(jnp.sin(state.weights))
    weights = state.weights * 0.9 + jnp.sin(rows) + jax.random.normal(draw, (4,)) * loss
    return Toy(weights, jax.random.key_data(key), state.step + 1), loss


def run(
    folder: Path, *, die=lambda number: None, steps=STEPS, name="toy", profile_steps=None
) -> tuple[Toy, list[list[float]]]:
    """The state and the batches that were seen; `die` is asked before every step."""
    seen = []

    def step(state, rows, number):
        assert int(state.step) == number
        die(number)
        seen.append(rows)
        state, loss = update(state, jnp.asarray(rows))
        return state, {"loss": float(loss)}

    stage = Stage(name=name, steps=steps, save_every=SAVE_EVERY, shown={"loss": "loss"}, profile_steps=profile_steps)
    with MetricLog(folder) as log:
        return run_stage(stage, start(), batches(ROWS, size=4, seed=0), step, folder=folder, log=log), seen


def rows(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("time", "step_time")} for row in read_metrics(folder)]


def assert_same(first: Toy, second: Toy) -> None:
    for a, b in zip(first, second, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    state, seen = run(folder)
    return state, seen, rows(folder)


class Killed(Exception):
    pass


def dies_at(step):
    def die(number):
        if number == step:
            raise Killed

    return die


# Before the first checkpoint, right at one, right after one, and on the last step.
@pytest.mark.parametrize("at", [1, 3, 4, 8])
def test_a_broken_stage_ends_as_an_unbroken_one(tmp_path, unbroken, at):
    wanted, all_batches, wanted_rows = unbroken
    with pytest.raises(Killed):
        run(tmp_path, die=dies_at(at))
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, at + 1))
    state, seen = run(tmp_path)
    assert_same(state, wanted)
    assert rows(tmp_path) == wanted_rows and len(wanted_rows) == STEPS
    kept = at // SAVE_EVERY * SAVE_EVERY
    assert seen == all_batches[kept:]  # neither repeated nor lost


def test_a_stage_broken_again_and_again_ends_as_an_unbroken_one(tmp_path, unbroken):
    wanted, _, wanted_rows = unbroken
    for at in (2, 4, 5, 7):
        with pytest.raises(Killed):
            run(tmp_path, die=dies_at(at))
    assert_same(run(tmp_path)[0], wanted)
    assert rows(tmp_path) == wanted_rows


def test_a_finished_stage_is_not_run_again(tmp_path, unbroken):
    wanted, _, wanted_rows = unbroken
    run(tmp_path)
    state, seen = run(tmp_path, die=dies_at(0))
    assert_same(state, wanted)
    assert seen == [] and rows(tmp_path) == wanted_rows


def test_the_last_step_is_saved_whatever_save_every(tmp_path):
    state, _ = run(tmp_path, steps=4)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints" / "toy")
    restored, _, done = checkpoints.restore(start())
    checkpoints.close()
    assert done == 4
    assert_same(restored, state)


def test_stages_do_not_touch_each_others_metrics(tmp_path, unbroken):
    """The second stage begins anew; the first one's lines stay, also when the second one is resumed."""
    run(tmp_path, name="first")
    with pytest.raises(Killed):
        run(tmp_path, name="second", die=dies_at(5))
    run(tmp_path, name="second")
    found = [(row["stage"], row["step"]) for row in rows(tmp_path)]
    assert found == [(name, n + 1) for name in ("first", "second") for n in range(STEPS)]


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path, steps=2)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints" / "toy")
    with pytest.raises(ValueError, match="array .*: got .*, wanted .*another model"):
        checkpoints.restore({"weights": jnp.zeros(4)})
    checkpoints.close()


# --- broken off from outside, in a process of its own ------------------------------------------------


def at_commit(call) -> ocp.Context:
    """Within it, every save calls this in the background, when all is written and only the renaming is left."""
    context = ocp.Context()
    context.asynchronous.post_finalization_callback = call
    return context


def whole(folder: Path, step: int) -> bool:
    return (folder / "checkpoints" / "toy" / str(step)).exists()


def killed_after_a_save(folder: Path) -> None:
    def die(number):
        if number == 5:
            while not whole(folder, 3):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, die=die)


def killed_in_a_save(folder: Path) -> None:
    """The second one; the steps go on until then, or the loop waits for it at its end."""

    def die():
        if whole(folder, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    with at_commit(die):
        run(folder)


def interrupted_in_a_save(folder: Path) -> None:
    """Ctrl-C in the step after the first save, which is not whole by then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

    def die(number):
        if number == 3:
            assert not whole(folder, 3)
            os.kill(os.getpid(), signal.SIGINT)

    with at_commit(lambda: time.sleep(1)):
        run(folder, die=die)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_loop
test_loop.{how}(Path({folder!r}))
"""


@pytest.mark.parametrize(
    ("how", "by"),
    [
        (killed_after_a_save, signal.SIGKILL),  # nothing is flushed, closed or caught
        (killed_in_a_save, signal.SIGKILL),
        (interrupted_in_a_save, signal.SIGINT),  # the save under way is not lost
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_stage_broken_off_from_outside_ends_as_an_unbroken_one(tmp_path, unbroken, how, by):
    wanted, all_batches, wanted_rows = unbroken
    code = CHILD.format(here=str(Path(__file__).parent), how=how.__name__, folder=str(tmp_path))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert died.returncode == -by, died.stderr
    assert whole(tmp_path, 3) and not whole(tmp_path, 6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 3 and all(json.loads(line) for line in lines)
    state, seen = run(tmp_path)
    assert_same(state, wanted)
    assert rows(tmp_path) == wanted_rows
    assert seen == all_batches[3:]


# --- saving in the background ------------------------------------------------------------------------


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    """The end of the first save waits for a step after it, which a loop that stood still would never reach."""
    went_on, in_time = threading.Event(), []
    with at_commit(lambda: in_time.append(went_on.wait(20))):
        run(tmp_path, die=lambda number: went_on.set() if number == SAVE_EVERY + 1 else None)
    assert in_time == [True] * 3


def test_a_stage_whose_checkpoint_cannot_be_written_says_so(tmp_path):
    def fail():
        raise OSError("disk full")

    for steps in (SAVE_EVERY, STEPS):  # at the end of the stage, and at the next save
        with at_commit(fail), pytest.raises(OSError, match="disk full"):
            run(tmp_path / str(steps), steps=steps)


# --- asked to stop -----------------------------------------------------------------------------------


def asked_at(step: int):
    def ask(number):
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    return ask


@pytest.mark.parametrize("at", [0, 4, 5, 8])  # where nothing is saved, where a checkpoint is due, on the last step
def test_sigterm_saves_at_the_end_of_the_step_and_ends_the_program(tmp_path, unbroken, capsys, at):
    wanted, all_batches, wanted_rows = unbroken
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, die=asked_at(at))
    assert end.value.code == PREEMPTED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    said = f"toy: got SIGTERM, saved step {at + 1} of {STEPS}; the same command goes on from there"
    assert said in capsys.readouterr().out.splitlines()
    assert whole(tmp_path, at + 1)
    state, seen = run(tmp_path)
    assert_same(state, wanted)
    assert rows(tmp_path) == wanted_rows
    assert seen == all_batches[at + 1 :]


def test_the_handler_of_before_comes_back_and_gets_what_came_too_late():
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with preemption() as asked:
            assert not asked()
            signal.raise_signal(signal.SIGTERM)
            assert got == []
        assert got == [signal.SIGTERM]
        with preemption() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert asked()
        assert got == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_set(tmp_path, unbroken):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path)[0]))
    thread.start()
    thread.join()
    assert_same(done[0], unbroken[0])


# --- the best checkpoint, and traces -----------------------------------------------------------------


def scored(folder: Path, scores: list[float | None], **settings) -> None:
    def step(state, rows, number):
        score = {} if scores[number] is None else {"eval": scores[number]}
        return update(state, jnp.asarray(rows))[0], {"loss": 0.0} | score

    stage = Stage(name="toy", steps=len(scores), save_every=1, shown={}, **settings)
    with MetricLog(folder) as log:
        run_stage(stage, start(), batches(ROWS, size=4, seed=0), step, folder=folder, log=log)


@pytest.mark.parametrize(
    ("settings", "best", "held"),
    [({}, None, [5, 6]), ({"keep_best": "eval"}, 2, [2, 5, 6]), ({"keep_best": "absent"}, None, [5, 6])],
)
def test_the_best_checkpoint_is_kept_by_the_metric_that_the_stage_names(tmp_path, settings, best, held):
    scored(tmp_path, [0.5, 0.75, float("nan"), 0.25, None, 0.5], **settings)
    with RunCheckpoints(tmp_path / "checkpoints" / "toy") as checkpoints:
        assert checkpoints.best() == best
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints" / "toy").iterdir()) == held


@pytest.mark.parametrize(("steps", "traces"), [("2:3", 1), ("9:9", 1), ("1:1", 1), (None, 0)])
def test_the_steps_that_are_asked_for_are_traced(tmp_path, monkeypatch, steps, traces):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    run(tmp_path, die=lambda number: calls.append(number + 1), profile_steps=steps)
    traced = profiled_steps(steps, STEPS) if steps else range(0)
    wanted = [n for n in range(1, STEPS + 1)]
    if traces:
        wanted.insert(wanted.index(traced[0]), ("start", tmp_path / "profile"))
        wanted.insert(wanted.index(traced[-1]) + 1, "stop")
    assert calls == wanted


def test_a_trace_ends_with_the_steps_also_when_they_break_off_and_starts_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.raises(Killed):
        run(tmp_path, die=dies_at(4), profile_steps="3:7")
    assert calls == ["start", "stop"]
    run(tmp_path, profile_steps="3:7")
    assert calls == ["start", "stop"] * 2


@pytest.mark.parametrize("steps", ["", "3", "3:", ":3", "0:2", "5:4", "8:10", "-1:2", "a:b", "1:2:3", "1.5:2"])
def test_a_range_that_is_none_is_refused(steps):
    says = f"profile_steps: got '{steps}', wanted A:B with 1 <= A <= B <= 9, steps to trace"
    with pytest.raises(ValueError, match=says):
        Stage(name="toy", steps=STEPS, save_every=1, shown={}, profile_steps=steps)
