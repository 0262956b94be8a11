"""What the settings of every stage say of its updates, as the step and the adapter want it."""

from typing import Protocol

from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.train.step import StepConfig


class UpdateSettings(Protocol):
    """Settings of a stage, of SFT or GRPO, which explain them."""

    micro_batches: int
    lora_rank: int
    lora_alpha: float
    lora_targets: tuple[str, ...]
    balance_alpha: float
    bias_gamma: float
    dtype: Precision
    skip_grad_norm: float | None


def step_config_of(settings: UpdateSettings) -> StepConfig:
    """How a batch becomes an update. Beside an adapter the router biases stay."""
    return StepConfig(
        micro_batches=settings.micro_batches,
        balance_alpha=settings.balance_alpha,
        bias_gamma=0.0 if settings.lora_rank else settings.bias_gamma,
        dtype=dtype_of(settings.dtype).name,
        skip_grad_norm=settings.skip_grad_norm,
    )


def lora_of(settings: UpdateSettings) -> LoRAConfig | None:
    """The adapter to train, if one is.

    Raises:
        ValueError: a rank below 0, or what `LoRAConfig` refuses.
    """
    if settings.lora_rank < 0:
        raise ValueError(f"lora_rank: got {settings.lora_rank}, wanted 0, for none, or more")
    if not settings.lora_rank:
        return None
    targets = ALL_LINEAR if settings.lora_targets == (ALL_LINEAR,) else settings.lora_targets
    return LoRAConfig(rank=settings.lora_rank, alpha=settings.lora_alpha, targets=targets)
