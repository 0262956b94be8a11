"""Supervised fine-tuning: cross-entropy on completions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.scoring import Scored, score
from deepseek_jax.ops.metrics import Mean, Metrics, masked_mean


class SFTBatch(NamedTuple):
    """Examples padded on the right; column t speaks of the token that position t predicts."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray


def sft_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, width: int) -> SFTBatch:
    """Lay (prompt, completion) token pairs out; only completions count.

    Raises:
        ValueError: an example is longer than width + 1 tokens, or its prompt or completion is empty.
    """
    tokens = np.zeros((len(examples), width + 1), np.int32)
    mask = np.zeros((len(examples), width), bool)
    for row, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        if not len(prompt) or not len(completion):
            empty = "completion" if len(prompt) else "prompt"
            raise ValueError(f"example {row}: got an empty {empty}, wanted at least one token")
        if end > width + 1:
            raise ValueError(f"example {row}: got {end} tokens, wanted at most {width + 1}; shorten it")
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = completion
        mask[row, len(prompt) - 1 : end - 1] = True
    return SFTBatch(tokens[:, :-1], tokens[:, 1:], mask)


def sft_objective(model: Decoder, batch: SFTBatch, samples: jax.Array) -> tuple[jax.Array, Metrics, Scored]:
    """Mean over examples of the mean negative log-likelihood of an example's completion, in nats."""
    scored = score(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT)
    nll = jnp.where(batch.mask_BT, -scored.logprobs_BT, 0.0)
    lengths = jnp.maximum(jnp.sum(batch.mask_BT, axis=1), 1)
    loss = jnp.sum(jnp.sum(nll, axis=1) / lengths) / samples
    metrics = {
        "nll": masked_mean(nll, batch.mask_BT),
        "tokens_per_example": Mean(jnp.sum(batch.mask_BT).astype(jnp.float32), jnp.float32(nll.shape[0])),
    }
    return loss, metrics, scored
