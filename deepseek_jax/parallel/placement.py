"""Which device holds which experts: the most loaded ones several times, so that devices have even loads.

A slot is a place for one expert; device d holds the slots from d S / devices on. `place_experts` fills them on the
host from measured loads. `spread` and `placed` then turn a layer's routing and weights to slots instead of experts.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config.model import check_whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """The expert in every slot of every layer.

    Args:
        table: int32 [L, S], the expert in each slot.
        experts: how many there are.
        devices: that share the slots, S / devices each, in order.

    Raises:
        ValueError: slots not divisible by devices, or a layer in which an expert has no slot.
    """

    table: np.ndarray
    experts: int
    devices: int

    def __post_init__(self) -> None:
        layers, slots = self.table.shape
        check_whole("placement: devices", self.devices)
        if slots % self.devices:
            raise ValueError(f"placement: {slots} slots are not divisible by {self.devices} devices")
        for layer in range(layers):
            held = np.unique(self.table[layer])
            if not np.array_equal(held, np.arange(self.experts)):
                raise ValueError(
                    f"placement: layer {layer} holds {len(held)} different experts, from {held[0]} to {held[-1]}, "
                    f"wanted all of 0 to {self.experts - 1}"
                )

    @cached_property
    def counts(self) -> np.ndarray:
        """int32 [L, E], how many slots hold each expert."""
        return np.stack([np.bincount(layer, minlength=self.experts) for layer in self.table]).astype(np.int32)

    @cached_property
    def replicas(self) -> np.ndarray:
        """int32 [L, E, most replicas], the slots that hold each expert; -1 past the last."""
        slots = np.full((*self.counts.shape, self.counts.max()), -1, np.int32)
        for layer, row in enumerate(self.table):
            order = np.argsort(row, kind="stable")
            number = np.arange(len(row)) - np.searchsorted(row[order], row[order])
            slots[layer, row[order], number] = order
        return slots


class Balance(NamedTuple):
    """The most loaded device's load over the mean, of each layer, float64 [L]; 1.0 is perfect, and a layer at rest."""

    before: np.ndarray  # every expert once, in order
    after: np.ndarray


def place_experts(
    loads: np.ndarray, *, slots: int, devices: int, nodes: int = 1, groups: int | None = None
) -> Placement:
    """Replicates the most loaded experts and packs the replicas so that devices have even loads.

    Each spare slot goes to the expert whose replicas are loaded most. Then the replicas, the heaviest first, each go
    to the least loaded device that has a slot left. Over several nodes, whole groups of experts are first packed
    into nodes in the same way, so that routing limited to groups keeps to few nodes. A layer for which all this
    would be worse than the experts in order keeps them in order.

    Args:
        loads: [L, E], rows that each expert was chosen for, in any unit.
        slots: E at least, and a multiple of devices.
        devices: over which experts are spread.
        nodes: that share the devices equally.
        groups: of experts with consecutive numbers, which stay on one node; by default every expert is one.

    Raises:
        ValueError: numbers that do not divide, too few slots, or loads that are negative or not finite.

    Source: github deepseek-ai/EPLB, hierarchical and global load balancing. Differs: never worse than no placement.
    """
    loads = np.asarray(loads, np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"placement: got loads of shape {loads.shape}, wanted layers x experts")
    if not (np.isfinite(loads) & (loads >= 0)).all():
        wrong = loads[~(np.isfinite(loads) & (loads >= 0))][0]
        raise ValueError(f"placement: got a load of {wrong}, wanted finite numbers from 0")
    experts = loads.shape[1]
    groups = experts if groups is None else groups
    for name, number in {"slots": slots, "devices": devices, "nodes": nodes, "groups": groups}.items():
        check_whole(f"placement: {name}", number)
    if slots < experts:
        raise ValueError(f"placement: {slots} slots do not hold {experts} experts; give a slot to each at least")
    _check_divides("slots", slots, "devices", devices)
    _check_divides("devices", devices, "nodes", nodes)
    _check_divides("experts", experts, "groups", groups)
    _check_divides("groups", groups, "nodes", nodes)
    table = np.stack([_layer(load, slots, devices, nodes, groups) for load in loads])
    return Placement(table=table.astype(np.int32), experts=experts, devices=devices)


def balance(loads: np.ndarray, placement: Placement) -> Balance:
    """How even the loads of devices are, each expert's rows shared equally by its replicas.

    Args:
        loads: [L, E] as for `place_experts`; those of another day show how well a placement lasts.
        placement: of the same layers and experts.

    Raises:
        ValueError: loads of another shape than the placement's layers and experts.
    """
    loads = np.asarray(loads, np.float64)
    if loads.shape != placement.counts.shape:
        raise ValueError(f"balance: got loads of shape {loads.shape}, wanted {placement.counts.shape}, as placed")
    plain = _plain_device(loads.shape[1], placement.devices)
    before = [np.bincount(plain, load, placement.devices) for load in loads]
    after = [_device_loads(load, row, placement.devices) for load, row in zip(loads, placement.table, strict=True)]
    return Balance(*(np.asarray([_unevenness(device) for device in layers]) for layers in (before, after)))


def spread(
    experts_BTA: Int[Array, "B T A"], replicas_ER: Int[Array, "E replicas"], counts_E: Int[Array, "E"]
) -> Int[Array, "B T A"]:
    """The slot for each chosen expert: its replicas take turns, by the row's position.

    Args:
        experts_BTA: int32, 0 to E - 1.
        replicas_ER: of this layer, `Placement.replicas`.
        counts_E: of this layer, `Placement.counts`.
    """
    B, T, _ = experts_BTA.shape
    position = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T, 1)
    turn = position % jnp.asarray(counts_E)[experts_BTA]
    return jnp.asarray(replicas_ER)[experts_BTA, turn]


def placed(weight_EDM: Float[Array, "E D M"], table_S: Int[Array, "S"]) -> Float[Array, "S D M"]:
    """A layer's stacked weights, a matrix for each slot; the gradient adds up what replicas get.

    Args:
        weight_EDM: one matrix an expert.
        table_S: of this layer, `Placement.table`.
    """
    return jnp.take(weight_EDM, jnp.asarray(table_S), axis=0)


def _layer(load: np.ndarray, slots: int, devices: int, nodes: int, groups: int) -> np.ndarray:
    """The expert in each slot."""
    node = np.repeat(_packed(load.reshape(groups, -1).sum(axis=1), nodes), len(load) // groups)
    own = [np.flatnonzero(node == n) for n in range(nodes)]
    balanced = np.concatenate([_packed_slots(load, experts, slots // nodes, devices // nodes) for experts in own])
    plain = _plain_slots(len(load), slots, devices)
    return min(balanced, plain, key=lambda row: _device_loads(load, row, devices).max())


def _packed_slots(load: np.ndarray, experts: np.ndarray, slots: int, devices: int) -> np.ndarray:
    """The expert in each slot of one node."""
    copies = _copies(load[experts], slots)
    held, share = np.repeat(experts, copies), np.repeat(load[experts] / copies, copies)
    return held[np.argsort(_packed(share, devices), kind="stable")]


def _copies(loads: np.ndarray, slots: int) -> np.ndarray:
    """How many slots each expert gets, at least one: each further slot to the one loaded most a slot."""
    copies = np.ones(len(loads), np.int64)
    most = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(most)
    for _ in range(slots - len(loads)):
        expert = most[0][1]
        copies[expert] += 1
        heapq.heapreplace(most, (-loads[expert] / copies[expert], expert))
    return copies


def _packed(loads: Sequence[float] | np.ndarray, bins: int) -> np.ndarray:
    """The bin of each load, as many in each: the heaviest first, each to the lightest bin with room."""
    room = [len(loads) // bins] * bins
    lightest = [(0.0, b) for b in range(bins)]
    chosen = np.empty(len(loads), np.int64)
    for item in np.argsort(-np.asarray(loads), kind="stable"):
        total, b = heapq.heappop(lightest)
        chosen[item] = b
        room[b] -= 1
        if room[b]:
            heapq.heappush(lightest, (total + loads[item], b))
    return chosen


def _plain_device(experts: int, devices: int) -> np.ndarray:
    """The device of each expert when each has one slot, in order."""
    return np.arange(experts) * devices // experts


def _plain_slots(experts: int, slots: int, devices: int) -> np.ndarray:
    """The expert in each slot of that placement; spare slots hold experts of the same device, or else of the last."""
    device = _plain_device(experts, devices)
    own = [np.flatnonzero(device == d) for d in range(devices)]
    rows = (np.resize(held if len(held) else d * experts // devices, slots // devices) for d, held in enumerate(own))
    return np.concatenate(list(rows))


def _device_loads(load: np.ndarray, row: np.ndarray, devices: int) -> np.ndarray:
    share = load / np.bincount(row, minlength=len(load))
    return share[row].reshape(devices, -1).sum(axis=1)


def _unevenness(device_loads: np.ndarray) -> float:
    mean = device_loads.mean()
    return float(device_loads.max() / mean) if mean else 1.0


def _check_divides(name: str, number: int, of: str, divisor: int) -> None:
    if number % divisor:
        raise ValueError(f"placement: {number} {name} are not divisible by {divisor} {of}")
