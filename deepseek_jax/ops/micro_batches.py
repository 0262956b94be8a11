"""Cutting a batch's rows in parts that are computed one after another, and putting results back in their order.

Row i goes to part i % parts. Devices of a mesh hold contiguous rows of a batch, so each part lies evenly on all of
them, and nothing moves; of contiguous rows, a part would lie on a few devices, and be sent from these to the others.
"""

from typing import Any

import jax


def split_rows(batch: Any, parts: int) -> Any:
    """A tree of arrays [B, ...] as one of arrays [parts, B / parts, ...].

    Raises:
        ValueError: `parts` does not divide B.
    """

    def split(a: jax.Array) -> jax.Array:
        if a.shape[0] % parts:
            raise ValueError(f"micro_batches: got {parts}, which does not divide the batch of {a.shape[0]} samples")
        return a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def join_rows(parts: Any) -> Any:
    """The inverse: a tree of arrays [parts, B / parts, ...] as one of arrays [B, ...].

    >>> import jax.numpy as jnp
    >>> split_rows(jnp.arange(6), 2).tolist(), join_rows(split_rows(jnp.arange(6), 2)).tolist()
    ([[0, 2, 4], [1, 3, 5]], [0, 1, 2, 3, 4, 5])
    """
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), parts)
