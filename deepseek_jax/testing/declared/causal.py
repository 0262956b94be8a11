"""Causal attention of whole sequences: a tile at a time, by jax's TPU kernel, and on meshes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.flash_attention import Tiling, flash_attention, packed
from deepseek_jax.ops.indexer import Index
from deepseek_jax.ops.kernels import splash
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.sharding import LOCAL
from deepseek_jax.testing import Draw, Kernel, counts
from deepseek_jax.testing.declared import bounds
from deepseek_jax.testing.declared.attention import SCALE, softmax
from deepseek_jax.testing.declared.indexer import best_keys, liking
from deepseek_jax.testing.declared.logprobs import MESHES, layout_of
from deepseek_jax.testing.rounding import UNITS


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


def _seen(length: int, segments: Any, prompts: Any, chosen: Any = None) -> Any:
    """[B, T, T], or [1, T, T] where all sequences are alike."""
    seen = np.tril(np.ones((length, length), bool))[None]
    if segments is not None:
        same = segments[:, :, None] == segments[:, None]
        seen = seen & (same if prompts is None else same | (prompts[:, :, None] == segments[:, None]))
    return seen if chosen is None else seen & chosen


def _twin(q, k, v, segments, prompts, chosen=None, **_):
    k, v = (jnp.repeat(of, q.shape[2] // of.shape[1], axis=1) for of in (k, v))
    scores, mask = SCALE * jnp.einsum("btnk,bnsk->bnts", q, k), _seen(q.shape[1], segments, prompts, chosen)[:, None]
    log_sum = jax.nn.logsumexp(jnp.where(mask, scores, -1e300), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", softmax(scores, mask), v), jnp.moveaxis(log_sum, 1, 2)


def _near(unit, q, k, v, segments, prompts=None, chosen=None, d=(0.0, 0.0), *, scaled=False, **_):
    mask = _seen(q.shape[1], segments, prompts, chosen)
    d_out = np.broadcast_to(d[0], (*q.shape[:3], v.shape[-1]))
    return bounds.attention(unit, q, k, v, mask, SCALE, d_out, d[1], scaled=scaled)


def _bound(unit, **of):
    found = _near(unit, **of)
    return found["out"].error, found["log_sum"].error


def _gradient_bound(unit, d_out, **of):
    d = d_out if isinstance(d_out, tuple) else (d_out, 0.0)
    return {name: of.error for name, of in _near(unit, d=d, **of).items()}


def _wider(x: jax.Array | None, axis: int, size: int) -> Any:
    if x is None:
        return None
    return jnp.pad(x, [(0, size - x.shape[at] if at == axis else 0) for at in range(x.ndim)])


def _by_tiles(q, k, v, segments, prompts, side, chosen=None):
    T = q.shape[1]
    of = Tiling(T, 1, side)
    at, pairs = (jnp.asarray(table[0]) for table in (of.positions(), of.pairs()))
    given = [_wider(q, 1, of.padded), _wider(k, 2, of.keys), _wider(v, 2, of.keys)]
    ids = None if segments is None else (_wider(segments, 1, of.padded),) * 2
    ids = ids if prompts is None else (*ids, _wider(prompts, 1, of.padded))
    bits = None if chosen is None else _bits(_wider(chosen, 2, of.keys)[:, at], side)
    return tuple(x[:, :T] for x in flash_attention(*given, ids, at, pairs, side=side, scale=SCALE, bits=bits))


def _bits(chosen: jax.Array, side: int) -> jax.Array:
    """Of bool [B, T, S], in tiles."""
    B, T, S = chosen.shape
    return packed(jnp.moveaxis(chosen.reshape(B, T // side, side, S // side, side), 1, 0))


def _chosen_inputs(draw: Draw) -> dict[str, Any]:
    """As many of the keys as the example says, anywhere; one of those that a query sees at least."""
    given, (B, T) = _inputs(draw), draw.of("B", "T")
    ranks = np.argsort(draw.ids.random((B, T, T)), axis=-1)
    visible = np.broadcast_to(_seen(T, given["segments"], given["prompts"]), ranks.shape)
    first = np.argmin(np.where(visible, ranks, T), axis=-1)
    chosen = (ranks < draw.ragged["chosen"][:, None, None]) | (np.arange(T) == first[..., None])
    return {**given, "chosen": chosen}


_ROWS = ("q", "k", "v")
_ALIKE: dict[str, Any] = {
    "tolerance": UNITS,
    "gradients": _ROWS,
    "gradient_bound": _gradient_bound,
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
FLASH_CHOSEN = Kernel(
    name="flash_chosen",
    run=_by_tiles,
    twin=_twin,
    inputs=lambda draw: {**_chosen_inputs(draw), "side": draw.sizes["side"]},
    bound=_bound,
    sizes=FLASH_ATTENTION.sizes,
    compiled=({**_LARGE, "kind": "packed", "side": 512},),
    **{**_ALIKE, "ragged": {**_ALIKE["ragged"], "chosen": counts("T", "B")}},
)


# --- jax's kernel --------------------------------------------------------------------------------


def _by_kernel(q, k, v, segments, interpret, sums):
    T, N = q.shape[1:3]
    of = splash.tiling(T, 1)
    form = {"number": k.dtype.itemsize, "segmented": segments is not None}
    kernel = splash.kernel(of, N, sums=sums, interpret=interpret, **form)
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
        bound=lambda unit, **of: found(_bound(unit, scaled=True, **of)),
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
        races=False,  # what it keeps between its steps are results too, that all heads write and nobody reads
        **{**_ALIKE, "gradient_bound": partial(_gradient_bound, scaled=True), **others},
    )


SPLASH_ATTENTION = _kernel("splash_attention", sums=False)
SPLASH_SUMS = _kernel("splash_sums", sums=True, gradients=())


def _by_bits(q, k, v, segments, prompts, chosen, interpret, sums=False):
    T, of = q.shape[1], splash.tiling(q.shape[1], 1)
    seen = jnp.broadcast_to(_seen(T, segments, prompts, chosen), (len(q), T, T))
    bits = _bits(_wider(seen, 2, of.keys)[:, of.positions()[0]], of.side)
    given = [_wider(q, 1, of.padded), _wider(k, 2, of.keys), _wider(v, 2, of.keys)]
    out, log_sum = splash.chosen_attention(*given, bits, of, scale=SCALE, sums=sums, interpret=interpret)
    return (out[:, :T], log_sum[:, :T]) if sums else out[:, :T]


def _bits_kernel(name: str, *, sums: bool, **others: Any) -> Kernel:
    found = (lambda both: both) if sums else (lambda both: both[0])
    return Kernel(
        name=name,
        run=partial(_by_bits, sums=sums),
        twin=lambda **of: found(_twin(**of)),
        inputs=_chosen_inputs,
        bound=lambda unit, **of: found(_bound(unit, scaled=True, **of)),
        sizes={**SPLASH_ATTENTION.sizes, "kind": ("whole", "packed", "shared")},
        compiled=({**_LARGE, "cuts": 2, "kind": "shared"},),
        platform="tpu",
        races=False,
        **{
            **_ALIKE,
            "gradient_bound": partial(_gradient_bound, scaled=True),
            "ragged": FLASH_CHOSEN.ragged,
            **others,
        },
    )


SPLASH_CHOSEN = _bits_kernel("splash_chosen", sums=False)
SPLASH_CHOSEN_SUMS = _bits_kernel("splash_chosen_sums", sums=True, gradients=())


# --- on meshes -----------------------------------------------------------------------------------


_MESHES = {**MESHES, "tensor": {"fsdp": 4, "tensor": 2}}


def _on_mesh(q, k, v, segments, prompts, mesh, devices, index=None, count=0, chosen=None):
    layout = LOCAL if mesh == "alone" else layout_of(devices, _MESHES[mesh])
    of = None if index is None else Index(**index, count=count)
    return causal_attention(q, k, v, segments, scale=SCALE, layout=layout, prompt_of_BT=prompts, index=of)[0]


def _index_inputs(draw: Draw) -> dict[str, Any]:
    """Whole numbers and powers of four, so that scores are exact; and for the twin what they choose."""
    given, (B, T, J, Z) = _inputs(draw), draw.of("B", "T", "J", "Z")
    whole = lambda *shape: draw.integers(-2, 3, *shape, dtype=draw.dtype)
    index, count = {"q": whole(B, T, J, Z), "weights": whole(B, T, J), "k": whole(B, T, Z)}, draw.sizes["count"]
    visible = np.broadcast_to(_seen(T, given["segments"], given["prompts"]), (B, T, T))
    exact = {name: of.astype(np.float64) for name, of in index.items()}
    return {**given, "index": index, "count": count, "chosen": best_keys(liking(**exact), visible, count)}


def _mesh_kernel(name: str, inputs: Any, sizes: dict[str, Any], **others: Any) -> Kernel:
    return Kernel(
        name=name,
        run=_on_mesh,
        twin=lambda **of: _twin(**of)[0],
        inputs=lambda draw: {**inputs(draw), "mesh": draw.sizes["mesh"]},
        bound=lambda unit, **of: _bound(unit, **of)[0],
        sizes={
            "B": (8,),
            "T": (2, 10),
            "N": (4,),
            "G": (4, 2),  # on one of the meshes heads are divided, or are too few
            "K": (8,),
            "H": (5,),
            "cuts": (2,),
            "kind": ("whole", "packed", "shared"),
            "mesh": tuple(_MESHES),
            **sizes,
        },
        devices=8,
        **_ALIKE,
        **others,
    )


_LARGE_MESH = {**_LARGE, "B": 8, "cuts": 2, "mesh": "context"}
CAUSAL_ATTENTION = _mesh_kernel(
    "causal_attention", _inputs, {}, compiled=tuple({**_LARGE_MESH, "kind": kind} for kind in ("packed", "shared"))
)
CAUSAL_CHOSEN = _mesh_kernel(
    "causal_chosen",
    _index_inputs,
    {"J": (1, 4), "Z": (4, 16), "count": (1, 3), "mesh": ("alone", *_MESHES)},
    compiled=({**_LARGE_MESH, "T": 512, "kind": "packed", "J": 16, "Z": 128, "count": 256},),
)
