"""Laws of the worker pool: every task gets its own verdict, nothing hangs, no process stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepseek_jax.rewards import pool as pool_module
from deepseek_jax.rewards.pool import Outcome, PoolConfig, WorkerPool

TARGET = "tests.rewards.pool_tasks:act"
ROOT = Path(__file__).resolve().parents[2]
QUICK = PoolConfig(workers=2, cpu_seconds=0.5, wall_seconds=20.0, memory_bytes=2**28)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(TARGET, QUICK) as pool:
        yield pool


def test_outcomes_come_in_order(pool):
    values = [0, None, "a\nb", "\x00", "\ud800", "é" * 70_000, {"k": [1.5]}, *range(200)]
    assert pool.map([["echo", value] for value in values]) == [Outcome("done", value) for value in values]
    assert pool.map([]) == []


@pytest.mark.parametrize(
    ("task", "kind", "value"),
    [
        (["spin", None], "timeout", "processor time"),
        (["compute", None], "timeout", "processor time"),
        (["fail", "no " * 200], "error", ("OSError: " + "no " * 200)[:200]),
        (["die", 0], "died", "exit code 0"),
        (["die", 3], "died", "exit code 3"),
        (["segfault", None], "died", "exit code -11"),
    ],
)
def test_a_bad_task_costs_only_itself(pool, task, kind, value):
    good = ["echo", "good"]
    outcomes = pool.map([good, task, good, good])
    assert outcomes == [Outcome("done", "good"), Outcome(kind, value), *[Outcome("done", "good")] * 2]


def test_a_worker_at_its_memory_limit_costs_only_its_task():
    # Processor time is not in question: on a busy machine, pages take long to come.
    with WorkerPool(TARGET, PoolConfig(workers=2, cpu_seconds=30.0, memory_bytes=2**28)) as pool:
        outcomes = pool.map([["echo", 1], ["eat", None], ["echo", 2]])
        assert outcomes == [Outcome("done", 1), Outcome("memory", "memory limit"), Outcome("done", 2)]
        assert pool.restarts == 1


def test_endless_recursion_is_an_error(pool):
    (outcome,) = pool.map([["recurse", 1]])
    assert outcome.kind == "error" and outcome.value.startswith("RecursionError")


def test_a_sleeping_worker_is_killed_and_replaced():
    config = PoolConfig(workers=1, wall_seconds=0.5)
    with WorkerPool(TARGET, config) as pool:
        outcomes = pool.map([["nap", 600], ["echo", 1]])
        assert outcomes == [Outcome("timeout", "time on the wall"), Outcome("done", 1)]
        assert pool.restarts == 1


def test_waiting_in_the_queue_is_not_a_timeout():
    config = PoolConfig(workers=1, cpu_seconds=0.5, wall_seconds=1.0)
    with WorkerPool(TARGET, config) as pool:
        begin = time.monotonic()
        outcomes = pool.map([["nap", 0.3]] * 8)
        assert time.monotonic() - begin > 2 * config.wall_seconds
        assert [outcome.kind for outcome in outcomes] == ["done"] * 8
        assert pool.restarts == 0


def test_processor_time_is_counted_anew_for_each_task():
    with WorkerPool(TARGET, PoolConfig(workers=1, cpu_seconds=0.3)) as pool:
        burn = "9" * 20_000
        outcomes = pool.map([["echo", burn]] * 400)
        assert {outcome.kind for outcome in outcomes} == {"done"}


def test_workers_share_the_work(pool):
    pids = {outcome.value for outcome in pool.map([["nap", 0.1]] * 6)}
    assert len(pids) == 2 and pids == set(pool.process_ids())


def test_what_a_task_prints_is_no_reply(pool, capfd):
    assert pool.map([["chatter", 1], ["echo", 2]]) == [Outcome("done", 1), Outcome("done", 2)]
    assert capfd.readouterr() == ("", "")


def test_workers_load_no_array_library_and_have_one_thread(pool):
    import jax  # noqa: F401  (the parent has it)

    names = ["jax", "jaxlib", "numpy", "torch", "sympy", "pytest", "__mp_main__"]
    assert pool.map([["modules", names]]) == [Outcome("done", [])]
    assert pool.map([["threads", None]]) == [Outcome("done", 1)]


def test_the_graders_module_loads_no_array_library():
    code = "import sys, deepseek_jax.rewards.algebra; print([m for m in ('jax', 'numpy', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_worker_killed_while_idle_costs_no_verdict(pool):
    pool.map([["echo", 1]] * 4)
    before = pool.process_ids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    for worker in pool._workers:
        worker.process.wait()
    assert pool.map([["echo", 1]]) == [Outcome("done", 1)]
    assert not set(before) & set(pool.process_ids())


def test_a_task_whose_worker_was_killed_is_tried_once_more():
    with WorkerPool(TARGET, PoolConfig(workers=1)) as pool:
        ((_, killed),) = pool.map([["nap", 0.0]])
        timer = threading.Timer(0.3, os.kill, [killed, signal.SIGKILL])
        timer.start()
        nap, echo = pool.map([["nap", 1.0], ["echo", 1]])
        assert nap.kind == "done" and nap.value != killed
        assert echo == Outcome("done", 1) and pool.restarts == 1
        assert pool.map([["die", 3], ["echo", 1]]) == [Outcome("died", "exit code 3"), Outcome("done", 1)]
        assert pool.restarts == 3


def test_an_answer_in_the_pipe_is_no_timeout_however_late_it_is_read(monkeypatch):
    def paused(workers):
        time.sleep(1.0)  # as if this process had been stopped
        return wait(workers)

    wait = pool_module._wait
    with WorkerPool(TARGET, PoolConfig(workers=1, wall_seconds=0.5)) as pool:
        pool.map([["echo", 0]])
        monkeypatch.setattr(pool_module, "_wait", paused)
        assert pool.map([["echo", 1], ["echo", 2]]) == [Outcome("done", 1), Outcome("done", 2)]
        assert pool.map([["nap", 60]]) == [Outcome("timeout", "time on the wall")]


def test_calls_from_threads_take_turns(pool):
    found = {}

    def call(name):
        found[name] = pool.map([["echo", [name, i]] for i in range(50)])

    threads = [threading.Thread(target=call, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [Outcome("done", [name, i]) for i in range(50)] for name in range(4)}


def test_closing_leaves_no_process():
    with WorkerPool(TARGET, QUICK) as pool:
        pool.map([["echo", 1]] * 4)
        pids = pool.process_ids()
        assert len(pids) == 2
    assert gone(pids, 0)
    with pytest.raises(ValueError, match="closed pool"):
        pool.map([["echo", 1]])


SCRIPT = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from deepseek_jax.rewards.pool import PoolConfig, WorkerPool
pool = WorkerPool("tests.rewards.pool_tasks:act", PoolConfig(workers=2, cpu_seconds=0.5))
pool.map([["nap", 0.2]] * 2)
print(*pool.process_ids(), flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "sent"),
    [
        ("", None),
        ("raise RuntimeError('the run failed')", None),
        ("pool.map([['nap', 60]] * 2)", signal.SIGINT),
        ("pool.map([['spin', None]] * 1000)", signal.SIGTERM),
        ("pool.map([['spin', None]] * 1000)", signal.SIGKILL),
        ("time.sleep(60)", signal.SIGKILL),
    ],
    ids=["exit", "error", "ctrl-c", "terminated", "killed-busy", "killed-idle"],
)
def test_no_process_outlives_the_interpreter(ending, sent):
    command = [sys.executable, "-c", SCRIPT + ending]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if sent is not None:
            time.sleep(0.3)
            parent.send_signal(sent)
        parent.wait(20)
    assert gone(pids)


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_leaves_no_stale_reply(interruptible):
    with WorkerPool(TARGET, QUICK) as pool:
        pool.map([["echo", 0]] * 2)
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.map([["nap", 1.0]] * 6)
        assert pool.map([["echo", value] for value in range(8)]) == [Outcome("done", value) for value in range(8)]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:act", "did not start: ModuleNotFoundError"),
        ("tests.rewards.pool_tasks:no_such", "did not start: KeyError: 'no_such'"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_and_no_verdict(target, reason):
    with WorkerPool(target) as pool, pytest.raises(RuntimeError, match=reason):
        pool.map([["echo", 1]])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="target: got 'act'"):
        WorkerPool("act")
    with pytest.raises(ValueError, match="workers: got 0"):
        PoolConfig(workers=0)
    with pytest.raises(ValueError, match="cpu_seconds: got nan"):
        PoolConfig(cpu_seconds=float("nan"))
