"""The least that chips have to send one another in a step, for the meshes and layouts of `sharding`.

Tokens' rows to their experts and back, the weights that training keeps cut gathered where they run, forward and
again backward, and their gradients summed; and weights that move from the layout that they are trained in to the one
that they are sampled in. Nothing is counted for recomputation, for padding, or for activations cut
over `tensor` and `context`.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.sharding import Layout


def comm_lower_bound(config: ModelConfig, layout: Layout, step: str, batch: int, context: int, width: int = 2) -> float:
    """Bytes that a chip sends, as a ring does: (n - 1) / n of what n chips exchange.

    Args:
        config: the architecture.
        layout: with a mesh.
        step: prefill, decode, train or grpo; these two run backward as well, and train runs the MTP modules.
        batch: sequences in all.
        context: tokens of each; decode runs one of each.
        width: bytes of a weight, gradient or state.
    """
    updates, modules = step in ("train", "grpo"), step == "train"
    if step == "decode":
        tokens = batch / layout.parts("cache_batch")
    else:
        tokens = batch * context / layout.parts("batch") / layout.parts("tokens")
    sent = (4 if updates else 2) * dispatched(config, layout, tokens, modules, width)
    return sent + (moved_for_training(config, layout, modules, width) if updates else 0)


def dispatched(config: ModelConfig, layout: Layout, tokens: float, modules: bool, width: int) -> float:
    """Rows of a chip's tokens to other chips' experts, once, in all layers (and modules)."""
    if config.moe is None:
        return 0.0
    count = config.num_hidden_layers + (config.num_nextn_predict_layers if modules else 0)
    layers = sum(config.is_moe_layer(layer) for layer in range(count))
    rows = tokens * config.moe.num_experts_per_tok * layers
    return _of_others(layout.parts("expert")) * rows * config.hidden_size * width


def moved_for_training(config: ModelConfig, layout: Layout, modules: bool, width: int) -> float:
    """Weights gathered twice and gradients summed, over the axes that cut a weight and those that repeat it."""
    sent = 0.0
    for path, leaf in nnx.to_flat_state(abstract_weights(config, layout=layout)[1]):
        if path[0] == "mtp" and not modules:
            continue
        axes = leaf.get_metadata()["axes"]
        cut = {of for axis in axes for of in layout.cut(axis)}
        gathered = layout.size(*(cut & set(layout.cut("embed"))))
        repeated = layout.size(*({"data", "fsdp", "expert", "context"} - cut))
        kept = math.prod(leaf.get_raw_value().sharding.shard_shape(leaf.get_raw_value().shape)) * width
        # the sum of a gradient: scattered over the axes that gather the weight, then added up over the others
        sent += 3 * _of_others(gathered) * gathered * kept + 2 * _of_others(repeated) * kept
    return sent


def _of_others(chips: int) -> float:
    return (chips - 1) / chips


def reshard_lower_bound(config: ModelConfig, of: Layout, to: Layout, dtype: jnp.dtype) -> float:
    """Bytes that a device has to be sent, on average, for weights to be in another layout too.

    What it is to hold there, less what it holds of that already.

    Args:
        config: the architecture that is moved.
        of, to: layouts on meshes of the same devices in the same order.
        dtype: that travels.
    """
    _, like = abstract_weights(config, dtype, dataclasses.replace(to, scan_layers=False))
    numbers: dict[tuple, float] = {}
    total = 0.0
    for _, leaf in nnx.to_flat_state(like):
        value, axes = leaf.get_raw_value(), leaf.get_metadata()["axes"]
        if (value.shape, axes) not in numbers:
            numbers[value.shape, axes] = _missing(value.shape, of.sharding(*axes), to.sharding(*axes))
        total += numbers[value.shape, axes] * value.dtype.itemsize
    return total


def _missing(shape: tuple[int, ...], of: NamedSharding, to: NamedSharding) -> float:
    """Numbers of an array that a device holds in one sharding and not in the other, on average."""
    held, wanted = of.devices_indices_map(shape), to.devices_indices_map(shape)
    missing = 0
    for device, parts in wanted.items():
        pairs = [(range(n)[a], range(n)[b]) for a, b, n in zip(parts, held[device], shape, strict=True)]
        shared = math.prod(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in pairs)
        missing += math.prod(len(a) for a, _ in pairs) - shared
    return missing / len(wanted)
