"""Scoring given sequences with a model: log-probs, entropies, and what routing did."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.ops.logprobs import token_logprobs


class Scored(NamedTuple):
    """Results of one forward pass over a batch.

    logprobs_BT and entropy_BT, nats. load_LE: how often each expert of each MoE layer was chosen, None without MoE.
    balance: the sequence-wise balance loss summed over layers and sequences.
    """

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    load_LE: jax.Array | None
    balance: jax.Array


def score(
    model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *, temperature: float = 1.0
) -> Scored:
    """Log-probs of the targets; routing statistics over real tokens only.

    Args:
        model: merged decoder.
        tokens_BT: inputs from position 0, padded on the right.
        targets_BT: what follows each input.
        mask_BT: where a target counts. Tokens up to a row's last counted one are real, the rest is padding.
        temperature: the sampler's; log-probs of a sample mean nothing at another one.
    """
    real_BT = jax.lax.cummax(mask_BT.astype(jnp.int32), axis=1, reverse=True) > 0
    hidden = model(tokens_BT, real_BT)
    logprobs, entropy = token_logprobs(hidden.x_BTD, model.head_DV(), targets_BT, temperature=temperature)
    if not hidden.stats:
        return Scored(logprobs, entropy, None, jnp.float32(0))
    load_LE = jnp.stack([jnp.sum(s.load_BE, axis=0) for s in hidden.stats])
    return Scored(logprobs, entropy, load_LE, sum(jnp.sum(s.balance_B) for s in hidden.stats))
