"""How fast a step may be: rooflines at stated shares of the peaks, worth comparing and hoping for, not measured."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.communication import (
    Sent,
    dispatched,
    gathered,
    shared_sequences,
    summed_activations,
    summed_gradients,
)
from deepseek_jax.plan.memory import train_memory
from deepseek_jax.plan.meshes import Sizes, weight_groups, weights_a_device
from deepseek_jax.plan.model_bytes import StateDTypes, decode_bytes, experts_touched, number_bytes
from deepseek_jax.plan.model_flops import decode_flops, prefill_flops
from deepseek_jax.plan.weights import DType
from deepseek_jax.sharding import AXES

ASSUMED = {
    "compute": 0.5,  # of the bfloat16 peak; products run in bfloat16 however weights are stored
    "bandwidth": 0.8,
    "link": 0.7,  # of one direction
}


class Seconds(NamedTuple):
    """What a step takes if one thing alone bounds it; the largest is the roofline."""

    compute: float
    memory: float
    collective: float

    @property
    def bound(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def longest(self) -> float:
        return max(self)


def seconds_a_byte(chip: Chip, sizes: Sizes, *axes: str, exchange: bool = False) -> float:
    """Seconds a byte that a device sends along some axes of the mesh."""
    members = together = stride = 1
    for axis in reversed(AXES):
        size = getattr(sizes, axis)
        if axis in axes:
            members *= size
            together *= min(size, max(1, chip.island * chip.devices // stride))
        stride *= size
    return chip.seconds_a_byte(members, together, exchange=exchange) / ASSUMED["link"]


def _sending(chip: Chip, sizes: Sizes, sent: Iterable[Sent]) -> float:
    return sum(of.nbytes * seconds_a_byte(chip, sizes, *of.axes, exchange=of.exchange) for of in sent)


def _seconds(chip: Chip, devices: int, flops: float, nbytes: float, collective: float) -> Seconds:
    """flops over all devices, bytes a device, seconds of collectives."""
    return Seconds(
        flops / (devices * chip.bf16_flops / chip.devices * ASSUMED["compute"]),
        nbytes / (chip.bandwidth / chip.devices * ASSUMED["bandwidth"]),
        collective,
    )


def decode_seconds(
    config: ModelConfig,
    dtype: DType,
    chip: Chip,
    sizes: Sizes,
    batch: int,
    context: int,
    *,
    cache_dtype: DType = "bf16",
) -> Seconds:
    """Of one token for each sequence. A layer's collectives are: states gathered over `tensor` for the projections of
    attention and feed-forward, and their sums scattered, rows to all experts and back, and MLA's queries to where
    their sequences' cache lies and back."""
    devices = math.prod(sizes)
    rows, own, D = batch / (sizes.data * sizes.expert), batch / devices, config.hidden_size
    touched = experts_touched(config, math.ceil(batch / sizes.data))
    weights = sum(
        group.nbytes / sizes.over(group.cut) * (touched if group.routed else 1)
        for group in weight_groups(config, dtype, "serve")
    )
    moved = decode_bytes(config, batch, context, dtype, cache_dtype=cache_dtype)
    nbytes = weights + (moved.cache_read + moved.cache_written) / devices
    share = (sizes.tensor - 1) / sizes.tensor
    states = 4 * 2 * rows * D * share * config.num_hidden_layers
    if isinstance(config.attention, MLAConfig):
        width = 2 * config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
        states += 2 * own * config.num_attention_heads * width * share * config.num_hidden_layers
    # all of it as an exchange between the devices that serve a sequence
    sent = Sent(("expert", "tensor"), states + 2 * dispatched(config, "serve", sizes, own).nbytes, exchange=True)
    flops = decode_flops(config, batch, context).total
    return _seconds(chip, devices, flops, nbytes, _sending(chip, sizes, [sent]))


def prefill_seconds(config: ModelConfig, dtype: DType, chip: Chip, sizes: Sizes, length: int) -> Seconds:
    """Of one sequence of `length` tokens on every batch shard: sums over `tensor`, rows sent to experts."""
    devices = math.prod(sizes)
    sequences = sizes.parts("serve", "batch")
    nbytes = weights_a_device(config, dtype, "serve", sizes)
    rows = dispatched(config, "serve", sizes, length / sizes.tensor)
    sums = summed_activations(config, sizes, length)
    sent = Sent(("expert", "tensor"), 2 * rows.nbytes + sums.nbytes, exchange=True)
    flops = prefill_flops(config, sequences, length).total
    return _seconds(chip, devices, flops, nbytes, _sending(chip, sizes, [sent]))


def update_seconds(
    config: ModelConfig,
    state: StateDTypes,
    chip: Chip,
    sizes: Sizes,
    batch: int,
    length: int,
    *,
    mtp: bool,
    scored: int = 0,
) -> Seconds:
    """Of one update with full remat: four forward passes' work, and `scored` more passes of a frozen model.

    Collectives: weights gathered forward and backward and their gradient scattered, rows to experts and back in three
    passes, what devices send one another that share sequences, sums over `tensor`, and the gradient's sum over the axes
    that hold copies of a weight.
    """
    devices, number = math.prod(sizes), number_bytes(state.compute)
    tokens = batch * length / sizes.over(("data", "fsdp", "expert", "context"))
    forward = prefill_flops(config, batch, length, logits=batch * length, mtp=mtp).total
    kept = train_memory(config, state, sizes, batch, length)
    passes, of_weights = 3 + scored, {"modules": mtp, "width": number}
    sent = [of.times(passes) for of in gathered(config, sizes, **of_weights)]
    sent += summed_gradients(config, sizes, **of_weights)
    sent.append(dispatched(config, "train", sizes, tokens, modules=mtp).times(2 * passes))
    sent += shared_sequences(config, sizes, tokens, length, passes, modules=mtp)
    sent.append(summed_activations(config, sizes, tokens, modules=mtp).times(passes))
    # gathered weights are written and read in each pass; the optimizer reads and writes what lies here
    groups = weight_groups(config, state.compute, "train", modules=mtp)
    nbytes = passes * 2 * sum(of.nbytes / sizes.over(of.kept) for of in groups)
    nbytes += 2 * (kept.weights + kept.computed + kept.gradient + kept.optimizer)
    nbytes += 2 * passes * tokens * config.hidden_size * number * config.num_hidden_layers
    return _seconds(chip, devices, (4 + scored) * forward, nbytes, _sending(chip, sizes, sent))
