"""Weights as a CPU decodes with them fastest: transposed and side by side, in a copy, where it is worth its memory."""

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.lora import is_adapted
from deepseek_jax.ops.transposed import Joined, Transposed

_PRODUCTS = frozenset(("q", "k", "v", "o", "q_a", "q_b", "kv_a", "gate", "up", "down", "head"))
_JOINED = (("q", "k", "v"), ("gate", "up"))  # `ops.low_rank.products` multiplies with these at once
_ELSEWHERE = frozenset(("experts", "indexer"))  # whose matrices of those names go through other functions
_WORTH = 2**24  # numbers of a model from which on a step takes longer than what surrounds it
_SHARE = 4  # of the machine's memory a copy may take one part in so many


def arranged_weights(weights: nnx.State) -> nnx.State:
    """The weights with those matrices transposed and joined that `ops.low_rank.product` and the head multiply with.

    Only float32 ones of a large model on one CPU, whose copy takes a quarter of its memory at most; others are given
    back as they are.
    """
    leaves = jax.tree.leaves(weights)
    if is_adapted(weights) or sum(leaf.size for leaf in leaves) < _WORTH or not all(map(_on_one_cpu, leaves)):
        return weights
    flat = dict(nnx.to_flat_state(weights))
    plain = {path: leaf.get_raw_value() for path, leaf in flat.items()}
    plain = {path: matrix for path, matrix in plain.items() if _multiplies(path, matrix)}
    copied = sum(matrix.nbytes for matrix in plain.values())
    if copied > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE:
        return weights
    arranged = {}
    for group in _groups(plain):
        arranged |= _held({path: plain[path] for path in group})
    flat |= {path: flat[path].replace(value) for path, value in arranged.items()}
    return nnx.from_flat_state(list(flat.items()))


def _on_one_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]


def _multiplies(path: tuple, value: Any) -> bool:
    plain = isinstance(value, jax.Array) and value.ndim == 2 and value.dtype == "float32"
    return plain and path[-1] in _PRODUCTS and not _ELSEWHERE & set(path)


def _groups(paths: Collection[tuple]) -> Iterator[tuple[tuple, ...]]:
    """Which matrices are held together, in their order; alone where one of the others lacks."""
    for path in paths:
        names = next((names for names in _JOINED if path[-1] in names), path[-1:])
        together = tuple((*path[:-1], name) for name in names)
        together = together if all(each in paths for each in together) else (path,)
        if path == together[0]:
            yield together


def _held(matrices: Mapping[tuple, jax.Array]) -> dict[tuple, Transposed | Joined]:
    """The first holds all, the others nothing."""
    first, *others = matrices
    whole = Transposed(_side_by_side(*matrices.values()))
    if not others:
        return {first: whole}
    widths = tuple(matrix.shape[1] for matrix in matrices.values())
    return {first: Joined(whole, widths)} | dict.fromkeys(others, Joined(None, ()))


_side_by_side = jax.jit(lambda *matrices: jnp.concatenate([matrix.T for matrix in matrices]))
