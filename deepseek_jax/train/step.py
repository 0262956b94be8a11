"""One optimizer step: (state, batch) -> (state, metrics), for any objective."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.model.decoder import Decoder
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.lora import LoRAConfig, decoder_of, with_adapter
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.model.scoring import Scored
from deepseek_jax.ops.metrics import BatchTotals, Mean, Metrics, Sum, merge
from deepseek_jax.ops.micro_batches import split_rows
from deepseek_jax.ops.routing import updated_bias
from deepseek_jax.sharding import LOCAL, Layout, module_layout


class TrainState(NamedTuple):
    """What an update reads and writes: weights (router biases among them), optimizer moments, and their count.

    Where an adapter is trained, `weights` is the adapter alone.
    """

    weights: nnx.State
    moments: optax.OptState
    step: jax.Array


class MaskedBatch(Protocol):
    """Any NamedTuple of arrays with rows along the first axis: a sample each, or several packed into one.

    A batch that may be packed has a field `lengths_BK`, None in one that is not: the tokens of each sample of a row,
    0 where there is none.
    """

    mask_BT: jax.Array


class Objective(Protocol):
    def __call__(
        self, model: Decoder, batch: Any, totals: BatchTotals, *given: Any
    ) -> tuple[jax.Array, Metrics, Scored | None]:
        """Loss of a part of a batch, `totals` of all of it, with metrics and what the forward pass said.

        `given`, a teacher's weights say, is what the step was called with behind its batch.

        None for the last, of a critic say, means no balance loss, no metrics of routing, and router biases that stay.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a batch becomes an update.

    Args:
        micro_batches: parts that a batch is computed in, one after another, to save memory; see
            `ops.micro_batches`. Sums and counts are kept until the end, so their number changes nothing but rounding.
        balance_alpha: weight of the sequence-wise balance loss (DeepSeek-V3: 1e-4).
        bias_gamma: speed of the router bias (DeepSeek-V3: 1e-3, then 0).
        dtype: what the model computes in, "float32" or "bfloat16". The weights of the state, gradients, and their sums
            over micro-batches have the dtype of the state all the same: float32 masters learn from updates that are
            far below a bfloat16's last bit. An adapter's model computes in the dtype of the frozen weights.
        skip_grad_norm: an update whose gradient has a norm above this, or not a finite one, leaves weights and moments
            as they are, and is counted. None: none is left out.
    """

    micro_batches: int = 1
    balance_alpha: float = 0.0
    bias_gamma: float = 0.0
    dtype: str = "float32"
    skip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.skip_grad_norm is not None and not 0 < self.skip_grad_norm < math.inf:
            raise ValueError(f"skip_grad_norm: got {self.skip_grad_norm}, wanted a finite number above 0, or None")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches: got {self.micro_batches}, wanted at least 1")


def init_state(
    weights: nnx.State, optimizer: optax.GradientTransformation, layout: Layout = LOCAL, *, donate: bool = False
) -> TrainState:
    """A state at step 0.

    Args:
        weights: to begin with, float32, a model's or an adapter's.
        optimizer: for the moments.
        layout: of the weights; the moments get the same.
        donate: take the weights themselves, so that there is no second copy; whoever gave them has them no longer.
            Otherwise they are copied, for an update donates its state.
    """

    def first(weights):
        params, _ = nnx.split_state(weights, nnx.Param, ...)
        own = weights if donate else jax.tree.map(jnp.copy, weights)
        return layout.stored(TrainState(own, optimizer.init(params), jnp.int32(0)))

    return jax.jit(first, donate_argnums=0 if donate else ())(weights)


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step (state, batch, *given) -> (state, metrics), in the layout that the module was made with.

    Args:
        graphdef: of the module to train.
        objective: its loss on a part of a batch.
        optimizer: of `make_optimizer`, say; the one that made the state's moments.
        config: how a batch becomes an update.

    Returns:
        The step. It donates its state, whose arrays are gone afterwards. Beside the objective's metrics it gives
        `loss`, `grad_norm`, and `nonfinite_updates`, which is 1 where loss, gradient or new weights are not finite
        and for which `train.loop` ends a run; with `skip_grad_norm` also `skipped_updates`.
    """
    layout = module_layout(graphdef)

    def step(state: TrainState, batch: MaskedBatch, *given: Any) -> tuple[TrainState, Metrics]:
        model = lambda weights: nnx.merge(graphdef, convert_dtype(weights, jnp.dtype(config.dtype)))
        return _stepped(state, batch, model, _of_given(objective, given), optimizer, config, layout)

    return jax.jit(step, donate_argnames="state")


def make_adapter_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    lora: LoRAConfig,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step of an adapter beside frozen weights: (state, batch, *given, frozen=) -> (state, metrics).

    Args:
        graphdef: of the model without an adapter.
        objective, optimizer, config: as for `make_train_step`.
        lora: the adapter's settings.

    Returns:
        The step. Its state is of `init_state(adapter, ...)`, so that moments exist for the adapter alone, and is
        donated. `frozen`, the model's weights, is only read; it stays with the caller. Router biases are frozen too,
        for an adapter's folder has no place for them. Metrics are those of `make_train_step`.

    Raises:
        ValueError: a `bias_gamma` other than 0.
    """
    layout = module_layout(graphdef)
    if config.bias_gamma:
        raise ValueError(f"bias_gamma: got {config.bias_gamma} with an adapter, wanted 0: router biases stay frozen")

    def step(state: TrainState, batch: MaskedBatch, *given: Any, frozen: nnx.State) -> tuple[TrainState, Metrics]:
        params, _ = nnx.split_state(frozen, nnx.Param, ...)
        dtype = jax.tree.leaves(params)[0].dtype
        model = lambda adapter: decoder_of(graphdef, with_adapter(frozen, convert_dtype(adapter, dtype), lora))
        return _stepped(state, batch, model, _of_given(objective, given), optimizer, config, layout)

    return jax.jit(step, donate_argnames="state")


def _of_given(objective: Objective, given: tuple[Any, ...]) -> Objective:
    return lambda model, part, totals: objective(model, part, totals, *given)


def _stepped(
    state: TrainState,
    batch: MaskedBatch,
    model: Callable[[nnx.State], nnx.Module],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    layout: Layout,
) -> tuple[TrainState, Metrics]:
    """One update of the weights that `model` makes a module of."""
    totals = batch_totals(batch)
    params, rest = nnx.split_state(state.weights, nnx.Param, ...)

    def part_gradient(part):
        part = layout.rows(part)

        def loss(params):
            loss, metrics, scored = objective(model(nnx.merge_state(params, rest)), part, totals)
            metrics = metrics | {"loss": Mean(loss, jnp.float32(1))}
            if scored is None:
                return loss, (metrics, None)
            total = loss + config.balance_alpha * scored.balance / totals.samples
            return total, (metrics | _routing_metrics(scored, part), scored.load_LE)

        gradient, found = jax.grad(loss, has_aux=True)(params)
        gradient = layout.stored(gradient)
        if config.micro_batches > 1 and layout.mesh is not None and layout.mesh.size > 1:
            # else a TPU's compiler adds up whole gradients, and sums over chips once, after the last part
            gradient = jax.tree.map(jax.lax.optimization_barrier, gradient)
        return gradient, found

    gradient, (metrics, load_LE) = _accumulate(part_gradient, batch, config.micro_batches)
    metrics["loss"] = Mean(metrics["loss"].total, jnp.float32(1))
    metrics["grad_norm"] = Mean(optax.tree.norm(gradient), jnp.float32(1))
    with jax.named_scope("optimizer"):
        updates, moments = optimizer.update(gradient, state.moments, params)
        params = optax.apply_updates(params, updates)
    if config.bias_gamma:
        rest = _moved_biases(rest, load_LE, config.bias_gamma)
    after = TrainState(nnx.merge_state(params, rest), moments, state.step + 1)
    after, counted = _guarded(state, after, metrics["loss"].total, metrics["grad_norm"].total, config.skip_grad_norm)
    return layout.stored(after), metrics | counted


def _guarded(
    before: TrainState, after: TrainState, loss: jax.Array, norm: jax.Array, most: float | None
) -> tuple[TrainState, Metrics]:
    """The state after an update, or the one before where a spike is to be left out; and what there was of either."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if most is None:
        return after, {"nonfinite_updates": Sum(_count(~(finite & _all_finite(after.weights))))}
    skip = ~(finite & (norm <= most))
    kept = jax.tree.map(lambda old, new: jnp.where(skip, old, new), before, after)._replace(step=after.step)
    bad = ~_all_finite(kept.weights)
    return kept, {"nonfinite_updates": Sum(_count(bad)), "skipped_updates": Sum(_count(skip))}


def _count(flag: jax.Array) -> jax.Array:
    return flag.astype(jnp.float32)


def _all_finite(weights: nnx.State) -> jax.Array:
    largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(weights)]  # NaN where any is
    return jnp.all(jnp.isfinite(jnp.stack([of.astype(jnp.float32) for of in largest])))


def batch_totals(batch: MaskedBatch) -> BatchTotals:
    """Samples and counted tokens of a batch; at least one token, that nothing is divided by zero."""
    lengths_BK = batch.lengths_BK if "lengths_BK" in batch._fields else None
    samples = batch.mask_BT.shape[0] if lengths_BK is None else jnp.sum(lengths_BK > 0)
    tokens = lambda mask: jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    high = batch.high_entropy_BT if "high_entropy_BT" in batch._fields else None
    return BatchTotals(
        jnp.asarray(samples, jnp.float32),
        tokens(batch.mask_BT),
        None if high is None else tokens(batch.mask_BT & high),
    )


def _accumulate(gradient_of, batch, parts: int):
    """Gradient, metrics and expert load of a whole batch, computed in `parts` equal parts."""
    if parts == 1:
        return gradient_of(batch)
    stacked = split_rows(batch, parts)
    first, rest = jax.tree.map(lambda a: a[0], stacked), jax.tree.map(lambda a: a[1:], stacked)

    def add(total, part):
        # a loop of one turn is unrolled, and would be worked on beside the first part
        total, part = jax.lax.optimization_barrier((total, part))
        gradient, (metrics, load) = gradient_of(part)
        total_gradient, (total_metrics, total_load) = total
        summed = jax.tree.map(jnp.add, (total_gradient, total_load), (gradient, load))
        return (summed[0], (merge(total_metrics, metrics), summed[1])), None

    return jax.lax.scan(add, gradient_of(first), rest)[0]


def _routing_metrics(scored: Scored, batch) -> Metrics:
    if scored.load_LE is None:
        return {}
    return {"router/balance_loss": Mean(scored.balance, scored.load_LE.shape[0] * batch_totals(batch).samples)}


def _moved_biases(rest: nnx.State, load_LE: jax.Array | None, gamma: float) -> nnx.State:
    """Each MoE layer's bias by its own load: the model's layers in their order, then the MTP modules'.

    A load without rows for the modules means that they did not run; their biases stay.
    """
    flat = nnx.to_flat_state(rest)
    biases = [(path, leaf) for path, leaf in flat if isinstance(leaf, RouterBias)]
    if not biases or load_LE is None:  # V2's routing, and dense models
        return rest
    of_model, modules = [], []
    for path, leaf in sorted(biases, key=lambda of: of[0][1]):
        (modules if path[0] == "mtp" else of_model).append((path, leaf[...]))
    layers = lambda biases: sum(1 if bias.ndim == 1 else len(bias) for _, bias in biases)  # a stack's bias is [L, E]
    ran = of_model if len(load_LE) == layers(of_model) else of_model + modules
    moved, done = {}, 0
    for path, bias in ran:
        load = load_LE[done : done + layers([(path, bias)])]
        moved[path] = updated_bias(bias, load.reshape(bias.shape), gamma)
        done += len(load)
    assert done == len(load_LE)
    return nnx.from_flat_state([(path, leaf.replace(moved[path]) if path in moved else leaf) for path, leaf in flat])
