"""Which experts a token goes to, with what weight, and how evenly: V3's noaux_tc and V2's softmax routing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.config import MoEConfig


def logits_of(x: Float[Array, "*B D"], router: Float[Array, "D E"]) -> Float[Array, "*B E"]:
    """Router logits in float32 of any dtypes, multiplied in float32 too.

    A product's default precision is bfloat16 on TPU and TF32 on GPU, in which other experts would be chosen.
    """
    return jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def scores_of(logits: Float[Array, "*B E"], moe: MoEConfig) -> Float[Array, "*B E"]:
    """Affinity of each expert: sigmoid for V3, softmax for V2."""
    return jax.nn.sigmoid(logits) if moe.topk_method == "noaux_tc" else jax.nn.softmax(logits, axis=-1)


def select_experts(
    scores: Float[Array, "W E"], bias: Float[Array, "E"] | None, moe: MoEConfig
) -> tuple[Float[Array, "W A"], Int[Array, "W A"]]:
    """Choose num_experts_per_tok experts a row and weigh them.

    Args:
        scores: float32 affinities of W rows.
        bias: V3's correction bias. It takes part in the choice and never in the weights; None for V2.
        moe: method, groups and scaling.

    Returns:
        Weights float32 [W, A] and expert indices int32 [W, A], best first.

    Source: DeepSeek-V3 inference/model.py Gate.forward; transformers DeepseekV3TopkRouter and DeepseekV2TopkRouter.
    """
    experts = choose_experts(scores, bias, moe)
    return expert_weights(scores, experts, moe), experts


def choose_experts(scores: Float[Array, "W E"], bias: Float[Array, "E"] | None, moe: MoEConfig) -> Int[Array, "W A"]:
    """The choice of `select_experts`."""
    choice = scores if bias is None else scores + bias
    if moe.grouped:
        choice = jnp.where(_kept_groups(choice, moe), choice, -jnp.inf)
    return jax.lax.top_k(choice, moe.num_experts_per_tok)[1]


def expert_weights(scores: Float[Array, "W E"], experts: Int[Array, "W A"], moe: MoEConfig) -> Float[Array, "W A"]:
    """The weights of `select_experts` for any experts, each at most once a row, that the scores would choose or not."""
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * moe.routed_scaling_factor


def _kept_groups(choice: jax.Array, moe: MoEConfig) -> Bool[Array, "W E"]:
    """True for the experts of the topk_group best groups: best two summed (V3), or the best one (V2)."""
    W, E = choice.shape
    grouped = choice.reshape(W, moe.n_group, E // moe.n_group)
    best = 2 if moe.topk_method == "noaux_tc" else 1
    group_scores = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    _, kept = jax.lax.top_k(group_scores, moe.topk_group)
    keep = jnp.any(kept[:, :, None] == jnp.arange(moe.n_group), axis=1)
    return jnp.repeat(keep, E // moe.n_group, axis=-1)


def expert_load(
    experts: Int[Array, "B T A"], times: Bool[Array, "B T"] | Int[Array, "B T"], n_experts: int
) -> Float[Array, "B E"]:
    """How often each expert was chosen, per row, a token counting so many times; float32."""
    hits = experts[..., None] == jnp.arange(n_experts)
    return jnp.sum(hits * times[..., None, None], axis=(1, 2), dtype=jnp.float32)


def sequence_balance(
    scores: Float[Array, "B T E"], load: Float[Array, "B E"], mask: Bool[Array, "B T"], moe: MoEConfig
) -> Float[Array, "B"]:
    """DeepSeek-V3's sequence-wise balance loss, without its factor alpha: sum_i f_i P_i of each sequence.

    Args:
        scores: affinities, not negative.
        load: of `expert_load` under the same mask.
        mask: the tokens that count.
        moe: numbers of experts.

    Returns:
        1.0 means perfect balance; a sequence without tokens gives 0.

    Source: arXiv 2412.19437 equations 17 to 20.
    """
    tokens = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    frequency = load * moe.n_routed_experts / (moe.num_experts_per_tok * tokens)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    mean_share = jnp.sum(share * mask[..., None], axis=1) / tokens
    return jnp.sum(frequency * mean_share, axis=-1)


def packed_balance(
    scores: Float[Array, "B T E"], experts: Int[Array, "B T A"], samples: Bool[Array, "B T K"], moe: MoEConfig
) -> Float[Array, "B"]:
    """`sequence_balance` of rows that hold up to K samples, summed over them as if each had a row of its own.

    Args:
        scores: affinities.
        experts: that the tokens went to.
        samples: which sample of its row a token belongs to; none for those that do not count.
        moe: numbers of experts.
    """
    hits = jnp.sum(experts[..., None] == jnp.arange(moe.n_routed_experts), axis=2, dtype=jnp.float32)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    counts = samples.astype(jnp.float32)
    # products with flags, and not masks of every sample, which are K times as large as all scores
    load, shares = (jnp.einsum("btk,bte->bke", counts, of, precision=jax.lax.Precision.HIGHEST) for of in (hits, share))
    tokens = jnp.maximum(jnp.sum(counts, axis=1), 1)[..., None]
    frequency = load * moe.n_routed_experts / (moe.num_experts_per_tok * tokens)
    return jnp.sum(frequency * shares / tokens, axis=(1, 2))


def updated_bias(bias: Float[Array, "*L E"], load: Float[Array, "*L E"], gamma: float) -> Float[Array, "*L E"]:
    """The auxiliary-loss-free rule: b += gamma * sign(mean load - load). Source: arXiv 2412.19437 section 2.1.2."""
    return bias + gamma * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
