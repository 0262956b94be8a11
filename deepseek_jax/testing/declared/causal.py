"""Causal attention of whole sequences: a tile at a time, by jax's TPU kernel, and on meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.flash_attention import Tiling, flash_attention
from deepseek_jax.ops.kernels import splash
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.testing import Draw, Kernel, counts
from deepseek_jax.testing.declared.attention import SCALE, softmax
from deepseek_jax.testing.declared.logprobs import MESHES, layout_of

_ROUNDING = 2.0**-21  # of a score, as a part of the sum of its terms' magnitudes
_OF_SUM = 2.0**-19


def _inputs(draw: Draw) -> dict[str, Any]:
    """Rows of one sequence; of several, cut where the example says; or of several that see an earlier one too."""
    B, T, N, G, K, H = draw.of("B", "T", "N", "G", "K", "H")
    q, k, v = draw.numbers(B, T, N, K), draw.numbers(B, G, T, K), draw.numbers(B, G, T, H)
    given = {"q": q, "k": k, "v": v, "segments": None, "prompts": None}
    if draw.sizes["kind"] != "whole":
        given["segments"] = np.sum(draw.ragged["cuts"][:, None] <= np.arange(T)[:, None], axis=-1, dtype=np.int32)
    if draw.sizes["kind"] == "shared":
        earlier = draw.ids.integers(0, np.arange(draw.sizes["cuts"] + 1) + 1)
        given["prompts"] = earlier.astype(np.int32)[given["segments"]]
    return given


def _seen(length: int, segments: Any, prompts: Any) -> np.ndarray:
    seen = np.tril(np.ones((length, length), bool))[None]
    if segments is None:
        return seen
    same = segments[:, :, None] == segments[:, None]
    return seen & (same if prompts is None else same | (prompts[:, :, None] == segments[:, None]))


def _twin(q, k, v, segments, prompts, **_):
    k, v = (jnp.repeat(of, q.shape[2] // of.shape[1], axis=1) for of in (k, v))
    scores, mask = SCALE * jnp.einsum("btnk,bnsk->bnts", q, k), _seen(q.shape[1], segments, prompts)[:, None]
    log_sum = jax.nn.logsumexp(jnp.where(mask, scores, -1e300), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", softmax(scores, mask), v), jnp.moveaxis(log_sum, 1, 2)


def _sizes(q, k) -> np.ndarray:
    """[B, T, N]: the largest sum of magnitudes that makes a score of a query."""
    return SCALE * np.max(np.einsum("btnk,bnsk->btns", abs(q), abs(k.repeat(q.shape[2] // k.shape[1], 1))), axis=-1)


def _bound(tolerance, q, k, v, **_):
    """Scores, of exact products, are rounded in float32."""
    of_score = _ROUNDING * _sizes(q, k)
    return np.max(np.abs(v)) * (tolerance + of_score[..., None]), _OF_SUM + of_score


def _bound_of_kernel(tolerance, q, k, v, **_):
    """Queries are scaled, and rounded so, before there are scores."""
    of_score = tolerance / 4 * _sizes(q, k)
    return np.max(np.abs(v)) * (tolerance + of_score[..., None]), _OF_SUM + of_score


def _wider(x: jax.Array | None, axis: int, size: int) -> Any:
    if x is None:
        return None
    return jnp.pad(x, [(0, size - x.shape[at] if at == axis else 0) for at in range(x.ndim)])


def _by_tiles(q, k, v, segments, prompts, side):
    T = q.shape[1]
    of = Tiling(T, 1, side)
    at, pairs = (jnp.asarray(table[0]) for table in (of.positions(), of.pairs()))
    given = [_wider(q, 1, of.padded), _wider(k, 2, of.keys), _wider(v, 2, of.keys)]
    ids = None if segments is None else (_wider(segments, 1, of.padded),) * 2
    ids = ids if prompts is None else (*ids, _wider(prompts, 1, of.padded))
    return tuple(x[:, :T] for x in flash_attention(*given, ids, at, pairs, side=side, scale=SCALE))


_ROWS = ("q", "k", "v")
_ALIKE: dict[str, Any] = {
    "tolerance": {"float32": 2.0**-19, "bfloat16": 2.0**-6},
    "gradients": _ROWS,
    "gradient_tolerance": {"float32": 2.0**-16, "bfloat16": 2.0**-5},
    "gradient_noise": {"float32": 2.0**-18, "bfloat16": 2.0**-5},  # a query that sees one key has none
    "numbers": ("normal", "whole", "zeros"),
    "ragged": {"cuts": counts("T", "B", "cuts")},
}
_LARGE = {"B": 1, "T": 2048, "N": 4, "G": 4, "K": 192, "H": 128, "cuts": 3}
FLASH_ATTENTION = Kernel(
    name="flash_attention",
    run=_by_tiles,
    twin=_twin,
    inputs=lambda draw: {**_inputs(draw), "side": draw.sizes["side"]},
    bound=_bound,
    sizes={
        "B": (1, 2),
        "T": (1, 4, 13),
        "N": (4,),
        "G": (4, 2),
        "K": (8,),
        "H": (8, 5),
        "cuts": (3,),
        "kind": ("whole", "packed", "shared"),
        "side": (4, 1, 8),
    },
    compiled=({**_LARGE, "kind": "packed", "side": 512}, {**_LARGE, "G": 2, "kind": "shared", "side": 512}),
    **_ALIKE,
)


# --- jax's kernel --------------------------------------------------------------------------------


def _by_kernel(q, k, v, segments, interpret, sums):
    T, N = q.shape[1:3]
    of = splash.tiling(T, 1)
    kernel = splash.kernel(of, N, sums=sums, interpret=interpret)
    given = [_wider(q, 1, of.padded), _wider(k, 2, of.keys), _wider(v, 2, of.keys)]
    ids = None if segments is None else (_wider(segments, 1, of.padded),) * 2
    one = lambda *of: splash.splash_attention(kernel, *of, scale=SCALE)
    if isinstance(interpret, bool):
        out, log_sum = one(*given, ids)
    else:  # jax's model of a TPU does not know the axis that vmap adds to a grid
        rows = [one(*jax.tree.map(lambda x, b=b: x[b : b + 1], (*given, ids))) for b in range(len(q))]
        out, log_sum = (None if parts[0] is None else jnp.concatenate(parts) for parts in zip(*rows, strict=True))
    return (out[:, :T], log_sum[:, :T]) if sums else out[:, :T]


def _kernel(name: str, *, sums: bool, **others: Any) -> Kernel:
    """It gives the logarithms of the sums, or has a gradient."""
    found = (lambda both: both) if sums else (lambda both: both[0])
    return Kernel(
        name=name,
        run=lambda q, k, v, segments, interpret: _by_kernel(q, k, v, segments, interpret, sums),
        twin=lambda q, k, v, segments: found(_twin(q, k, v, segments, None)),
        inputs=lambda draw: {name: of for name, of in _inputs(draw).items() if name != "prompts"},
        bound=lambda tolerance, q, k, v, segments: found(_bound_of_kernel(tolerance, q, k, v)),
        sizes={
            "B": (1, 2),
            "T": (1, 128, 300),
            "N": (2,),
            "G": (2, 1),
            "K": (24,),
            "H": (16,),
            "cuts": (2,),
            "kind": ("whole", "packed"),
        },
        compiled=({**_LARGE, "cuts": 2, "kind": "packed"},),
        platform="tpu",
        **{**_ALIKE, **others},
    )


SPLASH_ATTENTION = _kernel(
    "splash_attention", sums=False, gradient_tolerance={"float32": 2.0**-16, "bfloat16": 2.0**-4}
)
SPLASH_SUMS = _kernel("splash_sums", sums=True, gradients=())


# --- on meshes -----------------------------------------------------------------------------------


def _on_mesh(q, k, v, segments, prompts, mesh, devices):
    layout = layout_of(devices, mesh)
    return causal_attention(q, k, v, segments, scale=SCALE, layout=layout, prompt_of_BT=prompts)[0]


CAUSAL_ATTENTION = Kernel(
    name="causal_attention",
    run=_on_mesh,
    twin=lambda **of: _twin(**of)[0],
    inputs=lambda draw: {**_inputs(draw), "mesh": draw.sizes["mesh"]},
    bound=lambda tolerance, **of: _bound(tolerance, **of)[0],
    sizes={
        "B": (8,),
        "T": (2, 10),
        "N": (4,),
        "G": (4,),
        "K": (8,),
        "H": (5,),
        "cuts": (2,),
        "kind": ("whole", "packed", "shared"),
        "mesh": tuple(MESHES),
    },
    compiled=tuple({**_LARGE, "B": 8, "cuts": 2, "kind": kind, "mesh": "context"} for kind in ("packed", "shared")),
    devices=8,
    **_ALIKE,
)
