"""Settings of a GRPO stage, and what of them does not go together."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from deepseek_jax.checkpoint.adapters import adapted_paths
from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig
from deepseek_jax.model.precision import Precision
from deepseek_jax.rl.loss_config import GRPOLossConfig
from deepseek_jax.train.loop import profiled_steps
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.train.update_settings import lora_of, step_config_of

Advantage = Literal["group", "rloo", "reinforce", "reinforce_baseline"]


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
        at_once: questions sampled at a time, the others as answers end; None samples as many as there are slots for.
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
        share_prompts: samples of a group lie in a row behind one copy of their prompt, as many as save work, in an
            update and in scoring. It changes no loss. Updates that split groups share nothing without pack.
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
    advantage: Advantage = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
    lr: float = 1e-6
    warmup: int = 5
    updates_per_rollout: int = 1
    num_iterations: int = 1
    micro_batches: int = 1
    pack: bool = False
    share_prompts: bool = True
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
        if not 0 < self.temperature:
            raise ValueError(f"temperature: got {self.temperature}, wanted more than 0: groups must differ")
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"reference_mixup: got {self.reference_mixup}, wanted more than 0, at most 1")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once: got {self.at_once}, wanted at least 1 question, or None for all")

    def _check_combinations(self) -> None:
        if self.advantage not in get_args(Advantage):
            raise ValueError(f"advantage: got {self.advantage!r}, wanted one of {', '.join(get_args(Advantage))}")
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
        return step_config_of(self)

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapter to train, if one is."""
        return lora_of(self)


_COUNTS = (
    *("steps", "prompts_per_step", "sampling_rounds", "updates_per_rollout", "num_iterations", "micro_batches"),
    *("reference_every", "eval_every", "save_every", "samples_every"),
)
