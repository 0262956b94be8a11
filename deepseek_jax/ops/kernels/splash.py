"""Causal attention of whole sequences on TPU, by jax's own kernel: scores never leave the chip.

Source: jax.experimental.pallas.ops.tpu.splash_attention, with its gradient.
Differs from `ops.flash_attention`: queries are scaled before the product, in their own dtype.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

from deepseek_jax.ops.flash_attention import ATTENTION, Tiling, unpacked

LANES = 128  # of a tile's side the least
_SIDES = (512, 256, 128)
_PADDED = 8  # an eighth at most: four tiles of half the side take longer than one
# The gradient of the queries is a sum over blocks of keys, whose parts the kernel leaves in memory. Above so many
# parts a second kernel computes it instead, which multiplies queries and keys once more.
_PARTS = 8
_MOST_PAIRS = 2**27  # of a device, whose mask the kernel is given whole: with gradients three of 0.5 GB
_MOST_KEYS = 2048  # or queries of a block: what the chip's own memory holds of bfloat16


def tiling(length: int, parts: int) -> Tiling:
    """Of the largest tiles that pad little more than the smallest would."""
    least = Tiling(length, parts, LANES)
    little = lambda padded, at_least: padded <= at_least + at_least // _PADDED
    return next(
        of
        for of in (Tiling(length, parts, side) for side in _SIDES)
        if little(of.padded, least.padded) and little(of.keys, least.keys)
    )


@lru_cache(maxsize=32)
def kernel(
    of: Tiling,
    heads: int,
    *,
    number: int = 4,
    segmented: bool = True,
    sums: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> SplashAttentionKernel:
    """The kernel of some heads, for all devices that share a sequence: give each its part (`manual_sharding_spec`).

    Args:
        of: tiles, whose side is a multiple of 128.
        heads: of queries, on one device.
        number: bytes of one of its arguments'.
        segmented: whether it is to be given segments.
        sums: whether it returns the logarithms of the softmax's sums too; then it has no gradient.
        interpret: run as plain JAX, on any device; or as jax's model of a TPU.
    """
    positions = of.positions()
    mask = splash.CausalMask((positions.size, of.keys))
    mask.q_sequence = positions.reshape(-1)
    with jax.ensure_compile_time_eval():  # its tables would be a trace's own, and could not be kept
        made = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks(of, number=number, segmented=segmented),
            head_shards=1,
            q_seq_shards=of.parts,
            save_residuals=sums,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, made)  # on no device


def blocks(of: Tiling, *, number: int, segmented: bool, chosen: bool = False) -> splash.BlockSizes:
    """Sizes of blocks: tiles, but runs of them where something is read anew for every block.

    Keys and values are read for every block of queries, and for their gradients queries for every block of keys.
    Gradients that one kernel computes want blocks of keys wide enough to leave few parts. Wider numbers, and a mask of
    chosen keys, leave room for half as many of either; segments, of which every query's fills a row of the chip's
    memory, for half as many queries.
    """
    most = min(_MOST_KEYS, _MOST_KEYS * 2 // max(number, 4 * chosen))
    side, long = of.side, _long(of, min(most, _MOST_KEYS // (1 + segmented)))
    wide = side
    while wide < most and of.keys // wide > _PARTS and of.keys % (2 * wide) == 0:
        wide *= 2
    sizes = {"block_q": long, "block_kv": side, "block_q_dkv": side, "block_kv_dkv_compute": side}
    if of.keys // wide <= _PARTS:
        return splash.BlockSizes(**sizes, block_kv_dkv=wide, use_fused_bwd_kernel=True)
    return splash.BlockSizes(**sizes, block_kv_dkv=long, block_q_dq=long, block_kv_dq=side)


def _long(of: Tiling, most: int) -> int:
    """Queries of a block: as many as compute a sixteenth more pairs than single tiles would, at most."""
    long = of.side
    while long < most and of.padded % (2 * long) == of.keys % (2 * long) == 0:
        if 16 * (2 * long - of.side) > of.length + of.side:
            break
        long *= 2
    return long


def splash_attention(
    kernel: SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of queries over the keys at positions up to their own, of their own segment.

    Args:
        kernel: of `kernel`, this device's part.
        q: queries [B, T, N, K], in the order of the kernel's tiling.
        k, v: keys [B, G, S, K] from position 0 and values [B, G, S, H], head-major.
        segments: int32 [B, T] and [B, S], of queries and keys; None where every row is one sequence.
        scale: of the scores.

    Returns:
        [B, T, N, H] in the dtype of q; and the logarithms of the sums, float32 [B, T, N], where the kernel gives them.
    """
    ids = None if segments is None else splash.SegmentIds(*segments)
    return _results(jax.vmap(kernel)(_scaled(q, scale), k, v, ids), sums=kernel.kwargs["save_residuals"])


def mask_fits(of: Tiling) -> bool:
    """Whether `chosen_attention` is for sequences so long."""
    return of.chunks * of.padded * of.keys <= _MOST_PAIRS


def chosen_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bits: jax.Array,
    of: Tiling,
    *,
    scale: float,
    sums: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of queries over the keys whose bits are set, one at least of each query.

    The kernel reads 4 bytes a pair, for every head, of the blocks that are neither hidden nor seen whole. They
    exist of one sequence at a time, once for each pass; see `mask_fits`.

    Args:
        q: queries [B, T, N, K], in the order of the tiling.
        k, v: keys [B, G, S, K] and values [B, G, S, H], head-major.
        bits: uint8 [I, B, t, J, bytes], of each tile of queries and each of keys (`ops.flash_attention.packed`).
        of: tiles, whose side is a multiple of 128.
        scale, sums, interpret: as of `splash_attention` and `kernel`.

    Returns:
        As `splash_attention`.
    """
    sizes = blocks(of, number=k.dtype.itemsize, segmented=False, chosen=True)
    form = {"block_sizes": sizes, "head_shards": 1, "q_seq_shards": 1, "save_residuals": sums}
    form |= {"residual_checkpoint_name": ATTENTION, "interpret": interpret}

    def of_sequence(given):
        *arrays, bits = given
        mask = unpacked(bits, of.side).reshape(1, arrays[0].shape[1], of.keys)
        made = splash.make_splash_mha(mask, **form)
        infos = (made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info)
        # of its tables the flag has become an array too, which a trace cannot ask
        infos = (info and info._replace(is_dynamic_mask=True) for info in infos)
        return SplashAttentionKernel(*infos, **made.kwargs)(*arrays)

    found = jax.lax.map(of_sequence, (_scaled(q, scale), k, v, jnp.moveaxis(bits, 1, 0)))
    return _results(found, sums=sums)


def _scaled(q: jax.Array, scale: float) -> jax.Array:
    """[B, T, N, K] as the kernel takes them, head-major."""
    return (q.astype(jnp.float32) * scale).astype(q.dtype).swapaxes(1, 2)


def _results(found: Any, *, sums: bool) -> tuple[jax.Array, jax.Array | None]:
    out, log_sum = (found[0], found[1][0]) if sums else (found, None)
    return out.swapaxes(1, 2), None if log_sum is None else log_sum.swapaxes(1, 2)
