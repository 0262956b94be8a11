"""GRPO on one model: sample groups, grade, compare, update."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.adapters import new_adapter
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.lora import merge, with_adapter
from deepseek_jax.model.precision import computed, convert_dtype
from deepseek_jax.model.scoring import check_routes
from deepseek_jax.model.transfer import Transfer
from deepseek_jax.ops import metrics as ops_metrics
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
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.rl.rollout import Rollout, RolloutWorker, dynamic_sampling, rollout_metrics
from deepseek_jax.rl.shared_rows import Shape, shared_shape, work_of
from deepseek_jax.rl.slots import rows_multiple
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.optimizer import make_optimizer, schedule
from deepseek_jax.train.step import TrainState, init_state, make_adapter_step, make_train_step

_ADVANTAGES = {
    "group": group_advantages,
    "rloo": rloo_advantages,
    "reinforce": reinforce_advantages,
    "reinforce_baseline": reinforce_baseline_advantages,
}
PER_ROW = 16
"""Samples that a packed row holds at most."""
_COLUMNS_OF = 8  # what wider rows are a multiple of: attention cuts them in as many spans


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
        width: columns that a sample can take, at least the longest prompt and completion without its last token; fixed,
            so that an update compiles once. Where samples share prompts, rows may be wider.
        seed: of sampling.
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
        donate: bool = False,
        alter_rewards: Callable[[np.ndarray, int], np.ndarray] | None = None,
        take_metrics: Callable[[], Mapping[str, float]] = dict,
    ):
        self.config, self.model, self.layout, self.lora = config, model, model.layout, config.lora
        self.donate, self._dtype = donate, jnp.dtype(config.step_config.dtype)
        self._to_sampler = Transfer(generator.config, self.layout, generator.layout, self._dtype)
        self.width, self.seed, self.alter, self.take_metrics = width, seed, alter_rewards, take_metrics
        self.shape = self._shape()
        self.optimizer = make_optimizer(config.adamw, self._updates)
        self.rate = schedule(config.adamw, self._updates)
        self.sampler_settings = {"temperature": config.temperature, "repetition_penalty": config.repetition_penalty}
        self.score = {**self.sampler_settings, "keep_routing": config.keep_routing}
        scaled = {"scale": config.scale_rewards} if config.advantage == "group" else {}
        self._estimator = partial(_ADVANTAGES[config.advantage], **scaled)
        self.frozen = None if self.lora is None else computed(model.weights, self._dtype)
        objective = partial(grpo_objective, config=config.loss, **self.score)
        parts = model.graphdef, objective, self.optimizer, config.step_config
        if self.lora is None:
            self.update = make_train_step(*parts)
        else:
            self.update = partial(make_adapter_step(*parts, self.lora), frozen=self.frozen)
        self.rollout_worker = RolloutWorker(
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
        reference = self._updated_reference(weights, weights) if self.config.loss.beta else None
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
        return weights if self.lora is None else with_adapter(self.frozen, weights, self.lora)

    def step(self, state: GRPOState, draw: Callable[[], Sequence[Prompt]], number: int) -> StepResult:
        """One step: a rollout and its updates.

        Args:
            state: before the step; donated to the updates, so that its arrays are gone afterwards.
            draw: gives the next `prompts_per_step` prompts; dynamic sampling asks it again.
            number: of the step, from 0; with the seed it decides what is drawn.

        Returns:
            The state after the step, the samples it learned from, and its numbers.
        """
        start = time.perf_counter()
        everything, used = dynamic_sampling(
            self.rollout_worker,
            self.policy(state),
            draw,
            seed=self.seed,
            step=number,
            rounds=self.config.sampling_rounds,
        )
        rolled = time.perf_counter()
        state, found = self.learn(state, used, number)
        tokens = (
            total_tokens(state.tokens)
            + sum(len(p.tokens) for p in everything.prompts_of_samples())
            + sum(len(c.tokens) for c in everything.completions)
        )
        reference = state.reference
        if reference is not None and (number + 1) % self.config.reference_every == 0:
            reference = self._updated_reference(reference, state.train.weights)
        state = state._replace(reference=reference, tokens=_counted(tokens))
        values = rollout_metrics(everything) | ops_metrics.values(found) | self.take_metrics()
        values |= {
            "learning_rate": float(self.rate((number + 1) * (self._updates // self.config.steps) - 1)),
            "num_tokens": tokens,
            "sampling/rounds": len(everything.prompts) / len(used.prompts),
            "rollout_time": rolled - start,
            "update_time": time.perf_counter() - rolled,
        }
        if self.config.loss.has_entropy_bonus:
            control = state.entropy
            values["entropy_coef"] = self.config.loss.entropy_coef if control is None else float(control[0])
        return StepResult(state, used, values)

    def learn(self, state: GRPOState, rollout: Rollout, number: int) -> tuple[GRPOState, ops_metrics.Metrics]:
        """The updates of one rollout: `num_iterations` passes of `updates_per_rollout` batches.

        Args:
            state: before them; its training state is donated.
            rollout: the samples, with rewards [P, G].
            number: of the step, from 0.

        Returns:
            The state with what was trained and the entropy's control, and the metrics, unreduced. Metrics that compare
            sampler and trainer are those of the first update, for later ones meet weights that have moved.
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
        return state._replace(train=train, entropy=control), total | first

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
            of = [sample for sample in range(len(prompts)) if self._update_of(sample) == part]
            samples = [prompts[i] for i in of], [rollout.completions[i] for i in of], advantages[of]
            shape = self.shape
            if config.pack:
                shape = Shape(rows_multiple(len(of), self._parts), shape.width, max(PER_ROW, shape.per_row))
            options = {"width": shape.width, "mask_truncated": config.mask_truncated_completions}
            options["drawn"] = shape.per_row * config.max_new_tokens
            if shape.per_row == 1:
                yield make_batch(*samples, **options)
            else:
                rows = {"rows_of": shape.rows, "per_row": shape.per_row}
                yield pack(*samples, **options, **rows, share_prompts=config.share_prompts)

    def _update_of(self, sample: int) -> int:
        """The update of a pass that a sample is for: its whole group is for the same one where groups come out even."""
        parts = self.config.updates_per_rollout
        return (sample // self.config.group_size if self._whole_groups else sample) % parts

    @property
    def _whole_groups(self) -> bool:
        return self.config.prompts_per_step % self.config.updates_per_rollout == 0

    @property
    def _parts(self) -> int:
        """What an update's rows are divided into."""
        return self.config.micro_batches * self.layout.parts("batch")

    def _shape(self) -> Shape:
        """Rows of an update: those with which it computes least where samples share prompts, else one a sample."""
        config = self.config
        updates, samples = config.updates_per_rollout, config.prompts_per_step * config.group_size
        if not (config.share_prompts and self._whole_groups):
            return Shape(samples // updates, self.width, 1)
        found = shared_shape(
            work_of(self.model.config),
            groups=config.prompts_per_step // updates,
            group_size=config.group_size,
            prompt=max(1, self.width + 1 - config.max_new_tokens),
            completion=config.max_new_tokens,
            rows_of=self._parts,
            width_of=math.lcm(_COLUMNS_OF, self.layout.parts("tokens")),
        )
        return found._replace(width=max(found.width, self.width))

    def advantages(
        self, rewards_PG: np.ndarray, number: int, parts: Mapping[str, Sequence[float | None]] | None = None
    ) -> np.ndarray:
        """[P, G] from rewards, NaN where not known, for "normalize_then_sum" from their parts; 0 where not known."""
        altered = (lambda rewards: rewards) if self.alter is None else (lambda rewards: self.alter(rewards, number))
        if self.config.multi_objective_aggregation == "sum_then_normalize":
            return np.asarray(self._estimator(jnp.asarray(altered(rewards_PG))))
        weights = self.rollout_worker.reward.weights
        scores = [np.array(parts[name], np.float32).reshape(rewards_PG.shape) for name in weights]  # None is NaN
        scores = [altered(np.where(np.isnan(rewards_PG), np.nan, of)) for of in scores]
        of_weights = jnp.asarray(list(weights.values()), jnp.float32)
        return np.asarray(normalized_sum_advantages(jnp.asarray(np.stack(scores, axis=2)), of_weights))

    def _scored(self, batch: Batch, reference: nnx.State | None, policy: nnx.State | None) -> Batch:
        """With the log-probs of the reference, and of the policy where sampling is corrected for."""
        batch = self.layout.put(batch)
        frozen = partial(frozen_scores, self.model.graphdef, batch=batch, micro_batches=self.config.micro_batches)
        if policy is not None:
            own = frozen(policy, **self.score)
            batch = batch._replace(sampler_logprobs_BT=batch.old_logprobs_BT, old_logprobs_BT=own)
        if self.config.loss.beta:
            reference = self.frozen if reference is None else computed(reference, self._dtype)
            batch = batch._replace(ref_logprobs_BT=frozen(reference, **self.sampler_settings))
        return batch

    def _updated_reference(self, reference: nnx.State, weights: nnx.State) -> nnx.State:
        """As computed in, and in float32 where it is a moving average, whose steps are small."""
        share = self.config.reference_mixup
        return update_reference(reference, weights, share, self._dtype if share == 1 else jnp.dtype(jnp.float32))


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
def update_reference(reference: nnx.State, weights: nnx.State, share: float, dtype: jnp.dtype) -> nnx.State:
    """The reference model moved by a share of its way to the policy, in arrays of its own."""
    if share == 1:
        return jax.tree.map(jnp.copy, convert_dtype(weights, dtype))
    return convert_dtype(jax.tree.map(lambda old, new: old + share * (new - old), reference, weights), dtype)
