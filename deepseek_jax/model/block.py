"""One decoder layer: what the decoder stacks, and what a multi-token prediction module holds one of."""

import jax
from flax import nnx

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.layers import MLP, GroupedAttention, LatentAttention, Maker, MoE
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
    def __call__(self, x, rotary, counted_BT, layer_idx=None, *, samples_BTK=None, routes_BTA=None):
        """Whole sequences: states, what a cache keeps of them, and the routing.

        layer_idx: the layer's in a stack, where the experts' weights are a whole stack's. Further arguments are MoE's.
        """
        out, new = self.attention(rms_norm(x, self.attention_norm[...], self.eps), rotary)
        x = self.layout.constrain(x + out, "batch", "sequence", None)
        normed = rms_norm(x, self.mlp_norm[...], self.eps)
        out, stats = self._feed_forward(normed, counted_BT, layer_idx, samples_BTK=samples_BTK, routes_BTA=routes_BTA)
        return self.layout.constrain(x + out, "batch", "sequence", None), new, stats

    @jax.named_scope("layer")
    def extend(self, x, rotary, cache, counted_BT, layer_idx=None):
        """Further tokens over a cache, which is the layer's own or, with a place, its stack's."""
        lay = self.layout.constrain
        normed = lay(rms_norm(x, self.attention_norm[...], self.eps), "batch", None, None)
        out, cache = self.attention.extend(normed, rotary, cache, layer_idx)
        # between projections a chip keeps its own sequences' states, and adds up and norms no others
        x = x + lay(out, "cache_batch", None, None)
        normed = lay(rms_norm(x, self.mlp_norm[...], self.eps), "batch", None, None)
        out, stats = self._feed_forward(normed, counted_BT, layer_idx)
        return lay(x + out, "cache_batch", None, None), cache, stats

    def _feed_forward(self, normed, counted_BT, layer_idx, **of_packing_and_replay):
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, counted_BT, layer_idx, **of_packing_and_replay)
        return self.mlp(normed), None
