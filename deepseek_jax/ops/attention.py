"""Attention with grouped heads, and latent attention in its expanded, absorbed and sparse forms.

Masks are boolean [B, T, S], true where a query may look. Softmax runs in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.low_rank import LowRank, einsum

_RUN = 64  # queries that attend together where sequences are short


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

    Args:
        q: queries.
        k: keys, head-major as the cache stores them, so that decoding never transposes the cache.
        v: values, likewise.
        mask: which keys each query sees, one at least.
        scale: of the scores, which are float32.

    Returns:
        In the dtype of v.
    """
    B, T, N, K = q.shape
    G = k.shape[1]
    grouped = q.reshape(B, T, G, N // G, K)
    scores = jnp.einsum("btgnk,bgsk->bgnts", grouped, k, preferred_element_type=jnp.float32) * scale
    weights = _softmax(scores, mask[:, None, None])
    out = jnp.einsum("bgnts,bgsh->btgnh", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, v.shape[-1])


def attend_causal(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T H"],
    mask: Bool[Array, "B T T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """`attend` of whole sequences: a run of queries meets the keys up to its end alone, which causality lets it see.

    The gradient is written out: it passes over scores less often than JAX's own.

    Args:
        q, k, v, scale: as of `attend`.
        mask: which of the keys up to its own place each query sees, one at least.
    """
    T = q.shape[1]
    runs = [slice(start, min(start + _RUN, T)) for start in range(0, T, _RUN)]
    of_run = lambda run: _attend(q[:, run], k[:, :, : run.stop], v[:, :, : run.stop], mask[:, run, : run.stop], scale)
    return jnp.concatenate([of_run(run) for run in runs], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, scale):
    return _attend_forward(q, k, v, mask, scale)[0]


def _attend_forward(q, k, v, mask, scale):
    """The exponentials stay undivided: their sums divide what is smaller, results and gradients of them."""
    B, T, N, K = q.shape
    grouped = q.reshape(B, T, k.shape[1], -1, K)
    scores = jnp.where(mask[:, None, None], _product("btgnk,bgsk->bgnts", grouped, k) * scale, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)[..., None]
    out = _product("bgnts,bgsh->bgnth", weights.astype(v.dtype), v) / total
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, -1).astype(v.dtype), (grouped, k, v, weights, total)


def _attend_backward(scale, saved, d_out):
    """The mean is that of the rounded products themselves, so that what cancels does, and needs no forward output."""
    q, k, v, weights, total = saved
    B, T, G, N, K = q.shape
    of_v = (jnp.moveaxis(d_out.reshape(B, T, G, N, -1), 1, 3).astype(jnp.float32) / total).astype(v.dtype)
    d_weights = _product("bgnth,bgsh->bgnts", of_v, v)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True) / total
    d_scores = (weights * (d_weights - mean) * scale).astype(q.dtype)
    d_q = jnp.moveaxis(_product("bgnts,bgsk->bgntk", d_scores, k), 3, 1).reshape(B, T, -1, K).astype(q.dtype)
    d_k = _product("bgnts,btgnk->bgsk", d_scores, q).astype(k.dtype)
    return d_q, d_k, _product("bgnts,bgnth->bgsh", weights.astype(v.dtype), of_v).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def attend_expanded(
    q_nope: Float[Array, "B T N K"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"] | LowRank,
    w_v: Float[Array, "C N H"] | LowRank,
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Latent attention with every head's keys and values spelled out: cheapest for many queries.

    Args:
        q_nope, q_rope: the two parts of the queries, the second rotated.
        c: key-value latents.
        k_rope: rotated keys, which all heads share.
        w_k, w_v: what makes keys and values of the latents.
        mask, scale: as of `attend`.

    Source: arXiv 2412.19437 equations 1 to 11.
    """
    return attend(jnp.concatenate([q_nope, q_rope], axis=-1), *expand(c, k_rope, w_k, w_v), mask, scale)


def expand(
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"] | LowRank,
    w_v: Float[Array, "C N H"] | LowRank,
) -> tuple[Float[Array, "B N S width"], Float[Array, "B N S H"]]:
    """Every head's keys, of width K + R, and values, head-major, from the latents."""
    B, S, _ = c.shape
    N, R = w_k.shape[1], k_rope.shape[-1]
    k_nope = einsum("bsc,cnk->bnsk", c, w_k)
    k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, None], (B, N, S, R))], axis=-1)
    return k, einsum("bsc,cnh->bnsh", c, w_v)


def attend_absorbed(
    q_nope: Float[Array, "B T N K"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    w_k: Float[Array, "C N K"] | LowRank,
    w_v: Float[Array, "C N H"] | LowRank,
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """The same attention without leaving the latent space: the cache is read as it is, once for all heads.

    Args: as of `attend_expanded`.
    Source: DeepSeek-V3 inference/model.py, MLA.forward, attn_impl "absorb".
    """
    return project_values(attend_latents(absorb(q_nope, w_k), q_rope, c, k_rope, mask, scale), w_v)


def absorb(q_nope: Float[Array, "B T N K"], w_k: Float[Array, "C N K"] | LowRank) -> Float[Array, "B T N C"]:
    """Queries that meet the latents themselves: the keys' projection goes to their side."""
    return einsum("btnk,cnk->btnc", q_nope, w_k)


def project_values(
    out_latent: Float[Array, "B T N C"], w_v: Float[Array, "C N H"] | LowRank
) -> Float[Array, "B T N H"]:
    """The values' projection of what was attended to in the latent space."""
    return einsum("btnc,cnh->btnh", out_latent, w_v)


def attend_latents(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    c: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N C"]:
    """The part of absorbed attention between its two projections.

    Args:
        q_latent: queries in the latent space, of `absorb`.
        q_rope, c, k_rope, mask, scale: as of `attend_expanded`.

    Returns:
        Latents that `project_values` makes values of.
    """
    scores = jnp.einsum("btnc,bsc->bnts", q_latent, c, preferred_element_type=jnp.float32)
    scores += jnp.einsum("btnr,bsr->bnts", q_rope, k_rope, preferred_element_type=jnp.float32)
    weights = _softmax(scores * scale, mask[:, None])
    return jnp.einsum("bnts,bsc->btnc", weights.astype(c.dtype), c)


def causal_rows(positions: Int[Array, "t"], keys: int, sequences: int) -> Bool[Array, "B t S"]:
    """What queries at these positions of every sequence see of the first `keys` ones."""
    mask = jnp.arange(keys) <= positions[:, None]
    return jnp.broadcast_to(mask, (sequences, *mask.shape))


def positions_within(segments: Int[Array, "B T"], prompt_of: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """Each token's place in its own text, from 0: packed samples all begin at position 0.

    Args:
        segments: numbers, a run of equal ones a segment.
        prompt_of: where samples share prompts, the number of the segment with which each token's text begins: a
            prompt's, to which the segments with the rest of its texts follow, or the token's own. Positions go on from
            the prompt's last one.
    """
    columns = jnp.arange(segments.shape[1], dtype=jnp.int32)
    latest = lambda flags: jax.lax.cummax(jnp.where(flags, columns, 0), axis=1)
    starts = _starts(segments)
    within = columns - latest(starts)
    if prompt_of is None:
        return within
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    length = latest(starts & (before == prompt_of)) - latest(_starts(prompt_of))
    return within + jnp.where(segments == prompt_of, 0, length)


def _starts(numbers: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a run of equal numbers begins."""
    first = jnp.ones((numbers.shape[0], 1), bool)
    return jnp.concatenate([first, numbers[:, 1:] != numbers[:, :-1]], axis=1)


def same_segment(
    mask: Bool[Array, "B T S"],
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    prompt_of: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T S"]:
    """What `mask` lets a query see of the keys with its own segment's number, and with that of its prompt's.

    Args:
        mask: what it may see at most.
        queries, keys: their segments' numbers.
        prompt_of: of the queries, as of `positions_within`; None: no segment sees another.
    """
    seen = queries[:, :, None] == keys[:, None, :]
    if prompt_of is not None:
        seen |= prompt_of[:, :, None] == keys[:, None, :]
    return mask & seen


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
