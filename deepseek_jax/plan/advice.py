"""What a given memory makes of the published models, with the rules of thumb that guides go by."""

import math
from dataclasses import dataclass

from deepseek_jax.config import PRESETS, ModelConfig, preset
from deepseek_jax.plan.chips import GB
from deepseek_jax.plan.memory import serve_memory
from deepseek_jax.plan.meshes import Sizes, meshes
from deepseek_jax.plan.planner import USABLE
from deepseek_jax.plan.weights import DType, active_parameters, parameters, weight_bytes


@dataclass(frozen=True, kw_only=True)
class Advice:
    """How one model and dtype does with a given memory on one device.

    `needed`: bytes of one sequence of the context asked for. `context`: tokens of the longest sequence that fits, 0
    where none does. `devices`: how many such devices hold it, a power of two; None where no mesh of up to 1024 does.
    """

    model: str
    dtype: DType
    weights: int
    needed: int
    fits: bool
    context: int
    devices: int | None


def advise(name: str, config: ModelConfig, dtype: DType, memory: int, *, context: int) -> Advice:
    """What one device of this memory makes of a model, serving one sequence."""
    limit = int(USABLE * memory)
    context = min(context, config.max_position_embeddings)
    needs = lambda length: serve_memory(config, dtype, Sizes(), 1, length).total
    return Advice(
        model=name,
        dtype=dtype,
        weights=weight_bytes(config, dtype),
        needed=needs(context),
        fits=needs(context) <= limit,
        context=_longest(needs, limit, config.max_position_embeddings),
        devices=_devices(config, dtype, limit, context),
    )


def advise_all(memory: int, *, context: int) -> list[Advice]:
    """Every published model that this memory holds, in the best dtype that fits, the ablest first.

    Ability is guessed by size: the geometric mean of a model's parameters and of those active for a token.
    """
    found = []
    for name in PRESETS:
        if name == "tiny":
            continue
        tried = (advise(name, preset(name), dtype, memory, context=context) for dtype in ("bf16", "fp8", "int4"))
        fitting = next((advice for advice in tried if advice.fits), None)
        if fitting is not None:
            found.append(fitting)
    return sorted(found, key=lambda advice: -_ability(preset(advice.model)))


def _ability(config: ModelConfig) -> float:
    return math.sqrt(parameters(config).main * active_parameters(config))


def _longest(needs, limit: int, most: int) -> int:
    """The largest whole number up to `most` whose need is within the limit; `needs` never falls."""
    if needs(1) > limit:
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle - 1)
    return low


def _devices(config: ModelConfig, dtype: DType, limit: int, context: int) -> int | None:
    for devices in (1 << power for power in range(11)):
        for sizes in meshes(config, "serve", devices):
            if serve_memory(config, dtype, sizes, 1, context).total <= limit:
                return devices
    return None


# --- rules of thumb ------------------------------------------------------------------------------

_RULES = {1.5: "4 GB", 7: "8-16 GB", 32: "24-48 GB", 70: "48 GB", 671: "400-480 GB in 4 bits"}


def rule_of_thumb(config: ModelConfig) -> str | None:
    """The memory that deployment guides commonly name for a model of about this size; None between the sizes."""
    billions = parameters(config).main / 1e9
    for size, memory in _RULES.items():
        if abs(billions / size - 1) < 0.2:
            return memory
    return None


def thumb_tensor_parallel(memory: int) -> int:
    """The same guides' tensor-parallel size: memory of all devices over 24 GB, at most 8.

    >>> [thumb_tensor_parallel(gigabytes * 10**9) for gigabytes in (16, 48, 640)]
    [1, 2, 8]
    """
    return max(1, min(8, memory // (24 * GB)))
