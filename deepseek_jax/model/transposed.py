"""Weights as a CPU decodes with them fastest: transposed, in a copy, where that is worth its memory."""

import os
from typing import Any

import jax
from flax import nnx

from deepseek_jax.model.lora import is_adapted
from deepseek_jax.ops.transposed import Transposed

_PRODUCTS = frozenset(("q", "k", "v", "o", "q_a", "q_b", "kv_a", "gate", "up", "down", "head"))
_ELSEWHERE = frozenset(("experts", "indexer"))  # whose matrices of those names go through other functions
_WORTH = 2**24  # numbers of a model from which on a step takes longer than what surrounds it
_SHARE = 4  # of the machine's memory a copy may take one part in so many


def transposed_weights(weights: nnx.State) -> nnx.State:
    """The weights with those matrices transposed that `ops.low_rank.product` and the head multiply with.

    Only float32 ones of a large model on one CPU, whose copy takes a quarter of its memory at most; others are given
    back as they are.
    """
    leaves = jax.tree.leaves(weights)
    if is_adapted(weights) or sum(leaf.size for leaf in leaves) < _WORTH or not all(map(_on_one_cpu, leaves)):
        return weights
    chosen = {path for path, leaf in nnx.to_flat_state(weights) if _multiplies(path, leaf.get_raw_value())}
    flat = nnx.to_flat_state(weights)
    copied = sum(leaf.get_raw_value().nbytes for path, leaf in flat if path in chosen)
    if copied > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE:
        return weights
    turned = lambda leaf: leaf.replace(Transposed(_transpose(leaf.get_raw_value())))
    return nnx.from_flat_state([(path, turned(leaf) if path in chosen else leaf) for path, leaf in flat])


def _on_one_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]


def _multiplies(path: tuple, value: Any) -> bool:
    plain = isinstance(value, jax.Array) and value.ndim == 2 and value.dtype == "float32"
    return plain and path[-1] in _PRODUCTS and not _ELSEWHERE & set(path)


_transpose = jax.jit(lambda matrix: matrix.T)
