"""Rows on one device: taking them by index, ordering them by expert, and running them through their experts."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.experts import grouped_matmul
from deepseek_jax.ops.low_rank import Matrix


@jax.custom_vjp
def take_rows(x: Float[Array, "n D"], index: Int[Array, "m"], back: Int[Array, "n a"]) -> Float[Array, "m D"]:
    """x[index], whose gradient is a gather as well instead of a scatter, which accelerators do slowly.

    Args:
        x: rows.
        index: of rows; n gives a row of zeros.
        back: where in the result each row of x stands, up to a times; m is nowhere.
    """
    return _taken(x, index)


def _taken(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x, index, back):
    return _taken(x, index), back


def _take_backward(back, d):
    return jnp.sum(_taken(d, back), axis=1, dtype=jnp.float32).astype(d.dtype), None, None


take_rows.defvjp(_take_forward, _take_backward)


def swiglu_groups(
    rows: Float[Array, "W D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    sizes: Int[Array, "G"],
) -> Float[Array, "W D"]:
    """SwiGLU_e of the rows of each group e; the groups lie one after another. Of a stack, one layer's have rows.

    Rows past the last group cost nothing. They are undefined in the result, and nothing of them, NaN or not, reaches
    the other rows or a gradient of the weights.
    """
    filled = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    hidden = lambda weight: jnp.where(filled, grouped_matmul(rows, weight, sizes), 0)
    return grouped_matmul(jax.nn.silu(hidden(gate)) * hidden(up), down, sizes)


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
