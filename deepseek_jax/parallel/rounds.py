"""Work of unknown size in rounds of a fixed size: the first as plain code, any further ones in a loop."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Round = Callable[[Int[Array, ""] | int, PyTree, PyTree], Float[Array, "..."]]


def in_rounds(one_round: Round, count: Int[Array, ""], arrays: PyTree, numbers: PyTree) -> Float[Array, "..."]:
    """sum of one_round(k, arrays, numbers) for k from 0 to count - 1, at least the round 0.

    Round 0 stands outside the loop, so that the compiler may overlap it with its neighbours and rematerialisation
    treats it as it does them. The further rounds keep nothing for the gradient but the arguments, and compute each
    round again there.

    Args:
        one_round: closes over no traced value.
        count: of rounds, int32; known when the program runs. Devices whose rounds meet in collectives must agree.
        arrays: to differentiate in.
        numbers: whatever is not differentiated.
    """
    return _further(one_round, count, one_round(0, arrays, numbers), arrays, numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(one_round, count, total, arrays, numbers):
    with jax.named_scope("overflow_rounds"):
        body = lambda k, total: total + one_round(k, arrays, numbers)
        return jax.lax.fori_loop(1, count, body, total)


def _forward(one_round, count, total, arrays, numbers):
    return _further(one_round, count, total, arrays, numbers), (count, arrays, numbers)


def _backward(one_round, saved, d_total):
    count, arrays, numbers = saved

    def body(k, d_arrays):
        _, pull = jax.vjp(lambda arrays: one_round(k, arrays, numbers), arrays)
        return jax.tree.map(jnp.add, d_arrays, *pull(d_total))

    with jax.named_scope("overflow_rounds"):
        d_arrays = jax.lax.fori_loop(1, count, body, jax.tree.map(jnp.zeros_like, arrays))
    return None, d_total, d_arrays, None


_further.defvjp(_forward, _backward)
