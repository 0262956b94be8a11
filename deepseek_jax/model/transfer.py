"""A policy's weights from the layout that they are trained in to the one that they are sampled in."""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.precision import computed
from deepseek_jax.model.stacks import Path, members
from deepseek_jax.sharding import Layout

MOST_TENSOR = 16  # parts of heads: cut further, a step's sums over chips cost more than the reading they save


def serving_layout(
    config: ModelConfig,
    trained: Layout,
    *,
    expert: int | None = None,
    tensor: int | None = None,
    unstacked: bool = False,
) -> Layout:
    """The layout to sample in, on the devices that a model is trained on.

    Decoding reads every weight for few tokens: experts lie whole over `expert` x `tensor`, dense weights are cut by
    heads and columns over `tensor`, and what is left of the devices is `data`.

    Args:
        config: the architecture.
        trained: the layout of training.
        expert, tensor: sizes of its mesh. What is not given is chosen: the largest that the model's numbers allow,
            `tensor` up to 16.
        unstacked: layers one by one, also where those that are trained are stacks.

    Raises:
        ValueError: sizes that do not divide the devices or the model, or sizes above 1 without a mesh.
    """
    found = dataclasses.replace(trained, stacked=trained.stacked and not unstacked)
    if trained.mesh is None:
        if (expert or 1) * (tensor or 1) > 1:
            raise ValueError(f"mesh: expert {expert or 1} x tensor {tensor or 1} do not divide the one device in use")
        return found
    devices = trained.mesh.size
    tensors = _divisors(serving_sizes(config, devices, expert=expert)["tensor"]) if tensor is None else [tensor]
    layouts = [found.serving(**serving_sizes(config, devices, expert=expert, tensor=of)) for of in tensors]
    fitting = next((layout for layout in layouts if _divides(layout, config)), layouts[-1])
    fitting.check(config)
    return fitting


def serving_sizes(
    config: ModelConfig, devices: int, *, expert: int | None = None, tensor: int | None = None
) -> dict[str, int]:
    """Sizes of the axes of the mesh of `serving_layout`, by the numbers of heads and experts alone.

    Raises:
        ValueError: given sizes that do not divide the devices.
    """
    given = (expert or 1) * (tensor or 1)
    if devices % given:
        raise ValueError(f"mesh: expert {expert or 1} x tensor {tensor or 1} do not divide the {devices} devices")
    moe, rest = config.moe, devices // given
    if tensor is None and moe is None:
        tensor = math.gcd(rest, getattr(config.attention, "num_key_value_heads", config.num_attention_heads))
    elif tensor is None:
        tensor = math.gcd(rest, MOST_TENSOR, config.num_attention_heads, moe.n_routed_experts // (expert or 1))
    if expert is None:
        expert = 1 if moe is None else math.gcd(devices // tensor, max(1, moe.n_routed_experts // tensor))
    return {"data": devices // (expert * tensor), "expert": expert, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    """The largest first."""
    return [of for of in range(number, 0, -1) if number % of == 0]


def _divides(layout: Layout, config: ModelConfig) -> bool:
    try:
        layout.check(config)
    except ValueError:
        return False
    return True


def sampled_config(config: ModelConfig) -> ModelConfig:
    """An architecture as it is sampled: without MTP modules, which only training runs."""
    return dataclasses.replace(config, num_nextn_predict_layers=0)


@lru_cache(maxsize=16)
def make_transfer(config: ModelConfig, of: Layout, to: Layout, dtype: jnp.dtype) -> Callable[[nnx.State], nnx.State]:
    """One compiled call from weights in one layout to the same in another: cast, unstacked or stacked, moved.

    What it is given stays: these are the masters. Without a mesh, and with layers as they were, weights that have the
    dtype already are the very same arrays.

    Args:
        config: the architecture that is sampled; modules that it lacks are left behind.
        of, to: layouts whose meshes have the same devices in the same order (`Layout.serving`), or no mesh.
        dtype: to sample in. Router biases stay float32.
    """
    _, like = abstract_weights(config, dtype, to)
    if of.mesh is None and of.stacked == to.stacked:
        return lambda weights: computed(_kept(weights, like), dtype)
    move = partial(_moved, like=like, config=config, restack=of.stacked != to.stacked)
    if of.mesh is None:
        return jax.jit(move)
    return jax.jit(move, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))


def _kept(weights: nnx.State, like: nnx.State) -> nnx.State:
    wanted = {path for path, _ in nnx.to_flat_state(like)}
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(weights) if path in wanted])


def _moved(weights: nnx.State, like: nnx.State, config: ModelConfig, restack: bool) -> nnx.State:
    have = {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}
    have = _by_layer(have, config) if restack else have

    def value(path: Path) -> jax.Array:
        if restack and path[0] == "stacks":
            return jnp.stack([have[of] for of in members(path, config)])
        return have[path]

    cast = lambda path, leaf: leaf.replace(value(path).astype(leaf.get_raw_value().dtype))
    return nnx.from_flat_state([(path, cast(path, leaf)) for path, leaf in nnx.to_flat_state(like)])


def _by_layer(have: dict[Path, jax.Array], config: ModelConfig) -> dict[Path, jax.Array]:
    """Stacks taken apart."""
    apart = lambda path, value: list(value) if path[0] == "stacks" else [value]
    return {
        to: part
        for path, value in have.items()
        for to, part in zip(members(path, config), apart(path, value), strict=True)
    }
