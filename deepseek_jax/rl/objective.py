"""The model's part of a GRPO update: score the samples, take the loss."""

from functools import partial

import jax
from flax import nnx

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.scoring import Scored, score
from deepseek_jax.ops.metrics import Metrics, masked_mean
from deepseek_jax.rl.loss import GRPOConfig, grpo_loss
from deepseek_jax.rl.rollout import Batch


def grpo_objective(
    model: Decoder, batch: Batch, samples: jax.Array, *, config: GRPOConfig, temperature: float
) -> tuple[jax.Array, Metrics, Scored]:
    """GRPO loss of a batch, or of a part of one.

    Args:
        model: the policy.
        batch: samples with the log-probs of sampler and reference, and advantages.
        samples: size of the whole batch.
        config: of the loss.
        temperature: the sampler's.
    """
    scored = score(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT, temperature=temperature)
    loss, metrics = grpo_loss(
        scored.logprobs_BT,
        batch.old_logprobs_BT,
        batch.ref_logprobs_BT,
        batch.advantages_B,
        batch.mask_BT,
        config,
        samples=samples,
    )
    return loss, metrics | {"entropy": masked_mean(scored.entropy_BT, batch.mask_BT)}, scored


@partial(jax.jit, static_argnames=("graphdef", "temperature"))
def reference_logprobs(graphdef: nnx.GraphDef, weights: nnx.State, batch: Batch, *, temperature: float) -> jax.Array:
    """Log-probs [B, T] of the batch's targets under frozen weights."""
    model = nnx.merge(graphdef, weights)
    return score(model, batch.tokens_BT, batch.targets_BT, batch.mask_BT, temperature=temperature).logprobs_BT
