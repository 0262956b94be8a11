"""Grouped products: rows sorted by group, each group with a matrix of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.experts import Tiles, expert_mlp, ragged_matmul, tiled_matmul
from deepseek_jax.parallel.rows import sum_rows, swiglu_groups, take_rows
from deepseek_jax.testing import Draw, Kernel, choices, group_sizes, order, split
from deepseek_jax.testing.declared import bounds
from deepseek_jax.testing.rounding import UNITS, exact

_TILES = {"W": (8, 20), "E": (1, 4), "K": (8,), "N": (16,), "rows": (1, 4, 32)}
_ON_TPU = {"W": (16, 144), "E": (1, 4), "K": (128,), "N": (128,)}
_LARGE = {"W": 4096, "E": 16, "K": 2048, "N": 1408}


def group_of_rows(sizes: Any, rows: int, numpy: Any = np) -> tuple[Any, Any]:
    """The group of each row, and whether it has one, in NumPy or jax.numpy."""
    ends = numpy.cumsum(sizes)
    group = numpy.searchsorted(ends, np.arange(rows), side="right")
    return numpy.minimum(group, len(sizes) - 1), np.arange(rows) < ends[-1]


def _inputs(draw: Draw) -> dict[str, object]:
    W, E, K, N = draw.of("W", "E", "K", "N")
    sizes = draw.ragged["sizes"]
    past = ~group_of_rows(sizes, W)[1]
    lhs = draw.dead(draw.numbers(W, K), past[:, None])
    return {"lhs": lhs, "rhs": draw.numbers(E, K, N, scale=K**-0.5), "sizes": sizes}


def _twin(lhs, rhs, sizes, **_):
    group, filled = group_of_rows(sizes, lhs.shape[0], jnp)
    return jnp.where(filled[:, None], jnp.einsum("wk,wkn->wn", lhs, rhs[group]), jnp.nan)


def _tiled(lhs, rhs, sizes, rows):
    return tiled_matmul(lhs, rhs, sizes, Tiles(rows, 1))


def groups_of(sizes: Any, rows: int) -> np.ndarray:
    """1.0 for the group of each row, [W, E]."""
    group, filled = group_of_rows(sizes, rows)
    return (group[:, None] == np.arange(len(sizes))) * filled[:, None].astype(np.float64)


def _bound(unit, lhs, rhs, sizes, **_):
    of = groups_of(sizes, len(lhs))
    return bounds.grouped(unit, lhs, of, exact(rhs), np.zeros((len(lhs), rhs.shape[-1])))["out"].error


def _gradient_bound(unit, d_out, lhs, rhs, sizes, **_):
    found = bounds.grouped(unit, lhs, groups_of(sizes, len(lhs)), exact(rhs), d_out)
    return {"lhs": found["rows"].error, "rhs": found["matrices"].error}


_GROUPED = {
    "twin": _twin,
    "tolerance": UNITS,
    "bound": _bound,
    "ragged": {"sizes": group_sizes("W", "E")},
    "gradients": ("lhs", "rhs"),
    "gradient_bound": _gradient_bound,
    "dead_gradients": "undefined",
}
TILED_MATMUL = Kernel(
    name="tiled_matmul",
    run=_tiled,
    inputs=lambda draw: {**_inputs(draw), "rows": draw.sizes["rows"]},
    sizes=_TILES,
    compiled=({**_LARGE, "rows": 128},),
    **_GROUPED,
)
RAGGED_MATMUL = Kernel(
    name="ragged_matmul",
    run=lambda lhs, rhs, sizes, interpret: ragged_matmul(lhs, rhs, sizes, None, interpret),
    inputs=_inputs,
    sizes=_ON_TPU,
    compiled=(_LARGE,),
    platform="tpu",
    **_GROUPED,
)


# --- through experts -----------------------------------------------------------------------------


def _matrices(draw: Draw) -> dict[str, np.ndarray]:
    E, D, M = draw.of("E", "D", "M")
    of = lambda rows, columns: draw.numbers(E, rows, columns, scale=rows**-0.5)
    return {"gate": of(D, M), "up": of(D, M), "down": of(M, D)}


def routing(draw: Draw, *shape: int, experts: int) -> np.ndarray:
    """Where rows go: anywhere, all to a few, to one, or some to nobody."""
    anywhere = draw.ids.permuted(np.broadcast_to(np.arange(experts), (*shape[:-1], experts)), axis=-1)[..., : shape[-1]]
    kind = int(draw.ragged["load"])
    if kind == 0:
        found = anywhere
    elif kind == 1:
        found = np.minimum(anywhere, 1)
    elif kind == 2:
        found = np.full(shape, experts - 1)
    else:
        found = np.where(draw.ids.random(shape) < 0.5, experts, anywhere)
    return found.astype(np.int32)


def mlp_inputs(draw: Draw, *rows: int) -> dict[str, object]:
    """Rows of the example's numbers, what they count for, and where they go."""
    experts = routing(draw, *rows, draw.sizes["A"], experts=draw.sizes["E"])
    weights = draw.numbers(*experts.shape, scale=0.5, dtype=np.float32)
    return {"x": draw.numbers(*rows, draw.sizes["D"]), "weights": weights, "experts": experts, **_matrices(draw)}


def mlp_twin(x, weights, experts, gate, up, down):
    """Of rows [..., D], one choice of each at a time."""
    E, out = gate.shape[0], 0.0
    for a in range(experts.shape[-1]):
        chosen = jnp.minimum(experts[..., a], E - 1)
        into = lambda matrix, chosen=chosen: jnp.einsum("...d,...dm->...m", x, matrix[chosen])
        hidden = jax.nn.silu(into(gate)) * into(up)
        there = (experts[..., a] < E)[..., None]
        out += there * weights[..., a, None] * jnp.einsum("...m,...md->...d", hidden, down[chosen])
    return out


def _mlp_bound(unit, x, **of):
    return bounds.expert_mlp(unit, x, d_out=np.zeros_like(x), **of)["out"].error


def _mlp_gradient_bound(unit, d_out, **of):
    return _errors(bounds.expert_mlp(unit, d_out=d_out, **of))


def _errors(found):
    return {name: of.error for name, of in found.items()}


LOADS = choices(0, 1, 2, 3)
_ROWS = {"x": 0, "weights": 0, "experts": 0}
EXPERT_MLP = Kernel(
    name="expert_mlp",
    run=expert_mlp,
    twin=mlp_twin,
    inputs=lambda draw: mlp_inputs(draw, draw.sizes["W"]),
    sizes={"W": (2, 9), "A": (1, 3), "E": (4,), "D": (8,), "M": (16,)},
    ragged={"load": LOADS},
    tolerance=UNITS,
    bound=_mlp_bound,
    gradients=("x", "weights", "gate", "up", "down"),
    gradient_bound=_mlp_gradient_bound,
    numbers=("normal", "whole", "equal", "zeros"),
    invariances=(order(**_ROWS), split(**_ROWS)),
    compiled=({"W": 1024, "A": 8, "E": 32, "D": 1024, "M": 512},),
)


def _swiglu_inputs(draw: Draw) -> dict[str, object]:
    W, E, D = draw.of("W", "E", "D")
    sizes = draw.ragged["sizes"]
    past = ~group_of_rows(sizes, W)[1]
    return {"rows": draw.dead(draw.numbers(W, D), past[:, None]), **_matrices(draw), "sizes": sizes}


def _weighed_inputs(draw: Draw) -> dict[str, object]:
    given = _swiglu_inputs(draw)
    weights = draw.numbers(draw.sizes["W"], 1, scale=0.5, dtype=np.float32)
    past = ~group_of_rows(draw.ragged["sizes"], draw.sizes["W"])[1]
    return {**given, "weights": draw.dead(weights, past[:, None])}


def _swiglu_twin(rows, gate, up, down, sizes, weights=1.0):
    group, filled = group_of_rows(sizes, rows.shape[0], jnp)
    into = lambda x, matrix: jnp.einsum("wd,wdm->wm", x, matrix[group])
    out = weights * into(jax.nn.silu(into(rows, gate)) * into(rows, up), down)
    return jnp.where(filled[:, None], out, jnp.nan)


def _swiglu_near(unit, d_out, rows, sizes, weights=None, **of):
    weights = np.ones((len(rows), 1)) if weights is None else weights
    return bounds.swiglu(unit, rows, groups_of(sizes, len(rows)), weights=weights, d_out=d_out, **of)


def _swiglu_kernel(name: str, inputs: Any, *weights: str) -> Kernel:
    return Kernel(
        name=name,
        run=swiglu_groups,
        twin=_swiglu_twin,
        inputs=inputs,
        sizes={"W": (2, 12), "E": (1, 3), "D": (8,), "M": (16,)},
        ragged={"sizes": group_sizes("W", "E")},
        tolerance=UNITS,
        bound=lambda unit, rows, **of: _swiglu_near(unit, np.zeros_like(rows), rows, **of)["out"].error,
        gradients=("rows", "gate", "up", "down", *weights),
        gradient_bound=lambda unit, d_out, **of: _errors(_swiglu_near(unit, d_out, **of)),
        dead_gradients="undefined",
        numbers=EXPERT_MLP.numbers,
        compiled=({"W": 1024, "E": 32, "D": 1024, "M": 512},),
    )


SWIGLU_GROUPS = _swiglu_kernel("swiglu_groups", _swiglu_inputs)
SWIGLU_WEIGHED = _swiglu_kernel("swiglu_weighed", _weighed_inputs, "weights")


# --- rows by index -------------------------------------------------------------------------------


def _taken_inputs(draw: Draw) -> dict[str, np.ndarray]:
    """Every row at most `a` times, in any order, and some places without one."""
    n, a, m, D = draw.of("n", "a", "m", "D")
    index = np.full(m, n)
    some = min(m, n * a)
    index[:some] = draw.ids.permutation(np.repeat(np.arange(n), a))[:some]
    empty = {0: np.zeros(m, bool), 1: draw.ids.random(m) < 0.5, 2: np.ones(m, bool)}[int(draw.ragged["empty"])]
    index = np.where(empty, n, draw.ids.permutation(index)).astype(np.int32)
    back = np.full((n, a), m, np.int32)
    for row in range(n):
        places = np.flatnonzero(index == row)
        back[row, : len(places)] = places
    return {"x": draw.numbers(n, D), "index": index, "back": back}


TAKE_ROWS = Kernel(
    name="take_rows",
    run=take_rows,
    twin=lambda x, index, back: jnp.where((index < len(x))[:, None], x[jnp.minimum(index, len(x) - 1)], jnp.nan),
    inputs=_taken_inputs,
    sizes={"n": (1, 7), "a": (1, 3), "m": (1, 20), "D": (4,)},
    ragged={"empty": choices(0, 1, 2)},
    tolerance={"float32": 0.0, "bfloat16": 0.0},
    gradients=("x",),
    gradient_tolerance={"float32": 2.0**-22, "bfloat16": 2.0**-8},
    compiled=({"n": 1024, "a": 8, "m": 8192, "D": 1024},),
)


def _summed_inputs(draw: Draw) -> dict[str, np.ndarray]:
    """The same places, read the other way; a row that is in none may be anything."""
    of = _taken_inputs(draw)
    x = draw.numbers(len(of["index"]), draw.sizes["D"])
    return {"x": draw.dead(x, (of["index"] == len(of["x"]))[:, None]), "back": of["back"], "index": of["index"]}


SUM_ROWS = Kernel(
    name="sum_rows",
    run=sum_rows,
    twin=lambda x, back, index: jnp.where((back < len(x))[..., None], x[jnp.minimum(back, len(x) - 1)], 0).sum(axis=1),
    inputs=_summed_inputs,
    sizes=TAKE_ROWS.sizes,
    ragged=TAKE_ROWS.ragged,
    tolerance={"float32": 2.0**-22, "bfloat16": 2.0**-22},
    gradients=("x",),
    gradient_tolerance={"float32": 0.0, "bfloat16": 2.0**-8},
    dead_gradients="undefined",
    compiled=TAKE_ROWS.compiled,
)
