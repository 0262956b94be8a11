"""The steps of training and serving, traced for a pod from shapes alone."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import NO_RECORD
from deepseek_jax.generation.programs import Programs, Spans
from deepseek_jax.generation.thinking import NO_TAGS
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.packing import Quantization, packed_like
from deepseek_jax.model.transfer import Transfer, sampled_config
from deepseek_jax.rl.batch import Batch
from deepseek_jax.rl.objective import grpo_objective
from deepseek_jax.sharding import Layout
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.optimizer import make_optimizer
from deepseek_jax.train.sft_config import MOST_PER_ROW, SFTConfig
from deepseek_jax.train.sft_loss import SFTBatch, make_sft_objective
from deepseek_jax.train.step import MaskedBatch, Objective, TrainState, init_state, make_train_step

_BLOCK = 128  # tokens of a block of the cache


class Program(NamedTuple):
    """A traced step, and the shapes and shardings of what it is given, and of the weights that a sync gives."""

    traced: jax.stages.Traced
    weights: nnx.State
    moments: Any = ()
    cache: Any = ()
    serving: Any = ()

    def lower(self, *platforms: str) -> jax.stages.Lowered:
        """For the devices of its mesh, or for platforms such as "cuda" that need no device and no compiler."""
        return self.traced.lower(lowering_platforms=platforms or None)


def trace_prefill(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    context: int,
    dtype: jnp.dtype,
    cache: jnp.dtype,
    quantization: Quantization = "none",
) -> Program:
    """The engine's `extend`: `batch` prompts of `context` tokens into the cache, and the first token drawn."""
    programs, weights, state = _engine(config, layout, batch, context, dtype, cache, quantization)
    of = partial(_everywhere, layout)
    by_row = of((batch,), jnp.int32)
    spans = Spans(by_row, of((batch, context), jnp.int32), by_row, by_row, by_row)
    traced = programs.extend.trace(weights, state, spans, NO_TAGS, np.bool_(False))
    return Program(traced, weights, cache=state.cache)


def trace_decode(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    context: int,
    dtype: jnp.dtype,
    cache: jnp.dtype,
    quantization: Quantization = "none",
) -> Program:
    """The engine's `decode_loop` of `batch` requests of `context` tokens; its body is one token a request."""
    programs, weights, state = _engine(config, layout, batch, context, dtype, cache, quantization)
    rows = _everywhere(layout, (batch,), jnp.int32)
    traced = programs.decode_loop.trace(weights, state, rows, np.int32(1), np.int32(0), NO_TAGS)
    return Program(traced, weights, cache=state.cache)


def _engine(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    context: int,
    dtype: jnp.dtype,
    cache: jnp.dtype,
    quantization: Quantization,
):
    """An engine's programs, the weights, and the state of as many slots, whose blocks are just enough."""
    graphdef, weights = abstract_weights(config, dtype, layout)
    weights = packed_like(config, weights, quantization, layout)
    blocks, settings = -(-context // _BLOCK), {"length": context, "drafts": None, "draft_tokens": 0, "dtype": cache}
    programs = Programs(config, graphdef, slots=batch, table=blocks, steps=1, record=NO_RECORD, **settings)
    return programs, weights, programs.abstract_state(batch * blocks, _BLOCK)


def trace_train(config: ModelConfig, layout: Layout, batch: int, context: int, settings: SFTConfig) -> Program:
    """Supervised fine-tuning on `batch` rows of `context` tokens, with the MTP loss where there are modules.

    Packed rows are of as many examples as `sft` lays in one at most.
    """
    weight = settings.mtp_weight_of(config)
    objective = make_sft_objective(mtp_weight=weight, mean=settings.mean)
    like = SFTBatch(*_of_tokens(batch, context, np.int32, np.int32, bool))
    if settings.pack:
        like = like._replace(segments_BT=like.tokens_BT, lengths_BK=np.zeros((batch, MOST_PER_ROW), np.int32))
    untrained = ("indexer",) if weight else ("indexer", "mtp")
    return _trace_update(config, layout, objective, like, settings, untrained)


def trace_grpo(config: ModelConfig, layout: Layout, batch: int, context: int, settings: GRPOConfig) -> Program:
    """The update of GRPO on `batch` samples of `context` tokens, with what `GRPOTrainer` gives it beside them."""
    objective = partial(grpo_objective, config=settings.loss, temperature=settings.temperature)
    like = Batch(*_of_tokens(batch, context, np.int32, np.int32, bool, np.float32, np.float32, np.float32))
    return _trace_update(config, layout, objective, like, settings, ("indexer", "mtp"))


def trace_sync(config: ModelConfig, layout: Layout, serving: Layout, dtype: jnp.dtype) -> Program:
    """The call that lays weights out for sampling: `GRPOTrainer.policy` of a step."""
    _, weights = abstract_weights(config, jnp.float32, layout)
    sampled = sampled_config(config)
    transfer = Transfer(sampled, layout, serving, dtype).program(weights)
    return Program(transfer.trace(weights), weights, serving=abstract_weights(sampled, dtype, serving)[1])


def _trace_update(
    config: ModelConfig,
    layout: Layout,
    objective: Objective,
    like: MaskedBatch,
    settings: SFTConfig | GRPOConfig,
    untrained: tuple[str, ...],
) -> Program:
    graphdef, weights = abstract_weights(config, jnp.float32, layout)
    optimizer = make_optimizer(settings.adamw, 1, untrained=untrained)
    update = make_train_step(graphdef, objective, optimizer, settings.step_config)
    state = abstract_state(weights, optimizer, layout)
    place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    traced = update.trace(state, jax.tree.map(place, like, layout.row_shardings(like)))
    return Program(traced, weights, moments=state.moments)


def abstract_state(weights: nnx.State, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes of the state of training, moments in the dtype that the optimizer gives them, laid out as the weights."""
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), weights)

    def place(leaf):
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_raw_value()
            sharding = layout.sharding(*leaf.get_metadata()["axes"])
            return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))
        return _everywhere(layout, leaf.shape, leaf.dtype)

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _everywhere(layout: Layout, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*(None,) * len(shape)))


def _of_tokens(batch: int, context: int, *dtypes: type) -> list[np.ndarray]:
    return [np.zeros((batch, context), dtype) for dtype in dtypes]
