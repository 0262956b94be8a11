"""The lightning indexer of DeepSeek sparse attention: how much a query wants each key, and the keys it gets.

Source: DeepSeek-V3.2-Exp report section 1, equation 1; transformers modeling_deepseek_v32.py DeepseekV32Indexer.

Differs from DeepSeek-V3.2-Exp inference/model.py, as transformers does: no Hadamard rotation of queries and keys, and
no FP8 for them. The rotation spreads outliers before they are rounded to FP8; it is orthogonal, so that the dot
products are the same without it (`test_a_hadamard_rotation_changes_no_score`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.ops.paged_attention import KEYS_AT_ONCE, in_parts
from deepseek_jax.ops.sampling import highest_threshold, sortable

_SCORES_AT_ONCE = 2**26  # 256 MiB
_KEYS_SCORED = 1024  # at once, of which all heads' products exist


@partial(jax.tree_util.register_dataclass, data_fields=["q", "weights", "k"], meta_fields=["count"])
@dataclass(frozen=True, kw_only=True)
class Index:
    """What chooses the `count` keys that each query attends to: arguments of `index_scores`."""

    q: Float[Array, "B T J Z"]
    weights: Float[Array, "B T J"]
    k: Float[Array, "B S Z"]
    count: int


def index_scores(
    q: Float[Array, "B T J Z"], k: Float[Array, "B S Z"], weights: Float[Array, "B T J"]
) -> Float[Array, "B T S"]:
    """How much each query wants each key: sum_j w_j J^-0.5 relu(q_j . k Z^-0.5), float32.

    Args:
        q: queries of J heads, rotated.
        k: keys, one for all heads, rotated.
        weights: what each head counts for, of either sign.

    No gradient flows through it, as in transformers: a choice has none. (The report trains the indexer by a loss of
    its own, against the attention's distribution; that loss is not here.)
    """
    q, k, weights = map(jax.lax.stop_gradient, (q, k, weights))
    J, Z = q.shape[2:]
    # full precision on every device, and a sum in place of a product of matrices, which TF32 would round: nothing
    # after a choice makes up for another key
    dots = jnp.einsum("btjz,bsz->btjs", q, k, precision="highest", preferred_element_type=jnp.float32)
    weights = weights.astype(jnp.float32) * J**-0.5
    return jnp.sum(weights[..., None] * jax.nn.relu(dots * Z**-0.5), axis=2)


def scores_by_blocks(
    q: Float[Array, "B T J Z"],
    weights: Float[Array, "B T J"],
    block: Callable[[Int[Array, ""]], Float[Array, "B span Z"]],
    blocks: int,
    trips: Int[Array, ""] | int,
) -> Float[Array, "B T S"]:
    """`index_scores` of keys that come in so many blocks, of which the first `trips` are scored and the others 0."""
    (B, T), span = q.shape[:2], jax.eval_shape(block, jax.ShapeDtypeStruct((), jnp.int32)).shape[1]

    def add(trip, scores):
        return jax.lax.dynamic_update_slice_in_dim(scores, index_scores(q, block(trip), weights), trip * span, axis=2)

    return jax.lax.fori_loop(0, trips, add, jnp.zeros((B, T, blocks * span), jnp.float32))


def select_keys(scores: Float[Array, "B T S"], visible: Bool[Array, "B T S"], count: int) -> Int[Array, "B T U"]:
    """The `count` visible keys of the highest scores, best first; among equals the earlier key.

    A query that sees fewer gets all of them first, then keys that it must not see: mask what is chosen by `visible`.
    Needs S >= count.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k ranks -0.0 below 0.0, and no head's liking gives either
    return jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), count)[1]


def chosen_mask(scores: Float[Array, "B T S"], visible: Bool[Array, "B T S"], count: int) -> Bool[Array, "B T S"]:
    """True for the keys of `select_keys` that are visible; found without a sort."""
    ordered = sortable(scores)
    enough = lambda at_least: jnp.sum(at_least & visible, axis=-1) >= count
    least = highest_threshold(ordered, enough)[..., None]
    above, ties = visible & (ordered > least), visible & (ordered == least)
    left = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (ties & (jnp.cumsum(ties, axis=-1) <= left))


def choose_whole(
    q: Float[Array, "B T J Z"],
    weights: Float[Array, "B T J"],
    k: Float[Array, "B S Z"],
    visible: Bool[Array, "B T S"],
    count: int,
) -> Bool[Array, "B T S"]:
    """`chosen_mask` of some queries of whole sequences. Keys behind the last one that any of them sees cost nothing."""
    S = k.shape[1]
    span = min(_KEYS_SCORED, S)
    k = jnp.pad(k, ((0, 0), (0, -S % span), (0, 0)))
    block = lambda trip: jax.lax.dynamic_slice_in_dim(k, trip * span, span, axis=1)
    end = jnp.max(jnp.where(visible, jnp.arange(1, S + 1), 0))
    scores = scores_by_blocks(q, weights, block, k.shape[1] // span, -(-end // span))
    return chosen_mask(scores[..., :S], visible, count)


def choose_paged(
    q: Float[Array, "B T J Z"],
    weights: Float[Array, "B T J"],
    pool: Float[Array, "pages s Z"],
    table_BM: Int[Array, "B M"],
    seen_BT: Int[Array, "B T"],
    count: int,
) -> Int[Array, "B T U"]:
    """`select_keys` over a paged cache: positions of the `count` best of the keys that each query sees.

    Some queries at a time, so that there are never T x S scores; these are worked out for a few blocks at a time, as
    many times as the row that sees most needs.

    Args:
        q, weights: as of `index_scores`.
        pool: the indexer's keys, blocks of s.
        table_BM: int32, the pool's blocks that hold a row's keys, in order; room for `count` of them at least.
        seen_BT: int32, how many keys a query sees, from the row's first.
        count: of keys.
    """
    B, size = seen_BT.shape[0], pool.shape[1]
    blocks = max(1, KEYS_AT_ONCE // size)
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % blocks)))
    trips, keys = table_BM.shape[1] // blocks, table_BM.shape[1] * size

    def block(trip):
        ids = jax.lax.dynamic_slice_in_dim(table_BM, trip * blocks, blocks, axis=1)
        return pool[ids].reshape(B, blocks * size, -1)

    def choose(of):
        q, weights, seen = of
        scores = scores_by_blocks(q, weights, block, trips, -(-jnp.max(seen) // (blocks * size)))
        return select_keys(scores, jnp.arange(keys) < seen[..., None], count)

    return in_parts(choose, (q, weights, seen_BT), _SCORES_AT_ONCE // (B * keys))
