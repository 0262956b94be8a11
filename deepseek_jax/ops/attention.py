"""Attention with grouped heads, and latent attention in its expanded, absorbed and sparse forms.

Masks are boolean [B, T, S], true where a query may look. Softmax runs in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """A query at position p sees the keys at positions up to p."""
    return keys[:, None, :] <= queries[:, :, None]


def attend(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention; each of the G key-value heads serves N/G consecutive query heads.

    Keys lie head-major, as the cache stores them, so that decoding never transposes the cache.
    """
    B, T, N, K = q.shape
    G = k.shape[1]
    grouped = q.reshape(B, T, G, N // G, K)
    scores = jnp.einsum("btgnk,bgsk->bgnts", grouped, k, preferred_element_type=jnp.float32) * scale
    weights = _softmax(scores, mask[:, None, None])
    out = jnp.einsum("bgnts,bgsh->btgnh", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, v.shape[-1])


def attend_expanded(
    q_nope: Float[Array, "B T N K"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"],
    w_v: Float[Array, "C N H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Latent attention with every head's keys and values spelled out: cheapest for many queries.

    Source: arXiv 2412.19437 equations 1 to 11.
    """
    B, S, _ = c.shape
    N, R = q_nope.shape[2], k_rope.shape[-1]
    k_nope = jnp.einsum("bsc,cnk->bnsk", c, w_k)
    k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, None], (B, N, S, R))], axis=-1)
    v = jnp.einsum("bsc,cnh->bnsh", c, w_v)
    return attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, mask, scale)


def attend_absorbed(
    q_nope: Float[Array, "B T N K"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"],
    w_v: Float[Array, "C N H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """The same attention without leaving the latent space: the cache is read as it is, once for all heads.

    Source: DeepSeek-V3 inference/model.py, MLA.forward, attn_impl "absorb".
    """
    q_latent = jnp.einsum("btnk,cnk->btnc", q_nope, w_k)
    scores = jnp.einsum("btnc,bsc->bnts", q_latent, c, preferred_element_type=jnp.float32)
    scores += jnp.einsum("btnr,bsr->bnts", q_rope, k_rope, preferred_element_type=jnp.float32)
    weights = _softmax(scores * scale, mask[:, None])
    out_latent = jnp.einsum("bnts,bsc->btnc", weights.astype(c.dtype), c)
    return jnp.einsum("btnc,cnh->btnh", out_latent, w_v)


def attend_chosen(
    q_nope: Float[Array, "B T N K"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"],
    w_v: Float[Array, "C N H"],
    chosen: Int[Array, "B T U"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Absorbed attention where each query reads only the keys chosen for it, and of those only what `mask` lets it see.

    The cost is that of U keys a query, however many the cache has; the gathered latents take [B, T, U, C + R].
    Equals `attend_absorbed` under the mask of the same keys. Source: DeepSeek-V3.2-Exp report section 1, equation 2.
    """
    B, T, U = chosen.shape
    rows = jnp.arange(B)[:, None, None]
    alone = lambda x: x.reshape(B * T, -1, *x.shape[2:])  # each query a sequence of its own
    own = lambda x: x[rows, chosen].reshape(B * T, U, -1)
    sees = alone(jnp.take_along_axis(mask, chosen, axis=-1))
    out = attend_absorbed(alone(q_nope), alone(q_rope), own(c), own(k_rope), w_k, w_v, sees, scale)
    return out.reshape(B, T, *out.shape[2:])


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
