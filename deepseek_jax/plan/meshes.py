"""The meshes that divide a model, and what of its weights a device of one holds."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from deepseek_jax.config import GQAConfig, ModelConfig
from deepseek_jax.plan.model_flops import ranks
from deepseek_jax.plan.weights import DType, stored_bytes, weights
from deepseek_jax.sharding import cut, misfit

Workload = Literal["serve", "train", "grpo"]
_LARGEST_INNER = 8  # size of `context` and of `tensor` that training tries


class Sizes(NamedTuple):
    """Of the axes of a mesh."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def over(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def parts(self, workload: Workload, axis: str) -> int:
        """How many parts a logical axis is cut into."""
        return self.over(cut(layout_of(workload), axis))


def divides_heads(config: ModelConfig, sizes: Sizes, length: int) -> bool:
    """Whether devices that share sequences of such a length divide their heads, as `parallel.causal_attention` does."""
    a = config.attention
    heads = a.num_key_value_heads if isinstance(a, GQAConfig) else config.num_attention_heads
    return heads % sizes.parts("train", "head") == 0 and not ranks(config, length)


def layout_of(workload: Workload) -> Literal["train", "serve"]:
    """Where weights lie: a GRPO step begins and ends where they are trained."""
    return "serve" if workload == "serve" else "train"


class WeightGroup(NamedTuple):
    """Weights that the same mesh axes cut: their bytes, their numbers, and those that an optimizer trains."""

    routed: bool
    cut: tuple[str, ...]
    nbytes: int
    numbers: int
    trained: int

    @property
    def gathered(self) -> tuple[str, ...]:
        """The axes over which they are gathered to be used on whole sequences."""
        return tuple(axis for axis in self.cut if axis not in self.kept)

    @property
    def kept(self) -> tuple[str, ...]:
        """The axes that cut them even then."""
        return tuple(axis for axis in self.cut if axis == "tensor" or (self.routed and axis == "expert"))


@lru_cache(maxsize=1024)
def weight_groups(
    config: ModelConfig, dtype: DType, workload: Workload, *, modules: bool = True
) -> tuple[WeightGroup, ...]:
    """Of a model, with `modules` its MTP modules among it where it is trained."""
    found: dict[tuple, list[int]] = {}
    for weight in weights(config):
        if weight.module and (workload == "serve" or not modules):
            continue
        axes = tuple(axis for logical in weight.axes for axis in cut(layout_of(workload), logical))
        sums = found.setdefault((weight.kind == "routed_experts", axes), [0, 0, 0])
        sums[0] += stored_bytes(config, weight, dtype)
        sums[1] += weight.size
        sums[2] += 0 if weight.kind == "router_bias" else weight.size
    return tuple(WeightGroup(*key, *sums) for key, sums in found.items())


@lru_cache(maxsize=4096)  # of a mesh it is asked for every batch and every phase of a step
def weights_a_device(config: ModelConfig, dtype: DType, workload: Workload, sizes: Sizes) -> int:
    """Bytes of weights that a device of a mesh holds."""
    return math.ceil(sum(group.nbytes / sizes.over(group.cut) for group in weight_groups(config, dtype, workload)))


@lru_cache(maxsize=4096)
def trained_a_device(config: ModelConfig, sizes: Sizes) -> int:
    """Numbers of them that an optimizer keeps moments for."""
    return math.ceil(sum(group.trained / sizes.over(group.cut) for group in weight_groups(config, "bf16", "train")))


def meshes(config: ModelConfig, workload: Workload, devices: int) -> Iterator[Sizes]:
    """Every mesh of so many devices that divides the model, simple ones first.

    Serving replicates over `data` and cuts the rest by `expert` and `tensor`. Training tries `context` and `tensor`
    up to 8: further apart they cost more than they save.
    """
    for tensor in _divisors(devices):
        for context in _divisors(devices // tensor) if workload != "serve" else (1,):
            if workload != "serve" and max(tensor, context) > _LARGEST_INNER:
                continue
            rest = devices // (tensor * context)
            for expert in _divisors(rest) if config.moe is not None else (1,):
                for fsdp in _divisors(rest // expert) if workload != "serve" else (1,):
                    sizes = Sizes(rest // (expert * fsdp), fsdp, expert, context, tensor)
                    if misfit(config, layout_of(workload), sizes._asdict()) is None:
                        yield sizes


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)
