"""The state of a training run on disk: any tree of arrays beside the position in the data, by Orbax."""

from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")


class RunCheckpoints:
    """Numbered checkpoints of one stage of a run; each appears whole or not at all.

    Args:
        folder: made when missing. What a killed run left half-written there is removed.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Write `state` as of `step` finished steps, with the JSON-able position `data`."""
        self._checkpointer.save(step, _named(state), custom_metadata={"data": data}, force=True)

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def restore(self, like: State) -> tuple[State, dict[str, Any], int]:
        """The newest state, the position in the data, and the step.

        Args:
            like: a tree of the same structure, shapes, dtypes and shardings.

        Raises:
            ValueError: there is none, or it holds other arrays than `like`: other names, shapes or dtypes.
        """
        found = self._checkpointer.latest
        if found is None:
            raise ValueError(f"{self._checkpointer.directory}: holds no whole checkpoint")
        wanted = _named(like)
        metadata = self._checkpointer.metadata(found.step)
        held = _kinds(metadata.metadata)
        kinds = _kinds(wanted)
        for name in sorted(held.keys() | kinds.keys()):
            got, want = held.get(name, "nothing"), kinds.get(name, "nothing")
            if got != want:
                raise ValueError(f"{found.path}: array {name}: got {got}, wanted {want}; is it another model's?")
        arrays = self._checkpointer.load(found.step, jax.tree.map(_abstract, wanted))
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = [arrays[jax.tree_util.keystr(path)] for path, _ in paths]
        return jax.tree.unflatten(structure, leaves), metadata.custom_metadata["data"], found.step

    def close(self) -> None:
        self._checkpointer.close()


def _named(tree: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _kinds(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
