"""The routed experts of a layer on a mesh, each device computing the rows of the experts that it holds."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.ops.low_rank import LowRank, Matrix, apart, together
from deepseek_jax.ops.packed import Packed
from deepseek_jax.parallel.exchange import BLOCK, Entries, Exchange, fixed_exchange, ragged_exchange
from deepseek_jax.parallel.rounds import in_rounds
from deepseek_jax.parallel.rows import exclusive, locate, sum_rows, swiglu_groups, take_rows, window
from deepseek_jax.sharding import Transport

_ROWS_OF_BLOCKS = 64  # of an expert, from one device in the mean, at least: blocks then waste a twentieth
LAYER_OF = "layer_of_"  # names what reads one layer of so many, for the cost analysis of a compiled program


def routed_experts(
    x_BTD: Float[Array, "B T D"],
    weights_BTA: Float[Array, "B T A"],
    experts_BTA: Int[Array, "B T A"],
    gate_EDM: Matrix,
    up_EDM: Matrix,
    down_EMD: Matrix,
    *,
    mesh: Mesh | AbstractMesh,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    gathered: tuple[str, ...],
    transport: Transport,
    capacity_factor: float,
    over: tuple[str, ...] = ("expert",),
    inner: str | None = "tensor",
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """`ops.experts.expert_mlp` of all B T rows, with the experts spread over mesh axes.

    No row is dropped. A round has room for `capacity_factor` times the rows that an even load gives; what does not fit
    goes in further rounds, which cost nothing where there are none. Where the devices along `inner` hold parts of every
    expert's inner width, they add their parts up at the end, in the dtype of x.

    Args:
        x_BTD: lies on the mesh with B over `rows` and T over `columns`, whole over `inner`; so do the next two.
        weights_BTA: float32, of the routing; they travel with the rows (`ops.experts.weighed_swiglu`).
        experts_BTA: int32, 0 to E - 1; E is nobody's, costs nothing and adds nothing.
        gate_EDM: [*L, E, D, M] with E over `over`, D over `gathered`, M over `inner`; what low rank it has beside it as
            its axes. A packed one is cut by E alone.
        up_EDM: likewise.
        down_EMD: likewise.
        mesh: with Auto axes, those named here among them.
        rows: axes of B.
        columns: axes of T, if any.
        gathered: axes of D. The weights are gathered over them, and their gradient is scattered back.
        transport: how rows reach their experts. "all_gather" sends all rows to all devices and suits few rows, as in
            decoding; "all_to_all" sends equal parts between all pairs of devices, padded; "ragged_all_to_all" sends
            just the rows that there are.
        capacity_factor: room of a round, in even loads; 1.0 wastes nothing when the load is even, more
            makes further rounds rarer.
        over: axes of E, the first of them the slowest, as in a PartitionSpec. Where none of them is in `rows` or
            `columns`, rows lie whole over them, which "all_gather" then need not do; the result is cut by them all
            the same.
        inner: axis of M, or None: every expert is whole on its device.
        layer: which one of a stack of layers, where the weights are a whole stack's, [L, E, D, M]: what a scan over
            layers would copy is read where it lies. Not for gradients.

    Returns:
        In the dtype of x, with B over `rows`, followed by `over` if rows lie whole over it, and T over `columns`.

    Raises:
        ValueError: an unknown transport, a capacity_factor that is not above 0, rows that are not cut by all of `over`
            but to be sent over it, rows cut by a part of it, rows cut by `inner`, or experts not divisible by the axes.
    """
    if transport not in get_args(Transport):
        raise ValueError(f"transport: got {transport!r}, wanted one of {', '.join(get_args(Transport))}")
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor: got {capacity_factor}, wanted a finite number above 0, for example 1.25")
    _check_axes(rows, columns, over, inner, transport)
    devices = math.prod(mesh.shape[axis] for axis in over)
    if gate_EDM.shape[-3] % devices:
        axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in over)
        raise ValueError(f"{gate_EDM.shape[-3]} experts are not divisible by mesh {_axes(over)} {axes}")
    cutting = (*rows, *columns)
    missing = tuple(axis for axis in over if axis not in cutting)
    lie, cut = PartitionSpec(rows, columns), PartitionSpec((*rows, *missing), columns)
    leading = (*(None,) * (gate_EDM.ndim - 3), over)
    gate, up = (_placed(weight, leading, gathered, inner) for weight in (gate_EDM, up_EDM))
    down = _placed(down_EMD, leading, inner, gathered)
    terms = _Terms(over, tuple(axis for axis in cutting if axis not in over), capacity_factor)
    compute = _compute(transport, devices, not missing)
    on_device = partial(_on_device, compute=compute, terms=terms, gathered=gathered, inner=inner)
    # The loops of the grouped matmul carry arrays that check_vma would want declared as varying, in code that knows
    # no mesh.
    in_specs = (lie, lie, lie, gate, up, down, PartitionSpec())
    spread = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=cut, check_vma=False)
    return spread(x_BTD, weights_BTA, experts_BTA, gate_EDM, up_EDM, down_EMD, layer)


def _placed(weight: Matrix, leading: tuple, rows: Any, columns: Any) -> Any:
    """Which axes cut a weight, and of one that has parts each of them."""
    if isinstance(weight, LowRank):
        a, b = PartitionSpec(*leading, rows, None), PartitionSpec(*leading, None, columns)
        return LowRank(w=_placed(weight.w, leading, rows, columns), a=a, b=b, scale=weight.scale)
    if isinstance(weight, Packed) and (rows or columns):
        raise ValueError("experts: got packed ones that a mesh cuts within, wanted a layout to serve or whole weights")
    return jax.tree.map(lambda _: PartitionSpec(*leading, rows, columns), weight)


def _gathered_along(weight: Matrix, axis: int, axes: tuple[str, ...]) -> Matrix:
    """A weight that is cut along its rows, axis -2, or its columns, -1, as a whole one."""
    gather = lambda part: jax.lax.all_gather(part, axes, axis=axis, tiled=True)
    if not axes:
        return weight
    if not isinstance(weight, LowRank):
        return gather(weight)
    a, b = (gather(weight.a), weight.b) if axis == -2 else (weight.a, gather(weight.b))
    return LowRank(w=gather(weight.w), a=a, b=b, scale=weight.scale)


class _Terms(NamedTuple):
    """What all devices agree on."""

    over: tuple[str, ...]  # axes of the experts
    others: tuple[str, ...]  # further axes of the rows
    capacity_factor: float


def _check_axes(rows, columns, over, inner, transport):
    cutting = (*rows, *columns)
    missing = [axis for axis in over if axis not in cutting]
    got = f"rows and columns: got {rows} and {columns}, wanted"
    if missing and transport != "all_gather":
        raise ValueError(f"{got} {_axes(missing)} {', '.join(missing)} among them for {transport}; or use all_gather")
    if missing and len(missing) < len(over):
        raise ValueError(f"{got} all of {', '.join(over)} among them or none; add {', '.join(missing)}")
    if inner in cutting:
        raise ValueError(f"{got} no {inner} among them, which cuts the inner width; take it out, or set inner to None")


def _axes(names) -> str:
    return "axis" if len(names) == 1 else "axes"


def _on_device(x_BTD, weights_BTA, experts_BTA, gate, up, down, layer, *, compute, terms, gathered, inner):
    """The part of routed_experts that one device does."""
    flat = lambda a: a.reshape(-1, a.shape[-1])
    matrices = tuple(_gathered_along(weight, axis, gathered) for weight, axis in ((gate, -2), (up, -2), (down, -1)))
    y = compute(flat(x_BTD), flat(weights_BTA), flat(experts_BTA), matrices, layer, terms)
    y = y.reshape(-1, *x_BTD.shape[1:])
    return y if inner is None else _sum_of_parts(y, inner)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_of_parts(y, axis):
    """psum, whose gradient needs no collective.

    Without check_vma a shard_map gives each of the n devices that hold the same output 1/n of its gradient, and
    psum's own rule would add these up again.
    """
    return jax.lax.psum(y, axis)


def _sum_forward(y, axis):
    return _sum_of_parts(y, axis), None


def _sum_backward(axis, _, d):
    return (d * jax.lax.axis_size(axis),)


_sum_of_parts.defvjp(_sum_forward, _sum_backward)


def _at_home(x, weights, experts, matrices, layer, terms):
    """All experts on this device."""
    if layer is not None:
        stacks, local = matrices[0].shape[:2]
        experts = jnp.where(experts < local, experts + layer * local, stacks * local)
        with jax.named_scope(f"{LAYER_OF}{stacks}"):
            return expert_mlp(x, weights, experts, *matrices)
    return expert_mlp(x, weights, experts, *matrices)


def _gathered(x, weights, experts, matrices, layer, terms):
    """Every device sees all rows of the axes and adds what its own experts make of them."""
    everyone = partial(jax.lax.all_gather, axis_name=terms.over, tiled=True)
    return _part(everyone(x), everyone(weights), everyone(experts), matrices, layer, terms)


def _part(x, weights, experts, matrices, layer, terms):
    """What the own experts add to rows that all devices of the axes hold; each keeps a part of the sums."""
    local = matrices[0].shape[-3]
    own = experts - local * jax.lax.axis_index(terms.over)
    own = jnp.where((0 <= own) & (own < local), own, local)  # those of other devices come last in order
    order, position = _in_order(own)
    counts = _counts(own, local)
    numbers = (order, position, counts, layer)
    room = _room(terms.capacity_factor, experts.size / jax.lax.axis_size(terms.over), experts.size)
    rounds = -(-jnp.sum(counts) // room)  # may differ between devices: nothing in them is collective
    one_round = partial(_kept_round, room)
    y = _all_rounds(one_round, rounds, room < experts.size, (x, weights, matrices), numbers).astype(x.dtype)
    return jax.lax.psum_scatter(y, terms.over, tiled=True)


def _kept_round(room, number, arrays, numbers):
    """What the own experts make of the next `room` entries among those that are theirs."""
    x, weights, matrices = arrays
    order, position, counts, layer = numbers
    first = number * room
    _, sizes = window(exclusive(counts), counts, first, room)
    positions = first + jnp.arange(room, dtype=jnp.int32)
    positions = jnp.where(positions < jnp.sum(counts), positions, order.size)
    entry = order.at[positions].get(mode="fill", fill_value=order.size)
    inside = (position >= first) & (position < jnp.minimum(first + room, jnp.sum(counts)))
    slot = jnp.where(inside, position - first, room)
    rows, by_row = _into_slots(x, weights, entry, slot)
    out = _swiglu(rows, by_row, matrices, sizes, layer)
    filled = (entry < weights.size)[:, None]
    total = jnp.zeros(x.shape, jnp.float32)
    return total.at[entry // weights.shape[1]].add(jnp.where(filled, out, 0).astype(jnp.float32), mode="drop")


def _into_slots(x, weights, entry, slot):
    """Of the entry in each slot its row of x and its weight; of none some row and 0."""
    by_row = take_rows(weights.reshape(-1, 1), entry, slot.reshape(-1, 1))
    by_row = jnp.where((entry < weights.size)[:, None], by_row, 0)
    return take_rows(x, entry // weights.shape[1], slot), by_row


def _swiglu(rows, weights, matrices, sizes, layer):
    """Rows through the experts of a layer; the other layers of a stack get none, and are not read."""
    if layer is not None:
        stacks, experts = matrices[0].shape[:2]
        sizes = jax.lax.dynamic_update_slice(jnp.zeros(stacks * experts, sizes.dtype), sizes, (layer * experts,))
        with jax.named_scope(f"{LAYER_OF}{stacks}"):
            return swiglu_groups(rows, *matrices, sizes, weights)
    return swiglu_groups(rows, *matrices, sizes, weights)


def _sent(x, weights, experts, matrices, layer, terms, *, trip: Callable[..., Exchange], fullest, shares, block):
    """Rows travel to the devices of their experts and back."""
    devices = jax.lax.axis_size(terms.over)
    number = devices * matrices[0].shape[-3]
    block = block if experts.size >= _ROWS_OF_BLOCKS * number else 1
    order, position, counts = _in_blocks(experts, number, block)
    counts = jax.lax.all_gather(counts, terms.over)
    entries = Entries(experts, order, position, counts.reshape(devices, devices, -1))
    mean = experts.size + (block - 1) * number // 2  # half of an expert's last block is empty
    balanced, worst = shares(mean, order.size, devices)
    room = _room(terms.capacity_factor, balanced, worst)
    rounds = -(-fullest(jnp.sum(entries.counts, axis=2)) // room)
    if terms.others:  # the same loop everywhere: all devices meet in its collectives
        rounds = jax.lax.pmax(rounds, terms.others)
    blocks = {"block": block} if block > 1 else {}
    one_round = partial(_sent_round, partial(trip, room=room, over=terms.over, **blocks))
    numbers = (entries, layer)
    return _all_rounds(one_round, rounds, room < worst, (x, weights, matrices), numbers).astype(x.dtype)


def _sent_round(trip, number, arrays, numbers):
    """One journey of the rows that fit."""
    x, weights, matrices = arrays
    entries, layer = numbers
    go = trip(entries, number)
    with jax.named_scope("dispatch"):
        rows, by_row = map(go.dispatch, _into_slots(x, weights, go.entry, go.slot))
    out = _swiglu(rows, by_row, matrices, go.sizes, layer)
    with jax.named_scope("combine"):
        return sum_rows(go.combine(out), go.slot, go.entry // weights.shape[1])


_FIXED = partial(
    _sent,
    trip=fixed_exchange,
    fullest=jnp.max,
    block=1,
    shares=lambda mean, most, devices: (mean / devices, most),  # of a pair: even, and all that the source has
)
_RAGGED = partial(
    _sent,
    trip=ragged_exchange,
    fullest=lambda pairs: jnp.max(jnp.sum(pairs, axis=0)),
    block=BLOCK,
    shares=lambda mean, most, devices: (mean, most * devices),  # of a receiver: even, and all that there are
)


def _compute(transport: Transport, devices: int, spread: bool):
    """What each device does with its rows, when they are spread over the axes or lie whole on all their devices."""
    if devices == 1:
        return _at_home
    if not spread:
        return _part
    return {"all_gather": _gathered, "all_to_all": _FIXED, "ragged_all_to_all": _RAGGED}[transport]


def _all_rounds(one_round, count, several, arrays, numbers):
    """in_rounds, without a loop where one round has room for any load. What is frozen has no gradient there."""
    if not several:
        return one_round(0, arrays, numbers)
    frozen, rest = apart(arrays)
    run = lambda number, rest, given: one_round(number, together(given[0], rest), given[1])
    return in_rounds(run, count, rest, (frozen, numbers))


def _in_order(experts):
    """Entries in order of experts, and the place of each in that order."""
    order = jnp.argsort(experts.ravel(), stable=True).astype(jnp.int32)
    return order, jnp.argsort(order).astype(jnp.int32).reshape(experts.shape)


def _in_blocks(experts, number, block):
    """The same of places in order of experts, each expert's filled up to whole blocks, and how many each then has.

    `experts.size` in a place is none. What is nobody's has no place, and a number past the last.
    """
    order, position = _in_order(experts)
    counts = _counts(experts, number)
    if block == 1:
        return order, position, counts
    places = -(-counts // block) * block
    begin, begins = exclusive(counts), exclusive(places)
    slots = -(-(experts.size + (block - 1) * number) // block) * block
    run, offset = locate(jnp.arange(slots, dtype=jnp.int32), begins, counts)
    entry = jnp.where(run < number, order.at[begin[run] + offset].get(mode="clip"), experts.size)
    return entry, jnp.where(experts < number, position + (begins - begin)[experts], slots), places


def _counts(experts, number):
    return jnp.sum(experts.reshape(-1, 1) == jnp.arange(number), axis=0, dtype=jnp.int32)


def _room(capacity_factor: float, balanced: int | float, worst: int) -> int:
    """Rows of a round: `capacity_factor` times the even share, and never more than there can be.

    In whole eights; of many rows in whole tiles of the grouped products, a power of two that adds no more than 1/32.
    """
    wanted = math.ceil(capacity_factor * balanced)
    whole = min(512, max(8, 1 << (wanted // 32).bit_length() >> 1))
    return min(whole * math.ceil(wanted / whole), worst)
