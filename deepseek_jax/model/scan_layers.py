"""Weights between their two forms: a module a layer, and one stack for all layers of a kind."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import stack_sizes
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.sharding import Layout

Path = tuple[str | int, ...]


def stack_layers(weights: nnx.State, config: ModelConfig, layout: Layout) -> nnx.State:
    """Weights by layer as those of a decoder with scanned layers, bit for bit, laid out for it.

    One weight at a time is in memory twice.

    Args:
        weights: of a decoder whose layout has no `scan_layers`, packed or not; they are left as they are.
        config: its architecture.
        layout: one with `scan_layers`.
    """
    have = {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}
    del weights  # what the caller does not hold either goes as soon as it is stacked
    _, like = abstract_weights(config, layout=layout)
    filled = []
    for path, leaf in nnx.to_flat_state(like):
        parts = [have.pop(of) for of in members(path, config)]
        join = _stacked if path[0] == "stacks" else _alone
        place = leaf.get_raw_value().sharding
        if place is not None and not isinstance(parts[0], jax.Array):  # packed: each of its arrays as those of a layer
            place = jax.tree.map(lambda part, of=path: _in_front(part.sharding, of), parts[0])
        filled.append((path, leaf.replace(jax.jit(join, out_shardings=place)(parts))))
    return nnx.from_flat_state(filled)


def unstack_layers(weights: nnx.State, config: ModelConfig, layout: Layout) -> nnx.State:
    """The inverse, laid out for a layout without `scan_layers`: for a sampler, or for a folder."""
    have = {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}
    del weights  # what the caller does not hold either goes as soon as it is stacked
    _, like = abstract_weights(config, layout=layout)
    places = {path: (leaf, leaf.get_raw_value().sharding) for path, leaf in nnx.to_flat_state(like)}
    filled = []
    for path, value in have.items():
        to = list(members(path, config))
        apart = _apart if path[0] == "stacks" else _listed
        values = jax.jit(apart, out_shardings=[places[of][1] for of in to])(value)
        filled += [(of, places[of][0].replace(part)) for of, part in zip(to, values, strict=True)]
    return nnx.from_flat_state(filled)


# Functions of the module, so that weights of one shape share what jit compiled of them.
def _stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *parts)


def _alone(parts: list[Any]) -> Any:
    return parts[0]


def _in_front(place: NamedSharding, path: Path) -> NamedSharding:
    """Of layers one after another, where each lies in one place."""
    return NamedSharding(place.mesh, PartitionSpec(*(None,) * (path[0] == "stacks"), *place.spec))


def _apart(value: jax.Array) -> list[jax.Array]:
    return list(value)


def _listed(value: jax.Array) -> list[jax.Array]:
    return [value]


def members(path: Path, config: ModelConfig) -> Iterator[Path]:
    """The paths by layer of what lies at a path of the stacked form, in order."""
    if path[0] != "stacks":
        yield path
        return
    sizes = stack_sizes(config)
    first = sum(sizes[: path[1]])
    yield from (("layers", layer, *path[2:]) for layer in range(first, first + sizes[path[1]]))
