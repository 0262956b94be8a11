"""Experts over devices give what one device gives, forward and gradient; eight devices in a process of their own."""

import itertools
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from deepseek_jax.ops.experts import expert_mlp, tiled_matmul
from deepseek_jax.parallel import exchange, rows
from deepseek_jax.parallel import experts as experts_module
from deepseek_jax.parallel.exchange import ragged_route
from deepseek_jax.parallel.experts import routed_experts
from deepseek_jax.parallel.rounds import in_rounds
from deepseek_jax.parallel.rows import by_expert, sum_rows, swiglu_groups, take_rows
from deepseek_jax.sharding import AXES, make_mesh
from tests.laws import fixture_of, found_of

B, T, D, M, E, A = 8, 8, 8, 8, 16, 3
TRANSPORTS = ("all_gather", "all_to_all", "ragged_all_to_all")
ENOUGH = 100.0  # times the even load is more than there can be
COLLECTIVES = ("all-gather", "all-to-all", "ragged-all-to-all")
NAMES = ("y", "d x", "d weights", "d gate", "d up", "d down")


class Place(NamedTuple):
    """A mesh, and how arrays lie on it."""

    sizes: dict[str, int]
    columns: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("data", "fsdp", "expert")
    over: tuple[str, ...] = ("expert",)
    inner: str | None = "tensor"
    length: int = T  # of a sequence

    def run(self, *arrays, devices=None, **options):
        mesh = make_mesh(devices, **self.sizes)
        how = {name: getattr(self, name) for name in ("rows", "columns", "gathered", "over", "inner")}
        return routed_experts(*arrays, mesh=mesh, **how, **options)

    def sequences(self, *arrays: jax.Array) -> list[jax.Array]:
        """All B T rows of arrays, in sequences of this length."""
        return [a.reshape(-1, self.length, a.shape[-1]) for a in arrays]


WIDE = Place({"expert": 8})
PARTS = Place({"expert": 4, "tensor": 2})
FSDP = Place({"fsdp": 2, "expert": 4}, (), ("fsdp",))
LONG = Place({"data": 2, "expert": 2, "context": 2}, ("context",), ("fsdp", "context"))
THIN = Place({"expert": 2, "tensor": 4})
IDLE = Place({"context": 2, "expert": 2, "tensor": 2}, (), ("fsdp", "context"))  # context cuts weights and no rows
NO_EXPERTS = Place({"fsdp": 4, "tensor": 2}, (), ("fsdp",))
WHOLE_ROWS = Place({"fsdp": 2, "expert": 2, "tensor": 2}, (), (), ("data", "fsdp"))
# experts over two axes
TWO = ("expert", "tensor")
ALL_ROWS = ("data", "fsdp", "expert", "tensor")
BOTH = Place({"expert": 4, "tensor": 2}, ("context", "tensor"), over=TWO, inner=None)
BOTH_THIN = Place({"expert": 2, "tensor": 4}, ("context", "tensor"), over=TWO, inner=None)
BOTH_LONG = Place({"context": 2, "expert": 2, "tensor": 2}, ("context", "tensor"), ("context",), over=TWO, inner=None)
TURNED = Place({"expert": 4, "tensor": 2}, ("context", "tensor"), over=("tensor", "expert"), inner=None)
STEP = Place({"expert": 4, "tensor": 2}, rows=ALL_ROWS, over=TWO, inner=None, length=1)
STEP_THIN = Place({"expert": 2, "tensor": 4}, rows=ALL_ROWS, over=TWO, inner=None, length=1)
STEP_FSDP = Place({"fsdp": 2, "expert": 2, "tensor": 2}, rows=ALL_ROWS, over=TWO, inner=None, length=1)
BOTH_WHOLE = Place({"fsdp": 2, "expert": 2, "tensor": 2}, rows=("data", "fsdp"), over=TWO, inner=None)


def inputs() -> tuple[list[jax.Array], jax.Array]:
    """x, weights, experts, gate, up and down of results near 1; and a gradient of the result."""
    rng = np.random.default_rng(0)
    normal = lambda scale, *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    matrices = normal(D**-0.5, E, D, M), normal(D**-0.5, E, D, M), normal(M**-0.5, E, M, D)
    return [normal(1, B, T, D), normal(0.5, B, T, A), routings()["random"], *matrices], normal(0.3, B, T, D)


def routings() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        "random": jnp.asarray([rng.permutation(E)[:A] for _ in range(B * T)], jnp.int32).reshape(B, T, A),
        "one expert": jnp.full((B, T, A), 5, jnp.int32),
        "last device": jnp.asarray(rng.integers(E - 2, E, (B, T, A)), jnp.int32),
    }


def with_gradient(function: Callable) -> Callable:
    """(x, weights, experts, gate, up, down), gradient of y -> y and the gradients in all but the experts."""

    def run(arrays, d_y):
        x, weights, experts, *rest = arrays
        y, pull = jax.vjp(lambda x, weights, *rest: function(x, weights, experts, *rest), x, weights, *rest)
        return y, *pull(d_y)

    return jax.jit(run)


@with_gradient
def on_one_device(x, weights, experts, *matrices):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return expert_mlp(flat(x), flat(weights), flat(experts), *matrices).reshape(x.shape)


def equals_one_device(where: Place, transport: str, capacity_factor: float) -> None:
    (x, weights, _, *matrices), d_y = inputs()
    x, weights, d_y = where.sequences(x, weights, d_y)
    run = with_gradient(lambda *arrays: where.run(*arrays, transport=transport, capacity_factor=capacity_factor))
    for routing, experts in routings().items():
        arrays = [x, weights, *where.sequences(experts), *matrices]
        wanted = on_one_device(arrays, d_y)
        assert all(0.1 < jnp.abs(value).max() < 20 for value in wanted)
        for name, got, value in zip(NAMES, run(arrays, d_y), wanted, strict=True):
            message = f"{name}, {routing}, {where}, {transport}, capacity_factor {capacity_factor}"
            np.testing.assert_allclose(got, value, rtol=0, atol=2e-5, err_msg=message)


def equals_one_device_by_every_transport(places: tuple[Place, ...]) -> None:
    for where, transport, capacity_factor in itertools.product(places, TRANSPORTS, (1.0, ENOUGH)):
        equals_one_device(where, transport, capacity_factor)


def a_layer_of_a_stack_equals_its_slice(where: Place, transport: str) -> None:
    (x, weights, experts, *matrices), _ = inputs()
    tokens = where.sequences(x, weights, experts)
    stacks = [jnp.stack([-weight, weight, weight[::-1]]) for weight in matrices]
    run = jax.jit(lambda *arrays, layer: where.run(*arrays, layer=layer, transport=transport, capacity_factor=1.0))
    for k in range(3):
        slices = [stack[k] for stack in stacks]
        got, sliced = run(*tokens, *stacks, layer=jnp.int32(k)), run(*tokens, *slices, layer=None)
        wanted = expert_mlp(*(a.reshape(B * T, -1) for a in tokens), *slices).reshape(got.shape)
        message = f"layer {k}, {where}, {transport}"
        assert 0.1 < jnp.abs(wanted).max() < 20, message
        np.testing.assert_allclose(got, sliced, rtol=0, atol=2e-6, err_msg=message)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5, err_msg=message)


# --- laws that need eight devices ----------------------------------------------------------------


def gathered_rows_over_data_experts_and_context() -> None:
    equals_one_device(LONG, "all_gather", 1.0)


def rows_that_lie_whole_on_every_device_of_the_axis() -> None:
    equals_one_device(WHOLE_ROWS, "all_gather", 1.0)


def a_step_over_two_axes() -> None:
    equals_one_device(STEP_THIN, "all_to_all", 1.0)


def a_layer_of_a_stack() -> None:
    a_layer_of_a_stack_equals_its_slice(BOTH_WHOLE, "all_gather")


def only_a_round_that_may_not_suffice_is_followed_by_a_loop() -> None:
    """By shape: 4 devices exchange, so that a receiver gets at worst 4 even loads."""
    arrays, _ = inputs()
    for capacity_factor, loop in ((1.0, True), (3.5, True), (4.0, False), (ENOUGH, False)):
        run = jax.jit(
            lambda *arrays, capacity_factor=capacity_factor: FSDP.run(
                *arrays, transport="ragged_all_to_all", capacity_factor=capacity_factor
            )
        )
        assert ("overflow_rounds" in run.lower(*arrays).as_text(debug_info=True)) == loop, capacity_factor


def what_no_row_fills_reaches_nothing() -> None:
    """NaN where no row arrived, and in products of rows past the last group, forward and back."""
    move, matmul = exchange._move_emulated, rows.grouped_matmul

    def spoiling_move(room, axis, x, *route):
        positions, arrives, receives = jnp.arange(room)[:, None], route[3], route[4]
        came = jnp.any((positions >= arrives) & (positions < arrives + receives), axis=1)[:, None, None]
        return jnp.where(came, move(room, axis, x, *route), jnp.nan)

    exchange._move_emulated, rows.grouped_matmul = spoiling_move, spoiling_matmul
    try:
        equals_one_device(BOTH, "ragged_all_to_all", 1.0)
        in_blocks(BOTH)
    finally:
        exchange._move_emulated, rows.grouped_matmul = move, matmul


def in_blocks(where: Place = LONG) -> None:
    """Rows that travel in blocks, which are part empty, in one round and in several."""
    rows_of_blocks, experts_module._ROWS_OF_BLOCKS = experts_module._ROWS_OF_BLOCKS, 0
    try:
        for capacity_factor in (1.0, ENOUGH):
            equals_one_device(where, "ragged_all_to_all", capacity_factor)
    finally:
        experts_module._ROWS_OF_BLOCKS = rows_of_blocks


def every_transport_on_every_mesh() -> None:
    places = (WIDE, PARTS, FSDP, LONG, THIN, IDLE, NO_EXPERTS)
    equals_one_device_by_every_transport(places)
    equals_one_device(WHOLE_ROWS, "all_gather", ENOUGH)


def every_transport_over_two_axes() -> None:
    equals_one_device_by_every_transport((BOTH, BOTH_THIN, BOTH_LONG, TURNED, STEP, STEP_THIN, STEP_FSDP))
    for capacity_factor in (1.0, ENOUGH):
        equals_one_device(BOTH_WHOLE, "all_gather", capacity_factor)


def every_layer_of_a_stack() -> None:
    for where, transport in itertools.product((Place({"data": 8}), PARTS, LONG, BOTH, STEP_THIN), TRANSPORTS):
        a_layer_of_a_stack_equals_its_slice(where, transport)
    for where in (WHOLE_ROWS, BOTH_WHOLE):
        a_layer_of_a_stack_equals_its_slice(where, "all_gather")


def every_transport_compiles_for_tpus() -> None:
    """Forward and gradient in bfloat16, with the collective of its name; no rows that travelled are scattered."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    shapes = [(16, 32, 256), (16, 32, 4), (16, 32, 4), (16, 256, 128), (16, 256, 128), (16, 128, 256), (16, 32, 256)]
    dtypes = [jnp.bfloat16, jnp.float32, jnp.int32, *[jnp.bfloat16] * 4]
    for where, transport in (*itertools.product((WIDE, FSDP), TRANSPORTS), (BOTH, "ragged_all_to_all")):
        mesh = make_mesh(devices, **where.sizes)
        tokens = PartitionSpec(where.rows, where.columns)
        wide, tall = PartitionSpec(where.over, where.gathered), PartitionSpec(where.over, None, where.gathered)
        specs = [tokens, tokens, tokens, wide, wide, tall, tokens]
        *arrays, d_y = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
        )
        options = {"devices": devices, "transport": transport, "capacity_factor": 1.25}
        run = with_gradient(lambda *arrays, where=where, options=options: where.run(*arrays, **options))
        text = run.lower(arrays, d_y).compile().as_text()
        found = {op for op in COLLECTIVES if re.search(rf" {op}(-start)?\(", text)}
        if re.search(r"\[\d+(,\d+)+\]\S* scatter\(", text):  # of rows: the grouped matmul scatters its groups' sizes
            found.add("scatter")
        wanted = {transport.replace("_", "-"), *(["all-gather"] if where.gathered else [])}
        if transport == "all_gather":  # few of the rows that a device sees are its own: it adds these up in place
            wanted.add("scatter")
        assert found == wanted, (where, transport)


QUICK = [
    gathered_rows_over_data_experts_and_context,
    rows_that_lie_whole_on_every_device_of_the_axis,
    a_step_over_two_axes,
    a_layer_of_a_stack,
    only_a_round_that_may_not_suffice_is_followed_by_a_loop,
    what_no_row_fills_reaches_nothing,
    in_blocks,
]
AT_LENGTH = [
    every_transport_on_every_mesh,
    every_transport_over_two_axes,
    every_layer_of_a_stack,
]


quick = fixture_of(QUICK)


@pytest.mark.parametrize("law", [law.__name__ for law in QUICK])
def test_on_eight_devices(law, quick):
    assert quick[law] == "", quick[law]


@pytest.mark.slow
@pytest.mark.parametrize("law", AT_LENGTH)
def test_on_eight_devices_at_length(law):
    (said,) = found_of([law]).values()
    assert said == "", said


@pytest.mark.slow
def test_every_transport_compiles_for_tpus():
    if find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install -e '.[pod]'")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to share
    (said,) = found_of([every_transport_compiles_for_tpus], **settings).values()
    assert said == "", said


# --- laws of one device --------------------------------------------------------------------------


@jax.custom_vjp
def spoiling_matmul(lhs, rhs, sizes):
    """tiled_matmul with NaN for the rows past the last group, in the result and in the gradient of lhs."""
    return spoiled(tiled_matmul(lhs, rhs, sizes), sizes)


def spoiled(x, sizes):
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, jnp.nan)


def _spoiling_backward(saved, d):
    lhs, rhs, sizes = saved
    d_lhs, d_rhs = jax.vjp(lambda lhs, rhs: tiled_matmul(lhs, rhs, sizes), lhs, rhs)[1](d)
    return spoiled(d_lhs, sizes), d_rhs, None


spoiling_matmul.defvjp(lambda *saved: (spoiling_matmul(*saved), saved), _spoiling_backward)


def test_without_an_expert_axis_it_is_the_plain_function():
    arrays, d_y = inputs()
    alone = Place({})
    run = with_gradient(lambda *arrays: alone.run(*arrays, transport="ragged_all_to_all", capacity_factor=1.0))
    for got, wanted in zip(run(arrays, d_y), on_one_device(arrays, d_y), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"transport": "pigeon"}, "transport: got 'pigeon', wanted one of all_gather, all_to_all, ragged_all_to_all"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, wanted a finite number above 0, for example 1.25"),
        (
            {"capacity_factor": float("inf")},
            "capacity_factor: got inf, wanted a finite number above 0, for example 1.25",
        ),
        (
            {"capacity_factor": float("nan")},
            "capacity_factor: got nan, wanted a finite number above 0, for example 1.25",
        ),
        (
            {"rows": ("data",)},
            "rows and columns: got ('data',) and (), wanted axis expert among them for all_to_all; or use all_gather",
        ),
        (
            {"rows": ("data",), "over": TWO, "inner": None},
            "rows and columns: got ('data',) and (), wanted axes expert, tensor among them for all_to_all; "
            "or use all_gather",
        ),
        (
            {"over": TWO, "inner": None, "transport": "all_gather"},
            "rows and columns: got ('expert',) and (), wanted all of expert, tensor among them or none; add tensor",
        ),
        (
            {"columns": ("tensor",)},
            "rows and columns: got ('expert',) and ('tensor',), wanted no tensor among them, which cuts the inner "
            "width; take it out, or set inner to None",
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(wrong, says):
    options = {
        "rows": ("expert",),
        "columns": (),
        "gathered": (),
        "transport": "all_to_all",
        "capacity_factor": 1.0,
    } | wrong
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        routed_experts(*inputs()[0], mesh=make_mesh(), **options)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        (("expert",), "16 experts are not divisible by mesh axis expert 3"),
        (TWO, "16 experts are not divisible by mesh axes expert 3 x tensor 2"),
    ],
)
def test_experts_that_the_axes_do_not_divide_are_refused(over, says):
    arrays, _ = inputs()
    mesh = AbstractMesh((1, 1, 3, 1, 2), AXES)
    options = {
        "rows": TWO,
        "over": over,
        "inner": None,
        "columns": (),
        "gathered": (),
        "transport": "all_to_all",
        "capacity_factor": 1.0,
    }
    with pytest.raises(ValueError, match=f"^{says}$"):
        routed_experts(*arrays, mesh=mesh, **options)


def test_what_rows_arrive_in_is_made_by_every_layer_of_a_scan():
    """Of the gradient of two layers, traced: one buffer for all of them a TPU would copy for each to write into."""
    (x, weights, experts, *matrices), _ = inputs()
    mesh = AbstractMesh((1, 1, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    place = {"rows": ("expert",), "columns": (), "gathered": (), "transport": "ragged_all_to_all"}
    layer = lambda x, of: (routed_experts(x, *of, mesh=mesh, capacity_factor=1.0, **place), None)
    loss = lambda x, stacks: jnp.sum(jax.lax.scan(layer, x, stacks)[0])
    stacks = [jnp.stack([part, part]) for part in (weights, experts, *matrices)]
    traced = jax.make_jaxpr(jax.grad(loss))(x, stacks).jaxpr

    def buffers(jaxpr, in_scan=False):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "empty":
                yield in_scan
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from buffers(inner, in_scan or eqn.primitive.name == "scan")

    found = list(buffers(traced))
    assert found and all(found)


def test_taken_rows_have_the_gradient_of_an_index():
    """Rows taken twice, once and never, and places that take none."""
    x = jnp.arange(12.0).reshape(4, 3)
    out, pull = jax.vjp(lambda x: take_rows(x, TAKEN, STANDS), x)
    np.testing.assert_array_equal(out[HAVE], x[TAKEN[HAVE]])
    d = given_back()
    np.testing.assert_allclose(pull(d)[0], added_up(d), rtol=1e-6)


def test_summed_rows_are_the_transpose_of_taken_ones():
    """Of rows in bfloat16 the sums are float32, and the gradient is bfloat16 again."""
    x = given_back()
    out, pull = jax.vjp(lambda x: sum_rows(x, STANDS, TAKEN), x)
    np.testing.assert_allclose(out, added_up(x), rtol=1e-6)
    d = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(pull(d)[0][HAVE], d[TAKEN[HAVE]])
    out, pull = jax.vjp(lambda x: sum_rows(x, STANDS, TAKEN), x.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32 and pull(d)[0].dtype == jnp.bfloat16


# which of 4 rows is taken into each of 5 places, one of them taking none; and where each row then stands
TAKEN = jnp.asarray([2, 0, 4, 2, 3])
STANDS = jnp.asarray([[1, 5], [5, 5], [0, 3], [5, 4]])
HAVE = np.asarray([0, 1, 3, 4])


def given_back():
    """Numbers for 5 places, NaN in the one that takes no row."""
    d = np.random.default_rng(0).normal(size=(5, 3))
    d[2] = np.nan
    return jnp.asarray(d, jnp.float32)


def added_up(d):
    wanted = np.zeros((4, 3), np.float32)
    np.add.at(wanted, np.asarray(TAKEN)[HAVE], np.asarray(d)[HAVE])
    return wanted


@st.composite
def runs(draw):
    """Runs of 3 sources and 4 experts in a buffer of 40 rows, with rows of no run before any of them."""
    sizes, gaps = (np.asarray(draw(st.lists(st.integers(0, 2), min_size=12, max_size=12))) for _ in range(2))
    gaps = np.minimum(gaps, 1)
    starts = np.cumsum(gaps + sizes) - sizes
    return starts.reshape(3, 4), sizes.reshape(3, 4)


@given(runs())
def test_a_buffer_in_order_of_experts_has_their_rows_one_after_another(buffer):
    starts, sizes = buffer
    order, inverse = jitted_by_expert(*(jnp.asarray(a, jnp.int32) for a in buffer))
    wanted = [starts[s, e] + i for e in range(4) for s in range(3) for i in range(sizes[s, e])]
    np.testing.assert_array_equal(order, wanted + [40] * (40 - len(wanted)))
    places = np.full(40, 40)
    places[wanted] = np.arange(len(wanted))
    np.testing.assert_array_equal(inverse, places)


jitted_by_expert = jax.jit(lambda starts, sizes: by_expert(starts, sizes, 40))


def test_rows_past_the_last_group_reach_nothing(monkeypatch):
    """Not even where the grouped product leaves NaN there."""
    monkeypatch.setattr(rows, "grouped_matmul", spoiling_matmul)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, *matrices = normal(12, D), normal(3, D, M), normal(3, D, M), normal(3, M, D)
    d = normal(12, D).at[7:].set(0)
    sizes = jnp.asarray([4, 0, 3])
    run = jax.jit(lambda x, d: jax.vjp(lambda *arrays: swiglu_groups(*arrays, sizes), x, *matrices)[1](d))
    wanted, got = run(x[:7], d[:7]), run(x, d)
    assert np.isfinite(wanted[0]).all()
    for some, other in zip((got[0][:7], *got[1:]), wanted, strict=True):
        np.testing.assert_allclose(some, other, rtol=1e-5, atol=1e-5)


# --- the route of a ragged round, against what jax says ragged_all_to_all does with it -----------

P, OWN = 4, 2


@st.composite
def loads(draw):
    """How many rows each of P devices has for each of every device's experts, and room for a round."""
    count = P * P * OWN
    counts = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    return np.asarray(counts, np.int32).reshape(P, P, OWN), draw(st.integers(1, 30))


@jax.jit
def routes(counts, first, room):
    return [ragged_route(counts, me, first, room) for me in range(P)]


def moved(operands, routes, room):
    """ragged_all_to_all as its documentation has it; -1 where nothing is written."""
    results = np.full((P, room), -1)
    for source, operand in enumerate(operands):
        for target, own in itertools.product(range(P), range(OWN)):
            begin, size, lands = (int(a[target, own]) for a in routes[source][:3])
            assert size == routes[target].receives[source, own] and 0 <= begin <= len(operand) - size
            assert 0 <= lands <= room - size and (results[target, lands : lands + size] == -1).all()
            assert size == 0 or lands == routes[target].arrives[source, own]
            results[target, lands : lands + size] = operand[begin : begin + size]
    return results


@given(loads())
def test_rounds_of_a_ragged_exchange_bring_every_row_there_and_back(load):
    """There in order of experts, and of sources for each."""
    counts, room = load
    operands = [1000 * s + np.arange(of.sum()) for s, of in enumerate(counts)]
    runs = [np.split(operand, of.cumsum()[:-1]) for operand, of in zip(operands, counts, strict=True)]
    of_expert = lambda d, e: np.concatenate([runs[s][d * OWN + e] for s in range(P)])
    arrivals = [np.concatenate([of_expert(d, e) for e in range(OWN)]) for d in range(P)]
    returned = np.full((P, 60), -1)
    for first in range(0, counts.sum((0, 2)).max(), room):
        there = jax.tree.map(np.asarray, routes(counts, first, room))
        arrived = moved(operands, there, room)
        for d in range(P):
            wanted = arrivals[d][first : first + room]
            np.testing.assert_array_equal(arrived[d], [*wanted, *[-1] * (room - len(wanted))])
        back = moved(arrived, [route.reversed() for route in there], 60)
        assert (np.minimum(returned, back) == -1).all(), "a row came back twice"
        returned = np.maximum(returned, back)
    for s, operand in enumerate(operands):
        np.testing.assert_array_equal(returned[s], [*operand, *[-1] * (60 - len(operand))])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rounds_add_up_and_so_do_their_gradients(count):
    rng = np.random.default_rng(0)
    scales = jnp.asarray(rng.normal(size=5), jnp.float32)
    one_round = lambda k, a, scales: scales[k] * jnp.sin(a["x"]) * a["w"][k]
    arrays = {"x": jnp.asarray(rng.normal(size=3), jnp.float32), "w": jnp.asarray(rng.normal(size=5), jnp.float32)}
    plain = lambda a: sum(one_round(k, a, scales) for k in range(count))
    rounds = lambda a: in_rounds(one_round, jnp.int32(count), a, scales)
    d = jnp.asarray([1.0, -2.0, 0.5])
    for function in (lambda f: f(arrays), lambda f: jax.vjp(f, arrays)[1](d)[0]):
        jax.tree.map(
            lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6),
            jax.jit(lambda f=function: f(rounds))(),
            function(plain),
        )
