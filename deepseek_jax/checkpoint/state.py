"""The state of a training run on disk: any tree of arrays beside the position in the data, by Orbax."""

import json
import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import system_error, writing

State = TypeVar("State")


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax also prints the tracebacks of the exceptions that `RunCheckpoints` raises."""
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_news)


class RunCheckpoints:
    """Numbered checkpoints of one stage of a run, written in the background; each appears whole or not at all.

    The newest `keep` stay, and so does the one of the highest score, over restarts of the process as well; an older
    one is removed once its successor is whole. One save is under way at a time, and every method waits for it first.
    What goes wrong in the background is raised once, by the next call: usually the next `save` or `close`. The
    checkpoint of a save that failed does not exist, those before it do, and its step may be saved again.

    In several processes all of them make one on the same shared folder and call every method alike, for the calls
    meet at Orbax's barriers. Each process writes and reads its own shards. An array that lies on a process's own
    devices (a counter, a key) has to be the same in all of them; it is written once, and restored by each. `data` and
    `score` are written by the main process alone: all restore what it gave.

    Args:
        folder: made when missing. What a killed run left half-written there is removed.
        keep: how many of the newest to keep.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, wanted at least 1, the newest checkpoint")
        policies = ocp.training.preservation_policies
        newest = policies.LatestN(keep)
        best = policies.BestN(n=1, get_metric_fn=_score, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            Path(os.path.realpath(folder)),
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=True,
        )
        self._saving: ocp.AsyncResponse[bool] | None = None

    def save(self, step: int, state: Any, data: dict[str, Any], *, score: float | None = None) -> None:
        """Start to write `state`; once this returns, the state may be donated and `data` changed.

        Args:
            step: steps that are finished.
            state: a tree of arrays, typed random keys among them.
            data: the JSON-able position in the data.
            score: how good the state is, higher is better; None where it was not measured. Of equal scores the
                newest is the best.

        Raises:
            ValueError: the score is not finite.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score: got {score}, wanted a finite number, or None where there is none")
        # Orbax waits too, but only after it has put this save where the end of the one before looks for its own.
        self.wait()
        with writing(Path(self._checkpointer.directory)):
            self._saving = self._checkpointer.save_async(
                step,
                {name: _own(leaf) for name, leaf in _named(state).items()},
                metrics=None if score is None else {"score": float(score)},
                custom_metadata={"data": json.loads(json.dumps(data))},  # a copy, for it is written only at the end
                force=True,
            )

    def wait(self) -> None:
        """Wait until the save under way is whole."""
        if self._saving is None:
            return
        try:
            self._saving.result()  # Ctrl-C here leaves the save under way, for `close` to wait for
        except Exception as problem:
            self._saving = None
            with suppress(Exception):  # the same once more: Orbax raises it in every thread that waits
                self._checkpointer.wait()
            # Orbax has struck the failed checkpoint from its list, and also those that it was to replace.
            self._checkpointer.reload()
            raise system_error(problem, Path(self._checkpointer.directory)) from problem
        self._saving = None

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        self.wait()
        return max((found.step for found in self._checkpointer.checkpoints), default=None)

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score, or None where none has a score."""
        self.wait()
        scored = [found for found in self._checkpointer.checkpoints if found.metrics is not None]
        return max(scored, key=lambda found: (_score(found.metrics), found.step)).step if scored else None

    def restore(self, like: State, *, step: int | None = None) -> tuple[State, dict[str, Any], int]:
        """A state, its position in the data, and its step.

        Args:
            like: a tree of the same structure, shapes and dtypes. Its shardings decide where the arrays go, whatever
                mesh they were saved from. It may be of `shapes`, or have leaves that are `jax.ShapeDtypeStruct` with a
                sharding, but for typed keys.
            step: which checkpoint, for example `best()`; the newest by default.

        Raises:
            ValueError: there is none or not this one, or it holds other arrays than `like`: other names, shapes or
                dtypes.
        """
        self.wait()
        held = [found.step for found in self._checkpointer.checkpoints]
        if not held:
            raise ValueError(f"{self._checkpointer.directory}: holds no whole checkpoint")
        step = max(held) if step is None else step
        if step not in held:
            raise ValueError(f"{self._checkpointer.directory}: got step {step}, wanted one that is held: {held}")
        wanted = _named(like)
        metadata = self._checkpointer.metadata(step)
        _check_same(metadata.metadata, wanted, metadata.path)
        arrays = self._checkpointer.load(step, {name: _abstract(name, leaf) for name, leaf in wanted.items()})
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = [_placed(arrays.pop(jax.tree_util.keystr(path)), leaf) for path, leaf in paths]
        return jax.tree.unflatten(structure, leaves), metadata.custom_metadata["data"], step

    def close(self) -> None:
        """Wait for the save under way, raise what went wrong with it, and end."""
        try:
            self.wait()
        except BaseException:
            with suppress(Exception):  # the same once more, without a name
                self._checkpointer.close()
            raise
        with writing(Path(self._checkpointer.directory)):
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Shape:
    """What `RunCheckpoints.restore` has to know of an array; committed: whether it is bound to its devices."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    sharding: jax.sharding.Sharding
    committed: bool


def shapes(state: Any) -> Any:
    """A state to restore into, without its arrays, so that these need not be there as well; typed keys stay."""
    of = lambda leaf: leaf if _is_key(leaf) else Shape(leaf.shape, leaf.dtype, leaf.sharding, leaf.committed)
    return jax.tree.map(of, state)


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their paths, typed keys as their numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _own(leaf: jax.Array) -> jax.Array:
    """A copy where the device's memory is the host's: there Orbax writes from it after `save` has returned.

    From other devices Orbax copies all arrays to the host before that. What each of several processes holds for itself
    becomes one array of all of them; Orbax would have every process write it.
    """
    if distributed.process_count() > 1 and leaf.is_fully_addressable:
        return distributed.replicate(leaf)
    on_cpu = any(device.platform == "cpu" for device in leaf.sharding.device_set)
    return jnp.copy(leaf) if on_cpu else leaf


def _abstract(name: str, leaf: jax.Array | jax.ShapeDtypeStruct | Shape) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:
        raise ValueError(f"array {name}: got no sharding, wanted one, to know where to restore it to")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _placed(array: jax.Array, like: jax.Array | jax.ShapeDtypeStruct | Shape) -> jax.Array:
    """The restored array as `like` is: a key, and free to follow other arguments of a jitted function to their mesh."""
    if not isinstance(like, jax.Array | Shape):
        return array
    if not like.committed:  # Orbax commits every array to its devices
        array = jnp.asarray(np.asarray(array))
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else array


def _check_same(held: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    got, want = _kinds(held), _kinds(wanted)
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            difference = f"got {got.get(name, 'nothing')}, wanted {want.get(name, 'nothing')}"
            raise ValueError(f"{path}: array {name}: {difference}; is it another model's?")


def _kinds(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
