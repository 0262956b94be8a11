"""One decoder layer: what the decoder stacks, and what a multi-token prediction module holds one of."""

import jax
from flax import nnx

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.attention import GroupedAttention, LatentAttention
from deepseek_jax.model.layers import MLP, Maker, MoE
from deepseek_jax.ops.norm import rms_norm


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each around a residual."""

    def __init__(self, config: ModelConfig, index: int, make: Maker):
        latent = isinstance(config.attention, MLAConfig)
        self.eps, self.layout = config.rms_norm_eps, make.layout
        self.attention_norm = make.scale(config.hidden_size, None)
        self.attention = LatentAttention(config, make) if latent else GroupedAttention(config, make)
        self.mlp_norm = make.scale(config.hidden_size, None)
        if config.is_moe_layer(index):
            self.mlp = MoE(config.hidden_size, config.moe, make)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, make)

    @jax.named_scope("layer")
    def __call__(self, x_BTD, step, pool=None, layer_idx=None, routes_BTA=None):
        """States, the pool of the cache, and the routing.

        Args:
            x_BTD: new tokens.
            step: of the pass.
            pool: the layer's own or, with a place in it, its stack's; None for whole sequences.
            layer_idx: the layer's in a stack, where pool and experts' weights are a whole stack's.
            routes_BTA: of replay, see MoE.
        """
        lay, decodes = self.layout.constrain, step.phase == "decode"
        # decoding, a chip keeps its own sequences' states between projections, and adds up and norms no others
        kept = ("cache_batch", None, None) if decodes else ("batch", "sequence", None)
        projected = lambda x: lay(x, "batch", None, None) if decodes else x
        normed = projected(rms_norm(x_BTD, self.attention_norm[...], self.eps))
        out, pool = self.attention(normed, step, pool, layer_idx)
        x = lay(x_BTD + (lay(out, *kept) if decodes else out), *kept)
        normed = projected(rms_norm(x, self.mlp_norm[...], self.eps))
        out, stats = self._feed_forward(normed, step, layer_idx, routes_BTA)
        return lay(x + out, *kept), pool, stats

    def _feed_forward(self, normed, step, layer_idx, routes_BTA):
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, step, layer_idx, routes_BTA)
        return self.mlp(normed), None
