"""The decoder: embedding, layers, final norm, head and MTP modules, for every architecture of `config`.

Use it functionally: `graphdef, weights = split(Decoder(config, rngs=...))` once, and inside jit
`nnx.merge(graphdef, weights)` gives the module back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Layer
from deepseek_jax.model.cache import Cache, stack_sizes
from deepseek_jax.model.layers import Maker, MoE, Phase, RouterStats, Step
from deepseek_jax.model.mtp import MTP, ahead, ahead_within
from deepseek_jax.ops.attention import positions_within
from deepseek_jax.ops.flash_attention import ATTENTION
from deepseek_jax.ops.logprobs import project
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.pool import CacheView, Pool
from deepseek_jax.ops.rope import angles
from deepseek_jax.ops.transposed import Transposed, times_transposed
from deepseek_jax.parallel.embedding import sharded_lookup
from deepseek_jax.sharding import LOCAL, Layout, weight_sharding


class Hidden(NamedTuple):
    """States that the head reads [B, T, D], after the last norm, and the routing of each MoE layer, or stack of them.

    The statistics of a stack have its layers in front.
    """

    x_BTD: jax.Array
    stats: tuple[RouterStats, ...]


def experts_of(stats: tuple[RouterStats, ...]) -> jax.Array | None:
    """int32 [B, T, L, A]: what the router of each MoE layer chose for each token, best first; None without MoE."""
    if not stats:
        return None
    of_layers = [s.experts_BTA.reshape(-1, *s.experts_BTA.shape[-3:]) for s in stats]
    return jnp.moveaxis(jnp.concatenate(of_layers), 0, 2)


class Decoder(nnx.Module):
    """A causal language model.

    Args:
        config: the architecture.
        rngs: Flax random streams for the first weights (`nnx.Rngs(seed)`); None makes shapes alone.
        dtype: of weights and activations; router, norms, softmax and logits are float32 all the same.
        layout: how it lies on devices and runs there. Stacked, its layers are `stacks`, one of each kind with all
            their weights in front of one another, instead of `layers`; `model.stacks` turns one into the other.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout = LOCAL,
    ):
        make = Maker(config, rngs, dtype, layout)
        self.config, self.layout = config, layout
        self.embed = make.matrix(config.vocab_size, config.hidden_size, axes=("vocab", "embed"))
        if layout.scan_layers:
            first = [0, config.num_hidden_layers - 1]  # one of each kind
            self.stacks = nnx.List(
                [Layer(config, i, make.stack(n)) for i, n in zip(first, stack_sizes(config), strict=False)]
            )
        else:
            self.layers = nnx.List([Layer(config, i, make) for i in range(config.num_hidden_layers)])
        self.norm = make.scale(config.hidden_size, None)
        if not config.tie_word_embeddings:
            self.head = make.matrix(config.hidden_size, config.vocab_size, axes=("embed", "vocab"))
        self.mtp = nnx.List([MTP(config, depth, make) for depth in range(config.num_nextn_predict_layers)])

    def __call__(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        per_row: int | None = None,
        prompt_of_BT: jax.Array | None = None,
        routes_BTLA: jax.Array | None = None,
    ) -> Hidden:
        """Whole sequences from position 0, one a row, or several samples packed into a row.

        Args:
            tokens_BT: int32, padding on the right.
            mask_BT: bool, which tokens routing counts; None: all.
            segments_BT: int32, for packed rows: the number of a token's sample in its row, from 1, and 0 for padding.
                Tokens attend within their sample, whose positions start at 0, and the balance loss is the sum over
                samples, so that a packed batch gives what its samples give in rows of their own.
            per_row: samples that a row can hold; balance leaves those with higher numbers out.
            prompt_of_BT: int32, for packed rows whose samples share prompts. A prompt is a segment with a number above
                per_row, right before the segments of its samples, which see it and go on from its positions. Of their
                tokens this is the prompt's number, of all others their own segment's. In load and balance a prompt's
                tokens count in each of its samples with tokens in the mask, as if each had its own copy.
            routes_BTLA: integers, the experts of the tokens in the mask in each MoE layer, instead of those that the
                routers choose (see `check_routes`). Their weights are the router's, and have its gradient.

        Raises:
            ValueError: segments without `per_row`.
        """
        valid_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        step = self._whole_step(valid_BT, segments_BT, per_row, prompt_of_BT)
        parts = self.stacks if self.layout.scan_layers else self.layers
        x, _, stats = self._through(self._embedded(tokens_BT, step), step, (None,) * len(parts), routes_BTLA)
        return self._finish(x, stats)

    def draft(
        self,
        hidden_BTD: jax.Array,
        next_tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        per_row: int | None = None,
    ) -> tuple[Hidden, ...]:
        """What the MTP modules make of whole sequences: module d, from 1, speaks of the token d + 1 places on.

        At position i, module d joins the state of the module before it (of the model itself, for the first) with
        token i + d. Its state, through `logits`, predicts token i + d + 1. It depends on tokens up to i + d alone.

        Args:
            hidden_BTD: the model's own states, `Hidden.x_BTD` of a call on whole sequences.
            next_tokens_BT: int32, the token that follows each position's; padding on the right.
            mask_BT: bool, which of those tokens are real; None: all. Module d counts position i in its routing where
                token i + d + 1, which it predicts, is among them.
            segments_BT, per_row: of packed rows, as for a call on whole sequences.

        Returns:
            One Hidden a module, states [B, T, D] as the head reads them; none where the model has no module. The
            last d - 1 states of module d have no token to join and mean nothing; of packed samples, each one's.

        Source: arXiv 2412.19437 section 2.2, equations 21 to 23.
        """
        real = jnp.ones(next_tokens_BT.shape, bool) if mask_BT is None else mask_BT
        drafts, x = [], hidden_BTD
        for depth, module in enumerate(self.mtp, 1):
            step = self._whole_step(ahead_within(real, depth, segments_BT), segments_BT, per_row)
            x, _, hidden = self._through_module(module, x, ahead(next_tokens_BT, depth - 1), step, None)
            drafts.append(hidden)
        return tuple(drafts)

    def extend(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        valid_BT: jax.Array,
        cache: Cache,
        table_BM: jax.Array,
        *,
        phase: Phase,
    ) -> tuple[Hidden, Cache]:
        """New tokens of each sequence over what the cache has of it, and the cache with them.

        A chunk of a prompt, a whole one, a token to decode and several drafts are all the same to it.

        Args:
            tokens_BT: int32; a row's are consecutive, padding on the right.
            positions_BT: int32, of the tokens in their sequences.
            valid_BT: bool, those that are no padding. Padding neither writes nor travels to experts, and states of it
                mean nothing; a row may be nothing else.
            cache: of `model.cache.empty_cache`.
            table_BM: int32, the blocks of each sequence in order, see `ops.pool`.
            phase: "prefill" spells keys and values out, which many tokens want, "decode" does not.
        """
        step = self._step(phase, positions_BT, valid_BT)._replace(view=CacheView.of(table_BM, positions_BT, valid_BT))
        decodes = phase == "decode"
        x, pools, stats = self._through(self._embedded(tokens_BT, step), step, cache.layers)
        hidden = self._finish(x, stats)
        if decodes:
            hidden = hidden._replace(x_BTD=self.layout.constrain(hidden.x_BTD, "batch", None, None))
        return hidden, cache._replace(layers=pools)

    def draft_next(
        self,
        hidden_BTD: jax.Array,
        next_tokens_BT: jax.Array,
        positions_BT: jax.Array,
        valid_BT: jax.Array,
        cache: Cache,
        table_BM: jax.Array,
        *,
        phase: Phase,
    ) -> tuple[jax.Array, Cache]:
        """States, as the head reads them, that the first MTP module makes of new tokens over its part of the cache.

        Args:
            hidden_BTD: states of the model, or of the module itself, at these positions.
            next_tokens_BT: int32, the token that follows each.
            positions_BT, valid_BT, cache, table_BM, phase: as of `extend`; the cache has a pool for the module.
        """
        step = self._step(phase, positions_BT, valid_BT)._replace(view=CacheView.of(table_BM, positions_BT, valid_BT))
        x, pool, _ = self._through_module(self.mtp[0], hidden_BTD, next_tokens_BT, step, cache.mtp)
        return x, cache._replace(mtp=pool)

    @jax.named_scope("logits")
    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V] from states after the final norm."""
        head = self.head_matrix()
        if isinstance(head, Transposed):
            return times_transposed(x_BTD, head, jnp.float32)
        return project(x_BTD, head)

    def head_matrix(self) -> jax.Array | Transposed:
        """[D, V] as it lies in memory."""
        return Transposed(self.embed[...]) if self.config.tie_word_embeddings else self.head[...]

    def head_DV(self) -> jax.Array:
        head = self.head_matrix()
        return head.w.T if isinstance(head, Transposed) else head

    @jax.named_scope("embed")
    def _embedded(self, tokens_BT, step: Step) -> jax.Array:
        if step.phase == "decode":
            return self.layout.constrain(self.embed[tokens_BT], "cache_batch", None, None)
        if self.layout.mesh is None:
            return self.embed[tokens_BT]
        return sharded_lookup(self.embed[...], tokens_BT, self.layout)

    def _through(self, x: jax.Array, step: Step, pools: Sequence[Pool | None], routes_BTLA=None) -> tuple:
        """States, pools and routing after all layers or stacks."""
        parts = self.stacks if self.layout.scan_layers else self.layers

        def visit(layer, carried, of):
            x, pool, stats = layer(carried[0], step, carried[1], of.layer_idx, of.routes_BTA)
            return (x, pool), stats

        left, outs = [], []
        for part, pool, routes in zip(parts, pools, self._routes(routes_BTLA), strict=True):
            run, weights = self._runner(visit, part, step), nnx.state(part)
            if self.layout.scan_layers:
                (x, pool), out = _scan(run, (x, pool), weights, routes, keep=self.layout.workload == "serve")
            else:
                (x, pool), out = run((x, pool), weights, _LayerInputs(None, routes))
            left.append(pool)
            outs.append(out)
        return x, tuple(left), tuple(outs)

    def _through_module(self, module: MTP, x, tokens_BT, step: Step, pool: Pool | None) -> tuple:
        """States of an MTP module, its pool, and states with their routing."""
        visit = lambda module, carried, embedded: module(embedded, carried[0], step, carried[1])
        run = self._runner(visit, module, step)
        x, pool, stats = run((x, pool), nnx.state(module), self._embedded(tokens_BT, step))
        return x, pool, Hidden(x, () if stats is None else (stats,))

    def _routes(self, routes_BTLA) -> list[jax.Array | None]:
        """Those of each layer, or with its layers in front of each stack; None where there is nothing to choose."""
        parts = self.stacks if self.layout.scan_layers else self.layers
        if routes_BTLA is None:
            return [None] * len(parts)
        by_layer = jnp.moveaxis(routes_BTLA, 2, 0)
        of_moe = iter([by_layer] if self.layout.scan_layers else by_layer)  # there is one stack of MoE layers
        return [next(of_moe) if isinstance(part.mlp, MoE) else None for part in parts]

    def _runner(self, visit: Callable, part: nnx.Module, step: Step) -> Callable:
        """`visit` as a function of what is carried, a module's weights and further input, for scan and for remat.

        But for decoding, and wherever weights lie to be trained, a module's weights are gathered as it runs.
        """
        graphdef, layout = nnx.graphdef(part), self.layout
        gathers = step.phase != "decode" or layout.workload == "train"
        gather = layout.gathered if gathers else lambda weights: weights
        run = lambda carried, weights, of: visit(nnx.merge(graphdef, gather(weights)), carried, of)
        if layout.remat == "nothing" or step.phase != "whole":
            return run
        keep = [ATTENTION] if layout.remat == "all_but_attention" else []
        policy = jax.checkpoint_policies.save_only_these_names(*keep)
        return jax.checkpoint(run, policy=policy, prevent_cse=not layout.scan_layers)

    def _whole_step(self, valid_BT, segments_BT=None, per_row=None, prompt_of_BT=None) -> Step:
        """Of whole sequences, or of packed rows."""
        if segments_BT is None:
            return self._step("whole", jnp.broadcast_to(jnp.arange(valid_BT.shape[1]), valid_BT.shape), valid_BT)
        samples_BTK = _samples(segments_BT, per_row, prompt_of_BT, valid_BT)
        step = self._step("whole", positions_within(segments_BT, prompt_of_BT), valid_BT)
        step = step._replace(segments_BT=segments_BT, samples_BTK=samples_BTK)
        if prompt_of_BT is None:
            return step
        return step._replace(prompt_of_BT=prompt_of_BT, times_BT=jnp.sum(samples_BTK, axis=2))

    def _step(self, phase: Phase, positions_BT, valid_BT) -> Step:
        return Step(phase, positions_BT, *angles(self.config.rope, self.config.rotary_dim, positions_BT), valid_BT)

    def _finish(self, x, stats) -> Hidden:
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        return Hidden(x, tuple(s for s in stats if s is not None))


class _LayerInputs(NamedTuple):
    """What a layer is given of its own.

    A place, the layer's in its stack, where what it gets is the whole stack's: entries of the cache, and in serving the
    experts' weights. A scan would copy these for every layer.
    """

    layer_idx: jax.Array | None
    routes_BTA: jax.Array | None


def _samples(
    segments_BT: jax.Array, per_row: int | None, prompt_of_BT: jax.Array | None, valid_BT: jax.Array
) -> jax.Array:
    """bool [B, T, K]: which sample of its row each token that counts belongs to, a shared prompt's to several."""
    if per_row is None:
        raise ValueError("per_row: got none beside segments_BT, wanted the most samples that a row can hold")
    own = (segments_BT[..., None] == jnp.arange(1, per_row + 1)) & valid_BT[..., None]
    if prompt_of_BT is None:
        return own
    prompt_BK = jnp.max(jnp.where(own, prompt_of_BT[..., None], 0), axis=1)  # 0 of a sample of which nothing counts
    return own | ((segments_BT[..., None] == prompt_BK[:, None]) & valid_BT[..., None])


def _scan(run: Callable, carried: Any, weights: nnx.State, routes_LBTA: jax.Array | None, *, keep: bool) -> tuple:
    """`run` over the layers of a stack. With `keep`, the weights of routed experts are not sliced."""
    kept, sliced = nnx.split_state(weights, lambda path, _: keep and "experts" in path, ...)
    count = jax.tree.leaves(sliced)[0].shape[0]

    def step(carried, of):
        own, layer = of
        return run(carried, nnx.merge_state(layer, kept), own)

    return jax.lax.scan(step, carried, (_LayerInputs(jnp.arange(count), routes_LBTA), sliced))


def split(model: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
    """The module as a static description and a tree of weights (parameters and router biases)."""
    return nnx.split(model)


def abstract_weights(
    config: ModelConfig, dtype: jnp.dtype = jnp.float32, layout: Layout = LOCAL
) -> tuple[nnx.GraphDef, nnx.State]:
    """The same from shapes alone: leaves are jax.ShapeDtypeStruct, nothing is allocated.

    On a layout with a mesh they carry their shardings.

    Raises:
        ValueError: the mesh does not divide the model.
    """
    layout.check(config)
    graphdef, weights = split(Decoder(config, rngs=None, dtype=dtype, layout=layout))
    if layout.mesh is None:
        return graphdef, weights

    def placed(path, leaf):
        value = leaf.get_raw_value()
        sharding = weight_sharding(layout, value.shape, leaf.get_metadata()["axes"], ".".join(map(str, path)))
        return path, leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return graphdef, nnx.from_flat_state([placed(path, leaf) for path, leaf in nnx.to_flat_state(weights)])
