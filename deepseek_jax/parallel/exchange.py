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

from deepseek_jax.parallel.rows import by_expert, exclusive, take_rows, window

BLOCK = 8  # rows that a TPU keeps together: sent one by one, all would be laid out anew before and after


class Entries(NamedTuple):
    """A device's entries in order of experts, and how many there are on every device. All int32."""

    experts: Int[Array, "w A"]
    order: Int[Array, "n"]  # entries in order of experts; w A for none, where each expert's are filled up to blocks
    position: Int[Array, "w A"]  # of each entry in that order
    counts: Int[Array, "P P E"]  # of places in it, by source, destination and the destination's expert


class Exchange(NamedTuple):
    """One round's journey."""

    slot: Int[Array, "w A"]  # of each entry; the number of slots for those of other rounds
    entry: Int[Array, "slots"]  # in each slot; any, or w A, in those that no entry has
    sizes: Int[Array, "E"]  # how many rows arrive for each own expert, those of the first one first
    dispatch: Callable[[jax.Array], jax.Array]  # slots -> rows in order of experts
    combine: Callable[[jax.Array], jax.Array]  # rows in order of experts -> slots


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
    entry = order.at[(bases[:, None] + ranks).ravel()].get(mode="clip")

    arriving = counts[:, me]
    starts, sizes = window(exclusive(arriving, axis=1), arriving, first, room)
    starts += room * jnp.arange(devices, dtype=jnp.int32)[:, None]
    there, back = by_expert(starts, sizes, slots)
    move = partial(jax.lax.all_to_all, axis_name=over, split_axis=0, concat_axis=0, tiled=True)
    dispatch = lambda rows: take_rows(move(rows), there, back[:, None])
    combine = lambda rows: move(take_rows(rows, back, there[:, None]))
    return Exchange(slot, entry, jnp.sum(sizes, axis=0), dispatch, combine)


def ragged_exchange(entries: Entries, number, room: int, over: tuple[str, ...], block: int = 1) -> Exchange:
    """By ragged_all_to_all: `room` rows a receiver, from whomever they come; a slot is an entry's place in order.

    Each source's rows for an expert travel by themselves, and land where that expert's rows are; in whole blocks, of
    which counts, places and room are multiples.
    """
    me = jax.lax.axis_index(over)
    experts, order, position, counts = entries
    route = ragged_route(counts, me, number * room, room)

    begins, ends = route.begins.ravel(), (route.begins + route.sends).ravel()
    inside = (position >= begins[experts]) & (position < ends[experts])
    slot = jnp.where(inside, position, order.size)
    dispatch = lambda rows: ragged_move(order.size, room, over, block, rows, route)
    combine = lambda rows: ragged_move(room, order.size, over, block, rows, route.reversed())
    return Exchange(slot, order, jnp.sum(route.receives, axis=0), dispatch, combine)


class Route(NamedTuple):
    """Which rows go from here to each device's experts, and come here from each device. All int32 [P, E]."""

    begins: Int[Array, "P E"]  # here, of those that go
    sends: Int[Array, "P E"]
    lands: Int[Array, "P E"]  # there
    arrives: Int[Array, "P E"]  # here, of those that come
    receives: Int[Array, "P E"]
    comes_from: Int[Array, "P E"]  # there

    def reversed(self) -> "Route":
        """The route that takes the rows back to where they were."""
        return Route(*self[3:], *self[:3])


def ragged_route(counts: Int[Array, "P P E"], me, first, room) -> Route:
    """The route of one round, which takes of every receiver's arrivals the `room` from `first` on.

    Args:
        counts: rows that each device (first axis) has for each expert of each device; they lie there by receiver and
            expert, and arrive by expert and source.
        me: this device.
        first: arrival, from 0, of this round's first row.
        room: rows that a receiver has place for.
    """
    by_source = lambda of: jnp.transpose(of, (2, 0, 1))
    arrive = by_source(_places(jnp.transpose(counts, (1, 2, 0))))
    lands, moves = window(arrive, counts, first, room)
    begins = _places(counts) + jnp.clip(first - arrive, 0, counts)
    return Route(begins[me], moves[me], lands[me], lands[:, me], moves[:, me], begins[:, me])


def _places(sizes):
    """Where runs begin that lie one after another along all axes but the first."""
    return exclusive(sizes.reshape(sizes.shape[0], -1), axis=1).reshape(sizes.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def ragged_move(
    room_here: int, room_there: int, over: tuple[str, ...], block: int, rows: Float[Array, "room_here D"], route: Route
) -> Float[Array, "room_there D"]:
    """Rows along a route, in whole blocks of them; rows of the result that nothing comes to are undefined.

    `jax.lax.ragged_all_to_all` where it exists; on CPU, which has none, a gather with the same offsets.
    The gradient goes the route back, whose offsets are known here; jax's own rule has to exchange them.
    """
    return _move(room_there, over, block, rows, route)


def _move(room, over, block, rows, route):
    branches = {"cpu": _move_emulated, "default": _move_ragged}
    branches = {name: partial(move, room // block, over) for name, move in branches.items()}
    blocks = rows.reshape(-1, block, rows.shape[1])
    moved = jax.lax.platform_dependent(blocks, *(of.ravel() // block for of in route), **branches)
    return moved.reshape(room, rows.shape[1])


def _move_ragged(room, over, rows, begins, sends, lands, arrives, receives, comes_from):
    # A buffer that depends on nothing would be made once for all layers of a scan, and copied by each, which writes
    # it; of what is worked out again nothing is taken out of the scan.
    @jax.checkpoint
    def send(rows, *place):
        buffer = jax.lax.empty((room, *rows.shape[1:]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, buffer, *place, axis_name=over)

    return send(rows, begins, sends, lands, receives)


def _move_emulated(room, over, rows, begins, sends, lands, arrives, receives, comes_from):
    everything = jax.lax.all_gather(rows, over)
    offset = jnp.arange(room, dtype=jnp.int32)[:, None] - arrives
    mine = (0 <= offset) & (offset < receives)
    source = jnp.argmax(mine, axis=1) // (arrives.size // everything.shape[0])
    place = jnp.sum(jnp.where(mine, comes_from + offset, 0), axis=1)
    return jnp.where(jnp.any(mine, axis=1)[:, None, None], everything[source, place], 0)


def _move_forward(room_here, room_there, over, block, rows, route):
    return _move(room_there, over, block, rows, route), route


def _move_backward(room_here, room_there, over, block, route, d):
    return _move(room_here, over, block, d, route.reversed()), None


ragged_move.defvjp(_move_forward, _move_backward)
