"""Scoring given sequences with a model: log-probs, entropies, and what routing did."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import Decoder, experts_of
from deepseek_jax.model.layers import RouterStats
from deepseek_jax.model.mtp import ahead, ahead_within
from deepseek_jax.ops.logprobs import token_logprobs
from deepseek_jax.parallel.logprobs import sharded_logprobs


class Scored(NamedTuple):
    """Results of one forward pass over a batch.

    logprobs_BT and entropy_BT, nats. load_LE: how often each expert of each MoE layer was chosen, the model's layers
    first, then those of the MTP modules if these ran; None without MoE.
    balance: the sequence-wise balance loss summed over the same layers and over sequences.
    experts_BTLA: int32, what the routers of these layers choose for each token, best first, also where other experts
    are given to use; None without MoE. best_BT: the likeliest token's log-prob, nats; a target is that token where its
    own equals it. A program that does not use one of these does not compute it.
    """

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    load_LE: jax.Array | None
    balance: jax.Array
    experts_BTLA: jax.Array | None
    best_BT: jax.Array


class Ahead(NamedTuple):
    """What one MTP module says of the tokens that it predicts.

    Column t of module d, counted from 1, speaks of the target of column t + d: logprobs_BT in nats, and mask_BT,
    true where that target exists and counts.
    """

    logprobs_BT: jax.Array
    mask_BT: jax.Array


def score(
    model: Decoder,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    temperature: float = 1.0,
    segments_BT: jax.Array | None = None,
    per_row: int | None = None,
    prompt_of_BT: jax.Array | None = None,
    drawn_BU: jax.Array | None = None,
    routes_BTLA: jax.Array | None = None,
    support_BTW: jax.Array | None = None,
    penalised_BTW: jax.Array | None = None,
    penalty: float = 1.0,
) -> Scored:
    """Log-probs of the targets; routing statistics over real tokens only. MTP modules do not run.

    Args:
        model: merged decoder.
        tokens_BT: inputs from position 0, padded on the right.
        targets_BT: what follows each input.
        mask_BT: where a target counts. Tokens up to a sample's last counted one are real, the rest is padding.
        temperature: the sampler's; log-probs of a sample mean nothing at another one.
        segments_BT: int32, for packed rows: the number of a token's sample in its row, from 1, 0 for padding.
        per_row: samples that a row can hold, where rows are packed.
        prompt_of_BT: int32, where the samples of packed rows share prompts: see `Decoder`. No target of a prompt
            counts; its last token, of which the samples' first ones are predicted, is with these.
        drawn_BU: int32, ascending, the columns of every target that counts, then T: no others are scored, and have
            zeros. None scores all, as is done where a sequence is cut in parts.
        routes_BTLA: integers, the experts that real tokens went to when they were sampled, to be used again (V3.2's
            keep routing, arXiv 2512.02556 section 3.1). Weights and their gradient are of the router as it is now.
        support_BTW: uint32, bits of the tokens that each target was drawn from; log-probs and entropies are of the
            distribution within them (V3.2's keep sampling mask). Set all bits where nothing was left out.
        penalised_BTW: uint32, bits of the tokens that the sampler's repetition penalty was on.
        penalty: that penalty.

    Raises:
        ValueError: segments without `per_row`.
    """
    real_BT = real_tokens(mask_BT, segments_BT, prompt_of_BT)
    packed = {"segments_BT": segments_BT, "per_row": per_row, "prompt_of_BT": prompt_of_BT}
    hidden = model(tokens_BT, real_BT, **packed, routes_BTLA=routes_BTLA)
    given = hidden.x_BTD, targets_BT, (support_BTW, penalised_BTW)
    sampler_settings = {"temperature": temperature, "penalty": penalty}
    if drawn_BU is None or model.layout.parts("sequence") > 1:
        scores = logprobs_of(model, *given, **sampler_settings)
    else:
        found = logprobs_of(model, *jax.tree.map(partial(_taken, columns_BU=drawn_BU), given), **sampler_settings)
        scores = (_put_back(values_BU, drawn_BU, targets_BT.shape) for values_BU in found)
    logprobs, entropy, best = scores
    return Scored(logprobs, entropy, *routing_of(hidden.stats), best)


def _taken(values_BT: jax.Array, columns_BU: jax.Array) -> jax.Array:
    """Of arrays [B, T, ...] some columns; those past the end are zeros."""
    columns = columns_BU.reshape(*columns_BU.shape, *(1,) * (values_BT.ndim - 2))
    return jnp.take_along_axis(values_BT, columns, axis=1, mode="fill", fill_value=0)


def _put_back(values_BU: jax.Array, columns_BU: jax.Array, shape: tuple[int, int]) -> jax.Array:
    put = lambda values_U, columns_U: jnp.zeros(shape[1], values_U.dtype).at[columns_U].set(values_U, mode="drop")
    return jax.vmap(put)(values_BU, columns_BU)


def score_ahead(
    model: Decoder,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    per_row: int | None = None,
) -> tuple[Scored, tuple[Ahead, ...]]:
    """The same at temperature 1, and from the same forward pass what each MTP module says further ahead.

    Returns:
        Scores of the model, with the modules' layers among its routing statistics, and one Ahead a module. A module
        does not look from one packed sample into the next.
    """
    packed = {"segments_BT": segments_BT, "per_row": per_row}
    real_BT = real_tokens(mask_BT, segments_BT)
    hidden = model(tokens_BT, real_BT, **packed)
    logprobs, entropy, best = logprobs_of(model, hidden.x_BTD, targets_BT)
    further, stats = [], hidden.stats
    for depth, draft in enumerate(model.draft(hidden.x_BTD, targets_BT, real_BT, **packed), 1):
        of_targets, _, _ = logprobs_of(model, draft.x_BTD, ahead(targets_BT, depth))
        further.append(Ahead(of_targets, ahead_within(mask_BT, depth, segments_BT)))
        stats += draft.stats
    return Scored(logprobs, entropy, *routing_of(stats), best), tuple(further)


def check_routes(routes: np.ndarray, config: ModelConfig) -> None:
    """Refuse routes that are not this model's, before they reach a device, where nothing would notice.

    Args:
        routes: [..., L, A] integers, the A experts of a token in each of L MoE layers.
        config: of the model.

    Raises:
        ValueError: a model without experts, other layers or experts a token, no integers, or an expert that there is
            not.
    """
    wanted = _routes_a_token(config)
    if routes.shape[-2:] != wanted or not np.issubdtype(routes.dtype, np.integer):
        raise ValueError(
            f"routes: got {routes.dtype} {list(routes.shape)}, wanted integers [..., {wanted[0]}, {wanted[1]}]"
        )
    experts = config.moe.n_routed_experts
    if routes.size and not 0 <= routes.min() <= routes.max() < experts:
        raise ValueError(f"routes: got experts {routes.min()} to {routes.max()}, wanted 0 to {experts - 1}")


def _routes_a_token(config: ModelConfig) -> tuple[int, int]:
    if config.moe is None:
        raise ValueError("routes: got some for a model without experts, wanted none")
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    return layers, config.moe.num_experts_per_tok


@jax.named_scope("logits")
def logprobs_of(
    model: Decoder,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    bits_BTW: tuple[jax.Array | None, jax.Array | None] = (None, None),
    **sampler_settings: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`ops.logprobs.token_logprobs` of a decoder's states, on its mesh if it has one."""
    support, penalised = bits_BTW
    if model.layout.mesh is None:
        of_bits = {"support": support, "penalised": penalised}
        return token_logprobs(x_BTD, model.head_matrix(), targets_BT, **of_bits, **sampler_settings)
    of_bits = {"support_BTW": support, "penalised_BTW": penalised}
    return sharded_logprobs(x_BTD, model.head_DV(), targets_BT, model.layout, **of_bits, **sampler_settings)


def real_tokens(
    mask_BT: jax.Array, segments_BT: jax.Array | None = None, prompt_of_BT: jax.Array | None = None
) -> jax.Array:
    """True up to a row's last counted target, or, in packed rows, a sample's; of a shared prompt with such a sample."""
    if segments_BT is None:
        return jax.lax.cummax(mask_BT.astype(jnp.int32), axis=1, reverse=True) > 0
    # up to a sample's last one, the next one counted is of the same sample
    T = mask_BT.shape[1]
    following = jax.lax.cummin(jnp.where(mask_BT, jnp.arange(T), T), axis=1, reverse=True)
    of_next = lambda numbers: jnp.take_along_axis(numbers, following, axis=1, mode="fill", fill_value=-1)
    real_BT = segments_BT == of_next(segments_BT)
    return real_BT if prompt_of_BT is None else real_BT | (segments_BT == of_next(prompt_of_BT))


def routing_of(stats: tuple[RouterStats, ...]) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Load, balance and experts as `Scored` has them."""
    if not stats:
        return None, jnp.float32(0), None
    load_LE = jnp.concatenate([jnp.sum(s.load_BE, axis=-2).reshape(-1, s.load_BE.shape[-1]) for s in stats])
    return load_LE, sum(jnp.sum(s.balance_B) for s in stats), experts_of(stats)
