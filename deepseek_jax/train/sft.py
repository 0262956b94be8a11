"""The SFT stage: lay conversations out, one a row or packed, and learn what the assistant says in them."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import grain
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.checkpoint.adapters import adapted_paths, new_adapter
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig, beside, decoder_of, merge
from deepseek_jax.model.precision import Precision, computed, convert_dtype, dtype_of
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.report.metrics import MetricLog
from deepseek_jax.sharding import LOCAL, Layout
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.loop import Stage, profiled_steps, run_stage
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deepseek_jax.train.sft_loss import (
    SFTBatch,
    lay_out,
    make_sft_objective,
    mean_of_examples,
    mean_of_tokens,
    pack,
    sft_objective,
)
from deepseek_jax.train.step import (
    StepConfig,
    TrainState,
    batch_totals,
    init_state,
    make_adapter_step,
    make_train_step,
)

_MEANS = {"tokens": mean_of_tokens, "examples": mean_of_examples}
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
        micro_batches: parts of an update, computed one after another to save memory.
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
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: got {self.lora_rank}, wanted 0, for none, or more")
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
        return StepConfig(
            micro_batches=self.micro_batches,
            balance_alpha=self.balance_alpha,
            bias_gamma=0.0 if self.lora_rank else self.bias_gamma,
            dtype=dtype_of(self.dtype).name,
            skip_grad_norm=self.skip_grad_norm,
        )

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapter to train, if one is."""
        if not self.lora_rank:
            return None
        targets = ALL_LINEAR if self.lora_targets == (ALL_LINEAR,) else self.lora_targets
        return LoRAConfig(rank=self.lora_rank, alpha=self.lora_alpha, targets=targets)


class SFTTrainer:
    """One step at a time: batches of rows, updates, and the loss of held-out rows.

    Args:
        config: of the stage.
        model: to begin with; float32, or as computed in where an adapter is trained.
        steps: updates in all, which the learning rate's schedule is of.
        width: columns of a row.
        per_row: rows that one packed row holds at most.
        seed: of a new adapter.
        layout: of the model.
        donate: take the model's weights themselves, so that there is no second copy; the caller's are gone.
    """

    def __init__(
        self,
        config: SFTConfig,
        model: Model,
        *,
        steps: int,
        width: int,
        per_row: int = 16,
        seed: int = 0,
        layout: Layout = LOCAL,
        donate: bool = False,
    ):
        config.check_model(model.config)
        self.config, self.model, self.steps, self.lora = config, model, steps, config.lora
        self.width, self.per_row, self.seed, self.layout, self.donate = width, per_row, seed, layout, donate
        weight = config.mtp_weight_of(model.config)
        idle = ("indexer",) if weight else ("indexer", "mtp")
        self.optimizer = make_optimizer(config.adamw, steps, untrained=idle)
        self.rate = schedule(config.adamw, steps)
        self._dtype = jnp.dtype(config.step_config.dtype)
        self.frozen = None if self.lora is None else computed(model.weights, self._dtype)
        objective = make_sft_objective(mtp_weight=weight, mean=_MEANS[config.loss_mean])
        parts = model.graphdef, objective, self.optimizer, config.step_config
        if self.lora is None:
            self.update = make_train_step(*parts, layout)
        else:
            self.update = partial(make_adapter_step(*parts, self.lora, layout), frozen=self.frozen)
        self._measure = jax.jit(self._measured)

    def first_state(self) -> TrainState:
        """Before the first step."""
        if self.lora is None:
            return init_state(self.model.weights, self.optimizer, self.layout, donate=self.donate)
        adapter = new_adapter(self.model.config, self.lora, seed=self.seed, layout=self.layout)
        return init_state(adapter, self.optimizer, self.layout)

    def trained(self, state: TrainState) -> nnx.State:
        """What a run is for: the weights that are trained, in float32, or the frozen ones with the adapter in them."""
        return state.weights if self.lora is None else merge(self.frozen, state.weights, self.lora)

    def batch(self, examples: Sequence[MaskedTokens]) -> SFTBatch:
        """The rows of an update, on the devices."""
        parts = self.config.micro_batches * self.layout.parts("batch")
        return self.layout.put(self._laid_out(examples, parts, len(examples)))

    def _laid_out(self, examples: Sequence[MaskedTokens], parts: int, rows: int) -> SFTBatch:
        if self.config.pack:
            return pack(examples, width=self.width, per_row=self.per_row, parts=parts)
        return lay_out(examples, width=self.width, rows=rows)

    def step(
        self, state: TrainState, examples: Sequence[MaskedTokens], number: int
    ) -> tuple[TrainState, dict[str, float]]:
        """One update; `number` counts from 0."""
        start = time.perf_counter()
        batch = self.batch(examples)
        state, metrics = self.update(state, batch)
        values = ops_metrics.values(metrics)
        tokens = sum(len(example.tokens) for example in examples)
        return state, values | {
            "learning_rate": float(self.rate(number)),
            "rows": float(len(batch.mask_BT)),
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def evaluate(self, state: TrainState, examples: Sequence[MaskedTokens]) -> dict[str, float]:
        """Loss in nats a token, and the share of tokens that the model holds likeliest, over held-out rows."""
        return self._evaluate(state.weights, examples)

    def _evaluate(self, weights: nnx.State | None, examples: Sequence[MaskedTokens]) -> dict[str, float]:
        total = None
        for batch in self._parts(examples):
            metrics = self._measure(weights, self.frozen, self.layout.put(batch))
            total = metrics if total is None else ops_metrics.merge(total, metrics)
        values = ops_metrics.values(total)
        return {"eval/loss": values["nll"], "eval/mean_token_accuracy": values["mean_token_accuracy"]}

    def evaluate_first(self, examples: Sequence[MaskedTokens]) -> dict[str, float]:
        """The same before the first step."""
        weights = self.model.weights if self.lora is None else None
        return self._evaluate(weights, examples)

    def _parts(self, examples: Sequence[MaskedTokens]) -> Iterator[SFTBatch]:
        """In parts as large as a micro-batch; what the last one lacks is empty."""
        size = self.config.batch_size // self.config.micro_batches
        for first in range(0, len(examples), size):
            part = [examples[index] for index in range(first, min(first + size, len(examples)))]
            yield self._laid_out(part, self.layout.parts("batch"), size)

    def _measured(self, weights: nnx.State | None, frozen: nnx.State | None, batch: SFTBatch) -> ops_metrics.Metrics:
        weights, graphdef = convert_dtype(weights, self._dtype), self.model.graphdef
        if frozen is None:
            model = nnx.merge(graphdef, weights)
        else:
            model = decoder_of(graphdef, frozen if weights is None else beside(frozen, weights, self.lora))
        _, metrics, _ = sft_objective(model, self.layout.rows(batch), batch_totals(batch))
        return {name: metrics[name] for name in ("nll", "mean_token_accuracy")}


def run_sft(
    trainer: SFTTrainer,
    data: grain.DatasetIterator,
    *,
    folder: Path,
    log: MetricLog,
    held_out: Sequence[MaskedTokens] = (),
    name: str = "sft",
) -> TrainState:
    """The whole stage; it goes on from its newest checkpoint if it has one.

    Args:
        trainer: of the model.
        data: endless batches of rows, `batch_size` each.
        folder: of the run.
        log: of the run.
        held_out: rows to evaluate on.
        name: of the stage.

    Returns:
        The state after the last step.
    """
    config = trainer.config

    def step(
        state: TrainState, examples: Sequence[MaskedTokens], number: int
    ) -> tuple[TrainState, Mapping[str, float]]:
        state, values = trainer.step(state, examples, number)
        if held_out and ((number + 1) % config.eval_every == 0 or number + 1 == trainer.steps):
            values |= trainer.evaluate(state, held_out)
        return state, values

    stage = Stage(
        name=name,
        steps=trainer.steps,
        save_every=config.save_every,
        shown=_BAR,
        profile_steps=config.profile_steps,
    )
    return run_stage(stage, trainer.first_state(), data, step, folder=folder, log=log)


_BAR = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "learning_rate": "rate",
    "tokens_per_second": "tokens/s",
    "eval/loss": "held-out loss",
}
