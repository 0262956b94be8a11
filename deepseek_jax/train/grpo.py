"""The GRPO stage: draw prompts, sample groups, grade, compare, update; and its settings."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.checkpoint.adapters import adapted_paths, new_adapter
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import ModelConfig
from deepseek_jax.generate.engine import Generator, Record, SamplingConfig
from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig, beside, merge
from deepseek_jax.model.precision import Precision, computed, convert_dtype, dtype_of
from deepseek_jax.model.scoring import check_routes
from deepseek_jax.model.transfer import Transfer
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.report.metrics import MetricLog, explain_first_loss
from deepseek_jax.report.samples import SampleLog, sample_groups
from deepseek_jax.rewards.combine import CombinedReward
from deepseek_jax.rl import entropy
from deepseek_jax.rl.advantage import (
    group_advantages,
    normalized_sum_advantages,
    reinforce_advantages,
    reinforce_baseline_advantages,
    rloo_advantages,
)
from deepseek_jax.rl.batch import Batch, make_batch, pack
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.rl.rollout import Prompt, Rollout, RolloutWorker, dynamic_sampling, rollout_metrics
from deepseek_jax.sharding import LOCAL, Layout
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.loop import Stage, profiled_steps, run_stage
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from deepseek_jax.train.step import StepConfig, TrainState, init_state, make_adapter_step, make_train_step


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of a GRPO stage.

    Args:
        steps: rollouts in all (R1-Zero: 10,400); a finished run may be raised.
        prompts_per_step: questions a step (R1-Zero: 32).
        group_size: samples a question (R1: 16).
        max_new_tokens: limit a sample (R1-Zero: 32,768).
        temperature: of the samples; log-probs are taken at the same.
        top_p: of the samples; below 1 wants keep_sampling_mask.
        top_k: of the samples; above 0 wants keep_sampling_mask.
        min_p: of the samples: least probability, as a share of the likeliest token's; above 0 wants
            keep_sampling_mask.
        repetition_penalty: of the samples, for tokens of prompt and completion; other than 1 wants keep_sampling_mask.
        at_once: questions sampled at a time, while the answers to those before are graded; None samples all of a step,
            then grades.
        sampling_rounds: dynamic sampling: draw further questions, so many times in all, until enough groups have
            rewards that differ (DAPO); 1 takes what comes.
        loss: of the policy.
        advantage: "group" compares with the group's mean, "rloo" with that of the others in it, "reinforce"
            (REINFORCE++) with the batch's, "reinforce_baseline" with the group's, over the deviation of the batch.
        multi_objective_aggregation: "sum_then_normalize" compares weighted sums of the rewards;
            "normalize_then_sum" (GDPO) compares each reward within its group by itself, sums by weight, and scales by
            the batch.
        scale_rewards: what "group" divides by: the deviation of the group (R1), of the batch, or none (V3.2).
        mask_truncated_completions: samples that were cut off at max_new_tokens do not count.
        lr: learning rate (DeepSeekMath: 1e-6, R1-Zero: 3e-6).
        warmup: updates over which it rises.
        updates_per_rollout: parts of a rollout, an optimizer step each (R1-Zero: 16).
        num_iterations: passes over a rollout.
        micro_batches: parts of an update, computed one after another to save memory.
        pack: lay several short samples in one row.
        reference_every: steps after which the reference model follows the policy (R1-Zero: 400).
        reference_mixup: how far it follows: 1 replaces it, less is a moving average.
        lora_rank: train an adapter of this rank beside the weights; these stay, as does the reference model, which
            they are then, and the router biases. 0 trains the weights themselves.
        lora_alpha: strength of the adapter, which counts alpha / rank times.
        lora_targets: Hugging Face's names of the modules to adapt, or all-linear.
        record_routes: note the experts of sampling, and report the share of tokens for which the trainer's differ.
        keep_routing: the update goes through the experts of sampling (V3.2).
        keep_sampling_mask: log-probs are those among the tokens that top-p, top-k and min-p left (V3.2), after the
            repetition penalty, the reference model's too: the KL does not see what lies outside them.
        balance_alpha: weight of the sequence-wise balance loss of the experts.
        bias_gamma: speed of the router bias.
        dtype: what samples, scores and gradients are computed in; "auto" is bfloat16 on accelerators and float32 on
            the CPU. What is trained is float32 all the same, and so are router, softmax, norms, logits and loss.
        moments: what the optimizer's are kept in; bfloat16 halves them (DeepSeek-V3), each rounded to 8 bits.
        skip_grad_norm: an update whose gradient has a norm above this, or not a finite one, is left out and counted,
            in a cold start too; None leaves none out, and ends the run where it is not finite.
        eval_every: steps between evaluations on part of the held-out questions.
        save_every: steps between checkpoints.
        samples_every: steps between entries in the table of samples.
        profile_steps: "A:B" traces the steps A to B, counted from 1, into profile/.
    """

    steps: int = 1_000
    prompts_per_step: int = 32
    group_size: int = 16
    max_new_tokens: int = 32_768
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    at_once: int | None = None
    sampling_rounds: int = 1
    loss: GRPOLossConfig = field(default_factory=lambda: GRPOLossConfig(beta=0.001))
    advantage: Literal["group", "rloo", "reinforce", "reinforce_baseline"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
    lr: float = 1e-6
    warmup: int = 5
    updates_per_rollout: int = 1
    num_iterations: int = 1
    micro_batches: int = 1
    pack: bool = False
    reference_every: int = 400
    reference_mixup: float = 1.0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    record_routes: bool = False
    keep_routing: bool = False
    keep_sampling_mask: bool = False
    balance_alpha: float = 1e-4
    bias_gamma: float = 1e-3
    dtype: Precision = "auto"
    moments: Literal["float32", "bfloat16"] = "float32"
    skip_grad_norm: float | None = None
    eval_every: int = 10
    save_every: int = 20
    samples_every: int = 10
    profile_steps: str | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_combinations()
        # each refuses what it cannot work with, here rather than after hours of a run
        _ = self.sampling(()), self.adamw, self.lora, self.step_config
        if self.profile_steps is not None:
            profiled_steps(self.profile_steps, self.steps)

    def _check_numbers(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, wanted at least 2: a group of one learns nothing")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        samples, parts = self.prompts_per_step * self.group_size, self.updates_per_rollout * self.micro_batches
        if samples % parts:
            raise ValueError(
                f"updates_per_rollout {self.updates_per_rollout} x micro_batches {self.micro_batches} "
                f"does not divide the {samples} samples of a step"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: got {self.lora_rank}, wanted 0, for none, or more")
        if not 0 < self.temperature:
            raise ValueError(f"temperature: got {self.temperature}, wanted more than 0: groups must differ")
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"reference_mixup: got {self.reference_mixup}, wanted more than 0, at most 1")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once: got {self.at_once}, wanted at least 1 question, or None for all")

    def _check_combinations(self) -> None:
        if self.advantage not in _ADVANTAGES:
            raise ValueError(f"advantage: got {self.advantage!r}, wanted one of {', '.join(_ADVANTAGES)}")
        if self.scale_rewards != "group" and self.advantage != "group":
            raise ValueError(
                f"scale_rewards: got {self.scale_rewards!r} with advantage {self.advantage!r}, which has a scale of "
                "its own; leave it out"
            )
        self._check_aggregation()
        if self.sampling_rounds > 1 and self.advantage == "reinforce":
            raise ValueError(
                f"sampling_rounds: got {self.sampling_rounds} with advantage 'reinforce', wanted 1: compared with the "
                "batch, groups of equal rewards teach too"
            )
        if self.loss.loss_type == "dr_grpo" and self.loss.max_completion_length != self.max_new_tokens:
            raise ValueError(
                f"max_completion_length: got {self.loss.max_completion_length}, wanted max_new_tokens, "
                f"{self.max_new_tokens}, which dr_grpo divides by"
            )
        shaping = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        changed = [f"{name} {getattr(self, name)}" for name, none in shaping.items() if getattr(self, name) != none]
        if changed and not self.keep_sampling_mask:
            raise ValueError(
                f"keep_sampling_mask: got False with {' and '.join(changed)}, wanted True: "
                "the sampler's distribution would not be the trainer's"
            )

    def _check_aggregation(self) -> None:
        kind = self.multi_objective_aggregation
        if kind not in ("sum_then_normalize", "normalize_then_sum"):
            raise ValueError(
                f"multi_objective_aggregation: got {kind!r}, wanted 'sum_then_normalize' or 'normalize_then_sum'"
            )
        alone = {"advantage": "group", "scale_rewards": "group", "sampling_rounds": 1}
        for name, wanted in alone.items() if kind == "normalize_then_sum" else ():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with multi_objective_aggregation {kind!r}, which has its own "
                    f"way, wanted {wanted!r}"
                )

    def check_model(self, architecture: ModelConfig, longest: int) -> None:
        """Refuse what a model cannot do, before anything is trained.

        Args:
            architecture: of the model.
            longest: tokens of the longest prompt.

        Raises:
            ValueError: prompts and completions do not fit its context, it has no experts to record, or no such module
                to adapt.
        """
        context = architecture.max_position_embeddings
        if longest + self.max_new_tokens > context:
            raise ValueError(
                f"max_new_tokens: got {self.max_new_tokens} after prompts of up to {longest} tokens, wanted at most "
                f"the model's context of {context} for both; lower it, or leave long prompts out"
            )
        if (self.record_routes or self.keep_routing) and architecture.moe is None:
            raise ValueError("keep_routing, record_routes: got True for a model without experts, wanted False")
        if self.lora is not None:
            adapted_paths(architecture, self.lora)

    def sampling(self, stop_ids: tuple[int, ...]) -> SamplingConfig:
        """How completions are drawn that end with one of these tokens."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop_ids=stop_ids,
        )

    @property
    def adamw(self) -> OptimizerConfig:
        """The optimizer's settings."""
        return OptimizerConfig(learning_rate=self.lr, warmup_steps=self.warmup, moments=self.moments)

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


_ADVANTAGES = {
    "group": group_advantages,
    "rloo": rloo_advantages,
    "reinforce": reinforce_advantages,
    "reinforce_baseline": reinforce_baseline_advantages,
}
_COUNTS = (
    *("steps", "prompts_per_step", "sampling_rounds", "updates_per_rollout", "num_iterations", "micro_batches"),
    *("reference_every", "eval_every", "save_every", "samples_every"),
)
PER_ROW = 16
"""Samples that a packed row holds at most."""


class GRPOState(NamedTuple):
    """State of the stage: the policy's training, the reference model, and the tokens sampled so far (`_counted`).

    The reference is None where there is no KL, and where an adapter is trained: then it is what the run began with.
    entropy is of `rl.entropy`, None where the weight of the entropy bonus stays.
    """

    train: TrainState
    reference: nnx.State | None
    tokens: jax.Array
    entropy: jax.Array | None = None


class StepResult(NamedTuple):
    """One step's outcome: the state after it, the samples that it learned from, and the numbers of a dashboard.

    The numbers are of everything that was sampled, also of groups that dynamic sampling left out.
    """

    state: GRPOState
    rollout: Rollout
    metrics: dict[str, float]


class GRPOTrainer:
    """GRPO on one model.

    Args:
        config: settings.
        model: architecture and first weights, which become policy and reference.
        tokenizer: of prompts and completions.
        generator: the sampler, in a layout of its own or that of the model (`model.transfer.serving_layout`).
        reward: of texts and columns.
        width: columns of an update's rows, at least the longest prompt and completion; fixed, so that it compiles once.
        seed: of sampling.
        layout: the one that the model was made with, to train in.
        donate: train the model's weights themselves: whoever gave them has them no longer (`first_state` takes them).
        alter_rewards: (rewards [P, G], step) to those that advantages are made of (controls: shuffling them, say).
        take_metrics: further numbers of a step, such as those of a grader.
    """

    def __init__(
        self,
        config: GRPOConfig,
        model: Model,
        tokenizer: Tokenizer,
        generator: Generator,
        reward: CombinedReward,
        *,
        width: int,
        seed: int,
        layout: Layout = LOCAL,
        donate: bool = False,
        alter_rewards: Callable[[np.ndarray, int], np.ndarray] | None = None,
        take_metrics: Callable[[], Mapping[str, float]] = dict,
    ):
        self.config, self.model, self.layout, self.lora = config, model, layout, config.lora
        self.donate, self._dtype = donate, jnp.dtype(config.step_config.dtype)
        self._to_sampler = Transfer(generator.config, layout, generator.layout, self._dtype)
        self.width, self.seed, self.alter, self.take_metrics = width, seed, alter_rewards, take_metrics
        self.optimizer = make_optimizer(config.adamw, self._updates)
        self.rate = schedule(config.adamw, self._updates)
        self.of_sampler = {"temperature": config.temperature, "repetition_penalty": config.repetition_penalty}
        self.score = {**self.of_sampler, "keep_routing": config.keep_routing}
        scaled = {"scale": config.scale_rewards} if config.advantage == "group" else {}
        self._estimator = partial(_ADVANTAGES[config.advantage], **scaled)
        self.frozen = None if self.lora is None else computed(model.weights, self._dtype)
        objective = partial(grpo_objective, config=config.loss, **self.score)
        parts = model.graphdef, objective, self.optimizer, config.step_config
        if self.lora is None:
            self.update = make_train_step(*parts, layout)
        else:
            self.update = partial(make_adapter_step(*parts, self.lora, layout), frozen=self.frozen)
        self.roll = RolloutWorker(
            generator=generator,
            tokenizer=tokenizer,
            sampling=config.sampling(tokenizer.eos_ids),
            group_size=config.group_size,
            reward=reward,
            at_once=config.at_once,
            record=Record(routes=config.record_routes or config.keep_routing, support=config.keep_sampling_mask),
        )

    @property
    def _updates(self) -> int:
        return self.config.steps * self.config.updates_per_rollout * self.config.num_iterations

    def first_state(self) -> GRPOState:
        """Before the first step."""
        weights = self.model.weights
        if self.lora is not None:
            adapter = new_adapter(self.model.config, self.lora, seed=self.seed, layout=self.layout)
            return GRPOState(init_state(adapter, self.optimizer, self.layout), None, _counted(0), self._first_control())
        reference = self._followed(weights, weights) if self.config.loss.beta else None
        train = init_state(weights, self.optimizer, self.layout, donate=self.donate)
        return GRPOState(train, reference, _counted(0), self._first_control())

    def _first_control(self) -> jax.Array | None:
        return entropy.first_control(self.config.loss) if self.config.loss.use_adaptive_entropy else None

    def trained(self, state: GRPOState) -> nnx.State:
        """What a run is for: the weights that are trained, in float32, or the frozen ones with the adapter in them."""
        weights = state.train.weights
        return weights if self.lora is None else merge(self.frozen, weights, self.lora)

    def policy(self, state: GRPOState) -> nnx.State:
        """The weights that sample: the trained ones in the sampler's layout, as they are computed in.

        With two layouts it is a copy, to be let go of before an update: that needs the room for its gradient.
        """
        return self._to_sampler(state.train.weights if self.lora is None else self._computed(state.train))

    def _computed(self, train: TrainState) -> nnx.State:
        """The trained weights as they are computed in where they are trained, an adapter beside the frozen ones."""
        weights = computed(train.weights, self._dtype)
        return weights if self.lora is None else beside(self.frozen, weights, self.lora)

    def step(self, state: GRPOState, draw: Callable[[], Sequence[Prompt]], number: int) -> StepResult:
        """One step: rollout and updates. `draw` gives the next prompts, and is asked again by dynamic sampling."""
        start = time.perf_counter()
        everything, used = dynamic_sampling(
            self.roll,
            self.policy(state),
            draw,
            seed=self.seed,
            step=number,
            rounds=self.config.sampling_rounds,
        )
        rolled = time.perf_counter()
        train, control, found = self.learn(state, used, number)
        tokens = (
            total_tokens(state.tokens)
            + sum(len(p.tokens) for p in everything.prompts_of_samples())
            + sum(len(c.tokens) for c in everything.completions)
        )
        reference = state.reference
        if reference is not None and (number + 1) % self.config.reference_every == 0:
            reference = self._followed(reference, train.weights)
        state = GRPOState(train, reference, _counted(tokens), control)
        values = rollout_metrics(everything) | ops_metrics.values(found) | self.take_metrics()
        values |= {
            "learning_rate": float(self.rate((number + 1) * (self._updates // self.config.steps) - 1)),
            "num_tokens": tokens,
            "sampling/rounds": len(everything.prompts) / len(used.prompts),
            "rollout_time": rolled - start,
            "update_time": time.perf_counter() - rolled,
        }
        if self.config.loss.has_entropy_bonus:
            values["entropy_coef"] = self.config.loss.entropy_coef if control is None else float(control[0])
        return StepResult(state, used, values)

    def learn(
        self, state: GRPOState, rollout: Rollout, number: int
    ) -> tuple[TrainState, jax.Array | None, ops_metrics.Metrics]:
        """The updates that a rollout is good for, the control of the entropy after them, and their metrics.

        Those that compare sampler and trainer are of the first update: later ones meet weights that have moved.
        """
        policy = self._computed(state.train) if self.config.loss.corrects_sampler else None
        parts = [self._scored(batch, state.reference, policy) for batch in self.batches(rollout, number)]
        train, control, first, total = state.train, state.entropy, {}, None
        for _ in range(self.config.num_iterations):
            for batch in parts:
                train, metrics = self.update(train, self._with_entropy(batch, train, control))
                if control is not None:
                    of_update = metrics.pop("entropy_of_bonus").value()
                    control = entropy.next_control(control, of_update, self.config.loss)
                metrics = _of_one_update(metrics)
                first = first or {name: metrics[name] for name in metrics if name.startswith(_OF_SAMPLING)}
                total = metrics if total is None else ops_metrics.merge(total, metrics)
        return train, control, total | first

    def _with_entropy(self, batch: Batch, train: TrainState, control: jax.Array | None) -> Batch:
        """With what the loss needs of the whole batch, which a micro-batch of it could not know."""
        loss = self.config.loss
        if control is not None:
            weight = float(entropy.weight_now(control, loss))
            batch = self.layout.put(batch._replace(entropy_coef_B=np.full(len(batch.mask_BT), weight, np.float32)))
        if loss.top_entropy_quantile == 1:
            return batch
        weights, parts = self._computed(train), self.config.micro_batches
        wanted = {"micro_batches": parts, "wanted": "entropy_BT"}
        entropy_BT = frozen_scores(self.model.graphdef, weights, batch, **self.score, **wanted)
        high = entropy.high_entropy(entropy_BT, jnp.asarray(batch.mask_BT), loss.top_entropy_quantile)
        return self.layout.put(batch._replace(high_entropy_BT=high))

    def batches(self, rollout: Rollout, number: int) -> Iterator[Batch]:
        """The samples of a rollout with their advantages, a batch for each update of one pass."""
        config = self.config
        advantages = self.advantages(rollout.rewards, number, rollout.parts).reshape(-1)
        prompts = [p.tokens for p in rollout.prompts_of_samples()]
        for completion in rollout.completions:
            if completion.routes is not None:
                check_routes(completion.routes, self.model.config)
        for part in range(config.updates_per_rollout):
            of = slice(part, None, config.updates_per_rollout)
            samples = prompts[of], rollout.completions[of], advantages[of]
            options = {"width": self.width, "mask_truncated": config.mask_truncated_completions}
            if config.pack:
                yield pack(*samples, **options, per_row=PER_ROW, rows_of=self._rows_of(len(samples[0])))
            else:
                yield make_batch(*samples, **options)

    def advantages(
        self, rewards_PG: np.ndarray, number: int, parts: Mapping[str, Sequence[float | None]] | None = None
    ) -> np.ndarray:
        """[P, G] from rewards, NaN where not known, for "normalize_then_sum" from their parts; 0 where not known."""
        altered = (lambda rewards: rewards) if self.alter is None else (lambda rewards: self.alter(rewards, number))
        if self.config.multi_objective_aggregation == "sum_then_normalize":
            return np.asarray(self._estimator(jnp.asarray(altered(rewards_PG))))
        weights = self.roll.reward.weights
        scores = [np.array(parts[name], np.float32).reshape(rewards_PG.shape) for name in weights]  # None is NaN
        scores = [altered(np.where(np.isnan(rewards_PG), np.nan, of)) for of in scores]
        of_weights = jnp.asarray(list(weights.values()), jnp.float32)
        return np.asarray(normalized_sum_advantages(jnp.asarray(np.stack(scores, axis=2)), of_weights))

    def _rows_of(self, samples: int) -> int:
        """Rows come in at most eight numbers, each a compilation, and are divided by micro-batches and the mesh."""
        whole = self.config.micro_batches * self.layout.parts("batch")
        eighth = math.ceil(samples / 8)
        return math.ceil(eighth / whole) * whole

    def _scored(self, batch: Batch, reference: nnx.State | None, policy: nnx.State | None) -> Batch:
        """With the log-probs of the reference, and of the policy where sampling is corrected for."""
        batch = self.layout.put(batch)
        frozen = partial(frozen_scores, self.model.graphdef, batch=batch, micro_batches=self.config.micro_batches)
        if policy is not None:
            own = frozen(policy, **self.score)
            batch = batch._replace(sampler_logprobs_BT=batch.old_logprobs_BT, old_logprobs_BT=own)
        if self.config.loss.beta:
            reference = self.frozen if reference is None else computed(reference, self._dtype)
            batch = batch._replace(ref_logprobs_BT=frozen(reference, **self.of_sampler))
        return batch

    def _followed(self, reference: nnx.State, weights: nnx.State) -> nnx.State:
        """As computed in, and in float32 where it is a moving average, whose steps are small."""
        share = self.config.reference_mixup
        return followed(reference, weights, share, self._dtype if share == 1 else jnp.dtype(jnp.float32))


_OF_SAMPLING = ("sampling/sampling_logp_difference/", "sampling/experts_differ")
_UNIT = 2**30


def _counted(tokens: int) -> jax.Array:
    """A number of tokens as int32 [2], units of 2**30 and the rest: a run samples more than one int32 holds."""
    return jnp.asarray(divmod(tokens, _UNIT), jnp.int32)


def total_tokens(counted: jax.Array) -> int:
    """The number again."""
    units, rest = np.asarray(counted).tolist()
    return units * _UNIT + rest


def _of_one_update(metrics: ops_metrics.Metrics) -> ops_metrics.Metrics:
    """What added up over the parts of an update is averaged over updates."""
    averaged = lambda metric: ops_metrics.Mean(metric.total, jnp.float32(1))
    return {name: averaged(m) if isinstance(m, ops_metrics.Sum) else m for name, m in metrics.items()}


@partial(jax.jit, static_argnames=("share", "dtype"))
def followed(reference: nnx.State, weights: nnx.State, share: float, dtype: jnp.dtype) -> nnx.State:
    """The reference model moved by a share of its way to the policy, in arrays of its own."""
    if share == 1:
        return jax.tree.map(jnp.copy, convert_dtype(weights, dtype))
    return convert_dtype(jax.tree.map(lambda old, new: old + share * (new - old), reference, weights), dtype)


def run_grpo(
    trainer: GRPOTrainer,
    prompts: grain.DatasetIterator,
    *,
    folder: Path,
    log: MetricLog,
    evaluate: Callable[[nnx.State], float] | None = None,
) -> GRPOState:
    """The whole stage; it goes on from its newest checkpoint if it has one.

    Args:
        trainer: of the model.
        prompts: endless batches of prompts, `prompts_per_step` each.
        folder: of the run.
        log: of the run.
        evaluate: accuracy of weights in the sampler's layout on held-out questions, for every `eval_every` steps.

    Returns:
        The state after the last step.
    """
    config = trainer.config
    samples = SampleLog(folder, every=config.samples_every)
    went_on = False

    def step(state: GRPOState, first: list[Prompt], number: int) -> tuple[GRPOState, Mapping[str, float]]:
        nonlocal went_on
        if not went_on:
            samples.truncate(_STAGE, number)
            went_on = True
        drawn = [first]
        # What dynamic sampling draws beyond the first moves the iterator, and so is in the position that is saved.
        learned = trainer.step(state, lambda: drawn.pop() if drawn else next(prompts), number)
        values = learned.metrics
        if evaluate is not None and (number + 1) % config.eval_every == 0:
            values["eval/accuracy"] = evaluate(trainer.policy(learned.state))
        if samples.wants(number + 1):
            advantages = trainer.advantages(learned.rollout.rewards, number, learned.rollout.parts)
            samples.write(number + 1, sample_groups(learned.rollout, advantages, prompts=_SHOWN), _STAGE)
        if number == 0 and distributed.is_main() and (explanation := explain_first_loss(values)):
            print(explanation)
        return learned.state, values

    stage = Stage(
        name=_STAGE,
        steps=config.steps,
        save_every=config.save_every,
        shown=_BAR,
        profile_steps=config.profile_steps,
    )
    return run_stage(stage, trainer.first_state(), prompts, step, folder=folder, log=log)


_STAGE = "grpo"
_SHOWN = 4  # prompts in an entry of the table of samples
_BAR = {
    "reward": "reward",
    "rewards/accuracy/mean": "accuracy",
    "completions/mean_length": "length",
    "kl": "kl",
    "entropy": "entropy",
    "eval/accuracy": "held-out",
}
