"""Settings of supervised fine-tuning."""

import math
from dataclasses import dataclass
from typing import Literal

from deepseek_jax.checkpoint.adapters import adapted_paths
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig
from deepseek_jax.model.precision import Precision
from deepseek_jax.train.loop import profiled_steps
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.sft_loss import Averaged, make_sft_objective, mean_of_examples, mean_of_tokens
from deepseek_jax.train.step import StepConfig
from deepseek_jax.train.update_settings import lora_of, step_config_of

_MEANS = {"tokens": mean_of_tokens, "examples": mean_of_examples}
MOST_PER_ROW = 64
"""Rows that `sft` lays side by side in one at most."""
_MTP_WEIGHT = 0.1  # DeepSeek-V3's at the end of pre-training


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of an SFT stage.

    Args:
        steps: updates in all; None takes those of `epochs`.
        epochs: passes over the rows (DeepSeek-V3: 2, R1: 2 to 3).
        batch_size: rows an update (R1: 128).
        pack: lay several rows side by side in one, the longest first; none sees another.
        loss_mean: what the loss is the mean over: all tokens that are learnt, as in TRL, or the rows' own means.
        lr: peak of the learning rate (R1: 5e-5, V3: 5e-6).
        warmup: updates over which it rises.
        final_ratio: the end of the cosine that it falls by, as a share of the peak (R1: 0.1).
        weight_decay: of matrices.
        micro_batches: parts of an update, computed one after another to save memory; on a CPU those of some 512 tokens
            save time too.
        mtp_weight: of the loss of the modules for multi-token prediction; None takes 0.1 (V3) where the model has
            some and its weights are trained, and else 0.
        lora_rank: train an adapter of this rank beside the weights, which stay; 0 trains the weights themselves.
        lora_alpha: strength of the adapter, which counts alpha / rank times.
        lora_targets: Hugging Face's names of the modules to adapt, or all-linear.
        balance_alpha: weight of the sequence-wise balance loss of the experts.
        bias_gamma: speed of the router bias (V3, at the end of pre-training: 0).
        dtype: what losses and gradients are computed in; "auto" is bfloat16 on accelerators and float32 on the CPU.
            What is trained is float32 all the same, and so are router, softmax, norms, logits and loss.
        moments: what the optimizer's are kept in; bfloat16 halves them (DeepSeek-V3), each rounded to 8 bits.
        skip_grad_norm: an update whose gradient has a norm above this, or not a finite one, is left out and counted;
            None leaves none out, and ends the run where it is not finite.
        eval_every: steps between evaluations on the held-out rows; there is one at the end too.
        save_every: steps between checkpoints.
        profile_steps: "A:B" traces the steps A to B, counted from 1, into profile/.
    """

    steps: int | None = None
    epochs: float = 2.0
    batch_size: int = 128
    pack: bool = False
    loss_mean: Literal["tokens", "examples"] = "tokens"
    lr: float = 1e-5
    warmup: int = 0
    final_ratio: float = 0.1
    weight_decay: float = 0.1
    micro_batches: int = 1
    mtp_weight: float | None = None
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    balance_alpha: float = 1e-4
    bias_gamma: float = 0.0
    dtype: Precision = "auto"
    moments: Literal["float32", "bfloat16"] = "float32"
    skip_grad_norm: float | None = None
    eval_every: int = 50
    save_every: int = 100
    profile_steps: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, wanted at least 1, or None for those of the epochs")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs: got {self.epochs}, wanted a finite number above 0")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches {self.micro_batches} does not divide the {self.batch_size} rows of a step")
        if self.loss_mean not in _MEANS:
            raise ValueError(f"loss_mean: got {self.loss_mean!r}, wanted one of {', '.join(_MEANS)}")
        # each refuses what it cannot work with, here rather than after hours of a run
        _ = self.adamw, self.lora, self.step_config, make_sft_objective(mtp_weight=self.mtp_weight or 0.0)

    def steps_of(self, rows: int) -> int:
        """Updates in all, with so many rows to learn from.

        Raises:
            ValueError: fewer rows than an update takes, or `profile_steps` beyond the last one.
        """
        if rows < self.batch_size:
            raise ValueError(f"batch_size: got {self.batch_size}, wanted at most {rows}, the rows to learn from")
        steps = self.steps or max(1, math.ceil(self.epochs * rows / self.batch_size))
        if self.profile_steps is not None:
            profiled_steps(self.profile_steps, steps)
        return steps

    def check_model(self, architecture: ModelConfig) -> None:
        """Refuse what a model cannot do, before anything is trained.

        Raises:
            ValueError: a weight for modules that it has not, or no such module to adapt.
        """
        if self.mtp_weight and not architecture.num_nextn_predict_layers:
            raise ValueError(f"mtp_weight: got {self.mtp_weight} for a model without MTP modules, wanted 0")
        if self.lora is not None:
            adapted_paths(architecture, self.lora)

    def mtp_weight_of(self, architecture: ModelConfig) -> float:
        """The weight of the modules' loss for this model."""
        if self.mtp_weight is not None:
            return self.mtp_weight
        return _MTP_WEIGHT if architecture.num_nextn_predict_layers and not self.lora_rank else 0.0

    @property
    def mean(self) -> Averaged:
        """What the loss is the mean over."""
        return _MEANS[self.loss_mean]

    @property
    def adamw(self) -> OptimizerConfig:
        """The optimizer's settings."""
        return OptimizerConfig(
            learning_rate=self.lr,
            warmup_steps=self.warmup,
            final_ratio=self.final_ratio,
            weight_decay=self.weight_decay,
            moments=self.moments,
        )

    @property
    def step_config(self) -> StepConfig:
        """How a batch becomes an update."""
        return step_config_of(self)

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapter to train, if one is."""
        return lora_of(self)
