"""How processes wait for each other, agree on values, and fail together."""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.distributed.identity import START_SECONDS, is_main, process_count, process_index

_NO_LIMIT = 7 * 24 * 3600 * 1000  # milliseconds; whoever waits for the dead is ended by the watch

T = TypeVar("T")
_numbers = itertools.count()  # of the meetings; all processes hold the same ones


def barrier() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"deepseek_jax/meeting/{next(_numbers)}", _NO_LIMIT)


def all_gather_objects(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process. A value is anything that JSON holds."""
    if process_count() == 1:
        return [value]
    client, place = distributed.global_state.client, f"deepseek_jax/exchange/{next(_numbers)}"
    client.key_value_set(f"{place}/{process_index()}", json.dumps(value))
    barrier()
    found = [
        json.loads(client.blocking_key_value_get(f"{place}/{number}", START_SECONDS * 1000))
        for number in range(process_count())
    ]
    barrier()  # before the values go, which would else be kept to the end of the run
    client.key_value_delete(f"{place}/{process_index()}")
    return found


def replicate(value: np.ndarray | jax.Array) -> jax.Array:
    """A value that every process holds, as one array on all devices of all processes."""
    place = NamedSharding(Mesh(np.asarray(jax.devices()), ("devices",)), PartitionSpec())
    held = np.array(value)
    return jax.make_array_from_callback(held.shape, place, lambda index: held[index])


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A piece of work that fails in all processes if it fails in one.

    All wait for each other at its end. What one raises is then raised there, and in the others as a ValueError,
    OSError or RuntimeError with the number of the process.
    """
    problem = None
    try:
        yield
    except Exception as found:
        problem = found
    # `all_gather_objects` sends JSON: of an exception its kind and its words
    told = all_gather_objects(None if problem is None else [_kind(problem).__name__, str(problem)])
    if problem is not None:
        raise problem
    for number, said in enumerate(told):
        if said is not None:
            kind = {"ValueError": ValueError, "OSError": OSError}.get(said[0], RuntimeError)
            raise kind(f"process {number}: {said[1]}")


def _kind(problem: Exception) -> type[Exception]:
    return next((kind for kind in (ValueError, OSError) if isinstance(problem, kind)), RuntimeError)


def on_main(call: Callable[[], T]) -> T:
    """What `call` returns in the main process, in every process; the others do not call it.

    For what may differ from process to process (a grader with a time limit) or is to happen once (writing a file).
    The value goes through JSON where there are several: tuples become lists. What it raises is raised in all.
    """
    if process_count() == 1:
        return call()
    client, place = distributed.global_state.client, f"deepseek_jax/main/{next(_numbers)}"
    with together():
        if is_main():
            client.key_value_set(place, json.dumps(call()))
    value = json.loads(client.blocking_key_value_get(place, START_SECONDS * 1000))
    barrier()  # before the value goes, which would else be kept to the end of the run
    if is_main():
        client.key_value_delete(place)
    return value


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM, and yield a function that says whether one has come to any of the processes.

    All processes ask alike, at the end of a step; the answer is the same in all. Its cost is one gathered byte a
    process. Whoever gets True ends the program with status `PREEMPTED`. The handler before is put back at the end; a
    SIGTERM that came after the last question is then sent again. Outside the main thread, SIGTERM stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: _any(False)
        return
    came: list[int] = []
    answered = False

    def asked() -> bool:
        nonlocal answered
        answered = _any(bool(came))
        return answered

    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if came and not answered:
        signal.raise_signal(signal.SIGTERM)


def _any(flag: bool) -> bool:
    if process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))
