"""The model's part of a GRPO update: score the samples, take the loss."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.lora import decoder_of
from deepseek_jax.model.scoring import Scored, score
from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, masked_mean
from deepseek_jax.ops.micro_batches import join_rows, split_rows
from deepseek_jax.rl.batch import Batch
from deepseek_jax.rl.loss import GRPOLossConfig, grpo_loss


def grpo_objective(
    model: Decoder,
    batch: Batch,
    totals: BatchTotals,
    *,
    config: GRPOLossConfig,
    temperature: float,
    repetition_penalty: float = 1.0,
    keep_routing: bool = False,
) -> tuple[jax.Array, Metrics, Scored]:
    """GRPO loss of a batch, or of a part of one.

    Args:
        model: the policy.
        batch: samples with the log-probs of sampler and reference, and advantages.
        totals: of the whole batch.
        config: of the loss.
        temperature: the sampler's.
        repetition_penalty: the sampler's, for the tokens that the batch has as penalised.
        keep_routing: send every token through the experts that it went through when it was sampled (V3.2's keep
            routing, arXiv 2512.02556 section 3.1); the batch must hold them.
    """
    sampler_settings = {"temperature": temperature, "repetition_penalty": repetition_penalty}
    scored = scored_batch(model, batch, **sampler_settings, keep_routing=keep_routing)
    loss, metrics = grpo_loss(
        scored.logprobs_BT,
        batch.old_logprobs_BT,
        batch.ref_logprobs_BT,
        batch.advantages_BT,
        batch.mask_BT,
        config,
        totals=totals,
        segments_BT=batch.segments_BT,
        per_row=batch.per_row,
        entropy_BT=scored.entropy_BT,
        sampler_logprobs_BT=batch.sampler_logprobs_BT,
        high_entropy_BT=batch.high_entropy_BT,
        entropy_coef=None if batch.entropy_coef_B is None else batch.entropy_coef_B[0],
    )
    if batch.routes_BTLA is not None:
        metrics["sampling/experts_differ"] = experts_differ(batch.routes_BTLA, scored.experts_BTLA, batch.mask_BT)
    return loss, metrics, scored


def scored_batch(
    model: Decoder, batch: Batch, *, temperature: float, repetition_penalty: float = 1.0, keep_routing: bool = False
) -> Scored:
    """What the model says of a batch, and of the tokens among which each was drawn."""
    if keep_routing and batch.routes_BTLA is None:
        raise ValueError("keep_routing: got a batch without routes, wanted one; record them while sampling")
    return score(
        model,
        batch.tokens_BT,
        batch.targets_BT,
        batch.mask_BT,
        temperature=temperature,
        segments_BT=batch.segments_BT,
        per_row=batch.per_row,
        prompt_of_BT=batch.prompt_of_BT,
        drawn_BU=batch.drawn_BU,
        routes_BTLA=batch.routes_BTLA if keep_routing else None,
        support_BTW=batch.support_BTW,
        penalised_BTW=batch.penalised_BTW,
        penalty=repetition_penalty,
    )


def experts_differ(sampled_BTLA: jax.Array, chosen_BTLA: jax.Array, mask_BT: jax.Array) -> Mean:
    """Share of the counted tokens of which some layer's router would choose other experts than the sampler's did."""
    in_order = lambda experts: jnp.sort(experts.astype(jnp.int32), axis=-1)
    other = jnp.any(in_order(sampled_BTLA) != in_order(chosen_BTLA), axis=(2, 3))
    return masked_mean(other.astype(jnp.float32), mask_BT)


_OPTIONS = ("graphdef", "temperature", "repetition_penalty", "keep_routing", "micro_batches", "wanted")


@partial(jax.jit, static_argnames=_OPTIONS)
def frozen_scores(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    batch: Batch,
    *,
    temperature: float,
    repetition_penalty: float = 1.0,
    keep_routing: bool = False,
    micro_batches: int = 1,
    wanted: Literal["logprobs_BT", "entropy_BT"] = "logprobs_BT",
) -> jax.Array:
    """Log-probs [B, T] of the batch's targets under weights that are not trained, or entropies of their distributions.

    The weights are the reference model's, or the policy's own before an update, plain or beside an adapter. Both are
    in nats.
    """
    model = decoder_of(graphdef, weights)
    options = {"temperature": temperature, "repetition_penalty": repetition_penalty, "keep_routing": keep_routing}

    def of_part(part: Batch) -> jax.Array:
        return getattr(scored_batch(model, model.layout.rows(part), **options), wanted)

    if micro_batches == 1:
        return of_part(batch)
    scores_BT = join_rows(jax.lax.map(of_part, split_rows(batch, micro_batches)))
    return model.layout.constrain(scores_BT, "batch", "sequence")
