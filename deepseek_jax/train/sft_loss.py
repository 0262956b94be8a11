"""Supervised fine-tuning: cross-entropy on completions, of the next token and, with MTP, of those after it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.scoring import Scored, score, score_ahead
from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, masked_mean
from deepseek_jax.rl.slots import PackedSlot, first_fit, rows_multiple
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.step import Objective


class SFTBatch(NamedTuple):
    """Examples padded on the right; column t speaks of the token that position t predicts.

    Packed rows have segments_BT int32, from 1 the number of the example in its row, 0 for padding, and lengths_BK
    int32, the counted tokens of each, 0 where there is none. In rows of one example both are None.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    segments_BT: np.ndarray | None = None
    lengths_BK: np.ndarray | None = None

    @property
    def per_row(self) -> int | None:
        """Examples that a packed row can hold."""
        return None if self.lengths_BK is None else self.lengths_BK.shape[1]


def sft_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, width: int) -> SFTBatch:
    """Lay (prompt, completion) token pairs out, one a row; only completions count.

    Raises:
        ValueError: an example is longer than width + 1 tokens, or its prompt or completion is empty.
    """
    rows = []
    for number, (prompt, completion) in enumerate(examples):
        if not len(prompt) or not len(completion):
            empty = "completion" if len(prompt) else "prompt"
            raise ValueError(f"example {number}: got an empty {empty}, wanted at least one token")
        rows.append(completion_tokens(prompt, completion))
    return lay_out(rows, width=width)


def completion_tokens(prompt: Sequence[int], completion: Sequence[int]) -> MaskedTokens:
    """A prompt and a completion as one text, whose completion is learnt."""
    tokens = np.array([*prompt, *completion], np.int32)
    return MaskedTokens(tokens, np.arange(len(tokens)) >= len(prompt))


def lay_out(examples: Sequence[MaskedTokens], *, width: int, rows: int | None = None) -> SFTBatch:
    """One example a row.

    Args:
        examples: at least two tokens each.
        width: columns.
        rows: of the batch; what the examples leave is empty. None: as many as there are examples.

    Raises:
        ValueError: an example is longer than width + 1 tokens.
    """
    slots = [PackedSlot(row, 0, 0) for row in range(len(examples))]
    batch = _laid_out(examples, slots, len(examples) if rows is None else rows, width, 1)
    for row, example in enumerate(examples):  # where there is room for the last token, from which nothing is predicted
        batch.tokens_BT[row, len(example.tokens) - 1 : len(example.tokens)] = example.tokens[-1]
    return batch._replace(segments_BT=None, lengths_BK=None)


def pack(examples: Sequence[MaskedTokens], *, width: int, per_row: int, parts: int) -> SFTBatch:
    """Several examples a row, the longest first, each in the first row with room for it.

    Args:
        examples: at least two tokens each.
        width: columns.
        per_row: examples a row at most.
        parts: that rows are divided into, by micro-batches and the mesh. Rows come in at most eight numbers, each a
            compilation; empty ones fill up.

    Raises:
        ValueError: an example is longer than width + 1 tokens.
    """
    slots = first_fit([len(example.tokens) - 1 for example in examples], width, per_row)
    multiple = rows_multiple(len(examples), parts)
    rows = -(-(max(slot.row for slot in slots) + 1) // multiple) * multiple
    return _laid_out(examples, slots, rows, width, per_row)


def _laid_out(
    examples: Sequence[MaskedTokens], slots: Sequence[PackedSlot], rows: int, width: int, per_row: int
) -> SFTBatch:
    empty = lambda dtype, *shape: np.zeros(shape or (rows, width), dtype)
    batch = SFTBatch(empty(np.int32), empty(np.int32), empty(bool), empty(np.int32), empty(np.int32, rows, per_row))
    for number, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        end = slot.start + len(example.tokens) - 1
        if end > width:
            raise ValueError(
                f"example {number}: got {len(example.tokens)} tokens, wanted at most {width + 1}; shorten it"
            )
        batch.tokens_BT[slot.row, slot.start : end] = example.tokens[:-1]
        batch.targets_BT[slot.row, slot.start : end] = example.tokens[1:]
        batch.mask_BT[slot.row, slot.start : end] = example.mask[1:]
        batch.segments_BT[slot.row, slot.start : end] = slot.number + 1
        batch.lengths_BK[slot.row, slot.number] = np.sum(example.mask[1:])
    return batch


def mean_of_examples(nll_BT: jax.Array, batch: SFTBatch, totals: BatchTotals) -> jax.Array:
    """Each example's sum over its number of counted tokens, summed, over the size of the whole batch."""
    if batch.segments_BT is None:
        lengths = jnp.maximum(jnp.sum(batch.mask_BT, axis=1), 1)
        return jnp.sum(jnp.sum(nll_BT, axis=1) / lengths) / totals.samples
    member_BTK = batch.segments_BT[..., None] == jnp.arange(1, batch.per_row + 1)
    sums_BK = jnp.sum(jnp.where(member_BTK, nll_BT[..., None], 0), axis=1)
    return jnp.sum(sums_BK / jnp.maximum(batch.lengths_BK, 1)) / totals.samples


def mean_of_tokens(nll_BT: jax.Array, batch: SFTBatch, totals: BatchTotals) -> jax.Array:
    """The sum over the number of counted tokens of the whole batch."""
    return jnp.sum(nll_BT) / totals.tokens


Averaged = Callable[[jax.Array, SFTBatch, BatchTotals], jax.Array]


def sft_objective(
    model: Decoder, batch: SFTBatch, totals: BatchTotals, *, mean: Averaged = mean_of_examples
) -> tuple[jax.Array, Metrics, Scored]:
    """Mean negative log-likelihood of what is counted, in nats; `mean` says over what."""
    packed = {"segments_BT": batch.segments_BT, "per_row": batch.per_row}
    scored = score(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT, **packed)
    return *_main_loss(scored, batch, totals, mean), scored


def make_sft_objective(*, mtp_weight: float = 0.0, mean: Averaged = mean_of_examples) -> Objective:
    """Supervised fine-tuning with or without multi-token prediction.

    Args:
        mtp_weight: lambda of the MTP loss (DeepSeek-V3 pre-training: 0.3, later 0.1). 0 gives `sft_objective`, which
            runs no MTP module; the modules' gradient is then zero and their router biases stay.
        mean: `mean_of_examples`, or `mean_of_tokens`.

    Raises:
        ValueError: a weight that is negative or not finite; or, when the objective is called with a weight, a model
            without MTP modules.
    """
    if not 0 <= mtp_weight < math.inf:
        raise ValueError(f"mtp_weight: got {mtp_weight}, wanted a finite number from 0")
    if mtp_weight:
        return partial(sft_mtp_objective, mtp_weight=mtp_weight, mean=mean)
    return sft_objective if mean is mean_of_examples else partial(sft_objective, mean=mean)


def sft_mtp_objective(
    model: Decoder, batch: SFTBatch, totals: BatchTotals, *, mtp_weight: float, mean: Averaged = mean_of_examples
) -> tuple[jax.Array, Metrics, Scored]:
    """The loss of `sft_objective` plus mtp_weight / D times the sum of the losses of D MTP modules.

    The loss of module d, from 1, is over the positions i whose target d places further on, token i + d + 1, is a
    completion token that counts. Positions of the prompt are among them where they reach so far; of a completion no
    token is left out but those with fewer than d + 1 tokens before them. Its sum is divided by what the main loss is
    divided by: all counted tokens, like equation 24's T, of each example or of the batch.

    Gradients reach the main model through its states, the embedding and the head.

    Raises:
        ValueError: the model has no MTP module.

    Source: arXiv 2412.19437 equations 24 and 25.
    """
    if not model.mtp:
        raise ValueError(
            f"mtp_weight: got {mtp_weight} for a model without MTP modules, wanted 0; or set num_nextn_predict_layers"
        )
    packed = {"segments_BT": batch.segments_BT, "per_row": batch.per_row}
    scored, further = score_ahead(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT, **packed)
    loss, metrics = _main_loss(scored, batch, totals, mean)
    nlls = [jnp.where(ahead.mask_BT, -ahead.logprobs_BT, 0.0) for ahead in further]
    of_modules = sum(mean(nll, batch, totals) for nll in nlls)
    means = [masked_mean(nll, ahead.mask_BT) for nll, ahead in zip(nlls, further, strict=True)]
    metrics["mtp/nll"] = jax.tree.map(lambda *parts: sum(parts), *means)
    if len(means) > 1:
        metrics |= {f"mtp/nll_{depth}": of for depth, of in enumerate(means, 1)}
    return loss + mtp_weight / len(further) * of_modules, metrics, scored


def _main_loss(scored: Scored, batch: SFTBatch, totals: BatchTotals, mean: Averaged) -> tuple[jax.Array, Metrics]:
    return mean(jnp.where(batch.mask_BT, -scored.logprobs_BT, 0.0), batch, totals), main_metrics(scored, batch)


def main_metrics(scored: Scored, batch: SFTBatch) -> Metrics:
    """Of what is counted: its negative log-likelihood, the share that the model holds likeliest, and its length."""
    tokens = jnp.sum(batch.mask_BT).astype(jnp.float32)
    examples = jnp.float32(len(batch.mask_BT)) if batch.lengths_BK is None else jnp.sum(batch.lengths_BK > 0)
    return {
        "nll": masked_mean(-scored.logprobs_BT, batch.mask_BT),
        "mean_token_accuracy": masked_mean((scored.logprobs_BT == scored.best_BT).astype(jnp.float32), batch.mask_BT),
        "tokens_per_example": Mean(tokens, examples.astype(jnp.float32)),
    }
