"""Causal attention of whole sequences a tile of scores at a time, forward and backward: no T x T array exists.

The plain form, for all platforms. Tiles that are hidden whole, by their place, by segments or because no key of them is
chosen, are not computed. The softmax is online; the gradient works a tile's weights out again from the logarithms of
their sums, which are kept beside the result.

Source: arXiv 2205.14135 (tiles, recomputation), arXiv 1805.02867 (online softmax).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt8

ATTENTION = "attention"  # what remat may keep of a layer
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # finite: a row may see nothing of a tile


class Tiling(NamedTuple):
    """Which tiles of scores a device computes; the same shapes on every device. NumPy, hashable by its three numbers.

    Attributes:
        length: of the sequences.
        parts: devices that share the queries of a sequence, each a contiguous part of them.
        side: queries, and keys, of a tile.
    """

    length: int
    parts: int
    side: int

    @property
    def rows(self) -> int:
        """Queries of one device."""
        return self.length // self.parts

    @property
    def chunks(self) -> int:
        """Runs of consecutive queries that a device works on: one, or an early and a late one of a sequence."""
        return 1 if self.parts == 1 else 2

    @property
    def padded(self) -> int:
        """Queries of a run, rounded up to whole tiles."""
        return -(-self.rows // self.chunks // self.side) * self.side

    @property
    def keys(self) -> int:
        """Keys, rounded up to whole tiles."""
        return -(-self.length // self.side) * self.side

    def positions(self) -> np.ndarray:
        """int32 [parts, chunks x padded]: of the queries that each device works on, padding at its run's last one.

        The sequence is cut into twice as many runs as there are devices. Device d has run d and the d-th from the end:
        together they see as many keys on every device.
        """
        half = -(-self.rows // self.chunks)
        first = [part * self.rows + side * half for part in range(self.parts) for side in range(self.chunks)]
        ends = [*first[1:], self.length]
        runs = [np.minimum(start + np.arange(self.padded), end - 1) for start, end in zip(first, ends, strict=True)]
        found = [np.concatenate([runs[run] for run in sorted(self.runs_of(part))]) for part in range(self.parts)]
        return np.asarray(found, np.int32)

    def runs_of(self, part: int) -> tuple[int, ...]:
        """The runs of a device, the early one first."""
        return (part,) if self.chunks == 1 else (part, 2 * self.parts - 1 - part)

    def pairs(self) -> np.ndarray:
        """int32 [parts, count, 2]: the tiles of queries and keys that meet, on each device.

        Where a device has fewer than another it is given the first queries with the last keys, which these do not see.
        """
        last = self.positions().reshape(self.parts, -1, self.side).max(axis=-1)
        starts = np.arange(0, self.keys, self.side)
        meet = [np.argwhere(starts <= of[:, None]) for of in last]
        count = max(map(len, meet))
        spare = np.asarray([[0, len(starts) - 1]])
        return np.asarray([np.concatenate([of, np.repeat(spare, count - len(of), axis=0)]) for of in meet], np.int32)


class Operands(NamedTuple):
    """What one device attends with, cut into tiles along the first axis.

    Attributes:
        q: queries [I, B, G, M, t, K], of the M heads that share a key-value head.
        k, v: keys [J, B, G, s, K] and values [J, B, G, s, H].
        at: int32 [I, t], positions of the queries.
        q_segments, k_segments: int32 [I, B, t] and [J, B, s]; None where every row is one sequence.
        q_prompts: int32 [I, B, t], of the segments with the queries' prompts; None where samples share none.
        bits: uint8 [I, B, t, J, s/8], of the keys that V3.2's indexer lets each query see; None where it has no say.
        pairs: int32 [count, 2], tiles of queries and of keys that meet.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    at: jax.Array
    q_segments: jax.Array | None
    k_segments: jax.Array | None
    q_prompts: jax.Array | None
    bits: jax.Array | None
    pairs: jax.Array


def flash_attention(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]]
    | tuple[Int[Array, "B T"], Int[Array, "B S"], Int[Array, "B T"]]
    | None,
    at: Int[Array, "T"],
    pairs: Int[Array, "P 2"],
    *,
    side: int,
    scale: float,
    bits: UInt8[Array, "I B t J bytes"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of queries over the keys at positions up to their own, of their own segment.

    Args:
        q: queries; each of the G key-value heads serves N/G consecutive heads.
        k: keys from position 0, head-major.
        v: values, likewise.
        segments: of queries and keys and, where samples share prompts, of the queries' prompts, which they see too;
            None where every row is one sequence.
        at: int32, the queries' positions.
        pairs: int32, of `Tiling.pairs`: tiles of queries and of keys that meet.
        side: of a tile; it divides T and S.
        scale: of the scores, which are float32, as are softmax and sums.
        bits: of each tile of queries and each of keys what is chosen of what they see (`packed`), one key at least;
            None is all.

    Returns:
        In the dtype of v; and float32, the logarithm of the sum of exp(score) over the keys that a query sees.
    """
    B, T, N, _ = q.shape
    G = k.shape[1]
    cut = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], -1, side, x.shape[-1]), 2, 0)
    by_tile = lambda x: jnp.moveaxis(x.reshape(B, -1, side), 1, 0)
    queries = jnp.transpose(q.reshape(B, T // side, side, G, N // G, -1), (1, 0, 3, 4, 2, 5))
    of = (*map(by_tile, segments or ()), None, None, None)[:3]
    out, log_sum = _attend(Operands(queries, cut(k), cut(v), at.reshape(-1, side), *of, bits, pairs), scale)
    back = lambda x: jnp.moveaxis(jnp.moveaxis(x, 4, 2), 0, 1).reshape(B, T, N, *x.shape[5:])
    return back(out), back(log_sum)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(of: Operands, scale: float):
    return _forward(of, scale)[0]


def _forward(of: Operands, scale: float):
    """Result and logarithms of the sums, both kept for the gradient."""
    *lead, _ = of.q.shape

    def add(carried, pair):
        i, j = pair
        seen, (top, total, summed) = _seen(of, i, j), (x[i] for x in carried)

        def met():
            scores = _scores(of, i, j, seen, scale)
            new = jnp.maximum(top, scores.max(axis=-1))
            kept, weights = jnp.exp(top - new), jnp.exp(scores - new[..., None])
            here = _product("bgmts,bgsh->bgmth", weights.astype(of.v.dtype), of.v[j])
            return new, kept * total + weights.sum(axis=-1), kept[..., None] * summed + here

        values = _where_seen(of, seen, met, lambda: (top, total, summed))
        return tuple(x.at[i].set(value) for x, value in zip(carried, values, strict=True)), None

    empty = jnp.full(lead, _HIDDEN), jnp.zeros(lead), jnp.zeros((*lead, of.v.shape[-1]))
    (top, total, summed), _ = jax.lax.scan(add, empty, of.pairs)
    out, log_sum = (summed / total[..., None]).astype(of.v.dtype), top + jnp.log(total)
    out, log_sum = checkpoint_name(out, ATTENTION), checkpoint_name(log_sum, ATTENTION)
    return (out, log_sum), (of, out, log_sum)


def _backward(scale: float, kept, given):
    """Each tile gives its part of three gradients, which are summed in float32."""
    (of, out, log_sum), (d_out, d_log_sum) = kept, given
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_log_sum

    def add(carried, pair):
        i, j = pair
        seen, q, k, v, d = _seen(of, i, j), of.q[i], of.k[j], of.v[j], d_out[i]

        def met():
            weights = jnp.exp(_scores(of, i, j, seen, scale) - log_sum[i][..., None])
            d_weights = _product("bgmth,bgsh->bgmts", d, v)
            d_scores = (weights * (d_weights - inner[i][..., None]) * scale).astype(q.dtype)
            d_q, d_k = _product("bgmts,bgsk->bgmtk", d_scores, k), _product("bgmts,bgmtk->bgsk", d_scores, q)
            return d_q, d_k, _product("bgmts,bgmth->bgsh", weights.astype(v.dtype), d)

        parts = _where_seen(of, seen, met, lambda: tuple(jnp.zeros(x.shape) for x in (q, k, v)))
        return tuple(x.at[at].add(part) for x, at, part in zip(carried, (i, j, j), parts, strict=True)), None

    empty = tuple(jnp.zeros(x.shape) for x in of[:3])
    found, _ = jax.lax.scan(add, empty, of.pairs)
    found = (d.astype(x.dtype) for d, x in zip(found, of[:3], strict=True))
    return (Operands(*found, None, None, None, None, None, None),)


_attend.defvjp(lambda of, scale: _forward(of, scale), _backward)


def _where_seen(of: Operands, seen: jax.Array, met: Callable, otherwise: Callable):
    """What a tile gives; one that hides all its keys is not computed. By their places alone none does."""
    if of.q_segments is None and of.bits is None:
        return met()
    return jax.lax.cond(jnp.any(seen), met, otherwise)


def _seen(of: Operands, i: jax.Array, j: jax.Array) -> jax.Array:
    """bool [B, t, s] of one tile, or [1, t, s] where all sequences are alike."""
    side = of.k.shape[3]
    segments = of.q_segments, of.k_segments, of.q_prompts
    numbers = (None if x is None else x[at] for x, at in zip(segments, (i, j, i), strict=True))
    seen = sees(of.at[i], j * side + jnp.arange(side), *numbers)
    return seen if of.bits is None else seen & unpacked(of.bits[i][:, :, j], side)


def sees(
    at: Int[Array, "t"],
    keys: Int[Array, "s"],
    q_segments: Int[Array, "B t"] | None = None,
    k_segments: Int[Array, "B s"] | None = None,
    q_prompts: Int[Array, "B t"] | None = None,
) -> Bool[Array, "B t s"]:
    """Whether queries see keys, by their positions and the numbers of their segments; B is 1 without these."""
    seen = (at[:, None] >= keys)[None]
    if q_segments is None:
        return seen
    same = q_segments[:, :, None] == k_segments[:, None, :]
    if q_prompts is not None:
        same |= q_prompts[:, :, None] == k_segments[:, None, :]
    return seen & same


def packed(mask: Bool[Array, "*B s"]) -> UInt8[Array, "*B bytes"]:
    """Eight numbers a byte, the last byte filled up."""
    return jnp.packbits(mask, axis=-1)


def unpacked(bits: UInt8[Array, "*B bytes"], count: int) -> Bool[Array, "*B s"]:
    """The first `count` numbers of `packed`."""
    return jnp.unpackbits(bits, axis=-1, count=count).astype(bool)


def _scores(of: Operands, i: jax.Array, j: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """float32 [B, G, M, t, s] of one tile."""
    scores = _product("bgmtk,bgsk->bgmts", of.q[i], of.k[j]) * scale
    return jnp.where(seen[:, None, None], scores, _HIDDEN)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
