"""Divergences of student and teachers where tokens, and the vocabulary, lie on many devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.ops.divergence import Divergence, OverVocabulary, divergence_of_logits
from deepseek_jax.ops.logprobs import in_chunks, positions_at_once, project
from deepseek_jax.parallel.logprobs import scores_of_cut_logits
from deepseek_jax.sharding import Layout


def sharded_divergences(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    teachers: Sequence[tuple[jax.Array, jax.Array]],
    tokens_BT: jax.Array,
    divergence: Divergence,
    layout: Layout,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`ops.divergence.token_divergences` on the mesh of a layout, which is the teachers' too.

    Heads are gathered once, for all chunks of positions. With the vocabulary cut over `tensor`, a few numbers a token
    travel.

    Args:
        hidden_BTD, head_DV, teachers, tokens_BT, divergence: as there.
        layout: with a mesh that divides B, T and V.
    """
    rows = PartitionSpec(layout.cut("batch"), layout.cut("sequence"))
    whole = PartitionSpec(*rows, None)
    width = layout.cut("embed")
    of_head = PartitionSpec(width, "tensor")
    over = OverVocabulary(
        lambda x: jax.lax.psum(jnp.sum(x, axis=-1), "tensor"), lambda x: jax.lax.pmax(jnp.max(x, axis=-1), "tensor")
    )
    gathered = lambda head: jax.lax.all_gather(head, width, axis=0, tiled=True) if width else head

    def local(hidden, head, tokens, states, heads):
        head, heads = gathered(head), [gathered(theirs) for theirs in heads]
        first = jax.lax.axis_index("tensor") * head.shape[1]

        def of_chunk(hidden_btD, given):
            tokens_bt, states = given
            logits = project(hidden_btD, head)
            theirs = [project(state, of) for state, of in zip(states, heads, strict=True)]
            return divergence_of_logits(logits, theirs, divergence, over), *scores_of_cut_logits(
                logits, tokens_bt - first
            )

        at_once = positions_at_once(hidden.shape[0] * (1 + len(heads)), head.shape)
        return in_chunks(of_chunk, hidden, (tokens, states), at_once)

    states, heads = tuple(states for states, _ in teachers), tuple(head for _, head in teachers)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(whole, of_head, rows, whole, of_head),
        out_specs=(rows,) * 4,
    )(hidden_BTD, head_DV, tokens_BT, states, heads)
