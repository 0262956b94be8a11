"""Log-probabilities of given tokens where tokens, and the vocabulary, lie on many devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.ops.logprobs import as_sampled, in_chunks, positions_at_once, project
from deepseek_jax.sharding import Layout


def sharded_logprobs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    tokens_BT: jax.Array,
    layout: Layout,
    *,
    temperature: float = 1.0,
    support_BTW: jax.Array | None = None,
    penalised_BTW: jax.Array | None = None,
    penalty: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`ops.logprobs.token_logprobs` on the mesh of a layout, with its three results.

    The head is gathered once, for all chunks of positions, and its gradient reduced once; XLA by itself would do both
    for every chunk. With the vocabulary cut over `tensor`, three numbers a token travel.

    Args:
        hidden_BTD: states after the final norm.
        head_DV: output projection.
        tokens_BT: int32 targets.
        layout: with a mesh that divides B, T and V.
        temperature: the sampler's.
        support_BTW: bits of the tokens that each draw was from, as there; every device of a `tensor` group holds all.
        penalised_BTW, penalty: the repetition penalty, as there.
    """
    rows = PartitionSpec(layout.cut("batch"), layout.cut("sequence"))
    whole = PartitionSpec(*rows, None)
    width = layout.cut("embed")

    def local(hidden, head, tokens, support, penalised):
        if width:
            head = jax.lax.all_gather(head, width, axis=0, tiled=True)
        first = jax.lax.axis_index("tensor") * head.shape[1]

        def of_chunk(hidden_btD, given):
            tokens_bt, words = given
            logits = project(hidden_btD, head)
            logits = as_sampled(logits, *words, temperature=temperature, penalty=penalty, first=first)
            return scores_of_cut_logits(logits, tokens_bt - first)

        given = tokens, (support, penalised)
        return in_chunks(of_chunk, hidden, given, positions_at_once(hidden.shape[0], head.shape))

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(whole, PartitionSpec(width, "tensor"), rows, whole, whole),
        out_specs=(rows, rows, rows),
    )(hidden_BTD, head_DV, tokens_BT, support_BTW, penalised_BTW)


def scores_of_cut_logits(logits_btV: jax.Array, tokens_bt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`ops.logprobs.scores_of_logits` of this device's part of the vocabulary; tokens count from its first one."""
    summed = lambda x: jax.lax.psum(jnp.sum(x, axis=-1), "tensor")
    best = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_btV, axis=-1)), "tensor")
    from_best = logits_btV - best[..., None]
    total = jnp.log(summed(jnp.exp(from_best)))
    mine = jnp.arange(logits_btV.shape[-1]) == tokens_bt[..., None]
    every = from_best - total[..., None]
    likeliest = jax.lax.stop_gradient(-total)
    return summed(jnp.where(mine, from_best, 0.0)) - total, -summed(jnp.exp(every) * every), likeliest
