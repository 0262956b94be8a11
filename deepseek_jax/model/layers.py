"""The parts of a decoder layer: projections, SwiGLU, mixture of experts, and the two kinds of attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.cache import KVCache, LatentCache
from deepseek_jax.ops import attention, indexer, routing
from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.ops.norm import layer_norm, rms_norm
from deepseek_jax.ops.rope import rotate_half, rotate_interleaved

LATENT_EPS = 1e-6  # transformers and DeepSeek fix it for the latents' norms, whatever rms_norm_eps says
INDEX_EPS = 1e-6  # and for the indexer's layer norm


class RouterBias(nnx.Variable):
    """noaux_tc's correction bias: state that a rule moves after each step, outside the optimizer's reach."""


class Maker:
    """Makes every weight once: its shape, first value and logical axes in one place.

    Without `rngs` it makes shapes alone, jax.ShapeDtypeStruct, and allocates nothing: tracing the initialisers of
    671 billion weights takes 10 s, this takes a tenth of one.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype: jnp.dtype):
        self.std, self.rngs, self.dtype = config.initializer_range, rngs, dtype

    def matrix(self, *shape: int, axes: tuple[str | None, ...]) -> nnx.Param:
        draw = lambda: (jax.random.normal(self.rngs.params(), shape, jnp.float32) * self.std).astype(self.dtype)
        return nnx.Param(self._value(draw, shape, self.dtype), axes=axes)

    def scale(self, width: int, axis: str | None) -> nnx.Param:
        return nnx.Param(self._value(lambda: jnp.ones(width, self.dtype), (width,), self.dtype), axes=(axis,))

    def shift(self, width: int, axis: str | None) -> nnx.Param:
        return nnx.Param(self._value(lambda: jnp.zeros(width, self.dtype), (width,), self.dtype), axes=(axis,))

    def router_bias(self, experts: int) -> RouterBias:
        return RouterBias(self._value(lambda: jnp.zeros(experts), (experts,), jnp.float32), axes=(None,))

    def _value(self, first: Callable[[], jax.Array], shape: tuple[int, ...], dtype: jnp.dtype):
        return jax.ShapeDtypeStruct(shape, dtype) if self.rngs is None else first()


class RouterStats(NamedTuple):
    """What training wants to know of the routing of one layer, sums and counts per sequence."""

    load_BE: jax.Array
    balance_B: jax.Array


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, make: Maker):
        self.gate = make.matrix(width, inner, axes=("embed", "mlp"))
        self.up = make.matrix(width, inner, axes=("embed", "mlp"))
        self.down = make.matrix(inner, width, axes=("mlp", "embed"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return (jax.nn.silu(x_BTD @ self.gate) * (x_BTD @ self.up)) @ self.down


class Experts(nnx.Module):
    """The routed experts' weights, stacked along the first axis."""

    def __init__(self, width: int, moe: MoEConfig, make: Maker):
        count, inner = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate = make.matrix(count, width, inner, axes=("expert", "embed", "mlp"))
        self.up = make.matrix(count, width, inner, axes=("expert", "embed", "mlp"))
        self.down = make.matrix(count, inner, width, axes=("expert", "mlp", "embed"))


class MoE(nnx.Module):
    """Routed experts plus the shared ones. Source: arXiv 2412.19437 equations 12 to 15."""

    def __init__(self, width: int, moe: MoEConfig, make: Maker):
        self.config = moe
        self.router = make.matrix(width, moe.n_routed_experts, axes=("embed", None))
        self.bias = make.router_bias(moe.n_routed_experts) if moe.topk_method == "noaux_tc" else None
        self.experts = Experts(width, moe, make)
        self.shared = MLP(width, moe.n_shared_experts * moe.moe_intermediate_size, make)

    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        B, T, D = x_BTD.shape
        moe = self.config
        logits = x_BTD.astype(jnp.float32) @ self.router[...].astype(jnp.float32)
        scores_BTE = routing.scores_of(logits, moe)
        bias = None if self.bias is None else self.bias[...]
        weights, experts = routing.select_experts(scores_BTE.reshape(B * T, -1), bias, moe)
        e = self.experts
        routed = expert_mlp(x_BTD.reshape(B * T, D), weights, experts, e.gate[...], e.up[...], e.down[...])
        load = routing.expert_load(experts.reshape(B, T, -1), mask_BT, moe.n_routed_experts)
        stats = RouterStats(load, routing.sequence_balance(scores_BTE, load, mask_BT, moe))
        return routed.reshape(B, T, D) + self.shared(x_BTD), stats


class Rotary(NamedTuple):
    """Positions and their angles, worked out once a forward pass."""

    positions_BT: jax.Array
    cos_BTr: jax.Array
    sin_BTr: jax.Array


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
        self.q = make.matrix(a.q_lora_rank, J * Z, axes=(None, "heads"))
        self.k = make.matrix(D, Z, axes=("embed", None))
        self.norm = make.scale(Z, None)
        self.shift = make.shift(Z, None)
        self.weights = make.matrix(D, J, axes=("embed", None))

    def keys(self, x_BTD: jax.Array, rotary: Rotary) -> jax.Array:
        """[B, T, Z], as the cache keeps them."""
        k = layer_norm(x_BTD @ self.k, self.norm[...], self.shift[...], INDEX_EPS)
        return self._rotate(k[:, :, None], rotary)[:, :, 0]

    def choose(
        self, x_BTD: jax.Array, latent_BTQ: jax.Array, rotary: Rotary, keys_BSZ: jax.Array, visible_BTS: jax.Array
    ) -> jax.Array:
        """Indices [B, T, U] of the index_topk best keys; there must be so many, though not so many visible ones."""
        q = (latent_BTQ @ self.q).reshape(*x_BTD.shape[:2], self.heads, -1)
        scores = indexer.index_scores(self._rotate(q, rotary), keys_BSZ, x_BTD @ self.weights)
        return indexer.select_keys(scores, visible_BTS, self.count)

    def _rotate(self, x_BTJZ, rotary):
        first, rest = jnp.split(x_BTJZ, [self.rotated], axis=-1)
        return jnp.concatenate([rotate_half(first, rotary.cos_BTr, rotary.sin_BTr), rest], axis=-1)


class LatentAttention(nnx.Module):
    """MLA. New tokens attend expanded among themselves, or absorbed over the latent cache.

    With an indexer, V3.2's, a query attends to no more than index_topk keys. Among themselves new tokens do so by the
    mask; over the cache the chosen latents are gathered first. Where there are no more keys than that, all are chosen,
    and nothing is computed to choose them.
    """

    def __init__(self, config: ModelConfig, make: Maker):
        a: MLAConfig = config.attention
        D, N = config.hidden_size, config.num_attention_heads
        self.config, self.heads, self.scale = a, N, config.attention_scale
        q_width = N * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank is None:
            self.q = make.matrix(D, q_width, axes=("embed", "heads"))
        else:
            self.q_a = make.matrix(D, a.q_lora_rank, axes=("embed", None))
            self.q_norm = make.scale(a.q_lora_rank, None)
            self.q_b = make.matrix(a.q_lora_rank, q_width, axes=(None, "heads"))
        self.kv_a = make.matrix(D, a.kv_lora_rank + a.qk_rope_head_dim, axes=("embed", None))
        self.kv_norm = make.scale(a.kv_lora_rank, None)
        self.kv_b = make.matrix(a.kv_lora_rank, N * (a.qk_nope_head_dim + a.v_head_dim), axes=(None, "heads"))
        self.o = make.matrix(N * a.v_head_dim, D, axes=("heads", "embed"))
        self.indexer = None if a.indexer is None else Indexer(config, make)

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, mask_BTS: jax.Array) -> tuple[jax.Array, LatentCache]:
        latent = self._query_latent(x_BTD)
        new = self._latents(x_BTD, rotary)
        if self._chooses_among(mask_BTS.shape[-1]):
            chosen = self.indexer.choose(x_BTD, latent, rotary, new.index_BSZ, mask_BTS)
            mask_BTS = indexer.chosen_mask(chosen, mask_BTS)
        out = attention.attend_expanded(
            *self._queries(latent, rotary), new.c_BSC, new.r_BSR, *self._key_value_weights(), mask_BTS, self.scale
        )
        return self._output(out), new

    def extend(self, x_BTD: jax.Array, rotary: Rotary, cache: LatentCache) -> tuple[jax.Array, LatentCache]:
        cache = cache.write(self._latents(x_BTD, rotary), rotary.positions_BT)
        latent = self._query_latent(x_BTD)
        mask = attention.causal_mask(rotary.positions_BT, cache.positions())
        over = (*self._queries(latent, rotary), cache.c_BSC, cache.r_BSR, *self._key_value_weights())
        if self._chooses_among(mask.shape[-1]):
            chosen = self.indexer.choose(x_BTD, latent, rotary, cache.index_BSZ, mask)
            out = attention.attend_chosen(*over, chosen, mask, self.scale)
        else:
            out = attention.attend_absorbed(*over, mask, self.scale)
        return self._output(out), cache

    def _chooses_among(self, keys: int) -> bool:
        return self.indexer is not None and keys > self.config.indexer.index_topk

    def _query_latent(self, x):
        """What queries are projected from: the normed latent, or x itself where there is none."""
        if self.config.q_lora_rank is None:
            return x
        return rms_norm(x @ self.q_a, self.q_norm[...], LATENT_EPS)

    def _queries(self, latent, rotary):
        q = latent @ (self.q if self.config.q_lora_rank is None else self.q_b)
        q = q.reshape(*latent.shape[:2], self.heads, -1)
        nope, rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return nope, rotate_interleaved(rope, rotary.cos_BTr, rotary.sin_BTr)

    def _latents(self, x, rotary) -> LatentCache:
        c, r = jnp.split(x @ self.kv_a, [self.config.kv_lora_rank], axis=-1)
        r = rotate_interleaved(r[:, :, None], rotary.cos_BTr, rotary.sin_BTr)[:, :, 0]
        index = None if self.indexer is None else self.indexer.keys(x, rotary)
        return LatentCache(rms_norm(c, self.kv_norm[...], LATENT_EPS), r, index)

    def _key_value_weights(self):
        a = self.config
        w = self.kv_b[...].reshape(a.kv_lora_rank, self.heads, -1)
        return jnp.split(w, [a.qk_nope_head_dim], axis=-1)

    def _output(self, out_BTNH):
        return out_BTNH.reshape(*out_BTNH.shape[:2], -1) @ self.o


class GroupedAttention(nnx.Module):
    """Grouped-query attention of Qwen2 and Llama."""

    def __init__(self, config: ModelConfig, make: Maker):
        a: GQAConfig = config.attention
        D, N, G, K = config.hidden_size, config.num_attention_heads, a.num_key_value_heads, a.head_dim
        self.scale, self.shape = config.attention_scale, (N, G, K)
        self.q = make.matrix(D, N * K, axes=("embed", "heads"))
        self.k = make.matrix(D, G * K, axes=("embed", "heads"))
        self.v = make.matrix(D, G * K, axes=("embed", "heads"))
        self.o = make.matrix(N * K, D, axes=("heads", "embed"))
        self.qkv_bias = a.qkv_bias
        if a.qkv_bias:
            self.q_bias = make.shift(N * K, "heads")
            self.k_bias = make.shift(G * K, "heads")
            self.v_bias = make.shift(G * K, "heads")

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, mask_BTS: jax.Array) -> tuple[jax.Array, KVCache]:
        q, new = self._project(x_BTD, rotary)
        out = attention.attend(q, new.k_BGSK, new.v_BGSK, mask_BTS, self.scale)
        return out.reshape(*out.shape[:2], -1) @ self.o, new

    def extend(self, x_BTD: jax.Array, rotary: Rotary, cache: KVCache) -> tuple[jax.Array, KVCache]:
        q, new = self._project(x_BTD, rotary)
        cache = cache.write(new, rotary.positions_BT)
        mask = attention.causal_mask(rotary.positions_BT, cache.positions())
        out = attention.attend(q, cache.k_BGSK, cache.v_BGSK, mask, self.scale)
        return out.reshape(*out.shape[:2], -1) @ self.o, cache

    def _project(self, x, rotary):
        B, T, _ = x.shape
        N, G, K = self.shape
        q, k, v = x @ self.q, x @ self.k, x @ self.v
        if self.qkv_bias:
            q, k, v = q + self.q_bias, k + self.k_bias, v + self.v_bias
        q = rotate_half(q.reshape(B, T, N, K), rotary.cos_BTr, rotary.sin_BTr)
        k = rotate_half(k.reshape(B, T, G, K), rotary.cos_BTr, rotary.sin_BTr)
        return q, KVCache(k.swapaxes(1, 2), v.reshape(B, T, G, K).swapaxes(1, 2))
