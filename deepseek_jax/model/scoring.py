"""Scoring given sequences with a model: log-probs, entropies, and what routing did."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.layers import RouterStats
from deepseek_jax.model.mtp import ahead
from deepseek_jax.ops.logprobs import token_logprobs
from deepseek_jax.parallel.logprobs import sharded_logprobs


class Scored(NamedTuple):
    """Results of one forward pass over a batch.

    logprobs_BT and entropy_BT, nats. load_LE: how often each expert of each MoE layer was chosen, the model's layers
    first, then those of the MTP modules if these ran; None without MoE.
    balance: the sequence-wise balance loss summed over the same layers and over sequences.
    """

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    load_LE: jax.Array | None
    balance: jax.Array


class Ahead(NamedTuple):
    """What one MTP module says of the tokens that it predicts.

    Column t of module d, counted from 1, speaks of the target of column t + d: logprobs_BT in nats, and mask_BT,
    true where that target exists and counts.
    """

    logprobs_BT: jax.Array
    mask_BT: jax.Array


def score(
    model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *, temperature: float = 1.0
) -> Scored:
    """Log-probs of the targets; routing statistics over real tokens only. MTP modules do not run.

    Args:
        model: merged decoder.
        tokens_BT: inputs from position 0, padded on the right.
        targets_BT: what follows each input.
        mask_BT: where a target counts. Tokens up to a row's last counted one are real, the rest is padding.
        temperature: the sampler's; log-probs of a sample mean nothing at another one.
    """
    hidden = model(tokens_BT, _real(mask_BT))
    logprobs, entropy = _logprobs(model, hidden.x_BTD, targets_BT, temperature)
    return Scored(logprobs, entropy, *_routing(hidden.stats))


def score_ahead(
    model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array
) -> tuple[Scored, tuple[Ahead, ...]]:
    """The same at temperature 1, and from the same forward pass what each MTP module says further ahead.

    Returns:
        Scores of the model, with the modules' layers among its routing statistics, and one Ahead a module.
    """
    real_BT = _real(mask_BT)
    hidden = model(tokens_BT, real_BT)
    logprobs, entropy = _logprobs(model, hidden.x_BTD, targets_BT)
    further, stats = [], hidden.stats
    for depth, draft in enumerate(model.draft(hidden.x_BTD, targets_BT, real_BT), 1):
        of_targets, _ = _logprobs(model, draft.x_BTD, ahead(targets_BT, depth))
        further.append(Ahead(of_targets, ahead(mask_BT, depth)))
        stats += draft.stats
    return Scored(logprobs, entropy, *_routing(stats)), tuple(further)


def _logprobs(
    model: Decoder, x_BTD: jax.Array, targets_BT: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    if model.layout.mesh is None:
        return token_logprobs(x_BTD, model.head_DV(), targets_BT, temperature=temperature)
    return sharded_logprobs(x_BTD, model.head_DV(), targets_BT, model.layout, temperature=temperature)


def _real(mask_BT: jax.Array) -> jax.Array:
    """True up to a row's last counted target."""
    return jax.lax.cummax(mask_BT.astype(jnp.int32), axis=1, reverse=True) > 0


def _routing(stats: tuple[RouterStats, ...]) -> tuple[jax.Array | None, jax.Array]:
    """Load and balance as `Scored` has them."""
    if not stats:
        return None, jnp.float32(0)
    load_LE = jnp.concatenate([jnp.sum(s.load_BE, axis=-2).reshape(-1, s.load_BE.shape[-1]) for s in stats])
    return load_LE, sum(jnp.sum(s.balance_B) for s in stats)
