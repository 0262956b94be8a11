"""Causal attention of whole sequences on a mesh: each device its own sequences and heads, and its share of a sequence.

Where devices share a sequence they exchange its queries for its heads, if they divide these: keys and values of a head
are on one device alone, which spells them out and has their gradient by itself. Where heads are too few, or keys are
chosen, each device gets an early and a late run of the queries, of all heads, so that all see as many keys.

Source: arXiv 2309.14509 (the exchange).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops.attention import attend_causal, causal_rows, same_segment
from deepseek_jax.ops.flash_attention import ATTENTION, Tiling, flash_attention, packed, sees
from deepseek_jax.ops.indexer import Index, choose_whole
from deepseek_jax.sharding import Layout

_ALL_PAIRS = 256  # tokens of a sequence at most; a CPU takes longer for value and gradients by tiles
_SIDES = (128, 96, 64)  # of a tile on a CPU, whose caches hold its scores
_TILES = 8  # along a sequence elsewhere; 9/16 of all pairs then meet
_SCORES = 2**27  # of a tile at most


def causal_attention(
    q_BTNK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    layout: Layout,
    prompt_of_BT: jax.Array | None = None,
    index: Index | None = None,
    sums: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of every token of a sequence over those up to it, of its own segment; no T x T scores exist.

    On TPU jax's kernel (`ops.kernels.splash`); elsewhere, where samples share prompts, and where keys are chosen of too
    many, `ops.flash_attention`; and for short sequences all pairs.

    Args:
        q_BTNK: queries, from position 0; B is cut by "batch", T by "sequence", N by "tensor".
        k_BGSK: keys of the same tokens, head-major; laid out here.
        v_BGSH: values, likewise.
        segments_BT: int32, the numbers of packed samples; None where every row is one.
        scale: of the scores.
        layout: whose mesh, if there is one, divides these.
        prompt_of_BT: int32, the numbers of the segments with their prompts, which they see too (`model.decoder`); None
            where samples share none.
        index: by which keys are chosen among those that a query sees; None: it attends to all.
        sums: whether to return the logarithms of the softmax's sums; then it has no gradient.

    Returns:
        [B, T, N, H] in the dtype of v; and those logarithms, float32 [B, T, N], or None.
    """
    T, by_head = q_BTNK.shape[1], index is None and _divides(layout, k_BGSK.shape[1])
    k_BGSK, v_BGSH = (layout.constrain(of, "batch", _heads(by_head), None, None) for of in (k_BGSK, v_BGSH))
    few = T <= _ALL_PAIRS and layout.parts("sequence") == 1 and not sums and index is None
    if few and _platform(layout) != "tpu":
        mask = causal_rows(jnp.arange(T), T, q_BTNK.shape[0])
        mask = mask if segments_BT is None else same_segment(mask, segments_BT, segments_BT, prompt_of_BT)
        return checkpoint_name(attend_causal(q_BTNK, k_BGSK, v_BGSH, mask, scale), ATTENTION), None
    segments = None if segments_BT is None else (segments_BT, segments_BT, prompt_of_BT)
    form = {"segments": segments, "chosen": index is not None, "by_head": by_head}
    tiling, attend_tiles, tables, cuts = _form(q_BTNK, k_BGSK, layout, scale, sums, **form)
    run = _on_device(tiling, attend_tiles, layout, 1 + sums, by_head=by_head)
    if layout.mesh is not None:
        run = _on_mesh(run, layout, cuts, segments, index, sums=sums, by_head=by_head)
    out, *log_sum = run(tables, q_BTNK, k_BGSK, v_BGSH, segments, index)
    return out, log_sum[0] if sums else None


def _divides(layout: Layout, heads: int) -> bool:
    """Whether devices that share a sequence can divide its key-value heads, and with them the queries'."""
    return layout.parts("sequence") > 1 and heads % layout.parts("head") == 0


def _heads(by_head: bool) -> str:
    """The logical axis of the heads of a device."""
    return "head" if by_head else "tensor"


def _on_device(tiling: Tiling, attend_tiles: Callable, layout: Layout, results: int, *, by_head: bool) -> Callable:
    """What a device does with its part of the arguments."""
    axis = layout.cut("sequence")[0]
    dealt, padded = partial(_dealt, of=tiling, axis=axis), partial(_padded, size=tiling.keys)
    exchange = partial(jax.lax.all_to_all, axis_name=axis, tiled=True) if by_head else lambda x, **_: x

    def local(tables, q, k, v, segments, index):
        if segments is not None:
            of_queries, of_keys, prompt_of = segments
            of_prompts = () if prompt_of is None else (dealt(prompt_of),)
            segments = dealt(of_queries), padded(of_keys, axis=1), *of_prompts
        bits = {}
        if index is not None:
            own = {"q": dealt(index.q), "weights": dealt(index.weights), "k": padded(index.k, axis=1)}
            bits["bits"] = _chosen(dataclasses.replace(index, **own), segments, tables[0][0], tiling.side, layout)
        q = dealt(exchange(q, split_axis=2, concat_axis=1))
        found = attend_tiles(q, padded(k, axis=2), padded(v, axis=2), segments, tables, **bits)
        found = (_collected(of, tiling, axis) for of in found[:results])
        return tuple(exchange(of, split_axis=1, concat_axis=2) for of in found)

    return local


def _on_mesh(
    local: Callable, layout: Layout, cuts: Any, segments: Any, index: Index | None, *, sums: bool, by_head: bool
) -> Callable:
    """Each device with its own part of the arguments."""
    spec = lambda *axes: layout.sharding(*axes).spec
    queries, keys = spec("batch", "sequence", "tensor", None), spec("batch", _heads(by_head), None, None)
    of_queries, of_keys = spec("batch", None if by_head else "sequence"), spec("batch", None)
    numbers = segments and (of_queries, of_keys, None if segments[2] is None else of_queries)
    indexed = index and dataclasses.replace(index, q=of_queries, weights=of_queries, k=of_keys)
    results = (queries, spec("batch", "sequence", "tensor"))[: 1 + sums]
    given = (cuts, queries, keys, keys, numbers, indexed)
    # Unchecked: a kernel does not say over which axes its result differs.
    return jax.shard_map(local, mesh=layout.mesh, in_specs=given, out_specs=results, check_vma=False)


def _form(
    q: jax.Array,
    k: jax.Array,
    layout: Layout,
    scale: float,
    sums: bool,
    *,
    segments: Any,
    chosen: bool,
    by_head: bool,
) -> tuple[Tiling, Callable, Any, Any]:
    """The tiles, what attends with them on a device, and its tables with the way these are cut."""
    B, T, N, _ = q.shape
    runs = None if by_head else "sequence"
    parts, heads = layout.parts(runs), -(-N // layout.parts(_heads(by_head)))
    cut = None if layout.mesh is None else layout.sharding(runs).spec
    shared = segments is not None and segments[2] is not None
    if _platform(layout) == "tpu" and (chosen or not shared):  # the kernel compares one number of a query with a key's
        from deepseek_jax.ops.kernels import splash  # Pallas is slow to import

        tiling = splash.tiling(T, parts)
        if not chosen:
            kernel = splash.kernel(tiling, heads, number=k.dtype.itemsize, segmented=segments is not None, sums=sums)
            cuts = None if layout.mesh is None else kernel.manual_sharding_spec(layout.sharding(None, runs))
            of_tables = lambda q, k, v, ids, kernel: splash.splash_attention(kernel, q, k, v, ids, scale=scale)
            return tiling, of_tables, kernel, cuts
        if splash.mask_fits(tiling):
            form = {"of": tiling, "scale": scale, "sums": sums}
            of_bits = lambda q, k, v, ids, tables, bits: splash.chosen_attention(q, k, v, bits, **form)
            return tiling, of_bits, (jnp.asarray(tiling.positions()),), (cut,)

    scores = -(-B // layout.parts("batch")) * heads
    tiling = Tiling(T, parts, _side(-(-T // parts // (1 if parts == 1 else 2)), T, scores, _platform(layout)))

    def plain(q, k, v, segments, tables, bits=None):
        at, pairs = (of[0] for of in tables)
        return flash_attention(q, k, v, segments, at, pairs, side=tiling.side, scale=scale, bits=bits)

    tables = tuple(map(jnp.asarray, (tiling.positions(), tiling.pairs())))
    return tiling, plain, tables, (cut, cut)


def _chosen(index: Index, segments: Any, at: jax.Array, side: int, layout: Layout) -> jax.Array:
    """The bits of the chosen keys for `flash_attention`, a tile of queries at a time.

    Devices that have the same queries, for other heads, share the work.
    """
    B, tiles, keys = index.q.shape[0], at.size // side, index.k.shape[1]
    q_segments, k_segments, q_prompts = (*(segments or (None, None)), None)[:3]

    def of_tile(i):
        rows = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, i * side, side, axis=1)
        visible = sees(rows(at[None])[0], jnp.arange(keys), rows(q_segments), k_segments, rows(q_prompts))
        visible = jnp.broadcast_to(visible, (B, side, keys))
        chosen = choose_whole(rows(index.q), rows(index.weights), index.k, visible, index.count)
        return packed(chosen.reshape(B, side, -1, side))

    with jax.named_scope("indexer"):
        sharing = layout.cut("tensor") if layout.parts("tensor") > 1 else ()
        if not sharing:
            return jax.lax.map(of_tile, jnp.arange(tiles))
        own = -(-tiles // layout.parts("tensor"))
        mine = jnp.minimum(jax.lax.axis_index(sharing) * own + jnp.arange(own), tiles - 1)
        return jax.lax.all_gather(jax.lax.map(of_tile, mine), sharing, tiled=True)[:tiles]


def _platform(layout: Layout) -> str:
    """Of a layout's devices, before compiling: the gradient of a choice made later would keep what both sides do."""
    return jax.default_backend() if layout.mesh is None else layout.mesh.devices.flat[0].platform


def _side(run: int, length: int, heads: int, platform: str) -> int:
    """Of a tile, for runs of so many queries and so many heads of sequences on a device."""
    if run <= _SIDES[0]:
        return run
    if platform == "cpu":
        return min(_SIDES, key=lambda side: (-(-run // side) * side, -side))
    side = _SIDES[0]
    while 2 * side * _TILES <= length and 2 * side <= run and heads * (2 * side) ** 2 <= _SCORES:
        side *= 2
    return side


def _dealt(x: jax.Array, of: Tiling, axis: str) -> jax.Array:
    """[B, rows, ...] of consecutive queries to the runs [B, chunks x padded, ...] that a device works on."""
    if of.parts == 1:
        return _padded(x, 1, of.padded)
    half = -(-of.rows // 2)
    even, odd = (_padded(part, 1, of.padded) for part in (x[:, :half], x[:, half:]))
    even, odd = (jax.lax.ppermute(part, axis, way) for part, way in zip((even, odd), _ways(of), strict=True))
    return jnp.concatenate(_swapped(even, odd, axis), axis=1)


def _collected(x: jax.Array, of: Tiling, axis: str) -> jax.Array:
    """The way back."""
    if of.parts == 1:
        return x[:, : of.rows]
    half = -(-of.rows // 2)
    even, odd = _swapped(x[:, : of.padded], x[:, of.padded :], axis)
    back = [[(to, at) for at, to in way] for way in _ways(of)]
    even, odd = (jax.lax.ppermute(part, axis, way) for part, way in zip((even, odd), back, strict=True))
    return jnp.concatenate([even[:, :half], odd[:, : of.rows - half]], axis=1)


def _ways(of: Tiling) -> list[list[tuple[int, int]]]:
    """From where to where the even and the odd runs go: each device has one of both, before and after."""
    owner = {run: part for part in range(of.parts) for run in of.runs_of(part)}
    return [[(part, owner[2 * part + odd]) for part in range(of.parts)] for odd in (0, 1)]


def _swapped(first: jax.Array, second: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Even and odd runs to early and late ones, or back: an odd device has them the other way round."""
    odd = jax.lax.axis_index(axis) % 2 == 1
    return jnp.where(odd, second, first), jnp.where(odd, first, second)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if x.shape[axis] == size else jnp.pad(x, widths)
