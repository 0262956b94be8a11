"""Latent attention of one new token a sequence, as a TPU kernel that reads the cache once.

A sequence's keys come into VMEM a block at a time. Each block adds to the running maximum, sum and weighted latents
of every head, so that scores are never written to memory.

Source: arXiv 1805.02867 (online softmax).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_BLOCK = 512  # keys at a time: with both buffers 1.3 MiB of VMEM in bfloat16, of the 16 that v5e allows a kernel


def latent_decode(
    q_latent_BNC: Float[Array, "B N C"],
    q_rope_BNR: Float[Array, "B N R"],
    c: Float[Array, "B S C"] | Float[Array, "B L S C"],
    r: Float[Array, "B S R"] | Float[Array, "B L S R"],
    position_B: Int[Array, "B"],
    layer: Int[Array, ""] | None,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B N C"]:
    """`ops.attention.attend_latents` of one query a sequence, which sees the keys up to its own position.

    Blocks of keys past the position are not read; what lies in the last one past it, NaN even, reaches nothing. A
    layer of a stack is read where it lies. Has no gradient. XLA cannot partition it: see `parallel.attention`.

    Args:
        q_latent_BNC: bfloat16 or float32; taken in the cache's dtype, which the weights are cast to as well.
        q_rope_BNR: of the same dtype.
        c: latents of one layer, or of a stack of layers.
        r: rotated keys, likewise.
        position_B: int32, 0 to S - 1; one beyond the last slot sees all.
        layer: int32, the place in the stack; None where c and r are of one layer.
        scale: of the scores.
        interpret: run as plain JAX, on any device.

    Returns:
        In the queries' dtype; maximum, sum and weighted latents are float32.
    """
    if layer is None:
        c, r, layer = c[:, None], r[:, None], jnp.int32(0)
    (B, N, C), (S, R) = q_latent_BNC.shape, r.shape[2:]
    block = min(S, _BLOCK)
    of_sequence = lambda width: pl.BlockSpec((None, N, width), lambda b, step, layer, position: (b, 0, 0))
    seen = lambda b, step, position: jnp.minimum(step, position[b] // block)  # past it the same again: not fetched
    of_block = lambda b, step, layer, position: (b, layer[0], seen(b, step, position), 0)
    of_cache = [pl.BlockSpec((None, None, block, width), of_block) for width in (C, R)]
    call = pl.pallas_call(
        functools.partial(_attend_block, block, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, pl.cdiv(S, block)),
            in_specs=[of_sequence(C), of_sequence(R), *of_cache],
            out_specs=of_sequence(C),
            scratch_shapes=[pltpu.VMEM((N, width), jnp.float32) for width in (1, 1, C)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, C), q_latent_BNC.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q_latent_BNC, c, r),
        interpret=interpret,
        name="latent_decode",
    )
    return call(
        jnp.reshape(layer, 1).astype(jnp.int32),
        jnp.clip(position_B, 0, S - 1).astype(jnp.int32),
        q_latent_BNC.astype(c.dtype),
        q_rope_BNR.astype(c.dtype),
        c,
        r,
    )


def _cost(q_latent_BNC, c, r):
    """What XLA's scheduler is told: every key is read once, as are the queries, and the output is written."""
    (B, N, C), (S, R) = q_latent_BNC.shape, r.shape[2:]
    cache_bytes = B * S * (C + R) * c.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * B * N * S * (2 * C + R),
        bytes_accessed=cache_bytes + B * N * (2 * C + R) * q_latent_BNC.dtype.itemsize,
        transcendentals=B * N * S,
    )


def _attend_block(block, scale, layer, position, q_latent, q_rope, c, r, out, top, total, summed):
    """One step: a block of one sequence's keys. The last three are kept from step to step, a row a head."""
    step, last = pl.program_id(1), position[pl.program_id(0)]
    start = step * block
    seen = lambda shape, axis: start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) <= last

    def add(scores, latents):
        new_top = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        kept, weights = jnp.exp(top[...] - new_top), jnp.exp(scores - new_top)
        total[...] = kept * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        summed[...] = kept * summed[...] + _product(weights.astype(latents.dtype), latents, contracted=0)
        top[...] = new_top

    def scores():
        found = _product(q_latent[...], c[...], contracted=1) + _product(q_rope[...], r[...], contracted=1)
        return found * scale

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(start + block - 1 <= last)
    def _():
        add(scores(), c[...])

    # Latents are masked as well: a weight of 0 times NaN is NaN.
    @pl.when((start <= last) & (last < start + block - 1))
    def _():
        masked = jnp.where(seen((1, block), 1), scores(), -jnp.inf)
        add(masked, jnp.where(seen((block, 1), 0), c[...], 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = (summed[...] / total[...]).astype(out.dtype)


def _product(left, right, contracted):
    """left [N, x] with the axis of `right` that is its x, summed up in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
