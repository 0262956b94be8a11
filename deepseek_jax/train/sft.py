"""The SFT stage: lay conversations out, one a row or packed, and learn what the assistant says in them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.checkpoint.adapters import new_adapter
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.model.lora import decoder_of, merge, with_adapter
from deepseek_jax.model.precision import computed, convert_dtype
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.report.metrics import MetricLog
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.loop import Stage, run_stage
from deepseek_jax.train.optimizer import make_optimizer, schedule
from deepseek_jax.train.sft_config import SFTConfig
from deepseek_jax.train.sft_loss import (
    SFTBatch,
    lay_out,
    make_sft_objective,
    pack,
    sft_objective,
)
from deepseek_jax.train.step import (
    Objective,
    TrainState,
    batch_totals,
    init_state,
    make_adapter_step,
    make_train_step,
)


class SFTTrainer:
    """One step at a time: batches of rows, updates, and the loss of held-out rows.

    Args:
        config: of the stage.
        model: to begin with; float32, or as computed in where an adapter is trained.
        steps: updates in all, which the learning rate's schedule is of.
        width: columns of a row.
        per_row: rows that one packed row holds at most.
        seed: of a new adapter.
        donate: take the model's weights themselves, so that there is no second copy; the caller's are gone.
        objective: what is minimised in the place of the configuration's, for which MTP modules stay as they are.
        given: what it is called with behind a batch, a teacher's weights say, which stay the caller's.
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
        donate: bool = False,
        objective: Objective | None = None,
        given: tuple[Any, ...] = (),
    ):
        config.check_model(model.config)
        self.config, self.model, self.steps, self.lora = config, model, steps, config.lora
        self.width, self.per_row, self.seed, self.layout, self.donate = width, per_row, seed, model.layout, donate
        weight = 0.0 if objective is not None else config.mtp_weight_of(model.config)
        idle = ("indexer",) if weight else ("indexer", "mtp")
        self.optimizer = make_optimizer(config.adamw, steps, untrained=idle)
        self.rate = schedule(config.adamw, steps)
        self._dtype = jnp.dtype(config.step_config.dtype)
        self.frozen = None if self.lora is None else computed(model.weights, self._dtype)
        self.given, self._held_out_by = given, objective or sft_objective
        objective = objective or make_sft_objective(mtp_weight=weight, mean=config.mean)
        parts = model.graphdef, objective, self.optimizer, config.step_config
        if self.lora is None:
            self.update = make_train_step(*parts)
        else:
            self.update = partial(make_adapter_step(*parts, self.lora), frozen=self.frozen)
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
        state, metrics = self.update(state, batch, *self.given)
        values = ops_metrics.values(metrics)
        tokens = sum(len(example.tokens) for example in examples)
        return state, values | {
            "learning_rate": float(self.rate(number)),
            "rows": float(len(batch.mask_BT)),
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def evaluate(self, state: TrainState, examples: Sequence[MaskedTokens]) -> dict[str, float]:
        """Loss in nats a token, and the share of tokens that the model holds likeliest, over held-out rows; where a
        teacher is learnt from, how far from it too."""
        return self._evaluate(state.weights, examples)

    def _evaluate(self, weights: nnx.State | None, examples: Sequence[MaskedTokens]) -> dict[str, float]:
        total = None
        for batch in self._parts(examples):
            metrics = self._measure(weights, self.frozen, self.layout.put(batch), *self.given)
            total = metrics if total is None else ops_metrics.merge(total, metrics)
        return {_HELD_OUT[name]: value for name, value in ops_metrics.values(total).items()}

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

    def _measured(
        self, weights: nnx.State | None, frozen: nnx.State | None, batch: SFTBatch, *given: Any
    ) -> ops_metrics.Metrics:
        weights, graphdef = convert_dtype(weights, self._dtype), self.model.graphdef
        if frozen is None:
            model = nnx.merge(graphdef, weights)
        else:
            model = decoder_of(graphdef, frozen if weights is None else with_adapter(frozen, weights, self.lora))
        _, metrics, _ = self._held_out_by(model, self.layout.rows(batch), batch_totals(batch), *given)
        return {name: metrics[name] for name in _HELD_OUT if name in metrics}


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


_HELD_OUT = {"nll": "eval/loss", "mean_token_accuracy": "eval/mean_token_accuracy", "kl": "eval/kl"}
_BAR = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "learning_rate": "rate",
    "tokens_per_second": "tokens/s",
    "eval/loss": "held-out loss",
}
