"""A policy's weights from the layout that they are trained in to the one that they are sampled in."""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import stack_sizes
from deepseek_jax.model.precision import computed, convert_dtype
from deepseek_jax.model.scan_layers import members
from deepseek_jax.parallel.reshard import reshard
from deepseek_jax.sharding import Layout, misfit

MOST_TENSOR = 16  # parts of heads: cut further, a step's sums over chips cost more than the reading they save


def serving_layout(
    config: ModelConfig,
    trained: Layout,
    *,
    data: int | None = None,
    expert: int | None = None,
    tensor: int | None = None,
    unrolled: bool = False,
) -> Layout:
    """The layout to sample in, on the devices that a model is trained on.

    Decoding reads every weight for few tokens: experts lie whole over `expert` x `tensor`, dense weights are cut by
    heads and columns over `tensor`, and what is left of the devices is `data`.

    Args:
        config: the architecture.
        trained: the layout of training.
        data, expert, tensor: sizes of its mesh, all devices together. What is not given is chosen: the largest `expert`
            and `tensor` that the model's numbers allow, `tensor` up to 16.
        unrolled: layers one by one, also where those that are trained are scanned.

    Raises:
        ValueError: sizes that do not divide the devices or the model, or sizes above 1 without a mesh.
    """
    found = dataclasses.replace(trained, scan_layers=trained.scan_layers and not unrolled)
    devices = 1 if trained.mesh is None else trained.mesh.size
    sizes = serving_sizes(config, devices, data=data, expert=expert, tensor=tensor)
    if trained.mesh is None:
        return found
    found = found.serving(**sizes)
    found.check(config)
    return found


def serving_sizes(
    config: ModelConfig,
    devices: int,
    *,
    data: int | None = None,
    expert: int | None = None,
    tensor: int | None = None,
) -> dict[str, int]:
    """Sizes of the axes of the mesh of `serving_layout`: the largest `tensor` by which all the model's numbers divide.

    Raises:
        ValueError: given sizes that do not divide the devices, or a size of `data` that leaves some of them out.
    """
    for axis, size in {"data": data, "expert": expert, "tensor": tensor}.items():
        if size is not None and size < 1:
            raise ValueError(f"mesh: got {axis} {size}, wanted at least 1")
    if devices % ((data or 1) * (expert or 1) * (tensor or 1)):
        raise ValueError(f"mesh: {_named(data, expert, tensor)} do not divide the {devices} devices")
    sizes = _sizes_of_a_model(config, devices // (data or 1), expert, tensor)
    if data is not None and sizes["data"] > 1:
        divided = f"expert {sizes['expert']} x tensor {sizes['tensor']}"
        raise ValueError(
            f"mesh: got data {data} for {devices} devices and a model over {divided}, wanted {data * sizes['data']}"
        )
    return sizes | {"data": sizes["data"] * (data or 1)}


def _named(data: int | None, expert: int | None, tensor: int | None) -> str:
    replicas = "" if data is None else f"data {data} x "
    return f"{replicas}expert {expert or 1} x tensor {tensor or 1}"


def _sizes_of_a_model(config: ModelConfig, devices: int, expert: int | None, tensor: int | None) -> dict[str, int]:
    tensors = [tensor]
    if tensor is None:
        most = _most_tensor(config, devices // (expert or 1), expert or 1)
        tensors = [of for of in range(most, 0, -1) if most % of == 0]
    meshes = [_with_tensor(config, devices, expert, of) for of in tensors]
    return next((sizes for sizes in meshes if misfit(config, "serve", sizes) is None), meshes[-1])


def _most_tensor(config: ModelConfig, devices: int, expert: int) -> int:
    """By the numbers of heads and experts alone."""
    if config.moe is None:
        return math.gcd(devices, getattr(config.attention, "num_key_value_heads", config.num_attention_heads))
    return math.gcd(devices, MOST_TENSOR, config.num_attention_heads, config.moe.n_routed_experts // expert)


def _with_tensor(config: ModelConfig, devices: int, expert: int | None, tensor: int) -> dict[str, int]:
    if expert is None:
        experts = 1 if config.moe is None else max(1, config.moe.n_routed_experts // tensor)
        expert = math.gcd(devices // tensor, experts)
    return {"data": devices // (expert * tensor), "expert": expert, "tensor": tensor}


def sampled_config(config: ModelConfig) -> ModelConfig:
    """An architecture as it is sampled: without MTP modules, which only training runs."""
    return dataclasses.replace(config, num_nextn_predict_layers=0)


@dataclass(frozen=True)
class Transfer:
    """One compiled call from weights in one layout to the same in another: converted, unstacked or stacked, moved.

    What it is given stays: these are the masters. Without a mesh, and with layers as they were, weights that have the
    dtype already are the very same arrays. It takes plain weights and those of `model.lora.with_adapter`.

    Args:
        config: the architecture that is sampled; MTP modules that it lacks are left behind.
        of, to: layouts whose meshes have the same devices in the same order (`Layout.serving`), or no mesh.
        dtype: to sample in. Router biases stay float32.
    """

    config: ModelConfig
    of: Layout
    to: Layout
    dtype: jnp.dtype

    def __call__(self, weights: nnx.State) -> nnx.State:
        if self.of.mesh is None and self.of.scan_layers == self.to.scan_layers:
            return computed(self._sampled(weights), self.dtype)
        return self.program(weights)(weights)

    def program(self, weights: nnx.State) -> jax.stages.Wrapped:
        """The jitted function for weights of this structure; leaves may be jax.ShapeDtypeStruct."""
        return _program(self, jax.tree.structure(weights), tuple(leaf.shape for leaf in jax.tree.leaves(weights)))

    def move(self, weights: nnx.State) -> nnx.State:
        """What is compiled, without the shardings of its result."""
        weights = convert_dtype(self._sampled(weights), self.dtype)
        if self.of.mesh is not None:
            weights = jax.tree.map(self._moved, weights, is_leaf=_is_weight)
        if self.of.scan_layers == self.to.scan_layers:
            return weights
        return (_stacked if self.to.scan_layers else _by_layer)(weights, self.config)

    def _moved(self, leaf: nnx.Variable) -> nnx.Variable:
        axes = leaf.get_metadata()["axes"]
        return leaf.replace(reshard(leaf.get_raw_value(), self.of.sharding(*axes), self.to.sharding(*axes)))

    def _sampled(self, weights: nnx.State) -> nnx.State:
        modules = self.config.num_nextn_predict_layers
        return weights if modules else nnx.split_state(weights, lambda path, _: path[0] == "mtp", ...)[1]


@lru_cache(maxsize=16)
def _program(transfer: Transfer, structure: jax.tree_util.PyTreeDef, shapes: tuple[tuple[int, ...], ...]):
    if transfer.of.mesh is None:
        return jax.jit(transfer.move)
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = jax.eval_shape(transfer.move, jax.tree.unflatten(structure, leaves))
    place = lambda leaf: leaf.replace(transfer.to.sharding(*leaf.get_metadata()["axes"]))
    places = jax.tree.map(place, found, is_leaf=_is_weight)
    return jax.jit(transfer.move, out_shardings=places)


def _is_weight(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _by_layer(weights: nnx.State, config: ModelConfig) -> nnx.State:
    found = []
    for path, leaf in nnx.to_flat_state(weights):
        if path[0] != "stacks":
            found.append((path, leaf))
            continue
        axes = leaf.get_metadata()["axes"][1:]
        found += [
            (to, leaf.replace(value, axes=axes))
            for to, value in zip(members(path, config), leaf.get_raw_value(), strict=True)
        ]
    return nnx.from_flat_state(found)


def _stacked(weights: nnx.State, config: ModelConfig) -> nnx.State:
    """The inverse: a stack's place is known by its first layer."""
    flat = dict(nnx.to_flat_state(weights))
    found = [(path, leaf) for path, leaf in flat.items() if path[0] != "layers"]
    first = 0
    for number, size in enumerate(stack_sizes(config)):
        for path, leaf in flat.items():
            if path[:2] != ("layers", first):
                continue
            to = ("stacks", number, *path[2:])
            value = jnp.stack([flat[of].get_raw_value() for of in members(to, config)])
            found.append((to, leaf.replace(value, axes=("layer", *leaf.get_metadata()["axes"]))))
        first += size
    return nnx.from_flat_state(found)
