"""The parts of a decoder layer but its attention: how weights are made, SwiGLU, and the mixture of experts."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig, MoEConfig
from deepseek_jax.ops import routing
from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.ops.low_rank import product, products
from deepseek_jax.ops.pool import CacheView
from deepseek_jax.parallel.experts import routed_experts
from deepseek_jax.sharding import LOCAL, Layout


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
        gate, up = products(x_BTD, self.gate[...], self.up[...])
        return product(jax.nn.silu(gate) * up, self.down[...])


class Experts(nnx.Module):
    """The routed experts' weights, stacked along the first axis."""

    def __init__(self, width: int, moe: MoEConfig, make: Maker):
        count, inner = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate = make.matrix(count, width, inner, axes=("expert", "expert_embed", "expert_mlp"))
        self.up = make.matrix(count, width, inner, axes=("expert", "expert_embed", "expert_mlp"))
        self.down = make.matrix(count, inner, width, axes=("expert", "expert_mlp", "expert_embed"))


Phase = Literal["whole", "prefill", "decode"]


class Step(NamedTuple):
    """What all layers of one forward pass are told.

    phase: "whole" sequences from position 0 without a cache; "prefill", many new tokens over a cache, which attend with
    keys spelled out; "decode", few of them, which attend in the latent space.
    valid_BT: the tokens that count; over a cache the others, padding, neither write nor travel to experts.
    segments_BT: which segment of a packed row a token is of; prompt_of_BT: where samples share prompts, which one its
    text begins with.
    samples_BTK: flags of the samples that a token that counts is of; times_BT: how many these are, where a shared
    prompt is of several.
    view: where the tokens stand in the cache.
    """

    phase: Phase
    positions_BT: jax.Array
    cos_BTr: jax.Array
    sin_BTr: jax.Array
    valid_BT: jax.Array
    segments_BT: jax.Array | None = None
    prompt_of_BT: jax.Array | None = None
    samples_BTK: jax.Array | None = None
    times_BT: jax.Array | None = None
    view: CacheView | None = None


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
        step: Step,
        layer_idx: jax.Array | None = None,
        routes_BTA: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Experts of every token, and the statistics of those that count.

        Args:
            x_BTD: tokens.
            step: of the pass.
            layer_idx: the layer's in a stack, where the experts' weights are a whole stack's.
            routes_BTA: experts of the tokens that count, instead of those that the router chooses; their weights are
                of its scores all the same. The other tokens, padding, go where it sends them.
        """
        axes = ("cache_batch", None) if step.phase == "decode" else ("batch", "tokens")
        own = self.layout.constrain(x_BTD, *axes, None)
        weights, experts, stats = self._route(own, step, routes_BTA)
        if step.view is not None:  # one past the last expert is nobody's
            experts = jnp.where(step.valid_BT[..., None], experts, self.config.n_routed_experts)
        return self._routed(own, weights, experts, layer_idx, axes) + self.shared(x_BTD), stats

    @jax.named_scope("router")
    def _route(self, x_BTD, step, routes_BTA):
        """Weights and experts of every token, and the statistics of those that count."""
        B, T, _ = x_BTD.shape
        moe, mask_BT, samples_BTK = self.config, step.valid_BT, step.samples_BTK
        logits = routing.logits_of(x_BTD, self.router[...])
        scores_BTE = routing.scores_of(logits, moe)
        bias = None if self.bias is None else self.bias[...]
        by_row, by_token = lambda of: of.reshape(B * T, -1), lambda of: of.reshape(B, T, -1)
        chosen = by_token(routing.choose_experts(by_row(scores_BTE), bias, moe))
        experts = chosen if routes_BTA is None else jnp.where(mask_BT[..., None], routes_BTA.astype(jnp.int32), chosen)
        weights = by_token(routing.expert_weights(by_row(scores_BTE), by_row(experts), moe))
        load = routing.expert_load(experts, mask_BT if step.times_BT is None else step.times_BT, moe.n_routed_experts)
        if samples_BTK is None:
            balance = routing.sequence_balance(scores_BTE, load, mask_BT, moe)
        else:
            balance = routing.packed_balance(scores_BTE, experts, samples_BTK, moe)
        return weights, experts, RouterStats(load, balance, chosen)

    @jax.named_scope("experts")
    def _routed(self, x_BTD, weights_BTA, experts_BTA, layer_idx, axes):
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
            rows=layout.cut(axes[0]),
            columns=layout.cut(axes[1]),
            over=layout.cut("expert"),
            inner="tensor" if layout.cut("expert_mlp") else None,
            gathered=layout.cut("expert_embed"),
            transport=layout.transport,
            capacity_factor=layout.capacity_factor,
            layer=layer_idx,
        )
