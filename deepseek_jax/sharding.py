"""Where arrays lie on a mesh: one table from logical axes, of weights and activations, to the axes of the mesh."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config.model import GQAConfig, ModelConfig, check_whole

AXES = ("data", "fsdp", "expert", "context", "tensor")
Workload = Literal["train", "serve"]
Transport = Literal["all_gather", "all_to_all", "ragged_all_to_all"]
Remat = Literal["nothing", "layers", "all_but_attention"]


class _Cut(NamedTuple):
    """The mesh axes that cut a logical axis, where weights lie to be trained and where they lie to be served."""

    train: tuple[str, ...]
    serve: tuple[str, ...]


# Training cuts weights and moments by their width too, and gathers a layer's dense weights when it runs. (Not over
# `expert`: 7168 / 512 rows are no whole tile of a TPU, which then adds zeros up instead of gathering.) Serving moves
# no weight: dense ones are cut by heads, columns and vocabulary alone, and whole experts are spread over `tensor` too.
_TABLE: Mapping[str, _Cut] = {
    # weights
    "embed": _Cut(("fsdp", "context"), ()),  # the model's width
    "rank": _Cut(("fsdp", "context"), ()),  # a latent that is projected up
    "latent": _Cut(("tensor",), ("tensor",)),  # a latent that is projected down to
    "heads": _Cut(("tensor",), ("tensor",)),
    "kv_heads": _Cut(("tensor",), ("tensor",)),
    "mlp": _Cut(("tensor",), ("tensor",)),
    "vocab": _Cut(("tensor",), ("tensor",)),
    "expert": _Cut(("expert",), ("expert", "tensor")),
    "expert_embed": _Cut(("fsdp", "context"), ()),
    "expert_mlp": _Cut(("tensor",), ()),
    "layer": _Cut((), ()),
    # activations
    "batch": _Cut(("data", "fsdp", "expert"), ("data", "fsdp", "expert")),
    "sequence": _Cut(("context",), ("context",)),
    "tensor": _Cut(("tensor",), ("tensor",)),
    "head": _Cut(("tensor", "context"), ("tensor", "context")),  # where chips that share a sequence divide its heads
    # rows for experts, and those of a latent cache while it is decoded: no chip has another's
    "tokens": _Cut(("context",), ("context", "tensor")),
    "cache_batch": _Cut(("data", "fsdp", "expert"), ("data", "fsdp", "expert", "tensor")),
}


def cut(workload: Workload, axis: str | None) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis."""
    return () if axis is None else getattr(_TABLE[axis], workload)


@lru_cache(maxsize=256)
def cut_numbers(config: ModelConfig) -> tuple[tuple[str, int, str], ...]:
    """Every number of a model that a mesh has to divide: its name, itself and its logical axis.

    A mesh that divides them divides the model's weights, which are made of these numbers, and its heads.
    """
    moe, a = config.moe, config.attention
    found = [
        ("num_attention_heads", config.num_attention_heads, "heads"),
        ("hidden_size", config.hidden_size, "embed"),
        ("vocab_size", config.vocab_size, "vocab"),
    ]
    if moe is None or moe.first_k_dense_replace:
        found.append(("intermediate_size", config.intermediate_size, "mlp"))
    if moe is not None:
        shared = moe.n_shared_experts * moe.moe_intermediate_size
        found += [
            ("n_routed_experts", moe.n_routed_experts, "expert"),
            ("moe_intermediate_size", moe.moe_intermediate_size, "expert_mlp"),
            ("n_shared_experts x moe_intermediate_size", shared, "mlp"),
        ]
    if isinstance(a, GQAConfig):
        found.append(("num_key_value_heads", a.num_key_value_heads, "kv_heads"))
    else:
        found.append(("kv_lora_rank", a.kv_lora_rank, "rank"))
        found.append(("kv_lora_rank + qk_rope_head_dim", a.kv_lora_rank + a.qk_rope_head_dim, "latent"))
        if a.q_lora_rank is not None:
            found += [("q_lora_rank", a.q_lora_rank, axis) for axis in ("rank", "latent")]
        if a.indexer is not None:
            found.append(("index_n_heads", a.indexer.index_n_heads, "heads"))
    return tuple(found)


def misfit(config: ModelConfig, workload: Workload, sizes: Mapping[str, int]) -> str | None:
    """Which number of a model a mesh of such sizes does not divide, in words; None where it divides all."""
    if config.moe is None and sizes.get("expert", 1) > 1:
        return f"mesh: expert {sizes['expert']} for a model without experts, wanted 1"
    return _undivided(cut_numbers(config), workload, sizes)


def _undivided(numbers: Iterable[tuple[str, int, str]], workload: Workload, sizes: Mapping[str, int]) -> str | None:
    for name, number, axis in numbers:
        parts = {of: sizes[of] for of in cut(workload, axis) if sizes.get(of, 1) > 1}
        if number % math.prod(parts.values()):
            by = " x ".join(f"{of} {size}" for of, size in parts.items())
            return f"{name} {number} is not divisible by mesh {'axis' if len(parts) == 1 else 'axes'} {by}"
    return None


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh with the axes data, fsdp, expert, context and tensor, those not named of size 1.

    Neighbours on the last axes are neighbours in a TPU's torus. With several slices, `data` runs over the data-centre
    network between them first, and every other axis stays inside a slice.

    Args:
        devices: to use; None takes all.
        sizes: of the axes, by name.

    Raises:
        ValueError: an unknown axis, a size below 1, sizes that do not multiply to the number of devices, or a number
            of slices that does not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(_arranged(devices, _shape(sizes, len(devices))))


def _shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    unknown = sizes.keys() - set(AXES)
    if unknown:
        raise ValueError(f"mesh: got axis {min(unknown)!r}, wanted one of {', '.join(AXES)}")
    for axis, size in sizes.items():
        check_whole(f"mesh: {axis}", size)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != devices:
        raise ValueError(f"mesh: {' x '.join(map(str, shape))} does not make the {devices} devices there are")
    return shape


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({device.slice_index for device in devices if hasattr(device, "slice_index")}) or 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    if data % slices:
        raise ValueError(f"mesh: data {data} is not divisible by the {slices} slices there are")
    across = (slices,) + (1,) * len(rest)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest), across, devices, allow_split_physical_axes=True
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on devices and runs there. The mathematics is the same under every layout.

    Args:
        mesh: of `make_mesh`; None is one device, or whatever the arrays lie on.
        workload: "train" cuts dense weights by their width too and gathers a layer's when it runs; "serve" cuts them
            by heads and columns alone, moves none, and spreads experts over `tensor` as well.
        transport: of tokens to their experts, see `parallel.experts`.
        capacity_factor: room for an expert device in one round of the transport, as a multiple of the balanced
            share. What does not fit goes in a further round; nothing is dropped.
        scan_layers: layers of one kind are one stack of weights, run by a scan: compiles in the time of one layer.
        remat: what the backward pass works out again: nothing, whole layers from their inputs, or all of a layer but
            its attention.
        lanes: multiple of numbers to which the rotated keys of a latent cache are widened by zeros: 128 on TPU, whose
            memory takes as much anyway, and whose decoding kernel reads whole rows.

    Raises:
        ValueError: an unknown word, a capacity_factor below 1, or no lane.
    """

    mesh: Mesh | None = None
    workload: Workload = "train"
    transport: Transport = "ragged_all_to_all"
    capacity_factor: float = 1.1
    scan_layers: bool = False
    remat: Remat = "nothing"
    lanes: int = 1

    def __post_init__(self) -> None:
        check_whole("lanes", self.lanes)
        for name, known in (("workload", Workload), ("transport", Transport), ("remat", Remat)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(get_args(known))}")
        if not 1 <= self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: got {self.capacity_factor}, wanted 1 or more")

    def serving(self, **sizes: int) -> "Layout":
        """The same to serve, on a mesh of other sizes over the same devices in the same order.

        The order stays, for one compiled call moves arrays between meshes whose devices have the same.

        Raises:
            ValueError: as `make_mesh` does.
        """
        devices = self.mesh.devices
        mesh = _mesh(devices.reshape(_shape(sizes, devices.size)))
        return dataclasses.replace(self, mesh=mesh, workload="serve", remat="nothing")

    def cut(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that cut a logical axis."""
        return cut(self.workload, axis)

    def size(self, *mesh_axes: str) -> int:
        """How many parts these axes of the mesh make."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    def parts(self, axis: str) -> int:
        """How many parts a logical axis is cut into."""
        return self.size(*self.cut(axis))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array with these logical axes, one a dimension."""
        # Axes of size 1 are left out: XLA's TPU compiler gathers over one axis, but over two it adds zeros up.
        real = lambda axis: tuple(of for of in self.cut(axis) if self.mesh.shape[of] > 1)
        return NamedSharding(self.mesh, PartitionSpec(*(real(axis) or None for axis in axes)))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Lay an activation out by its logical axes; without a mesh it stays as it is."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def gathered(self, weights: Any) -> Any:
        """A tree of weights as a layer uses them on whole sequences: whole but for `tensor`, and their gradients cut.

        Experts are left alone; the transport gathers those.
        """
        if self.mesh is None:
            return weights
        return jax.tree.map(self._gathered, weights, is_leaf=_is_weight)

    def _gathered(self, leaf: Any) -> Any:
        value = leaf.get_raw_value()
        if not isinstance(value, jax.Array):  # what is packed or arranged is served, where it lies to be used
            return leaf
        axes = leaf.get_metadata()["axes"][-value.ndim :]
        if "expert" in axes:
            return leaf
        stored = self.sharding(*axes)
        used = PartitionSpec(*("tensor" if "tensor" in self.cut(axis) else None for axis in axes))
        return leaf.replace(_move(value, NamedSharding(self.mesh, used), stored))

    def stored(self, weights: Any) -> Any:
        """A tree of weights, or of a weight's gradient and moments, laid out as weights are kept."""
        if self.mesh is None:
            return weights
        lay = lambda leaf: leaf.replace(self.constrain(leaf.get_raw_value(), *leaf.get_metadata()["axes"]))
        return jax.tree.map(lambda leaf: lay(leaf) if _is_weight(leaf) else leaf, weights, is_leaf=_is_weight)

    def rows(self, batch: Any) -> Any:
        """The arrays [B, ...] of a batch, cut by row, and those [B, T, ...] by position too."""
        if self.mesh is None:
            return batch
        return jax.tree.map(jax.lax.with_sharding_constraint, batch, self.row_shardings(batch))

    def put(self, batch: Any) -> Any:
        """A batch on the devices of the mesh, cut as `rows` cuts it: each device receives its own part alone.

        Every process holds the whole batch as NumPy arrays, and places what its devices are to have. Arrays that lie
        there already stay. Without a mesh nothing is moved: a jitted step takes the batch as it is.

        Args:
            batch: a NamedTuple of arrays [B, ...], mask_BT among them.

        Raises:
            ValueError: the mesh does not divide the rows or their length.
        """
        if self.mesh is None:
            return batch
        self.check_batch(*batch.mask_BT.shape)
        return jax.tree.map(_placed, batch, self.row_shardings(batch))

    def row_shardings(self, batch: Any) -> Any:
        """How `rows` lays each array of a batch out, on a layout with a mesh."""
        T = batch.mask_BT.shape[1]

        def of(a: Any) -> NamedSharding:
            by_position = ("sequence",) if a.ndim > 1 and a.shape[1] == T else (None,) * (a.ndim > 1)
            return self.sharding("batch", *by_position, *(None,) * (a.ndim - 2))

        return jax.tree.map(of, batch)

    def check(self, config: ModelConfig) -> None:
        """Refuse a mesh that does not divide the model, before anything is compiled.

        Raises:
            ValueError: which number of the model is not divisible by which axes of the mesh.
        """
        if self.mesh is not None and (problem := misfit(config, self.workload, self.mesh.shape)):
            raise ValueError(problem)

    def check_divides(self, *numbers: tuple[str, int, str]) -> None:
        """The same for any numbers: their names, themselves and their logical axes."""
        if self.mesh is not None and (problem := _undivided(numbers, self.workload, self.mesh.shape)):
            raise ValueError(problem)

    def check_batch(self, sequences: int, length: int) -> None:
        """Refuse a batch of whole sequences that the mesh does not divide.

        Raises:
            ValueError: with the numbers.
        """
        self.check_divides(("batch", sequences, "batch"), ("length", length, "tokens"))


LOCAL = Layout()


def module_layout(graphdef: nnx.GraphDef) -> Layout:
    """The layout that a module was made with, which its static description keeps; LOCAL where it keeps none.

    Args:
        graphdef: of `model.decoder.split` or `abstract_weights`.
    """
    static = (getattr(attribute, "value", None) for _, attribute in graphdef.attributes)
    return next((value for value in static if isinstance(value, Layout)), LOCAL)


def lanes_of(platform: str) -> int:
    """What `Layout.lanes` is to be on devices of a platform, as jax names it."""
    return 128 if platform == "tpu" else 1


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def weight_sharding(layout: Layout, shape: Sequence[int], axes: Sequence[str | None], name: str) -> NamedSharding:
    """How a weight lies on a mesh.

    Args:
        layout: with a mesh.
        shape: of the weight.
        axes: its logical axes, one a dimension; None is never cut.
        name: for the message.

    Raises:
        ValueError: a dimension is not divisible by the mesh axes that cut it.
    """
    layout.check_divides(
        *((f"{name}: axis {axis} of size", size, axis) for size, axis in zip(shape, axes, strict=True) if axis)
    )
    return layout.sharding(*axes)


def _placed(value: np.ndarray | jax.Array, where: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array):
        return jax.device_put(value, where)
    return jax.make_array_from_callback(value.shape, where, lambda part: value[part])


def _move(value: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    """`value` laid out as `used`, and its gradient as `stored`: a sum over chips of which each keeps its part."""

    @jax.custom_vjp
    def move(x):
        return jax.lax.with_sharding_constraint(x, used)

    move.defvjp(lambda x: (move(x), None), lambda _, d: (jax.lax.with_sharding_constraint(d, stored),))
    return move(value)
