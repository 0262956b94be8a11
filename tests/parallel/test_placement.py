"""Replicas of loaded experts: complete, evenly loaded, never worse than none, and invisible in the result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.parallel.placement import Placement, balance, place_experts, placed, spread


def zipf(layers: int, experts: int, exponent: float = 1.0) -> np.ndarray:
    """Loads of which the n-th largest is 1 / n^exponent, in another order in every layer."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(1 / np.arange(1, experts + 1) ** exponent) for _ in range(layers)])


def device_loads(loads: np.ndarray, placement: Placement) -> np.ndarray:
    """[L, devices], one slot at a time."""
    totals = np.zeros((len(loads), placement.devices))
    each = placement.table.shape[1] // placement.devices
    for layer, row in enumerate(placement.table.tolist()):
        for slot, expert in enumerate(row):
            totals[layer, slot // each] += loads[layer, expert] / row.count(expert)
    return totals


@st.composite
def cases(draw):
    """Loads of 2 layers; slots, devices, nodes and groups that divide."""
    nodes, groups = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 4), (3, 3)]))
    devices = nodes * draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 6))
    slots = devices * (-(-experts // devices) + draw(st.integers(0, 3)))
    load = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10_000))
    loads = draw(st.lists(load, min_size=2 * experts, max_size=2 * experts))
    how = {"slots": slots, "devices": devices, "nodes": nodes, "groups": groups}
    return np.asarray(loads).reshape(2, experts), how


@given(cases())
def test_every_expert_has_slots_and_no_layer_gets_worse(case):
    loads, how = case
    placement = place_experts(loads, **how)
    experts = loads.shape[1]
    assert placement.table.shape == (2, how["slots"]) and placement.table.dtype == np.int32
    for table, replicas, counts in zip(placement.table, placement.replicas, placement.counts, strict=True):
        for expert in range(experts):
            slots = np.flatnonzero(table == expert)
            assert counts[expert] == len(slots) >= 1
            np.testing.assert_array_equal(replicas[expert], [*slots, *[-1] * (replicas.shape[1] - len(slots))])
    before, after = balance(loads, placement)
    assert (1 <= after + 1e-9).all() and (after <= before + 1e-9).all()
    got = device_loads(loads, placement)
    mean = np.where(loads.any(axis=1), got.mean(axis=1), 1)
    np.testing.assert_allclose(after, np.where(loads.any(axis=1), got.max(axis=1) / mean, 1), rtol=1e-9)


@given(cases())
def test_a_group_stays_on_one_node(case):
    loads, how = case
    placement = place_experts(loads, **how)
    node_of_slot = np.arange(how["slots"]) // (how["slots"] // how["nodes"])
    group_of_expert = np.arange(loads.shape[1]) // (loads.shape[1] // how["groups"])
    for table in placement.table:
        for group in range(how["groups"]):
            assert len(set(node_of_slot[group_of_expert[table] == group])) == 1


@pytest.mark.parametrize(("exponent", "worst_before"), [(0.5, 1.8), (1.0, 5.2), (1.2, 7.9)])
def test_a_skewed_load_becomes_even(exponent, worst_before):
    """256 experts on 32 devices of 9 slots: with one spare slot a device, at most 1.1 of the mean."""
    loads = zipf(4, 256, exponent)
    before, after = balance(loads, place_experts(loads, slots=288, devices=32))
    assert before.max() > worst_before
    assert after.max() < 1.1


def test_devices_of_a_node_have_even_loads():
    """Between nodes it is the groups that set them: the most loaded node is what the most loaded device shows."""
    loads = zipf(4, 256)
    placement = place_experts(loads, slots=288, devices=32, nodes=4, groups=8)
    before, after = balance(loads, placement)
    nodes = device_loads(loads, placement).reshape(4, 4, 8).sum(axis=2)
    assert before.max() > 5.2
    assert (after / (nodes.max(axis=1) / nodes.mean(axis=1))).max() < 1.1


def test_spare_slots_go_to_the_most_loaded():
    """By hand: 60, 20, 10 and 10 in 8 slots become four of 15 and four of 10; an even load takes all four devices."""
    placement = place_experts(np.array([[10, 60, 10, 20]]), slots=8, devices=4)
    np.testing.assert_array_equal(placement.counts, [[1, 4, 1, 2]])
    np.testing.assert_allclose(device_loads(np.array([[10, 60, 10, 20]]), placement), [[25, 25, 25, 25]])


def test_what_a_load_of_another_day_makes_of_a_placement():
    placement = place_experts(np.array([[3, 1, 1, 1]]), slots=6, devices=2)
    before, after = balance(np.array([[0, 0, 0, 8]]), placement)
    assert before[0] == 2.0 and after[0] == 2.0 / len(set(placement.replicas[0, 3] // 3) - {-1})


def test_replicas_take_turns_and_hold_the_expert():
    loads = zipf(2, 12)
    placement = place_experts(loads, slots=20, devices=4)
    experts = (
        jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 50, 3)), jnp.int32).at[:, :, 0].set(loads[0].argmax())
    )
    slots = np.asarray(jax.jit(spread)(experts, placement.replicas[0], placement.counts[0]))
    assert slots.dtype == np.int32
    np.testing.assert_array_equal(placement.table[0][slots], experts)
    heaviest = np.bincount(slots[:, :, 0].ravel(), minlength=20)
    taken = heaviest[heaviest > 0]
    assert len(taken) == placement.counts[0].max() > 2 and taken.max() - taken.min() <= 1


def test_placed_experts_give_the_same_result_and_gradient():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    x, weights, d_y = normal(20, 8), normal(20, 3), normal(20, 8)
    matrices = normal(6, 8, 8), normal(6, 8, 8), normal(6, 8, 8)
    experts = jnp.asarray(rng.integers(0, 6, (4, 5, 3)), jnp.int32)
    placement = place_experts(np.array([[9, 1, 5, 1, 1, 1]]), slots=10, devices=5)

    def plain(x, weights, *matrices):
        return expert_mlp(x, weights, experts.reshape(20, 3), *matrices)

    def replicated(x, weights, *matrices):
        slots = spread(experts, placement.replicas[0], placement.counts[0]).reshape(20, 3)
        return expert_mlp(x, weights, slots, *(placed(weight, placement.table[0]) for weight in matrices))

    run = lambda function: jax.jit(lambda *arrays: (function(*arrays), jax.vjp(function, *arrays)[1](d_y)))
    some, other = (jax.tree.leaves(run(function)(x, weights, *matrices)) for function in (plain, replicated))
    for got, wanted in zip(other, some, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("loads", "wrong", "says"),
    [
        ([[1.0, 2.0]], {"slots": 1}, "1 slots do not hold 2 experts; give a slot to each at least"),
        ([[1.0, 2.0]], {"slots": 3}, "3 slots are not divisible by 2 devices"),
        ([[1.0, 2.0]], {"nodes": 4}, "2 devices are not divisible by 4 nodes"),
        ([[1.0, 2.0]], {"groups": 3}, "2 experts are not divisible by 3 groups"),
        ([[1.0, 2.0]], {"nodes": 2, "groups": 1}, "1 groups are not divisible by 2 nodes"),
        ([[1.0, 2.0]], {"devices": 0}, "devices: got 0, wanted a whole number from 1"),
        ([[1.0, -2.0]], {}, "got a load of -2.0, wanted finite numbers from 0"),
        ([[1.0, float("nan")]], {}, "got a load of nan, wanted finite numbers from 0"),
        ([1.0, 2.0], {}, "got loads of shape (2,), wanted layers x experts"),
    ],
)
def test_bad_numbers_are_refused(loads, wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        place_experts(np.array(loads), **{"slots": 4, "devices": 2} | wrong)


def test_a_placement_must_hold_every_expert():
    with pytest.raises(ValueError, match="layer 1 holds 2 different experts, from 0 to 2, wanted all of 0 to 2"):
        Placement(table=np.array([[0, 1, 2, 0], [0, 2, 2, 0]]), experts=3, devices=2)
    with pytest.raises(ValueError, match="4 slots are not divisible by 3 devices"):
        Placement(table=np.array([[0, 1, 2, 0]]), experts=3, devices=3)
    with pytest.raises(ValueError, match=re.escape("got loads of shape (1, 4), wanted (1, 3), as placed")):
        balance(np.ones((1, 4)), Placement(table=np.array([[0, 1, 2, 0]]), experts=3, devices=2))
