"""What devices send one another, for the meshes and layouts of `sharding`: the planner's terms, and their least.

Tokens' rows to their experts and back; weights that training keeps cut, gathered where they run; their gradients,
scattered and summed; activations summed over `tensor`; queries and keys of sequences that `context` cuts; and weights
that move from the layout that they are trained in to the one that they are sampled in. A ring sends (n - 1) / n of what
n devices exchange.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.plan.meshes import Sizes, divides_heads, layout_of, weight_groups
from deepseek_jax.plan.weights import moe_layers
from deepseek_jax.sharding import Layout, cut

_COPIES = ("data", "fsdp", "expert", "context")  # along which a weight that they do not cut is repeated


class Sent(NamedTuple):
    """Bytes that a device sends along some axes of a mesh; `exchange`: each device has something for each other."""

    axes: tuple[str, ...]
    nbytes: float
    exchange: bool = False

    def times(self, count: float) -> "Sent":
        return self._replace(nbytes=count * self.nbytes)


def dispatched(
    config: ModelConfig, workload: str, sizes: Sizes, tokens: float, *, modules: bool = False, width: int = 2
) -> Sent:
    """Rows of a device's own tokens to other devices' experts, one way, once in each layer (and module)."""
    axes = cut(layout_of(workload), "expert")
    rows = 0.0 if config.moe is None else tokens * config.moe.num_experts_per_tok * moe_layers(config, modules=modules)
    return Sent(axes, _of_others(sizes, axes) * rows * config.hidden_size * width, exchange=True)


def gathered(config: ModelConfig, sizes: Sizes, *, modules: bool, width: int = 2) -> list[Sent]:
    """Weights where they are trained, gathered once; their gradients scattered send as much."""
    return [
        Sent(of.gathered, _of_others(sizes, of.gathered) * of.numbers / sizes.over(of.kept) * width)
        for of in weight_groups(config, "bf16", "train", modules=modules)
    ]


def summed_gradients(config: ModelConfig, sizes: Sizes, *, modules: bool, width: int = 2) -> list[Sent]:
    """Gradients, added up over the devices that hold the same part of a weight."""
    found = []
    for of in weight_groups(config, "bf16", "train", modules=modules):
        axes = tuple(axis for axis in _COPIES if axis not in of.cut)
        found.append(Sent(axes, 2 * _of_others(sizes, axes) * of.numbers / sizes.over(of.cut) * width))
    return found


def summed_activations(config: ModelConfig, sizes: Sizes, tokens: float, *, modules: bool = False) -> Sent:
    """The two sums over `tensor` in each layer (and module) of a forward pass."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if modules else 0)
    return Sent(("tensor",), 2 * 2 * 2 * tokens * config.hidden_size * _of_others(sizes, ("tensor",)) * layers)


def shared_sequences(
    config: ModelConfig,
    sizes: Sizes,
    tokens: float,
    length: int,
    passes: float,
    *,
    modules: bool = False,
    width: int = 2,
) -> list[Sent]:
    """What devices that share sequences send one another in an update of so many passes, in each layer (and module).

    In each pass queries, and what they attended to, for other heads or in other runs; and latents, or keys and values
    of grouped heads. Where heads are not divided, the gradients of all keys and values are summed by head.
    """
    a, layers = config.attention, config.num_hidden_layers + (config.num_nextn_predict_layers if modules else 0)
    rows, divided = tokens * layers * width * _of_others(sizes, ("context",)), divides_heads(config, sizes, length)
    if isinstance(a, MLAConfig):
        by_head = queries = config.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
        keys = (a.kv_lora_rank + a.qk_rope_head_dim) * sizes.context
    else:
        queries, by_head = config.num_attention_heads * 2 * a.head_dim, a.num_key_value_heads * 2 * a.head_dim
        keys = by_head / sizes.tensor * (1 if divided else sizes.context)
    summed = 0 if divided else 2 * sizes.context * by_head / sizes.tensor
    exchanged = Sent(("context",), passes * rows * queries / sizes.tensor, exchange=divided)
    return [exchanged, Sent(("context",), rows * (passes * keys + summed))]


def _of_others(sizes: Sizes, axes: tuple[str, ...]) -> float:
    return 1 - 1 / sizes.over(axes)


def comm_lower_bound(config: ModelConfig, sizes: Sizes, step: str, batch: int, context: int, width: int = 2) -> float:
    """The least bytes that a device sends in a step: nothing is sent again to be computed again, nothing is padded.

    Activations that are cut over `tensor` and `context` are not counted.

    Args:
        config: the architecture.
        sizes: of the mesh.
        step: prefill, decode, train or grpo; these two run backward as well, and train runs the MTP modules.
        batch: sequences in all.
        context: tokens of each; decode runs one of each.
        width: bytes of a weight, gradient or state.
    """
    updates, modules = step in ("train", "grpo"), step == "train"
    workload = "train" if updates else "serve"
    if step == "decode":
        tokens = batch / sizes.parts(workload, "cache_batch")
    else:
        tokens = batch * context / sizes.parts(workload, "batch") / sizes.parts(workload, "tokens")
    rows = dispatched(config, workload, sizes, tokens, modules=modules, width=width)
    sent = (4 if updates else 2) * rows.nbytes
    if updates:
        sent += 3 * sum(of.nbytes for of in gathered(config, sizes, modules=modules, width=width))
        sent += sum(of.nbytes for of in summed_gradients(config, sizes, modules=modules, width=width))
    return sent


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
