"""Guesses of the tokens that follow a request's latest one, for a decode step to verify beside it.

A guess changes no token: verification draws every position with its own noise and goes on while guess and draw are the
same. So guesses are drawn with that noise too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.model.cache import Cache
from deepseek_jax.model.decoder import Decoder, Phase


def lookup(history_RL: jax.Array, position_R: jax.Array, count: int) -> jax.Array:
    """What followed the last two tokens where they last came before: int32 [R, count], -1 where they never did.

    Args:
        history_RL: int32, the tokens of each request up to its latest.
        position_R: int32, of the latest.
        count: of guesses.

    Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """
    L = history_RL.shape[1]
    at = jnp.arange(1, L)
    last = jnp.take_along_axis(history_RL, jnp.stack([position_R - 1, position_R], axis=1), axis=1, mode="clip")
    same = (history_RL[:, :-1] == last[:, :1]) & (history_RL[:, 1:] == last[:, 1:])
    same &= (at < position_R[:, None]) & (position_R[:, None] > 0)
    found_R = jnp.max(jnp.where(same, at, -1), axis=1)
    ahead = found_R[:, None] + 1 + jnp.arange(count)
    known = (found_R[:, None] >= 0) & (ahead <= position_R[:, None])
    return jnp.where(known, jnp.take_along_axis(history_RL, ahead, axis=1, mode="clip"), -1)


def by_mtp(
    model: Decoder,
    hidden_RTD: jax.Array,
    next_RT: jax.Array,
    positions_RT: jax.Array,
    count_R: jax.Array,
    cache: Cache,
    table_RM: jax.Array,
    *,
    count: int,
    phase: Phase,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, Cache]:
    """Guesses of the first MTP module, int32 [R, count], and the cache with its entries of new tokens.

    After the first guess the module goes on from its own state and guess.

    Args:
        model: with a module.
        hidden_RTD: the model's states of new tokens.
        next_RT: int32, the token after each.
        positions_RT: int32, of the new tokens.
        count_R: int32, how many of a row are real.
        cache: with a pool for the module.
        table_RM: the blocks of each row.
        count: of guesses.
        phase: for the new tokens.
        choose: logits [R, V] and the position of the token that they are of to a token.

    Source: arXiv 2412.19437 section 5.4.3; the state is used again as vLLM and SGLang do.
    """
    real = jnp.arange(next_RT.shape[1]) < count_R[:, None]
    x, cache = model.draft_next(hidden_RTD, next_RT, positions_RT, real, cache, table_RM, phase=phase)
    last = jnp.maximum(count_R - 1, 0)[:, None]
    x = jnp.take_along_axis(x, last[..., None], axis=1)
    at, live = jnp.take_along_axis(positions_RT, last, axis=1), real[:, :1]
    guesses = [choose(model.logits(x)[:, 0], at[:, 0] + 2)]
    while len(guesses) < count:
        at = at + 1
        x, cache = model.draft_next(x, guesses[-1][:, None], at, live, cache, table_RM, phase="decode")
        guesses.append(choose(model.logits(x)[:, 0], at[:, 0] + 2))
    return jnp.stack(guesses, axis=1), cache
