"""Distillation by logits: a divergence from teachers over the whole vocabulary, at the tokens that count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.scoring import Scored, real_tokens, routing_of
from deepseek_jax.ops.divergence import Divergence, token_divergences
from deepseek_jax.ops.metrics import BatchTotals, Metrics, masked_mean
from deepseek_jax.parallel.divergence import sharded_divergences
from deepseek_jax.train.sft_loss import Averaged, SFTBatch, main_metrics, mean_of_tokens
from deepseek_jax.train.step import Objective

_TEMPERATURES = {"forward-kl": 3.0, "reverse-kl": 1.0}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student learns from.

    Args:
        loss: sequence learns the teacher's text, as fine-tuning does; forward-kl the teacher's distribution at every
            token of that text; reverse-kl, on-policy, the teachers' at every token of the student's own samples.
        temperature: that logits of both are divided by; None is 3 for forward-kl and 1 for reverse-kl.
        hard_share: share of the cross-entropy of the tokens themselves in the loss of forward-kl.
        teacher_weights: of several teachers, above 0; None weighs them alike.
    """

    loss: Literal["sequence", "forward-kl", "reverse-kl"] = "sequence"
    temperature: float | None = None
    hard_share: float = 0.0
    teacher_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature is not None and self.loss == "sequence":
            raise ValueError("temperature: got it for text alone, wanted --loss forward-kl or reverse-kl beside it")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, wanted a finite number above 0")
        if not 0 <= self.hard_share < 1 or (self.hard_share and self.loss != "forward-kl"):
            raise ValueError(
                f"hard_share: got {self.hard_share} with {self.loss}, wanted 0 to below 1 with --loss forward-kl"
            )
        if any(not 0 < weight < math.inf for weight in self.teacher_weights):
            raise ValueError(f"teacher_weights: got {list(self.teacher_weights)}, wanted finite numbers above 0")

    def divergence(self, teachers: int) -> Divergence:
        """Of so many teachers, whose weights sum to 1.

        Raises:
            ValueError: weights for another number of them.
        """
        given = self.teacher_weights or (1.0,) * teachers
        if len(given) != teachers:
            raise ValueError(f"teacher_weights: got {len(given)} for {teachers} teachers, wanted one of each")
        weights = tuple(weight / sum(given) for weight in given)
        temperature = _TEMPERATURES[self.loss] if self.temperature is None else self.temperature
        return Divergence("forward" if self.loss == "forward-kl" else "reverse", temperature, weights)


def make_distill_objective(
    graphdefs: Sequence[nnx.GraphDef],
    divergence: Divergence,
    *,
    hard_share: float = 0.0,
    mean: Averaged = mean_of_tokens,
) -> Objective:
    """The objective of a step whose `given` is the teachers' weights.

    Args:
        graphdefs: of the teachers' modules, in the layout of the student.
        divergence: from them.
        hard_share: as of `DistillConfig`.
        mean: what the loss is the mean over.
    """
    return partial(
        distill_objective, graphdefs=tuple(graphdefs), divergence=divergence, hard_share=hard_share, mean=mean
    )


def distill_objective(
    model: Decoder,
    batch: SFTBatch,
    totals: BatchTotals,
    teachers: Sequence[nnx.State],
    *,
    graphdefs: tuple[nnx.GraphDef, ...],
    divergence: Divergence,
    hard_share: float = 0.0,
    mean: Averaged = mean_of_tokens,
) -> tuple[jax.Array, Metrics, Scored]:
    """Mean divergence from teachers at what is counted, in nats and times the temperature's square.

    MTP modules do not run. Where heads have other numbers of columns, those that all have count: the others belong to
    no token.

    Args:
        model: the student.
        batch: texts; what counts is the teacher's or the student's own.
        totals: of the whole batch.
        teachers: weights of each, no gradient of which is taken.
        graphdefs, divergence, hard_share, mean: as for `make_distill_objective`.
    """
    real_BT = real_tokens(batch.mask_BT, batch.segments_BT)
    given = {"segments_BT": batch.segments_BT, "per_row": batch.per_row}
    hidden = model(batch.tokens_BT, real_BT, **given)
    merged = [nnx.merge(graphdef, weights) for graphdef, weights in zip(graphdefs, teachers, strict=True)]
    theirs = [(teacher(batch.tokens_BT, real_BT, **given).x_BTD, teacher.head_DV()) for teacher in merged]
    theirs = jax.lax.stop_gradient(theirs)
    apart_BT, logprobs, entropy, best = _divergences(model, hidden.x_BTD, theirs, batch.targets_BT, divergence)
    scored = Scored(logprobs, entropy, *routing_of(hidden.stats), best)
    apart_BT = jnp.where(batch.mask_BT, apart_BT, 0.0)
    loss = mean(apart_BT, batch, totals)
    if hard_share:
        loss = (1 - hard_share) * loss + hard_share * mean(jnp.where(batch.mask_BT, -logprobs, 0.0), batch, totals)
    metrics = main_metrics(scored, batch)
    metrics["kl"] = masked_mean(apart_BT / divergence.temperature**2, batch.mask_BT)
    metrics["entropy"] = masked_mean(entropy, batch.mask_BT)
    return loss, metrics, scored


@jax.named_scope("logits")
def _divergences(model: Decoder, x_BTD, teachers, targets_BT, divergence: Divergence) -> tuple[jax.Array, ...]:
    heads = [model.head_DV(), *(head for _, head in teachers)]
    shared = min(head.shape[1] for head in heads)
    cut = lambda head: head if head.shape[1] == shared else head[:, :shared]
    given = x_BTD, cut(heads[0]), [(states, cut(head)) for states, head in teachers], targets_BT, divergence
    if model.layout.mesh is None:
        return token_divergences(*given)
    return sharded_divergences(*given, model.layout)
