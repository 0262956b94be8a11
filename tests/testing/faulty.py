"""Small kernels, each sound or with one planted fault."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.testing import Draw, Kernel, counts, order, padding, split

TILE = 4
OF_MEAN = (
    "wrong mask edge",
    "unmasked NaN",
    "float16 accumulation",
    "dropped ragged tail",
    "stale output buffer",
    "uninitialised accumulator",
    "shape-dependent branch",
    "race between grid steps",
)
FAULTS = (*OF_MEAN, "transposed gradient", "off-by-one page")


# --- the mean of what a row has, tile by tile ----------------------------------------------------


def masked_mean(x, length, *, interpret, fault=""):
    """Of x [B, S, H], the mean of each row's first length[b] vectors, [B, H]; zeros of none."""
    B, S, H = x.shape
    tiles = S // TILE if fault == "dropped ragged tail" and S > TILE else -(-S // TILE)
    race = fault == "race between grid steps"
    call = pl.pallas_call(
        functools.partial(_mean_kernel, fault=fault, whole=S <= TILE),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, tiles),
            in_specs=[pl.BlockSpec((None, TILE, H), lambda b, t, length: (b, t, 0))],
            out_specs=pl.BlockSpec((None, 1, H), lambda b, t, length: (b, 0, 0)),
            scratch_shapes=[pltpu.VMEM((1, H), jnp.float16 if fault == "float16 accumulation" else jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, 1, H), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel" if race else "arbitrary")),
        interpret=interpret,
    )
    return call(length, x)[:, 0]


def _mean_kernel(length, x, out, total, *, fault, whole):
    b, t = pl.program_id(0), pl.program_id(1)
    has = length[b]

    @pl.when(t == (1 if fault == "uninitialised accumulator" else 0))
    def _():
        total[...] = jnp.zeros_like(total)

    at = t * TILE + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    seen = at <= has if fault == "wrong mask edge" else at < has
    values = x[...].astype(jnp.float32)
    if fault != "unmasked NaN" and not (fault == "shape-dependent branch" and whole):
        values = jnp.where(seen, values, 0)
    weights = jnp.where(seen[:, :1], 1.0, 0.0)
    summed = jax.lax.dot_general(weights, values, (((0,), (0,)), ((), ())), precision="highest")
    total[...] += summed.astype(total.dtype)

    @pl.when((has > 0) if fault == "stale output buffer" else (t >= 0))
    def _():
        out[...] = (total[...].astype(jnp.float32) / jnp.maximum(has, 1)).astype(out.dtype)


def mean_twin(x, length):
    seen = np.arange(x.shape[1]) < length[:, None]
    return np.sum(np.where(seen[..., None], x, 0), axis=1) / np.maximum(length, 1)[:, None]


def mean_inputs(draw: Draw):
    B, S, H = draw.of("B", "S", "H")
    length = draw.ragged["length"]
    x = draw.numbers(B, S, H)
    return {"x": draw.dead(x, (np.arange(S) >= length[:, None])[..., None]), "length": length}


def mean_kernel(fault: str = "") -> Kernel:
    return Kernel(
        name="masked_mean",
        run=functools.partial(masked_mean, fault=fault),
        twin=mean_twin,
        inputs=mean_inputs,
        sizes={"B": (1, 2), "S": (4, 6), "H": (8,)},
        ragged={"length": counts("S", "B")},
        invariances=(order(x=0, length=0), split(x=0, length=0), padding(TILE, None, x=1)),
        bound=lambda tolerance, x, length: tolerance * np.max(np.abs(x), initial=0),
        compiled=({"B": 8, "S": 256, "H": 128},),
        platform="tpu",
    )


# --- a product with a gradient of its own --------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, w, fault):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _backward(fault, saved, d):
    x, w = saved
    return jnp.matmul(d, w if fault else w.T), jnp.matmul(x.T, d)


product.defvjp(lambda x, w, fault: (product(x, w, fault), (x, w)), _backward)


def product_kernel(fault: str = "") -> Kernel:
    return Kernel(
        name="product",
        run=lambda x, w: product(x, w, fault),
        twin=lambda x, w: jnp.matmul(x, w),
        inputs=lambda draw: {"x": draw.numbers(*draw.of("W", "K")), "w": draw.numbers(*draw.of("K", "K"))},
        sizes={"W": (1, 5), "K": (2, 8)},
        gradients=("x", "w"),
        numbers=("normal", "whole", "zeros"),
        invariances=(order(x=0), split(x=0)),
    )


# --- the mean of a row's pages -------------------------------------------------------------------


def paged_mean(pool, table, pages, *, interpret, fault=""):
    """Of pool [P, s, H], the mean over the first pages[b] of the pages table[b] names, [B, s, H]."""
    (_, s, H), (B, M) = pool.shape, table.shape
    at = lambda m: jnp.minimum(m + 1, M - 1) if fault else m

    def kernel(table, pages, page, out):
        b, m = pl.program_id(0), pl.program_id(1)

        @pl.when(m == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        @pl.when(m < pages[b])
        def _():
            out[...] += page[...] / pages[b].astype(page.dtype)

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, M),
            in_specs=[pl.BlockSpec((None, s, H), lambda b, m, table, pages: (table[b, at(m)], 0, 0))],
            out_specs=pl.BlockSpec((None, s, H), lambda b, m, table, pages: (b, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((B, s, H), pool.dtype),
        interpret=interpret,
    )
    return call(table, pages, pool)


def paged_twin(pool, table, pages):
    used = (np.arange(table.shape[1]) < pages[:, None])[..., None, None]
    return np.sum(np.where(used, pool[table], 0), axis=1) / np.maximum(pages, 1)[:, None, None]


def paged_inputs(draw: Draw):
    B, M, s, H = draw.of("B", "M", "s", "H")
    pages, P = draw.ragged["pages"], B * M + 1
    unused = np.arange(M) >= pages[:, None]
    table = draw.dead(1 + draw.ids.permutation(B * M).reshape(B, M).astype(np.int32), unused, below=P)
    free = np.ones(P, bool)
    free[table[~unused]] = False
    return {"pool": draw.dead(draw.numbers(P, s, H), free[:, None, None]), "table": table, "pages": pages}


def paged_kernel(fault: str = "") -> Kernel:
    return Kernel(
        name="paged_mean",
        run=functools.partial(paged_mean, fault=fault),
        twin=paged_twin,
        inputs=paged_inputs,
        sizes={"B": (1, 2), "M": (1, 3), "s": (2,), "H": (4,)},
        ragged={"pages": counts("M", "B")},
        dtypes=("float32",),
        bound=lambda tolerance, pool, table, pages: tolerance * np.max(np.abs(pool), initial=0),
        invariances=(order(table=0, pages=0), split(table=0, pages=0)),
        platform="tpu",
    )


def kernel_with(fault: str) -> Kernel:
    """The kernel that has such a fault."""
    if fault in OF_MEAN:
        return mean_kernel(fault)
    return product_kernel(fault) if fault == "transposed gradient" else paged_kernel(fault)
