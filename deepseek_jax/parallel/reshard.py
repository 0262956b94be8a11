"""From one mesh to another of the same devices, by shardings between which XLA moves no more than it has to.

Asked for it at once, XLA's partitioner gathers an array whole on every device wherever it finds no single collective.
Here both meshes are cut to a common finer one, in whose axes the way is: cut what lies there twice (nothing is sent),
exchange the axes that move from one dimension to another one by one, permute, gather over those that no longer cut.
"""

import math
from collections.abc import Iterator

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Cuts = tuple[tuple[str, ...], ...]  # the axes of the finer mesh that cut each dimension, the major one first


def reshard(x: jax.Array, of: NamedSharding, to: NamedSharding) -> jax.Array:
    """`x`, which lies as `of`, to lie as `to`; for use in a compiled call, whose result is to be laid out so.

    Args:
        x: any array.
        of, to: on meshes with the same devices in the same order.
    """
    fine = _finer(of.mesh, to.mesh)
    x = jax.lax.with_sharding_constraint(x, of)  # so that what made it, a cast say, comes before anything is sent
    if fine is None:
        return x
    for cuts in _way(x.shape, _cuts(of, fine, x.ndim), _cuts(to, fine, x.ndim), fine):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(fine, PartitionSpec(*(cut or None for cut in cuts))))
    return x


def _finer(one: Mesh, other: Mesh) -> Mesh | None:
    """The coarsest mesh whose axes make up those of both; None where their sizes have no such."""
    strides = sorted(_strides(one) | _strides(other))
    if any(large % small for small, large in zip(strides, strides[1:], strict=False)):
        return None
    sizes = [large // small for small, large in zip(strides, strides[1:], strict=False)][::-1]
    names = tuple(f"stride_{stride}" for stride in strides[:-1][::-1])
    devices = one.devices.reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def _strides(mesh: Mesh) -> set[int]:
    sizes = mesh.devices.shape
    return {math.prod(sizes[place:]) for place in range(len(sizes) + 1)}


def _cuts(sharding: NamedSharding, fine: Mesh, ndim: int) -> Cuts:
    """A sharding in the axes of the finer mesh."""
    spec = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]
    named = [() if of is None else (of,) if isinstance(of, str) else of for of in spec]
    return tuple(tuple(part for axis in axes for part in _parts(sharding.mesh, axis, fine)) for axes in named)


def _parts(mesh: Mesh, axis: str, fine: Mesh) -> list[str]:
    place = mesh.axis_names.index(axis)
    inner = math.prod(mesh.devices.shape[place + 1 :])
    outer = inner * mesh.devices.shape[place]
    stride = lambda name: int(name.removeprefix("stride_"))
    return [name for name in fine.axis_names if inner <= stride(name) < outer]


def _way(shape: tuple[int, ...], of: Cuts, to: Cuts, fine: Mesh) -> Iterator[Cuts]:
    """The shardings between, each a step of one kind from the one before, where they divide the array; and the last."""
    place = {axis: dim for dim, axes in enumerate(to) for axis in axes}
    used = {axis for axes in of for axis in axes}
    now = [list(had) + [axis for axis in want if axis not in used] for had, want in zip(of, to, strict=True)]
    steps = [tuple(map(tuple, now))]
    for axis in sorted(used & place.keys()):
        if axis not in of[place[axis]]:  # one exchange at a time, the axis the minor one where it comes to
            now = [[other for other in axes if other != axis] for axes in now]
            now[place[axis]].append(axis)
            steps.append(tuple(map(tuple, now)))
    steps.append(
        tuple(want + tuple(axis for axis in axes if axis not in place) for axes, want in zip(now, to, strict=True))
    )
    parts = lambda axes: math.prod(fine.shape[axis] for axis in axes)
    yield from (cuts for cuts in steps if all(size % parts(axes) == 0 for size, axes in zip(shape, cuts, strict=True)))
    yield to
