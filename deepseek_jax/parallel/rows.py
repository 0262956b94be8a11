"""Rows on one device: taking them by index, ordering them by expert, and running them through their experts."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.experts import grouped_matmul, weighed_swiglu
from deepseek_jax.ops.low_rank import Matrix


@jax.custom_vjp
def take_rows(x: Float[Array, "n D"], index: Int[Array, "m"], back: Int[Array, "n a"]) -> Float[Array, "m D"]:
    """x[index], whose gradient is a gather as well instead of a scatter, which accelerators do slowly.

    Args:
        x: rows.
        index: of rows; n is none, and gives some row: zeros there would be a pass over memory of their own.
        back: where in the result each row of x stands, up to a times; m is nowhere. What is given back in other
            places, NaN or not, does not count.
    """
    return _taken(x, index)


@jax.custom_vjp
def sum_rows(x: Float[Array, "m D"], back: Int[Array, "n a"], index: Int[Array, "m"]) -> Float[Array, "n D"]:
    """sum_a x[back[:, a]] in float32, m counting as zeros: the transpose of `take_rows`, as that is of this.

    Args:
        x: rows, of which those in no place of `back` do not count, NaN or not.
        back: of rows.
        index: in which row of the result each row of x is counted; n is in none.
    """
    return _summed(x, back)


def _taken(x, index):
    return x.at[index].get(mode="clip")


def _summed(x, back):
    there = (back < x.shape[0])[..., None]
    return jnp.sum(jnp.where(there, _taken(x, back), 0), axis=1, dtype=jnp.float32)


take_rows.defvjp(
    lambda x, index, back: (_taken(x, index), back),
    lambda back, d: (_summed(d, back).astype(d.dtype), None, None),
)
sum_rows.defvjp(
    lambda x, back, index: (_summed(x, back), (index, x[:0])),
    lambda kept, d: (_taken(d.astype(kept[1].dtype), kept[0]), None, None),
)


def swiglu_groups(
    rows: Float[Array, "W D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    sizes: Int[Array, "G"],
    weights: Float[Array, "W 1"] | None = None,
) -> Float[Array, "W D"]:
    """SwiGLU_e of the rows of each group e; the groups lie one after another. Of a stack, one layer's have rows.

    Rows past the last group cost nothing. They are undefined in the result, and nothing of them, NaN or not, reaches
    the other rows or a gradient of the matrices.

    Args:
        rows: sorted by group.
        gate, up, down: the groups' matrices.
        sizes: of the groups.
        weights: float32, what each row's result is multiplied by; None is 1.
    """
    filled = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    hidden = lambda weight: jnp.where(filled, grouped_matmul(rows, weight, sizes), 0)
    weights = None if weights is None else jnp.where(filled, weights, 0)
    return grouped_matmul(weighed_swiglu(hidden(gate), hidden(up), weights), down, sizes)


def by_expert(
    starts: Int[Array, "P E"], sizes: Int[Array, "P E"], room: int
) -> tuple[Int[Array, "room"], Int[Array, "room"]]:
    """How a buffer of runs of rows, one a source and expert, is put in order of experts.

    Args:
        starts: where the run of each source and expert begins; ascending when read row by row.
        sizes: of the runs.
        room: rows of the buffer; those in no run come last.

    Returns:
        order: for each place in order, the row of the buffer that goes there; room for none.
        inverse: for each row of the buffer, its place in order; room for none.
    """
    turned = sizes.T
    ordered = jnp.cumsum(turned).reshape(turned.shape) - turned
    places = partial(_moved, jnp.arange(room, dtype=jnp.int32), none=room)
    return places(ordered, turned, starts.T), places(starts, sizes, ordered.T)


def _moved(positions, starts, sizes, new_starts, none):
    """Where positions go when runs that begin at `starts` move to `new_starts`."""
    run, offset = locate(positions, starts.ravel(), sizes.ravel())
    return jnp.append(new_starts.ravel(), none)[run] + offset


def locate(
    positions: Int[Array, "m"], starts: Int[Array, "J"], sizes: Int[Array, "J"]
) -> tuple[Int[Array, "m"], Int[Array, "m"]]:
    """Which of J ascending runs each position lies in, and how far from its start; (J, 0) where in none."""
    run = jnp.sum(starts + sizes <= positions[:, None], axis=1, dtype=jnp.int32)
    offset = positions - starts.at[run].get(mode="clip")
    inside = (run < starts.shape[0]) & (offset >= 0)
    return jnp.where(inside, run, starts.shape[0]), jnp.where(inside, offset, 0)


def window(starts: Int[Array, "*J"], sizes: Int[Array, "*J"], first: int | Int[Array, ""], room: int | Int[Array, ""]):
    """What of runs lies in positions first to first + room, counted from `first`: starts and sizes."""
    begin = jnp.clip(starts - first, 0, room)
    return begin, jnp.clip(starts + sizes - first, 0, room) - begin


def exclusive(sizes: Int[Array, "*J"], axis: int | None = None) -> Int[Array, "*J"]:
    """Where runs of these sizes begin when they lie one after another."""
    return jnp.cumsum(sizes, axis=axis).reshape(sizes.shape) - sizes
