"""The decoder: embedding, layers, final norm, head and MTP modules, for every architecture of `config`.

Use it functionally: `graphdef, weights = split(Decoder(config, rngs=...))` once, and inside jit
`nnx.merge(graphdef, weights)` gives the module back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Layer
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.layers import Maker, Rotary, RouterStats
from deepseek_jax.model.mtp import MTP, ahead
from deepseek_jax.ops.attention import causal_mask
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.rope import angles


class Hidden(NamedTuple):
    """States that the head reads [B, T, D], after the last norm, and the routing statistics of each MoE layer."""

    x_BTD: jax.Array
    stats: tuple[RouterStats, ...]


class Decoder(nnx.Module):
    """A causal language model.

    Args:
        config: the architecture.
        rngs: Flax random streams for the first weights (`nnx.Rngs(seed)`); None makes shapes alone.
        dtype: of weights and activations; router, norms, softmax and logits are float32 all the same.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32):
        make = Maker(config, rngs, dtype)
        self.config = config
        self.embed = make.matrix(config.vocab_size, config.hidden_size, axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(config, i, make) for i in range(config.num_hidden_layers)])
        self.norm = make.scale(config.hidden_size, None)
        if not config.tie_word_embeddings:
            self.head = make.matrix(config.hidden_size, config.vocab_size, axes=("embed", "vocab"))
        self.mtp = nnx.List([MTP(config, depth, make) for depth in range(config.num_nextn_predict_layers)])

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array | None = None) -> Hidden:
        """Whole sequences from position 0, padding on the right; `mask_BT` says which tokens routing counts."""
        return self._forward(tokens_BT, mask_BT)[0]

    def draft(
        self, hidden_BTD: jax.Array, next_tokens_BT: jax.Array, mask_BT: jax.Array | None = None
    ) -> tuple[Hidden, ...]:
        """What the MTP modules make of whole sequences: module d, from 1, speaks of the token d + 1 places on.

        At position i, module d joins the state of the module before it (of the model itself, for the first) with
        token i + d. Its state, through `logits`, predicts token i + d + 1. It depends on tokens up to i + d alone.

        Args:
            hidden_BTD: the model's own states, `Hidden.x_BTD` of a call on whole sequences.
            next_tokens_BT: int32, the token that follows each position's; padding on the right.
            mask_BT: bool, which of those tokens are real; None: all. Module d counts position i in its routing where
                token i + d + 1, which it predicts, is among them.

        Returns:
            One Hidden a module, states [B, T, D] as the head reads them; none where the model has no module. The
            last d - 1 states of module d have no token to join and mean nothing.

        Source: arXiv 2412.19437 section 2.2, equations 21 to 23.
        """
        rotary, visible = self._whole(next_tokens_BT.shape)
        real = jnp.ones(next_tokens_BT.shape, bool) if mask_BT is None else mask_BT
        drafts, x = [], hidden_BTD
        for depth, module in enumerate(self.mtp, 1):
            embedded = self.embed[ahead(next_tokens_BT, depth - 1)]
            x, stats = module(embedded, x, rotary, visible, ahead(real, depth))
            drafts.append(Hidden(x, () if stats is None else (stats,)))
        return tuple(drafts)

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
        rotary, visible = self._whole(tokens_BT.shape)
        x = self.embed[tokens_BT]
        counted = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        entries, stats = [], []
        for layer in self.layers:
            x, entry, layer_stats = layer(x, rotary, visible, counted)
            entries.append(entry)
            stats.append(layer_stats)
        return self._finish(x, stats), entries

    def _whole(self, shape: tuple[int, int]) -> tuple[Rotary, jax.Array]:
        """Rotary angles and the causal mask of whole sequences [B, T]."""
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        return self._rotary(positions), causal_mask(positions, positions)

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
    return split(Decoder(config, rngs=None, dtype=dtype))
