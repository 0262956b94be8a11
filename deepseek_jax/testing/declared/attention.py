"""Attention in its forms: grouped heads, latents expanded and absorbed, and parts joined."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops import attention
from deepseek_jax.ops.paged_attention import attend_partial, finish, join
from deepseek_jax.testing import Draw, Kernel, counts, order, split

SCALE = 0.3
_ROUNDING = 2.0**-21


def softmax(scores, mask):
    """Over the keys that a query sees, at least one."""
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e300), axis=-1)
    return jnp.where(mask, weights, 0)


def _mask(draw: Draw) -> np.ndarray:
    """One key at least, then as many as the example says, anywhere."""
    B, T, S = draw.of("B", "T", "S")
    ranks = np.argsort(draw.ids.random((B, T, S)), axis=-1)
    return ranks <= draw.ragged["seen"][..., None]


def _bound(tolerance, keys, values, queries):
    """Of the largest value, a part for roundings and a part for what the scores' are off."""
    size = SCALE * np.max(np.abs(queries), initial=0) * np.max(np.abs(keys), initial=0) * queries.shape[-1]
    return np.max(np.abs(values), initial=0) * (tolerance + _ROUNDING * size)


# --- grouped heads -------------------------------------------------------------------------------


def _grouped_inputs(draw: Draw) -> dict[str, Any]:
    B, T, S, N, G, K, H = draw.of("B", "T", "S", "N", "G", "K", "H")
    q, k, v = draw.numbers(B, T, N, K), draw.numbers(B, G, S, K), draw.numbers(B, G, S, H)
    return {"q": q, "k": k, "v": v, "mask": _mask(draw)}


def _grouped_twin(q, k, v, mask):
    k, v = (jnp.repeat(of, q.shape[2] // of.shape[1], axis=1) for of in (k, v))
    weights = softmax(SCALE * jnp.einsum("btnk,bnsk->bnts", q, k), mask[:, None])
    return jnp.einsum("bnts,bnsh->btnh", weights, v)


def _in_two_parts(q, k, v, mask):
    """The keys in halves, each attended to alone: queries may see nothing of one of them."""
    half = k.shape[2] // 2
    parts = [
        attend_partial(q, k[:, :, at], v[:, :, at], mask[:, :, at], SCALE) for at in (slice(half), slice(half, None))
    ]
    return finish(join(*parts), q.dtype)


_ROWS = {"q": 0, "k": 0, "v": 0, "mask": 0}
_OF_HEADS: dict[str, Any] = {
    "twin": _grouped_twin,
    "inputs": _grouped_inputs,
    "bound": lambda tolerance, q, k, v, mask: _bound(tolerance, k, v, q),
    "ragged": {"seen": counts(lambda of: of["S"] - 1, "B", "T")},
    "sizes": {"B": (1, 3), "T": (1, 3), "S": (2, 7), "N": (4,), "G": (1, 2), "K": (8,), "H": (8, 5)},
    "tolerance": {"float32": 2.0**-19, "bfloat16": 2.0**-6},
    "invariances": (order(**_ROWS), split(**_ROWS)),
    "compiled": ({"B": 2, "T": 256, "S": 512, "N": 32, "G": 8, "K": 128, "H": 128},),
}
ATTEND = Kernel(
    name="attend",
    run=lambda q, k, v, mask: attention.attend(q, k, v, mask, SCALE),
    gradients=("q", "k", "v"),
    gradient_tolerance={"float32": 2.0**-16, "bfloat16": 2.0**-5},
    numbers=("normal", "whole", "zeros"),
    **_OF_HEADS,
)
ATTEND_PARTIAL = Kernel(name="attend_partial", run=_in_two_parts, **_OF_HEADS)


# --- latents -------------------------------------------------------------------------------------


def _latent_inputs(draw: Draw) -> dict[str, Any]:
    B, T, S, N, K, R, C, H = draw.of("B", "T", "S", "N", "K", "R", "C", "H")
    of = {"q_nope": (B, T, N, K), "q_rope": (B, T, N, R), "c": (B, S, C), "k_rope": (B, S, R)}
    arrays: dict[str, Any] = {name: draw.numbers(*shape) for name, shape in of.items()}
    weights = {name: draw.numbers(C, N, width, scale=C**-0.5) for name, width in (("w_k", K), ("w_v", H))}
    return {**arrays, **weights, "mask": _mask(draw)}


def _latent_twin(q_nope, q_rope, c, k_rope, w_k, w_v, mask):
    k, v = jnp.einsum("bsc,cnk->bnsk", c, w_k), jnp.einsum("bsc,cnh->bnsh", c, w_v)
    scores = jnp.einsum("btnk,bnsk->bnts", q_nope, k) + jnp.einsum("btnr,bsr->bnts", q_rope, k_rope)
    return jnp.einsum("bnts,bnsh->btnh", softmax(SCALE * scores, mask[:, None]), v)


_LATENT_ROWS = {"q_nope": 0, "q_rope": 0, "c": 0, "k_rope": 0, "mask": 0}
_OF_LATENTS: dict[str, Any] = {
    "twin": _latent_twin,
    "inputs": _latent_inputs,
    "ragged": _OF_HEADS["ragged"],
    "sizes": {"B": (1, 2), "T": (1, 3), "S": (2, 7), "N": (2,), "K": (8,), "R": (4,), "C": (16,), "H": (8, 5)},
    # keys, or absorbed queries, are rounded before scores are made of them
    "tolerance": {"float32": 2.0**-18, "bfloat16": 2.0**-4},
    "gradients": ("q_nope", "q_rope", "c", "k_rope", "w_k", "w_v"),
    "gradient_tolerance": {"float32": 2.0**-16, "bfloat16": 2.0**-3},
    "numbers": ("normal", "whole", "zeros"),
    "invariances": (order(**_LATENT_ROWS), split(**_LATENT_ROWS)),
    "compiled": ({"B": 2, "T": 256, "S": 512, "N": 16, "K": 128, "R": 64, "C": 512, "H": 128},),
}
ATTEND_EXPANDED = Kernel(
    name="attend_expanded",
    run=lambda **of: attention.attend_expanded(**of, scale=SCALE),
    gradient_noise={"bfloat16": 2.0**-9},  # a query whose weights are nearly 0 and 1 has little gradient
    **_OF_LATENTS,
)
ATTEND_ABSORBED = Kernel(
    name="attend_absorbed", run=lambda **of: attention.attend_absorbed(**of, scale=SCALE), **_OF_LATENTS
)
