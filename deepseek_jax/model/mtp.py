"""Multi-token prediction: a module that looks one token further ahead than the model or the module before it."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Layer
from deepseek_jax.model.layers import Maker, RouterStats, Step
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.pool import Pool


class MTP(nnx.Module):
    """One module: z_i = [norm(Emb(t)) ; norm(h_i)] projected to the model's width, a decoder layer, and a norm.

    Embedding and head are the main model's; the module has no weights of its own for them.

    Args:
        config: the model's.
        depth: which module, from 0. Its layer is the one of that number after the model's last, thus MoE in V3.
        make: of the weights.

    Source: arXiv 2412.19437 section 2.2. Differs from its equation 21, which puts the state before the embedding:
    the published weights want the embedding first (test_drafts_equal_transformers).
    """

    def __init__(self, config: ModelConfig, depth: int, make: Maker):
        D = config.hidden_size
        self.eps = config.rms_norm_eps
        self.token_norm = make.scale(D, None)
        self.hidden_norm = make.scale(D, None)
        # one of the two dimensions may be cut as the model's width is, not both
        self.project = make.matrix(2 * D, D, axes=("embed", None))
        self.layer = Layer(config, config.num_hidden_layers + depth, make)
        self.norm = make.scale(D, None)

    @jax.named_scope("mtp")
    def __call__(
        self,
        embedded_BTD: jax.Array,
        hidden_BTD: jax.Array,
        step: Step,
        pool: Pool | None = None,
    ) -> tuple[jax.Array, Pool | None, RouterStats | None]:
        """States [B, T, D] after the module's norm, for the head and for the next module; its pool and its routing.

        Args:
            embedded_BTD: embeddings of the tokens to join, the next token at each position for the first module.
            hidden_BTD: states of the model after its final norm, or of the module before.
            step: of the pass. Both parts of a position lie at the position of its state; attention knows only
                distances, so the place of the joined token would give the same.
            pool: of the module's layer, where there is a cache.
        """
        token = rms_norm(embedded_BTD, self.token_norm[...], self.eps)
        state = rms_norm(hidden_BTD, self.hidden_norm[...], self.eps)
        z = jnp.concatenate([token, state], axis=-1) @ self.project
        x, pool, stats = self.layer(z, step, pool)
        return rms_norm(x, self.norm[...], self.eps), pool, stats


def ahead(values_BT: jax.Array, steps: int) -> jax.Array:
    """What lies `steps` columns to the right; zero, or false, where nothing does."""
    return jnp.pad(values_BT, ((0, 0), (0, steps)))[:, steps:]


def ahead_within(mask_BT: jax.Array, steps: int, segments_BT: jax.Array | None) -> jax.Array:
    """`ahead` of a mask, false also where what lies there is of another packed sample."""
    shifted = ahead(mask_BT, steps)
    return shifted if segments_BT is None else shifted & (segments_BT == ahead(segments_BT, steps))
