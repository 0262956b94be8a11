"""One decoder layer: what the decoder stacks, and what a multi-token prediction module holds one of."""

from flax import nnx

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.layers import MLP, GroupedAttention, LatentAttention, Maker, MoE
from deepseek_jax.ops.norm import rms_norm


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each around a residual."""

    def __init__(self, config: ModelConfig, index: int, make: Maker):
        latent = isinstance(config.attention, MLAConfig)
        self.eps = config.rms_norm_eps
        self.attention_norm = make.scale(config.hidden_size, None)
        self.attention = LatentAttention(config, make) if latent else GroupedAttention(config, make)
        self.mlp_norm = make.scale(config.hidden_size, None)
        if config.is_moe_layer(index):
            self.mlp = MoE(config.hidden_size, config.moe, make)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, make)

    def __call__(self, x, rotary, mask_BTS, tokens_BT):
        out, new = self.attention(rms_norm(x, self.attention_norm[...], self.eps), rotary, mask_BTS)
        x, stats = self._feed_forward(x + out, tokens_BT)
        return x, new, stats

    def extend(self, x, rotary, cache, tokens_BT):
        out, cache = self.attention.extend(rms_norm(x, self.attention_norm[...], self.eps), rotary, cache)
        x, stats = self._feed_forward(x + out, tokens_BT)
        return x, cache, stats

    def _feed_forward(self, x, counted_BT):
        normed = rms_norm(x, self.mlp_norm[...], self.eps)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, counted_BT)
            return x + out, stats
        return x + self.mlp(normed), None
