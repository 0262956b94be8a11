"""Moving rows between the devices along mesh axes, to those that hold their experts and back, in rounds.

Rows leave in slots of a send buffer. A device's entries (its rows, each as often as it has experts) are the numbers
0 to w A - 1, and every entry has a slot in exactly one round.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.parallel.rows import exclusive, locate, window


class Entries(NamedTuple):
    """A device's entries in order of experts, and how many there are on every device. All int32."""

    experts: Int[Array, "w A"]
    order: Int[Array, "n"]  # entries in order of experts, n = w A
    position: Int[Array, "w A"]  # of each entry in that order
    counts: Int[Array, "P P E"]  # by source, destination and the destination's expert


class Exchange(NamedTuple):
    """One round's journey."""

    slot: Int[Array, "w A"]  # of each entry; the number of slots for those of other rounds
    entry: Int[Array, "slots"]  # in each slot; w A for none
    starts: Int[Array, "P E"]  # where, in the buffer that arrives, the run of each source and own expert begins
    sizes: Int[Array, "P E"]  # of these runs
    dispatch: Callable[[jax.Array], jax.Array]  # slots -> rows that arrive
    combine: Callable[[jax.Array], jax.Array]  # rows that arrived -> slots


def fixed_exchange(entries: Entries, number, room: int, over: tuple[str, ...]) -> Exchange:
    """By all_to_all: `room` slots for every pair of devices, filled or not."""
    me = jax.lax.axis_index(over)
    experts, order, position, counts = entries
    devices, _, local = counts.shape
    slots, first = devices * room, number * room
    pairs = jnp.sum(counts, axis=2)
    bases = exclusive(pairs[me])

    target = experts // local
    rank = position - bases[target] - first
    slot = jnp.where((0 <= rank) & (rank < room), target * room + rank, slots)
    ranks = first + jnp.arange(room, dtype=jnp.int32)
    positions = jnp.where(ranks < pairs[me][:, None], bases[:, None] + ranks, order.size).ravel()
    entry = order.at[positions].get(mode="fill", fill_value=order.size)

    arriving = counts[:, me]
    starts, sizes = window(exclusive(arriving, axis=1), arriving, first, room)
    starts += room * jnp.arange(devices, dtype=jnp.int32)[:, None]
    move = partial(jax.lax.all_to_all, axis_name=over, split_axis=0, concat_axis=0, tiled=True)
    return Exchange(slot, entry, starts, sizes, move, move)


def ragged_exchange(entries: Entries, number, room: int, over: tuple[str, ...]) -> Exchange:
    """By ragged_all_to_all: `room` rows a receiver, from whomever they come; a slot is an entry's place in order."""
    me = jax.lax.axis_index(over)
    experts, order, position, counts = entries
    local, first = counts.shape[2], number * room
    route = ragged_route(jnp.sum(counts, axis=2), me, first, room)

    target = experts // local
    inside = (position >= route.begins[target]) & (position < (route.begins + route.sends)[target])
    slot = jnp.where(inside, position, order.size)
    entry = jnp.where(inside.ravel()[order], order, order.size)

    arriving = counts[:, me]
    starts, sizes = window(exclusive(arriving), arriving, first, room)
    dispatch = lambda rows: ragged_move(order.size, room, over, rows, route)
    combine = lambda rows: ragged_move(room, order.size, over, rows, route.reversed())
    return Exchange(slot, entry, starts, sizes, dispatch, combine)


class Route(NamedTuple):
    """Which rows go from here to each device of the axes and come here from each. All int32 [P]."""

    begins: Int[Array, "P"]  # here, of those that go
    sends: Int[Array, "P"]
    lands: Int[Array, "P"]  # there
    arrives: Int[Array, "P"]  # here, of those that come
    receives: Int[Array, "P"]
    comes_from: Int[Array, "P"]  # there

    def reversed(self) -> "Route":
        """The route that takes the rows back to where they were."""
        return Route(*self[3:], *self[:3])


def ragged_route(pairs: Int[Array, "P P"], me, first, room) -> Route:
    """The route of one round, which takes of every receiver's arrivals the `room` from `first` on.

    Args:
        pairs: rows that each device (first axis) has for each (second), lying there by receiver; they arrive by
            source.
        me: this device.
        first: arrival, from 0, of this round's first row.
        room: rows that a receiver has place for.
    """
    arrive = exclusive(pairs, axis=0)
    lands, moves = window(arrive, pairs, first, room)
    begins = exclusive(pairs, axis=1) + jnp.clip(first - arrive, 0, pairs)
    return Route(begins[me], moves[me], lands[me], lands[:, me], moves[:, me], begins[:, me])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ragged_move(
    room_here: int, room_there: int, over: tuple[str, ...], rows: Float[Array, "room_here D"], route: Route
) -> Float[Array, "room_there D"]:
    """Rows along a route; rows of the result that nothing comes to are undefined.

    `jax.lax.ragged_all_to_all` where it exists; on CPU, which has none, a gather with the same offsets.
    The gradient goes the route back, whose offsets are known here; jax's own rule has to exchange them.
    """
    return _move(room_there, over, rows, route)


def _move(room, over, rows, route):
    branches = {"cpu": _move_emulated, "default": _move_ragged}
    return jax.lax.platform_dependent(rows, *route, **{name: partial(f, room, over) for name, f in branches.items()})


def _move_ragged(room, over, rows, begins, sends, lands, arrives, receives, comes_from):
    buffer = jnp.zeros((room, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, buffer, begins, sends, lands, receives, axis_name=over)


def _move_emulated(room, over, rows, begins, sends, lands, arrives, receives, comes_from):
    everything = jax.lax.all_gather(rows, over)
    source, offset = locate(jnp.arange(room, dtype=jnp.int32), arrives, receives)
    begin = comes_from.at[source].get(mode="clip")
    return everything.at[source, begin + offset].get(mode="fill", fill_value=0)


def _move_forward(room_here, room_there, over, rows, route):
    return _move(room_there, over, rows, route), route


def _move_backward(room_here, room_there, over, route, d):
    return _move(room_here, over, d, route.reversed()), None


ragged_move.defvjp(_move_forward, _move_backward)
