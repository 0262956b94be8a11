"""The decoder: embedding, layers, final norm and head, for every architecture of `config`.

Use it functionally: `graphdef, weights = split(Decoder(config, rngs=...))` once, and inside jit
`nnx.merge(graphdef, weights)` gives the module back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.layers import MLP, GroupedAttention, LatentAttention, Maker, MoE, Rotary, RouterStats
from deepseek_jax.ops.attention import causal_mask
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.rope import angles


class Hidden(NamedTuple):
    """States after the final norm [B, T, D], and the routing statistics of each MoE layer."""

    x_BTD: jax.Array
    stats: tuple[RouterStats, ...]


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


class Decoder(nnx.Module):
    """A causal language model.

    Args:
        config: the architecture.
        rngs: Flax random streams for the first weights (`nnx.Rngs(seed)`).
        dtype: of weights and activations; router, norms, softmax and logits are float32 all the same.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        make = Maker(config, rngs, dtype)
        self.config = config
        self.embed = make.matrix(config.vocab_size, config.hidden_size, axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(config, i, make) for i in range(config.num_hidden_layers)])
        self.norm = make.scale(config.hidden_size, None)
        if not config.tie_word_embeddings:
            self.head = make.matrix(config.hidden_size, config.vocab_size, axes=("embed", "vocab"))

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array | None = None) -> Hidden:
        """Whole sequences from position 0, padding on the right; `mask_BT` says which tokens routing counts."""
        return self._forward(tokens_BT, mask_BT)[0]

    def prefill(self, tokens_BT: jax.Array, cache: Cache) -> tuple[Hidden, Cache]:
        """Prompts from position 0 into the first slots of the cache."""
        hidden, new = self._forward(tokens_BT, None)
        return hidden, tuple(old.prefix(entry) for old, entry in zip(cache, new, strict=True))

    def extend(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[Hidden, Cache]:
        """Further tokens at the given positions of each sequence, attending to the cache and themselves."""
        rotary = self._rotary(positions_BT)
        x, counted = self.embed[tokens_BT], jnp.ones(tokens_BT.shape, bool)
        caches, stats = [], []
        for layer, entry in zip(self.layers, cache, strict=True):
            x, entry, layer_stats = layer.extend(x, rotary, entry, counted)
            caches.append(entry)
            stats.append(layer_stats)
        return self._finish(x, stats), tuple(caches)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V] from states after the final norm."""
        return (x_BTD @ self.head_DV()).astype(jnp.float32)

    def head_DV(self) -> jax.Array:
        return self.embed[...].T if self.config.tie_word_embeddings else self.head[...]

    def _forward(self, tokens_BT, mask_BT):
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        rotary, visible = self._rotary(positions), causal_mask(positions, positions)
        x = self.embed[tokens_BT]
        counted = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        entries, stats = [], []
        for layer in self.layers:
            x, entry, layer_stats = layer(x, rotary, visible, counted)
            entries.append(entry)
            stats.append(layer_stats)
        return self._finish(x, stats), entries

    def _rotary(self, positions_BT) -> Rotary:
        return Rotary(positions_BT, *angles(self.config.rope, self.config.rotary_dim, positions_BT))

    def _finish(self, x, stats) -> Hidden:
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        return Hidden(x, tuple(s for s in stats if s is not None))


def split(model: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
    """The module as a static description and a tree of weights (parameters and router biases)."""
    return nnx.split(model)


def abstract_weights(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """The same from shapes alone: leaves are jax.ShapeDtypeStruct, nothing is allocated."""
    return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)))
