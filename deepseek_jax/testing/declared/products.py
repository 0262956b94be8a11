"""Products with matrices that are packed in 8 or 4 bits, lie transposed, or have others of low rank beside them."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops import low_rank
from deepseek_jax.ops.experts import Tiles, grouped_matmul, tiled_matmul
from deepseek_jax.ops.kernels.packed_matmul import packed_matmul
from deepseek_jax.ops.low_rank import LowRank
from deepseek_jax.ops.packed import Packed, Packing
from deepseek_jax.ops.transposed import Transposed, times_transposed
from deepseek_jax.testing import Draw, Kernel, group_sizes, order, split
from deepseek_jax.testing.declared import bounds
from deepseek_jax.testing.declared.experts import group_of_rows, groups_of
from deepseek_jax.testing.rounding import UNITS, exact, product

_SCALE = 2.0  # of what has low rank
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def _packed(draw: Draw, *shape: int) -> Packed:
    """Any codes, with scales that make numbers near the reciprocal of the rows' square root."""
    scheme = draw.sizes["scheme"]
    like = Packing(scheme=scheme).like(shape)
    most = _LARGEST[scheme]
    codes = np.clip(draw.numbers(*shape, scale=most / 4, dtype=np.float32), -most, most)
    codes = codes if scheme == "fp8" else np.round(codes)
    scale = np.abs(draw.numbers(*like.scale.shape, scale=4 / most * shape[-2] ** -0.5, dtype=like.scale.dtype))
    return Packed(codes=codes.astype(like.codes.dtype), scale=scale, block=like.block)


def _dense(packed: Packed) -> np.ndarray:
    """In float64."""
    rows, columns = packed.codes.shape[-2:]
    spread = packed.scale.repeat(packed.block[0], axis=-2)[..., :rows, :].repeat(packed.block[1], axis=-1)
    return packed.codes.astype(np.float64) * spread[..., :columns]


# --- a matrix a group ----------------------------------------------------------------------------


def _grouped_inputs(draw: Draw) -> dict[str, Any]:
    W, E, K, N = draw.of("W", "E", "K", "N")
    sizes = draw.ragged["sizes"]
    lhs = draw.dead(draw.numbers(W, K), ~group_of_rows(sizes, W)[1][:, None])
    return {"lhs": lhs, "rhs": _packed(draw, E, K, N), "sizes": sizes}


def _grouped_twin(lhs, rhs, sizes):
    group, filled = group_of_rows(sizes, lhs.shape[0])
    return np.where(filled[:, None], np.einsum("wk,wkn->wn", lhs, _dense(rhs)[group]), np.nan)


def _grouped_bound(whole, unit, lhs, rhs, sizes):
    """`whole`: whether matrices are made whole in the dtype of lhs; scales round in any case."""
    matrices = exact(_dense(rhs)).rounded(UNITS["float32"])
    matrices, of = matrices.rounded(unit) if whole else matrices, groups_of(sizes, len(lhs))
    return bounds.grouped(unit, lhs, of, matrices, np.zeros((len(lhs), rhs.shape[-1])))["out"].error


_GROUPED = {
    "twin": _grouped_twin,
    "tolerance": UNITS,
    "inputs": _grouped_inputs,
    "ragged": {"sizes": group_sizes("W", "E")},
}
_SCHEMES = ("int8", "fp8", "int4")
PACKED_MATMUL = Kernel(
    name="packed_matmul",
    run=packed_matmul,
    sizes={"W": (16, 144), "E": (1, 4), "K": (128, 384), "N": (128,), "scheme": _SCHEMES},
    bound=partial(_grouped_bound, False),
    compiled=tuple({"W": 1024, "E": 8, "K": 2048, "N": 1408, "scheme": scheme} for scheme in _SCHEMES),
    platform="tpu",
    **_GROUPED,
)
TILED_PACKED = Kernel(
    name="tiled_packed",
    run=lambda lhs, rhs, sizes: tiled_matmul(lhs, rhs, sizes, Tiles(4, 1)),
    sizes={"W": (8, 20), "E": (1, 4), "K": (128, 200), "N": (16,), "scheme": _SCHEMES},
    bound=partial(_grouped_bound, True),
    compiled=tuple({"W": 1024, "E": 8, "K": 2048, "N": 1408, "scheme": scheme} for scheme in _SCHEMES),
    **_GROUPED,
)


# --- one matrix ----------------------------------------------------------------------------------


def _bound(unit, x, weight):
    matrix = exact(_dense(weight)).rounded(UNITS["float32"]).rounded(unit)
    return product("wk,kn->wn", exact(x), matrix).rounded(unit).error


PACKED_PRODUCT = Kernel(
    name="packed_product",
    run=low_rank.product,
    twin=lambda x, weight: x @ _dense(weight),
    bound=_bound,
    inputs=lambda draw: {
        "x": draw.numbers(*draw.of("W", "K")),
        "weight": _packed(draw, *draw.of("K", "N")),
    },
    sizes={"W": (1, 9), "K": (128, 200), "N": (16, 130), "scheme": _SCHEMES},
    tolerance=UNITS,
    invariances=(order(x=0), split(x=0)),
    compiled=tuple({"W": 64, "K": 2048, "N": 1408, "scheme": scheme} for scheme in _SCHEMES),
)
TIMES_TRANSPOSED = Kernel(
    name="times_transposed",
    run=lambda x, weight: times_transposed(x, Transposed(weight)),
    twin=lambda x, weight: x @ weight.T,
    bound=lambda tolerance, x, weight: tolerance * (np.abs(x) @ np.abs(weight.T)),
    inputs=lambda draw: {"x": draw.numbers(*draw.of("W", "K")), "weight": draw.numbers(*draw.of("N", "K"))},
    sizes={"W": (1, 9, 65), "K": (8, 40), "N": (1, 33)},
    tolerance={"float32": 2.0**-19, "bfloat16": 2.0**-8},
    invariances=(order(x=0), split(x=0)),
    compiled=({"W": 8, "K": 2048, "N": 2048}, {"W": 128, "K": 2048, "N": 2048}),
)


def _low_rank_near(unit, d_out, x, w, a, b, sizes=None):
    of = np.ones((len(x), 1)) if sizes is None else groups_of(sizes, len(x))
    matrices = (matrix[None] if sizes is None else matrix for matrix in (w, a, b))
    return bounds.low_rank(unit, x, of, *matrices, _SCALE, d_out)


def _low_rank_bound(unit, x, w, **of):
    return _low_rank_near(unit, np.zeros((len(x), w.shape[-1])), x, w, **of)["out"].error


def _low_rank_gradient_bound(unit, d_out, **of):
    found = {name: near.error for name, near in _low_rank_near(unit, d_out, **of).items()}
    first = lambda error: error[0] if "sizes" not in of else error
    return {"x": found["rows"], **{name: first(found[name]) for name in ("w", "a", "b")}}


def _low_rank(x, w, a, b):
    return low_rank.product(x, LowRank(w=w, a=a, b=b, scale=_SCALE))


def _low_rank_inputs(draw: Draw) -> dict[str, Any]:
    W, K, N, rank = draw.of("W", "K", "N", "rank")
    of = lambda rows, columns: draw.numbers(rows, columns, scale=rows**-0.5)
    return {"x": draw.numbers(W, K), "w": of(K, N), "a": of(K, rank), "b": of(rank, N)}


LOW_RANK_PRODUCT = Kernel(
    name="low_rank_product",
    run=_low_rank,
    twin=lambda x, w, a, b: jnp.matmul(x, w) + _SCALE * jnp.matmul(jnp.matmul(x, a), b),
    inputs=_low_rank_inputs,
    sizes={"W": (1, 9), "K": (8, 40), "N": (16,), "rank": (1, 4)},
    tolerance=UNITS,
    bound=_low_rank_bound,
    gradients=("x", "w", "a", "b"),
    gradient_bound=_low_rank_gradient_bound,
    numbers=("normal", "whole", "zeros", "large"),
    invariances=(order(x=0), split(x=0)),
    compiled=({"W": 256, "K": 2048, "N": 2048, "rank": 16},),
)


def _grouped_low_rank_inputs(draw: Draw) -> dict[str, Any]:
    W, E, K, N, rank = draw.of("W", "E", "K", "N", "rank")
    of = lambda rows, columns: draw.numbers(E, rows, columns, scale=rows**-0.5)
    sizes = draw.ragged["sizes"]
    lhs = draw.dead(draw.numbers(W, K), ~group_of_rows(sizes, W)[1][:, None])
    return {"lhs": lhs, "w": of(K, N), "a": of(K, rank), "b": of(rank, N), "sizes": sizes}


def _grouped_low_rank_twin(lhs, w, a, b, sizes):
    group, filled = group_of_rows(sizes, lhs.shape[0], jnp)
    times = lambda x, matrix: jnp.einsum("wk,wkn->wn", x, matrix[group])
    return jnp.where(filled[:, None], times(lhs, w) + _SCALE * times(times(lhs, a), b), jnp.nan)


def _grouped_low_rank_gradient_bound(unit, d_out, lhs, **of):
    found = _low_rank_gradient_bound(unit, d_out, x=lhs, **of)
    return {"lhs": found.pop("x"), **found}


GROUPED_LOW_RANK = Kernel(
    name="grouped_low_rank",
    run=lambda lhs, w, a, b, sizes: grouped_matmul(lhs, LowRank(w=w, a=a, b=b, scale=_SCALE), sizes),
    twin=_grouped_low_rank_twin,
    inputs=_grouped_low_rank_inputs,
    sizes={"W": (8, 20), "E": (1, 4), "K": (8, 40), "N": (16,), "rank": (1, 4)},
    ragged={"sizes": group_sizes("W", "E")},
    tolerance=UNITS,
    bound=lambda unit, lhs, **of: _low_rank_bound(unit, x=lhs, **of),
    gradients=("lhs", "w", "a", "b"),
    gradient_bound=_grouped_low_rank_gradient_bound,
    dead_gradients="undefined",
    numbers=LOW_RANK_PRODUCT.numbers,
    compiled=({"W": 1024, "E": 16, "K": 1024, "N": 512, "rank": 16},),
)
