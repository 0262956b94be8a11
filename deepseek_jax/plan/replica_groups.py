"""Which axes of a mesh a collective runs over, from the groups of chips in its attributes."""

import math
import re
from collections.abc import Mapping

import numpy as np

_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUPS = re.compile(
    r"source_target_pairs=\{(?P<pairs>[^=]*?\})\}"
    r"|replica_groups=(?:"
    r"\{(?P<every>)\}"
    r"|\{(?P<listed>\{[^=]*?\})\}"
    rf"|\[(?P<shape>[\d,]+)\]<=(?P<iota>{_IOTA})"
    r"|mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\((?P<ids>[^{]*)\))? \{(?P<axes>[^}]*)\}"
    r")"
)
_SUBAXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


class Axes:
    """Names groups of chips by the axes of the mesh along which they lie.

    Args:
        mesh_shape: sizes by axis, in the mesh's order; the chips are numbered row by row.
    """

    def __init__(self, mesh_shape: Mapping[str, int]):
        self.names, self.sizes = tuple(mesh_shape), tuple(mesh_shape.values())
        self._known: dict[str, tuple[str, int]] = {}

    def of(self, attributes: str) -> tuple[str, int]:
        """The axes' names, joined with "+", and the chips in a group; 1 where nothing is sent.

        A group that spans a part of an axis has that axis's name, and its own number of chips.

        Raises:
            ValueError: groups that are written in a way not understood.
        """
        found = _GROUPS.search(attributes)
        if found is None:
            raise ValueError(f"cost: got a collective with groups not understood: {attributes[:200]!r}")
        text = found.group(0)
        if text not in self._known:
            members = _members(found, math.prod(self.sizes))
            axes = self._varying(members)
            self._known[text] = ("+".join(axes), members.shape[-1] if axes else 1)
        return self._known[text]

    def _varying(self, groups: np.ndarray) -> list[str]:
        """The axes whose coordinate varies within any of the groups, one a row."""
        places = np.unravel_index(groups, self.sizes)
        return [name for name, place in zip(self.names, places, strict=True) if np.ptp(place, axis=-1).any()]


def _members(found: re.Match, chips: int) -> np.ndarray:
    """The chips of the first group, or of all pairs, one group a row."""
    if found["pairs"] is not None:
        return np.asarray(_numbers(found["pairs"])).reshape(-1, 2)
    if found["listed"] is not None:
        return np.asarray([_numbers(found["listed"].split("}")[0])])
    if found["shape"] is not None:
        return _iota(found["iota"]).reshape(_numbers(found["shape"]))[:1]
    if found["mesh"] is not None:
        return _mesh_group(found["mesh"], found["ids"], found["axes"])
    return np.arange(chips)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """Such as [8,8]T(1,0): 0, 1, 2 ... in that shape, transposed so."""
    dims, order = re.fullmatch(_IOTA, text.removeprefix("<=")).groups()
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else range(len(shape)))


def _mesh_group(mesh: str, ids: str | None, axes: str) -> np.ndarray:
    """Of a mesh with names of XLA's own and the axes, or parts of axes, that a group runs along."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    chips = np.arange(math.prod(sizes.values()))
    if ids is not None:
        chips = (_iota(ids) if "[" in ids else np.asarray(_numbers(ids))).reshape(-1)
    chips = chips.reshape(tuple(sizes.values()))
    for name, before, size in _SUBAXIS.findall(axes):
        axis = list(sizes).index(name)
        before, size = (int(before), int(size)) if size else (1, sizes[name])
        stride = sizes[name] // (before * size)
        chips = chips.take(np.arange(size) * stride, axis=axis) if size < sizes[name] else chips
    listed = {name for name, _, _ in _SUBAXIS.findall(axes)}
    for axis, name in enumerate(sizes):
        if name not in listed:
            chips = chips.take([0], axis=axis)
    return chips.reshape(1, -1)
