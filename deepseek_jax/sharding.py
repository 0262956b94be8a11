"""Where arrays lie on a mesh: one table from the logical axes of a weight to the axes of the mesh."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config.model import check_whole

AXES = ("data", "fsdp", "expert", "tensor")
# Heads, feed-forward and vocabulary over `tensor`, experts over `expert`, and the rest of every weight over `fsdp`.
_RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh with the axes data, fsdp, expert and tensor, those not named of size 1.

    Args:
        devices: to use; None takes all.
        sizes: of the axes, by name.

    Raises:
        ValueError: an unknown axis, a size below 1, or sizes that do not multiply to the number of devices.
    """
    unknown = sizes.keys() - set(AXES)
    if unknown:
        raise ValueError(f"mesh: got axis {min(unknown)!r}, wanted one of {', '.join(AXES)}")
    for axis, size in sizes.items():
        check_whole(f"mesh: {axis}", size)
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh: {' x '.join(map(str, shape))} does not make the {len(devices)} devices there are")
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def weight_sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None], name: str) -> NamedSharding:
    """How a weight lies on a mesh.

    Args:
        mesh: of `make_mesh`.
        shape: of the weight.
        axes: its logical axes, one a dimension; None is never cut.
        name: for the message.

    Raises:
        ValueError: a dimension is not divisible by the mesh axis that cuts it.
    """
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        cut = None if axis is None else _RULES[axis]
        if cut is not None and size % mesh.shape[cut]:
            raise ValueError(
                f"{name}: axis {axis} of size {size} is not divisible by mesh axis {cut} {mesh.shape[cut]}"
            )
        spec.append(cut)
    return NamedSharding(mesh, PartitionSpec(*spec))
