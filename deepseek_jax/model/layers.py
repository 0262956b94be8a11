"""The parts of a decoder layer: projections, SwiGLU, mixture of experts, and the two kinds of attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.cache import KVCache, LatentCache
from deepseek_jax.ops import attention, indexer, routing
from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.ops.low_rank import columns, product
from deepseek_jax.ops.norm import layer_norm, rms_norm
from deepseek_jax.ops.rope import rotate_half, rotate_interleaved
from deepseek_jax.parallel.attention import decode_attention
from deepseek_jax.parallel.experts import routed_experts
from deepseek_jax.sharding import LOCAL, Layout

LATENT_EPS = 1e-6  # transformers and DeepSeek fix it for the latents' norms, whatever rms_norm_eps says
INDEX_EPS = 1e-6  # and for the indexer's layer norm
ATTENTION = "attention"  # what remat may keep of a layer


class RouterBias(nnx.Variable):
    """noaux_tc's correction bias: state that a rule moves after each step, outside the optimizer's reach."""


class Maker:
    """Makes every weight once: its shape, first value and logical axes in one place.

    Without `rngs` it makes shapes alone, jax.ShapeDtypeStruct, and allocates nothing: tracing the initialisers of
    671 billion weights takes 10 s, this takes a tenth of one. `of_stack` makes the weights of that many equal layers,
    one after another along a first axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype,
        layout: Layout = LOCAL,
        of_stack: int | None = None,
    ):
        self.config, self.rngs, self.dtype, self.layout = config, rngs, dtype, layout
        self.leading = () if of_stack is None else (of_stack,)

    def stack(self, layers: int) -> "Maker":
        return Maker(self.config, self.rngs, self.dtype, self.layout, layers)

    def matrix(self, *shape: int, axes: tuple[str | None, ...]) -> nnx.Param:
        std = self.config.initializer_range
        return self._made(nnx.Param, lambda s: jax.random.normal(self.rngs.params(), s, jnp.float32) * std, shape, axes)

    def scale(self, width: int, axis: str | None) -> nnx.Param:
        return self._made(nnx.Param, jnp.ones, (width,), (axis,))

    def shift(self, width: int, axis: str | None) -> nnx.Param:
        return self._made(nnx.Param, jnp.zeros, (width,), (axis,))

    def router_bias(self, experts: int) -> RouterBias:
        return self._made(RouterBias, jnp.zeros, (experts,), (None,), jnp.float32)

    def _made(self, kind: type[nnx.Variable], first: Callable, shape: tuple, axes: tuple, dtype=None) -> nnx.Variable:
        shape, axes, dtype = self.leading + shape, ("layer",) * len(self.leading) + axes, dtype or self.dtype
        value = jax.ShapeDtypeStruct(shape, dtype) if self.rngs is None else first(shape).astype(dtype)
        return kind(value, axes=axes)


class RouterStats(NamedTuple):
    """What training wants to know of the routing of one layer: sums and counts per row, and each token's choice.

    load_BE counts the experts that tokens went to; experts_BTA int32 are those that the router itself would choose.
    """

    load_BE: jax.Array
    balance_B: jax.Array
    experts_BTA: jax.Array


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, make: Maker):
        self.gate = make.matrix(width, inner, axes=("embed", "mlp"))
        self.up = make.matrix(width, inner, axes=("embed", "mlp"))
        self.down = make.matrix(inner, width, axes=("mlp", "embed"))

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(product(x_BTD, self.gate[...])) * product(x_BTD, self.up[...])
        return product(hidden, self.down[...])


class Experts(nnx.Module):
    """The routed experts' weights, stacked along the first axis."""

    def __init__(self, width: int, moe: MoEConfig, make: Maker):
        count, inner = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate = make.matrix(count, width, inner, axes=("expert", "expert_embed", "expert_mlp"))
        self.up = make.matrix(count, width, inner, axes=("expert", "expert_embed", "expert_mlp"))
        self.down = make.matrix(count, inner, width, axes=("expert", "expert_mlp", "expert_embed"))


class MoE(nnx.Module):
    """Routed experts plus the shared ones. Source: arXiv 2412.19437 equations 12 to 15."""

    def __init__(self, width: int, moe: MoEConfig, make: Maker):
        self.config, self.layout = moe, make.layout
        self.router = make.matrix(width, moe.n_routed_experts, axes=("embed", None))
        self.bias = make.router_bias(moe.n_routed_experts) if moe.topk_method == "noaux_tc" else None
        self.experts = Experts(width, moe, make)
        self.shared = MLP(width, moe.n_shared_experts * moe.moe_intermediate_size, make)

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BT: jax.Array,
        layer_idx: jax.Array | None = None,
        *,
        samples_BTK: jax.Array | None = None,
        routes_BTA: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Experts of every token, and the statistics of those in the mask.

        Args:
            x_BTD: tokens.
            mask_BT: which of them count.
            layer_idx: the layer's in a stack, where the experts' weights are a whole stack's.
            samples_BTK: in packed rows, which sample of its row a token that counts belongs to.
            routes_BTA: experts of the tokens that count, instead of those that the router chooses; their weights are
                of its scores all the same. The other tokens, padding, go where it sends them.
        """
        axes = ("cache_batch", None) if x_BTD.shape[1] == 1 else ("batch", "tokens")
        own = self.layout.constrain(x_BTD, *axes, None)
        weights, experts, stats = self._route(own, mask_BT, samples_BTK, routes_BTA)
        return self._routed(own, weights, experts, layer_idx) + self.shared(x_BTD), stats

    @jax.named_scope("router")
    def _route(self, x_BTD, mask_BT, samples_BTK, routes_BTA):
        """Weights and experts of every token, and the statistics of those that count."""
        B, T, _ = x_BTD.shape
        moe = self.config
        logits = routing.logits_of(x_BTD, self.router[...])
        scores_BTE = routing.scores_of(logits, moe)
        bias = None if self.bias is None else self.bias[...]
        by_row, by_token = lambda of: of.reshape(B * T, -1), lambda of: of.reshape(B, T, -1)
        chosen = by_token(routing.choose_experts(by_row(scores_BTE), bias, moe))
        experts = chosen if routes_BTA is None else jnp.where(mask_BT[..., None], routes_BTA.astype(jnp.int32), chosen)
        weights = by_token(routing.expert_weights(by_row(scores_BTE), by_row(experts), moe))
        load = routing.expert_load(experts, mask_BT, moe.n_routed_experts)
        if samples_BTK is None:
            balance = routing.sequence_balance(scores_BTE, load, mask_BT, moe)
        else:
            balance = routing.packed_balance(scores_BTE, experts, samples_BTK, moe)
        return weights, experts, RouterStats(load, balance, chosen)

    @jax.named_scope("experts")
    def _routed(self, x_BTD, weights_BTA, experts_BTA, layer_idx):
        e, layout = self.experts, self.layout
        matrices = e.gate[...], e.up[...], e.down[...]
        layer_idx = layer_idx if matrices[0].ndim == 4 else None  # else they are the layer's own already
        if layout.mesh is None:
            if layer_idx is not None:
                matrices = jax.tree.map(lambda stack: stack[layer_idx], matrices)
            flat = lambda of: of.reshape(-1, of.shape[-1])
            return expert_mlp(flat(x_BTD), flat(weights_BTA), flat(experts_BTA), *matrices).reshape(x_BTD.shape)
        return routed_experts(
            x_BTD,
            weights_BTA,
            experts_BTA,
            *matrices,
            mesh=layout.mesh,
            rows=layout.cut("cache_batch" if x_BTD.shape[1] == 1 else "batch"),
            columns=() if x_BTD.shape[1] == 1 else layout.cut("tokens"),
            over=layout.cut("expert"),
            inner="tensor" if layout.cut("expert_mlp") else None,
            gathered=layout.cut("expert_embed"),
            transport=layout.transport,
            capacity_factor=layout.capacity_factor,
            layer=layer_idx,
        )


class Rotary(NamedTuple):
    """Positions and their angles, worked out once a forward pass; in packed rows also which sample a token is of."""

    positions_BT: jax.Array
    cos_BTr: jax.Array
    sin_BTr: jax.Array
    segments_BT: jax.Array | None = None


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

    def keys(self, x_BTD: jax.Array, rotary: Rotary) -> jax.Array:
        """[B, T, Z], as the cache keeps them."""
        k = layer_norm(x_BTD @ self.k, self.norm[...], self.shift[...], INDEX_EPS)
        return self._rotate(k[:, :, None], rotary)[:, :, 0]

    def queries(self, x_BTD: jax.Array, latent_BTQ: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, J, Z] and the weights of their heads [B, T, J]."""
        q = (latent_BTQ @ self.q).reshape(*x_BTD.shape[:2], self.heads, -1)
        return self._rotate(q, rotary), x_BTD @ self.weights

    @jax.named_scope("indexer")
    def choose(self, queries: tuple[jax.Array, jax.Array], keys_BSZ: jax.Array, visible_BTS: jax.Array) -> jax.Array:
        """Indices [B, T, U] of the index_topk best keys; there must be so many, though not so many visible ones."""
        q, weights = queries
        return indexer.select_keys(indexer.index_scores(q, keys_BSZ, weights), visible_BTS, self.count)

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
    def __call__(self, x_BTD: jax.Array, rotary: Rotary) -> tuple[jax.Array, LatentCache]:
        lay = self.layout.constrain
        latent = self._query_latent(x_BTD)
        q = jnp.concatenate(self._queries(latent, rotary), axis=-1)
        q = lay(q, "batch", "sequence", "tensor", None)
        # every chip of a `context` group needs all keys: 576 numbers a token, before they are spelled out by head
        new = jax.tree.map(lambda part: lay(part, "batch", None, None), self._latents(x_BTD, rotary))
        index = None if self.indexer is None else self.indexer.queries(x_BTD, latent, rotary)
        spelled = attention.expand(new.c_BSC, new.r_BSR, *self._key_value_weights())
        k, v = (lay(part, "batch", "tensor", None, None) for part in spelled)

        def attend_rows(queries, positions_t, end):
            q, index, segments = queries
            mask = _visible(positions_t, end, x_BTD.shape[0], segments, rotary)
            if self._chooses_among(end):
                mask = indexer.chosen_mask(self.indexer.choose(index, new.index_BSZ[:, :end], mask), mask)
            return attention.attend(q, k[:, :, :end], v[:, :, :end], mask, self.scale)

        queries = q, index, rotary.segments_BT
        out = attention.in_blocks(attend_rows, queries, **_blocks(self.layout, x_BTD.shape, self.heads))
        return self._output(checkpoint_name(out, ATTENTION)), new

    @jax.named_scope("attention")
    def extend(
        self, x_BTD: jax.Array, rotary: Rotary, cache: LatentCache, layer_idx: jax.Array | None = None
    ) -> tuple[jax.Array, LatentCache]:
        """Over a cache, the layer's own or, with the layer's place in it, a stack's."""
        lay = self.layout.constrain
        by_sequence = lambda part: lay(part, "cache_batch", *(None,) * (part.ndim - 1))
        by_head = lambda part: lay(part, "batch", None, "tensor", None)
        cache = cache.write(jax.tree.map(by_sequence, self._latents(x_BTD, rotary)), rotary.positions_BT, layer_idx)
        latent = self._query_latent(x_BTD)
        nope, rope = map(by_head, self._queries(latent, rotary))
        w_k, w_v = self._key_value_weights()
        q = [by_sequence(part) for part in (by_head(attention.absorb(nope, w_k)), rope)]
        if x_BTD.shape[1] == 1 and not self._chooses_among(cache.c_BSC.shape[-2]):
            at = rotary.positions_BT, layer_idx
            out = decode_attention(*q, cache.c_BSC, cache.r_BSR, *at, scale=self.scale, layout=self.layout)
        else:
            index = None if self.indexer is None else self.indexer.queries(x_BTD, latent, rotary)
            out = self._over(cache.layer(layer_idx), q, jax.tree.map(by_sequence, index), rotary.positions_BT)
        return self._output(by_head(attention.project_values(by_head(out), w_v))), cache

    def _over(self, own: LatentCache, q, index, positions_BT):
        """Between the projections of absorbed attention: over all keys, or over chosen ones."""
        mask = attention.causal_mask(positions_BT, own.positions())
        keys = own.c_BSC, own.r_BSR[..., : self.config.qk_rope_head_dim]
        if not self._chooses_among(mask.shape[-1]):
            return attention.attend_latents(*q, *keys, mask, self.scale)
        return attention.attend_chosen(*q, *keys, self.indexer.choose(index, own.index_BSZ, mask), mask, self.scale)

    def _chooses_among(self, keys: int) -> bool:
        return self.indexer is not None and keys > self.config.indexer.index_topk

    def _query_latent(self, x):
        """What queries are projected from: the normed latent, or x itself where there is none."""
        if self.config.q_lora_rank is None:
            return x
        return rms_norm(product(x, self.q_a[...]), self.q_norm[...], LATENT_EPS)

    def _queries(self, latent, rotary):
        q = product(latent, (self.q if self.config.q_lora_rank is None else self.q_b)[...])
        q = q.reshape(*latent.shape[:2], self.heads, -1)
        nope, rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return nope, rotate_interleaved(rope, rotary.cos_BTr, rotary.sin_BTr)

    def _latents(self, x, rotary) -> LatentCache:
        c, r = jnp.split(product(x, self.kv_a[...]), [self.config.kv_lora_rank], axis=-1)
        r = rotate_interleaved(r[:, :, None], rotary.cos_BTr, rotary.sin_BTr)[:, :, 0]
        index = None if self.indexer is None else self.indexer.keys(x, rotary)
        return LatentCache(rms_norm(c, self.kv_norm[...], LATENT_EPS), r, index)

    def _key_value_weights(self):
        K = self.config.qk_nope_head_dim
        by_head = columns(self.kv_b[...], lambda w: w.reshape(w.shape[0], self.heads, -1))
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
    def __call__(self, x_BTD: jax.Array, rotary: Rotary) -> tuple[jax.Array, KVCache]:
        lay = self.layout.constrain
        q, new = self._project(x_BTD, rotary)
        q = lay(q, "batch", "sequence", "tensor", None)
        new = jax.tree.map(lambda part: lay(part, "batch", "tensor", None, None), new)

        def attend_rows(queries, positions_t, end):
            q, segments = queries
            mask = _visible(positions_t, end, x_BTD.shape[0], segments, rotary)
            return attention.attend(q, *(part[:, :, :end] for part in new), mask, self.scale)

        queries = q, rotary.segments_BT
        out = attention.in_blocks(attend_rows, queries, **_blocks(self.layout, x_BTD.shape, self.shape[0]))
        return self._output(checkpoint_name(out, ATTENTION)), new

    @jax.named_scope("attention")
    def extend(
        self, x_BTD: jax.Array, rotary: Rotary, cache: KVCache, layer_idx: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Over a cache, the layer's own or, with the layer's place in it, a stack's."""
        q, new = self._project(x_BTD, rotary)
        cache = cache.write(new, rotary.positions_BT, layer_idx)
        own = cache.layer(layer_idx)
        mask = attention.causal_mask(rotary.positions_BT, own.positions())
        return self._output(attention.attend(q, own.k_BGSK, own.v_BGSK, mask, self.scale)), cache

    def _project(self, x, rotary):
        B, T, _ = x.shape
        N, G, K = self.shape
        q, k, v = (product(x, weight[...]) for weight in (self.q, self.k, self.v))
        if self.qkv_bias:
            q, k, v = q + self.q_bias, k + self.k_bias, v + self.v_bias
        q, k = q.reshape(B, T, N, K), k.reshape(B, T, G, K)
        if self.norm_eps is not None:  # each head by itself, with one weight for all
            q = rms_norm(q, self.q_head_norm[...], self.norm_eps)
            k = rms_norm(k, self.k_head_norm[...], self.norm_eps)
        q, k = (rotate_half(part, rotary.cos_BTr, rotary.sin_BTr) for part in (q, k))
        return q, KVCache(k.swapaxes(1, 2), v.reshape(B, T, G, K).swapaxes(1, 2))

    def _output(self, out_BTNH):
        return product(out_BTNH.reshape(*out_BTNH.shape[:2], -1), self.o[...])


def _visible(columns_t, end: int, sequences: int, segments_Bt, rotary: Rotary) -> jax.Array:
    """What queries in these columns of whole sequences see of the first `end` keys: in packed rows, of their sample."""
    mask = attention.causal_rows(columns_t, end, sequences)
    return mask if segments_Bt is None else attention.same_segment(mask, segments_Bt, rotary.segments_BT[:, :end])


def _blocks(layout: Layout, shape: tuple[int, ...], heads: int) -> dict[str, int]:
    """How `attention.in_blocks` is to cut the queries: so that a chip's scores at once stay within bounds."""
    B, T = shape[:2]
    scores_a_row = -(-B // layout.parts("batch")) * -(-heads // layout.parts("tensor")) * T
    return {"rows": attention.rows_at_once(scores_a_row), "shards": layout.parts("sequence")}
