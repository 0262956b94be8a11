"""Attention of decoding where the cache lies on many devices, cut by sequence."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.ops.attention import attend_latents, causal_mask
from deepseek_jax.sharding import Layout


def decode_attention(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    c: jax.Array,
    r: jax.Array,
    positions_BT: jax.Array,
    layer: jax.Array | None,
    *,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """Latent attention of one new token a sequence over its cache, [B, 1, N, C] in the queries' dtype.

    On TPU the kernel `ops.kernels.latent_decode`, elsewhere `ops.attention.attend_latents`. On a mesh each device
    computes the sequences whose cache it holds, with all heads; nothing is exchanged. Has no gradient.

    Args:
        q_latent_BTNC: queries that meet the latents, T = 1.
        q_rope_BTNR: rotated queries.
        c: [B, S, C] latents of one layer, or [B, L, S, C] of a stack of layers.
        r: [B, S, R] or [B, L, S, R] rotated keys, or wider with zeros at the end. On TPU store them 128 wide, which
            rows of 64 take up anyway: XLA's layout of 64 has S innermost, and it copies the whole stack for the kernel.
        positions_BT: int32; a query sees the slots up to its own.
        layer: int32, the place in the stack; None where c and r are of one layer.
        scale: of the scores.
        layout: whose mesh, if there is one, divides B by "cache_batch".

    Raises:
        ValueError: more than one token a sequence.
    """
    if q_latent_BTNC.shape[1] != 1:
        raise ValueError(f"decode_attention: got {q_latent_BTNC.shape[1]} tokens a sequence, wanted 1: attend_latents")
    wide = jnp.pad(q_rope_BTNR, ((0, 0),) * 3 + ((0, r.shape[-1] - q_rope_BTNR.shape[-1]),))
    arguments = (q_latent_BTNC, wide, c, r, positions_BT, layer)
    attend = functools.partial(_attend, scale=scale)
    if layout.mesh is None:
        return attend(*arguments)
    sequences = layout.sharding("cache_batch").spec
    specs = (*(sequences,) * 5, PartitionSpec())
    # Unchecked: a kernel does not say over which axes its result differs; over `sequences`, as all that it reads.
    return jax.shard_map(attend, mesh=layout.mesh, in_specs=specs, out_specs=sequences, check_vma=False)(*arguments)


def _attend(*arguments, scale):
    on_tpu, plain = (functools.partial(attend, scale=scale) for attend in (_by_kernel, _plainly))
    return jax.lax.platform_dependent(*arguments, tpu=on_tpu, default=plain)


def _by_kernel(q_latent, q_rope, c, r, positions, layer, *, scale):
    from deepseek_jax.ops.kernels.latent_decode import latent_decode  # Pallas is slow to import

    return latent_decode(q_latent[:, 0], q_rope[:, 0], c, r, positions[:, 0], layer, scale=scale)[:, None]


def _plainly(q_latent, q_rope, c, r, positions, layer, *, scale):
    if layer is not None:
        c, r = (jax.lax.dynamic_index_in_dim(of, layer, axis=1, keepdims=False) for of in (c, r))
    B, S, _ = c.shape
    mask = causal_mask(positions, jnp.broadcast_to(jnp.arange(S), (B, S)))
    return attend_latents(q_latent, q_rope, c, r, mask, scale).astype(q_latent.dtype)
