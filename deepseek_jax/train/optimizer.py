"""AdamW as DeepSeek trains with it: betas 0.9 and 0.95, the gradient clipped by its global norm."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW and its schedule.

    Args:
        learning_rate: peak.
        warmup_steps: linear rise from 0.
        final_ratio: the cosine's end as a share of the peak; 1 keeps the rate constant.
        weight_decay: for matrices only; norms and biases are left alone.
        b1: decay of the first moment.
        b2: decay of the second moment (arXiv 2412.19437 section 4.2).
        clip_norm: largest global norm of the gradient.
        moments: what they are kept in, "float32" or "bfloat16" (DeepSeek-V3, arXiv 2412.19437 section 3.3.2), half the
            memory. They are updated in float32; what is kept is rounded to 8 bits, a step's update to about 1 %.
    """

    learning_rate: float
    warmup_steps: int = 0
    final_ratio: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}, wanted more than 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, wanted 0 or more")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm: got {self.clip_norm}, wanted more than 0")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up, then a cosine over the remaining steps (constant where final_ratio is 1)."""
    if config.final_ratio == 1:
        after = optax.constant_schedule(config.learning_rate)
    else:
        length = max(1, steps - config.warmup_steps)
        after = optax.cosine_decay_schedule(config.learning_rate, length, alpha=config.final_ratio)
    if not config.warmup_steps:
        return after
    # Starts one step in: a first update with rate 0 would be a wasted rollout.
    rise = optax.linear_schedule(config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, steps: int, *, untrained: Collection[str] = ("indexer", "mtp")
) -> optax.GradientTransformation:
    """Clip, then AdamW with the schedule of `steps` updates.

    Args:
        config: settings.
        steps: updates in all.
        untrained: modules that the objective gives no gradient: weight decay alone would shrink them to nothing.
            V3.2's indexer never has one; leave "mtp" out where the objective runs the MTP modules.
    """
    is_weight = lambda leaf: isinstance(leaf, nnx.Variable)
    names = lambda path: {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
    decays = lambda path, leaf: _is_matrix(leaf) and names(path).isdisjoint(untrained)
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_weight),
    )
    if config.moments == "bfloat16":
        adamw = _kept_in(jnp.bfloat16, adamw)
    return optax.chain(_clipped(config.clip_norm), adamw)


def _clipped(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by one factor: XLA joins products with what follows, and keeps quotients apart."""

    def update(gradient, state, params=None):
        scale = jnp.minimum(1.0, most / optax.tree.norm(gradient))
        return jax.tree.map(lambda of: of * scale.astype(of.dtype), gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _kept_in(dtype: jnp.dtype, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with the float32 arrays of its state rounded between updates. (optax has this for the first moment.)"""

    def to(of: jnp.dtype, state: optax.OptState) -> optax.OptState:
        return jax.tree.map(lambda a: a.astype(of) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def update(gradient, state, params=None):
        updates, state = optimizer.update(gradient, to(jnp.float32, state), params)
        return updates, to(dtype, state)

    return optax.GradientTransformation(lambda params: to(dtype, optimizer.init(params)), update)


def _is_matrix(weight: nnx.Variable) -> bool:
    """By its logical axes: a norm's scale stays one where its layers are a stack."""
    return sum(axis != "layer" for axis in weight.get_metadata()["axes"]) >= 2
