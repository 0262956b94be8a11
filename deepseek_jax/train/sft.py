"""Supervised fine-tuning: cross-entropy on completions, of the next token and, with MTP, of those after it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.scoring import Scored, score, score_ahead
from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, masked_mean
from deepseek_jax.train.step import Objective


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


def sft_objective(model: Decoder, batch: SFTBatch, totals: BatchTotals) -> tuple[jax.Array, Metrics, Scored]:
    """Mean over examples of the mean negative log-likelihood of an example's completion, in nats."""
    scored = score(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT)
    return *_main_loss(scored, batch, totals), scored


def make_sft_objective(*, mtp_weight: float = 0.0) -> Objective:
    """Supervised fine-tuning with or without multi-token prediction.

    Args:
        mtp_weight: lambda of the MTP loss (DeepSeek-V3 pre-training: 0.3, later 0.1). 0 gives `sft_objective`, which
            runs no MTP module; the modules' gradient is then zero and their router biases stay.

    Raises:
        ValueError: a weight that is negative or not finite; or, when the objective is called with a weight, a model
            without MTP modules.
    """
    if not 0 <= mtp_weight < math.inf:
        raise ValueError(f"mtp_weight: got {mtp_weight}, wanted a finite number from 0")
    return partial(sft_mtp_objective, mtp_weight=mtp_weight) if mtp_weight else sft_objective


def sft_mtp_objective(
    model: Decoder, batch: SFTBatch, totals: BatchTotals, *, mtp_weight: float
) -> tuple[jax.Array, Metrics, Scored]:
    """The loss of `sft_objective` plus mtp_weight / D times the sum of the losses of D MTP modules.

    The loss of module d, from 1, is over the positions i whose target d places further on, token i + d + 1, is a
    completion token that counts. Positions of the prompt are among them where they reach so far; of a completion no
    token is left out but those with fewer than d + 1 tokens before them. As in the main loss, an example's sum is
    divided by its number of counted tokens (all of them, like equation 24's T), and examples have equal weight.

    Gradients reach the main model through its states, the embedding and the head.

    Raises:
        ValueError: the model has no MTP module.

    Source: arXiv 2412.19437 equations 24 and 25.
    """
    if not model.mtp:
        raise ValueError(
            f"mtp_weight: got {mtp_weight} for a model without MTP modules, wanted 0; or set num_nextn_predict_layers"
        )
    scored, further = score_ahead(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT)
    loss, metrics = _main_loss(scored, batch, totals)
    nlls = [jnp.where(ahead.mask_BT, -ahead.logprobs_BT, 0.0) for ahead in further]
    of_modules = sum(_mean_of_examples(nll, batch, totals) for nll in nlls)
    means = [masked_mean(nll, ahead.mask_BT) for nll, ahead in zip(nlls, further, strict=True)]
    metrics["mtp/nll"] = jax.tree.map(lambda *parts: sum(parts), *means)
    if len(means) > 1:
        metrics |= {f"mtp/nll_{depth}": mean for depth, mean in enumerate(means, 1)}
    return loss + mtp_weight / len(further) * of_modules, metrics, scored


def _main_loss(scored: Scored, batch: SFTBatch, totals: BatchTotals) -> tuple[jax.Array, Metrics]:
    nll = jnp.where(batch.mask_BT, -scored.logprobs_BT, 0.0)
    metrics = {
        "nll": masked_mean(nll, batch.mask_BT),
        "tokens_per_example": Mean(jnp.sum(batch.mask_BT).astype(jnp.float32), jnp.float32(nll.shape[0])),
    }
    return _mean_of_examples(nll, batch, totals), metrics


def _mean_of_examples(nll_BT: jax.Array, batch: SFTBatch, totals: BatchTotals) -> jax.Array:
    """Each example's sum over its number of counted tokens, summed, over the size of the whole batch."""
    lengths = jnp.maximum(jnp.sum(batch.mask_BT, axis=1), 1)
    return jnp.sum(jnp.sum(nll_BT, axis=1) / lengths) / totals.samples
