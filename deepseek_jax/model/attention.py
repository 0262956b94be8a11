"""The two kinds of attention of a decoder layer: latent, with V3.2's choice of keys, and grouped-query."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import GQAConfig, MLAConfig, ModelConfig
from deepseek_jax.model.layers import Maker, Step
from deepseek_jax.ops import attention, indexer
from deepseek_jax.ops.low_rank import columns, product, products, split_columns, split_product, whole
from deepseek_jax.ops.norm import layer_norm, rms_norm
from deepseek_jax.ops.pool import KVCache, LatentCache
from deepseek_jax.ops.rope import rotate_half, rotate_interleaved
from deepseek_jax.parallel.attention import (
    chosen_attention,
    grouped_attention,
    latent_attention,
    over_pool,
    pooled_keys,
    read_blocks,
    write,
)
from deepseek_jax.parallel.causal_attention import causal_attention

LATENT_EPS = 1e-6  # transformers and DeepSeek fix it for the latents' norms, whatever rms_norm_eps says
INDEX_EPS = 1e-6  # and for the indexer's layer norm


class Indexer(nnx.Module):
    """V3.2's lightning indexer: chooses the keys that each query of a LatentAttention attends to.

    It reads the layer's input and the query latent, and keeps a key of its own a token. Its rope pairs dimension i with
    i + R/2, unlike the attention's. Its weights get no gradient: a choice has none.
    Source: transformers modeling_deepseek_v32.py DeepseekV32Indexer; ops/indexer.py says where DeepSeek's code differs.
    """

    def __init__(self, config: ModelConfig, make: Maker):
        a: MLAConfig = config.attention
        D, J, Z = config.hidden_size, a.indexer.index_n_heads, a.indexer.index_head_dim
        self.heads, self.count, self.rotated = J, a.indexer.index_topk, a.qk_rope_head_dim
        self.q = make.matrix(a.q_lora_rank, J * Z, axes=("rank", "heads"))
        self.k = make.matrix(D, Z, axes=("embed", None))
        self.norm = make.scale(Z, None)
        self.shift = make.shift(Z, None)
        self.weights = make.matrix(D, J, axes=("embed", None))

    def keys(self, x_BTD: jax.Array, step: Step) -> jax.Array:
        """[B, T, Z], as the cache keeps them."""
        k = layer_norm(product(x_BTD, self.k[...]), self.norm[...], self.shift[...], INDEX_EPS)
        return self._rotate(k[:, :, None], step)[:, :, 0]

    def queries(self, x_BTD: jax.Array, latent_BTQ: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, J, Z] and the weights of their heads [B, T, J]."""
        q = product(latent_BTQ, self.q[...]).reshape(*x_BTD.shape[:2], self.heads, -1)
        return self._rotate(q, step), x_BTD @ self.weights

    def chooser(self, queries: tuple[jax.Array, jax.Array], keys_BSZ: jax.Array) -> indexer.Index:
        """What chooses the keys of whole sequences' queries; there must be more of these than it chooses."""
        q, weights, k = jax.lax.stop_gradient((*queries, keys_BSZ))
        return indexer.Index(q=q, weights=weights, k=k, count=self.count)

    def _rotate(self, x_BTJZ, step):
        first, rest = jnp.split(x_BTJZ, [self.rotated], axis=-1)
        return jnp.concatenate([rotate_half(first, step.cos_BTr, step.sin_BTr), rest], axis=-1)


class LatentAttention(nnx.Module):
    """MLA. New tokens attend expanded among themselves, or absorbed over the latent cache.

    With an indexer, V3.2's, a query attends to no more than index_topk keys. Among themselves new tokens do so by the
    mask; over the cache the chosen latents are gathered first. Where there are no more keys than that, all are chosen,
    and nothing is computed to choose them.
    """

    def __init__(self, config: ModelConfig, make: Maker):
        a: MLAConfig = config.attention
        D, N = config.hidden_size, config.num_attention_heads
        self.config, self.heads, self.scale, self.layout = a, N, config.attention_scale, make.layout
        q_width = N * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank is None:
            self.q = make.matrix(D, q_width, axes=("embed", "heads"))
        else:
            self.q_a = make.matrix(D, a.q_lora_rank, axes=("embed", "latent"))
            self.q_norm = make.scale(a.q_lora_rank, None)
            self.q_b = make.matrix(a.q_lora_rank, q_width, axes=("rank", "heads"))
        self.kv_a = make.matrix(D, a.kv_lora_rank + a.qk_rope_head_dim, axes=("embed", "latent"))
        self.kv_norm = make.scale(a.kv_lora_rank, None)
        self.kv_b = make.matrix(a.kv_lora_rank, N * (a.qk_nope_head_dim + a.v_head_dim), axes=("rank", "heads"))
        self.o = make.matrix(N * a.v_head_dim, D, axes=("heads", "embed"))
        self.indexer = None if a.indexer is None else Indexer(config, make)

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, step: Step, pool: LatentCache | None, layer_idx: jax.Array | None = None
    ) -> tuple[jax.Array, LatentCache | None]:
        """New tokens among themselves, or over a pool, the layer's own or, with the layer's place in it, a stack's."""
        latent, new = self._query_latent(x_BTD), self._latents(x_BTD, step)
        index = None if self.indexer is None else self.indexer.queries(x_BTD, latent, step)
        if step.phase == "decode" or (pool is not None and self._chooses_among(pooled_keys(pool, step.view))):
            return self._absorbed(latent, new, index, step, pool, layer_idx)
        return self._expanded(latent, new, index, step, pool, layer_idx)

    def _expanded(self, latent, new, index, step, pool, layer_idx):
        """With every head's keys and values spelled out: of the new tokens, and before them of those in the pool."""
        lay = self.layout.constrain
        parts = self._queries(latent, step, split_columns)
        q = lay(jnp.concatenate(parts, axis=-1), "batch", "sequence", "tensor", None)
        # every chip of a `context` group needs all tokens: 576 numbers of each, before keys are spelled out by head
        new = jax.tree.map(lambda part: lay(part, "batch", None, None), new)
        if pool is not None:
            pool = write(pool, new, step.view, layer_idx, self.layout)
            new = pool.as_kept(new)

        def spell(entries):
            r = entries.r[..., : self.config.qk_rope_head_dim]
            return attention.expand(entries.c, r, *self._key_value_weights(r.dtype))

        def of_pool(first):
            by_head = spell(read_blocks(pool, step.view, layer_idx, first, new.c.dtype, self.layout))
            return [lay(part, "batch", "tensor", None, None) for part in by_head]

        k, v = spell(new)
        chooses = pool is None and self._chooses_among(k.shape[2])
        of_indexer = self.indexer.chooser(index, new.index) if chooses else None
        place = {"scale": self.scale, "layout": self.layout, "prompt_of_BT": step.prompt_of_BT, "index": of_indexer}
        out, log_sum = causal_attention(q, k, v, step.segments_BT, sums=pool is not None, **place)
        if pool is not None:
            out = over_pool(q, (out, log_sum), step.view, of_pool, pool, self.scale)
        return self._output(out), pool

    def _absorbed(self, latent, new, index, step, pool, layer_idx):
        """Without leaving the latent space: the pool is read as it is, once for all heads."""
        lay = self.layout.constrain
        by_sequence = lambda part: lay(part, "cache_batch", *(None,) * (part.ndim - 1))
        by_head = lambda part: lay(part, "batch", None, "tensor", None)
        pool = write(pool, jax.tree.map(by_sequence, new), step.view, layer_idx, self.layout)
        nope, rope = map(by_head, self._queries(latent, step, split_product))
        w_k, w_v = self._key_value_weights(latent.dtype)
        q = [by_sequence(part) for part in (by_head(attention.absorb(nope, w_k)), rope)]
        place = {"layer_idx": layer_idx, "scale": self.scale, "layout": self.layout}
        if self._chooses_among(pooled_keys(pool, step.view)):
            index, count = jax.tree.map(by_sequence, index), self.config.indexer.index_topk
            out = chosen_attention(*q, index, pool, step.view, count=count, **place)
        else:
            out = latent_attention(*q, pool, step.view, **place)
        return self._output(by_head(attention.project_values(by_head(out), w_v))), pool

    def _chooses_among(self, keys: int) -> bool:
        return self.indexer is not None and keys > self.config.indexer.index_topk

    def _query_latent(self, x):
        """What queries are projected from: the normed latent, or x itself where there is none."""
        if self.config.q_lora_rank is None:
            return x
        return rms_norm(product(x, self.q_a[...]), self.q_norm[...], LATENT_EPS)

    def _queries(self, latent, step, split):
        a = self.config
        weight = (self.q if a.q_lora_rank is None else self.q_b)[...]
        nope, rope = split(latent, weight, self.heads, (a.qk_nope_head_dim, a.qk_rope_head_dim))
        return nope, rotate_interleaved(rope, step.cos_BTr, step.sin_BTr)

    def _latents(self, x, step) -> LatentCache:
        c, r = jnp.split(product(x, self.kv_a[...]), [self.config.kv_lora_rank], axis=-1)
        r = rotate_interleaved(r[:, :, None], step.cos_BTr, step.sin_BTr)[:, :, 0]
        index = None if self.indexer is None else self.indexer.keys(x, step)
        return LatentCache(rms_norm(c, self.kv_norm[...], LATENT_EPS), r, index)

    def _key_value_weights(self, dtype):
        K = self.config.qk_nope_head_dim
        by_head = columns(whole(self.kv_b[...], dtype), lambda w: w.reshape(w.shape[0], self.heads, -1))
        return columns(by_head, lambda w: w[..., :K]), columns(by_head, lambda w: w[..., K:])

    def _output(self, out_BTNH):
        return product(out_BTNH.reshape(*out_BTNH.shape[:2], -1), self.o[...])


class GroupedAttention(nnx.Module):
    """Grouped-query attention of Qwen2, Qwen3 and Llama."""

    def __init__(self, config: ModelConfig, make: Maker):
        a: GQAConfig = config.attention
        D, N, G, K = config.hidden_size, config.num_attention_heads, a.num_key_value_heads, a.head_dim
        self.scale, self.shape, self.layout = config.attention_scale, (N, G, K), make.layout
        self.q = make.matrix(D, N * K, axes=("embed", "heads"))
        self.k = make.matrix(D, G * K, axes=("embed", "kv_heads"))
        self.v = make.matrix(D, G * K, axes=("embed", "kv_heads"))
        self.o = make.matrix(N * K, D, axes=("heads", "embed"))
        self.qkv_bias = a.qkv_bias
        if a.qkv_bias:
            self.q_bias = make.shift(N * K, "heads")
            self.k_bias = make.shift(G * K, "kv_heads")
            self.v_bias = make.shift(G * K, "kv_heads")
        self.norm_eps = config.rms_norm_eps if a.qk_norm else None
        if a.qk_norm:
            self.q_head_norm = make.scale(K, None)
            self.k_head_norm = make.scale(K, None)

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, step: Step, pool: KVCache | None, layer_idx: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """New tokens among themselves, or over a pool, the layer's own or, with the layer's place in it, a stack's."""
        lay = self.layout.constrain
        q, new = self._project(x_BTD, step)
        if step.phase == "decode":
            pool = write(pool, new, step.view, layer_idx, self.layout)
            out = grouped_attention(q, pool, step.view, layer_idx=layer_idx, scale=self.scale, layout=self.layout)
            return self._output(out), pool
        q = lay(q, "batch", "sequence", "tensor", None)
        if pool is not None:
            new = jax.tree.map(lambda part: lay(part, "batch", "tensor", None, None), new)
            pool = write(pool, new, step.view, layer_idx, self.layout)
            new = pool.as_kept(new)
        place = {"scale": self.scale, "layout": self.layout, "prompt_of_BT": step.prompt_of_BT}
        out, log_sum = causal_attention(q, *new[:2], step.segments_BT, sums=pool is not None, **place)
        if pool is not None:
            of_pool = lambda first: read_blocks(pool, step.view, layer_idx, first, new.k.dtype, self.layout)[:2]
            out = over_pool(q, (out, log_sum), step.view, of_pool, pool, self.scale)
        return self._output(out), pool

    def _project(self, x, step):
        B, T, _ = x.shape
        N, G, K = self.shape
        q, k, v = products(x, self.q[...], self.k[...], self.v[...])
        if self.qkv_bias:
            q, k, v = q + self.q_bias, k + self.k_bias, v + self.v_bias
        q, k = q.reshape(B, T, N, K), k.reshape(B, T, G, K)
        if self.norm_eps is not None:  # each head by itself, with one weight for all
            q = rms_norm(q, self.q_head_norm[...], self.norm_eps)
            k = rms_norm(k, self.k_head_norm[...], self.norm_eps)
        q, k = (rotate_half(part, step.cos_BTr, step.sin_BTr) for part in (q, k))
        return q, KVCache(k.swapaxes(1, 2), v.reshape(B, T, G, K).swapaxes(1, 2))

    def _output(self, out_BTNH):
        return product(out_BTNH.reshape(*out_BTNH.shape[:2], -1), self.o[...])
