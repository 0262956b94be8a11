"""Looking tokens up where they, and the table, lie on many devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.sharding import Layout


def sharded_lookup(table_VD: jax.Array, tokens_BT: jax.Array, layout: Layout) -> jax.Array:
    """table[tokens], [B, T, D] cut by sequence and position, on the mesh of a layout.

    The table is gathered and its gradient reduced as those of other weights; XLA by itself would gather the states of
    all tokens instead. With the vocabulary cut over `tensor`, each device looks up what it holds, and parts are added.

    Args:
        table_VD: embeddings.
        tokens_BT: int32, of whole sequences.
        layout: with a mesh that divides B, T, V and D.
    """
    rows = PartitionSpec(layout.cut("batch"), layout.cut("sequence"))
    width = layout.cut("embed")

    def local(table, tokens):
        if width:
            table = jax.lax.all_gather(table, width, axis=1, tiled=True)
        own = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        held = (0 <= own) & (own < table.shape[0])
        found = jnp.where(held[..., None], table[jnp.where(held, own, 0)], 0)
        return jax.lax.psum(found, "tensor")

    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(PartitionSpec("tensor", width), rows), out_specs=PartitionSpec(*rows, None)
    )(table_VD, tokens_BT)
