"""Settings of the GRPO loss and its variants, and what of them does not go together."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["k3", "k2", "unbiased"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """Settings of the loss, under the names that TRL's users know.

    Args:
        loss_type: what a token's loss is, and how tokens are added up. A sample's mean is over its own tokens;
            "the batch" is the whole one, however it is cut into parts.
            "grpo": clipped; mean over samples of a sample's mean (DeepSeekMath, R1).
            "dapo", "bnpo": clipped; mean over the tokens of the batch.
            "dr_grpo": clipped; sum over tokens / (samples x max_completion_length).
            "luspo": clipped; mean over samples of a sample's sum. At the sequence level only.
            "cispo": -min(ratio, epsilon_high) A log pi, no gradient through the ratio; mean over tokens.
            "sapo": a sigmoid gate in place of the clip; mean over samples of a sample's mean.
            "vespo": -phi(w) A log pi, no gradient through phi, which is exp(l) w^k exp(-l w), 1 at w = 1; w is the
            sample's ratio, the product of its tokens', times the weights against the sampler if any; mean over tokens.
        max_completion_length: tokens; what dr_grpo divides by, which no other type looks at.
        importance_sampling_level: "token", or "sequence": one ratio a sample, exp of its mean log-ratio (GSPO).
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high; None means epsilon. With cispo it is the largest ratio itself.
        delta: dual clip: where A < 0, the ratio counts as delta at most. Above 1 + epsilon_high.
        sapo_temperature_pos, sapo_temperature_neg: of the gate where A > 0, and elsewhere.
        vespo_k_pos, vespo_lambda_pos: k and l of phi where A >= 0.
        vespo_k_neg, vespo_lambda_neg: and elsewhere.
        beta: weight of the KL term towards the reference model.
        kl_estimator: "k3", "k2", or "unbiased": k3 times the token's ratio (V3.2). See `rl.kl`.
        use_bias_correction_kl: k3 times the ratio of the level: the token's, which is "unbiased", or the sample's.
        top_entropy_quantile: share of the batch's tokens, those of highest entropy, whose policy term counts, and
            whose entropy the bonus is of; the KL is of all. 1: all (arXiv 2506.01939 recommends 0.2).
        entropy_coef: weight of the mean entropy of the batch's tokens, which is taken off the loss.
        use_adaptive_entropy: after each update that weight, from `entropy_coef` on, rises by `entropy_coef_delta`
            where the entropy was at most `entropy_target` nats, else falls by it; it counts only after an update whose
            entropy was at most the target, and so not in the first (`rl.entropy`).
        entropy_coef_min, entropy_coef_max: bounds of the moving weight.
        off_policy_mask_threshold: nats; the policy term is dropped where A < 0 and the sample's mean of
            log pi_sampler - log pi_theta is above it (V3.2). None: nothing is dropped.
        importance_sampling_clip_max, importance_sampling_clip_min: bounds, around 1, of the weight
            pi_old / pi_sampler on the policy term. Both None: no such weight.
        importance_sampling_mode: a weight a "token" or a "sequence" (the product of its tokens'), which outside the
            bounds is put on the bound ("truncate") or to 0 ("mask").

    Raises:
        ValueError: a number out of its range, or settings that contradict each other.

    Source: DeepSeekMath arXiv 2402.03300, R1 2501.12948, V3.2 2512.02556 section 3.1, DAPO 2503.14476, Dr. GRPO
    2503.20783, GSPO 2507.18071, CISPO 2506.13585, SAPO 2511.20347, LUSPO 2602.05261, VESPO 2602.10693, Skywork-OR1
    2505.22312; names and meanings of TRL 1.16, trl/trainer/grpo_trainer.py, with which tests/rl/test_loss_oracle.py
    compares.

    Differs from TRL: bnpo divides by the tokens of the whole batch, hence is dapo: TRL's divides by those of each
    micro-batch, so that its gradient depends on the cut. For the same reason the tokens of highest entropy are those
    of the whole batch (`rl.entropy.high_entropy`). The importance_sampling settings are TRL's vllm_importance_sampling
    ones. Refused where TRL warns or accepts: sums over tokens, and vespo, at the sequence level, luspo at the token
    level, cispo without epsilon_high (TRL would cap ratios at 0.2), a delta within the clip range. The defaults are
    DeepSeekMath's, not TRL's.
    """

    loss_type: LossType = "grpo"
    max_completion_length: int | None = None
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    beta: float = 0.04
    kl_estimator: KLEstimator = "k3"
    use_bias_correction_kl: bool = False
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    entropy_coef_delta: float = 0.005
    entropy_target: float = 0.2
    off_policy_mask_threshold: float | None = None
    importance_sampling_clip_max: float | None = None
    importance_sampling_clip_min: float | None = None
    importance_sampling_mode: CorrectionMode = "token_truncate"

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_combinations()

    @property
    def upper(self) -> float:
        """1 + the upper epsilon."""
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def corrects_sampler(self) -> bool:
        """Whether a weight pi_old / pi_sampler is asked for."""
        return self.importance_sampling_clip_max is not None or self.importance_sampling_clip_min is not None

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the entropy is part of the loss, now or later."""
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    def _check_names(self) -> None:
        if self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: got 'k1', wanted 'k3', 'k2' or 'unbiased'; k1's gradient is 0 on average on-policy"
            )
        choices = {
            "loss_type": LossType,
            "importance_sampling_level": Level,
            "kl_estimator": KLEstimator,
            "importance_sampling_mode": CorrectionMode,
        }
        for name, choice in choices.items():
            if (got := vars(self)[name]) not in get_args(choice):
                raise ValueError(f"{name}: got {got!r}, wanted one of {', '.join(get_args(choice))}")

    def _check_numbers(self) -> None:
        length = self.max_completion_length
        if length is not None and not 1 <= length < math.inf:
            raise ValueError(f"max_completion_length: got {length}, wanted at least 1 token")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"epsilon: got {self.epsilon}, wanted 0 to 1; for a wider range above (R1's 10) set epsilon_high"
            )
        for name in _FROM_ZERO:
            if (got := vars(self)[name]) is not None and not 0 <= got < math.inf:
                raise ValueError(f"{name}: got {got}, wanted a finite number from 0")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            if not 0 < (got := vars(self)[name]) < math.inf:
                raise ValueError(f"{name}: got {got}, wanted a finite number above 0")
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile: got {self.top_entropy_quantile}, wanted 0 to 1, which is all tokens"
            )
        most, least = self.importance_sampling_clip_max, self.importance_sampling_clip_min
        if most is not None and not 1 <= most < math.inf:
            raise ValueError(
                f"importance_sampling_clip_max: got {most}, wanted a finite number from 1, the exact weight"
            )
        if least is not None and not 0 <= least <= 1:
            raise ValueError(f"importance_sampling_clip_min: got {least}, wanted 0 to 1, the exact weight")

    def _check_combinations(self) -> None:
        kind = self.loss_type
        if kind == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: got None, wanted the sampler's limit; dr_grpo divides by it")
        if self.importance_sampling_level == "sequence" and kind in ("bnpo", "dr_grpo", "dapo", "cispo", "vespo"):
            raise ValueError(
                f"importance_sampling_level: got 'sequence' with {kind}, wanted 'token': {kind} would weigh a "
                "sequence's one ratio by its length; for GSPO take loss_type 'grpo'"
            )
        if self.importance_sampling_level == "token" and kind == "luspo":
            raise ValueError("importance_sampling_level: got 'token' with luspo, wanted 'sequence'")
        if kind == "cispo" and not self.epsilon_high:
            raise ValueError(
                f"epsilon_high: got {self.epsilon_high} with cispo, wanted the largest ratio, above 0 (ScaleRL: 5.0)"
            )
        if self.delta is not None and kind in ("cispo", "sapo", "vespo"):
            raise ValueError(f"delta: got {self.delta} with {kind}, wanted None; {kind} has no clip to bound")
        if self.delta is not None and not self.delta > self.upper:
            raise ValueError(f"delta: got {self.delta}, wanted above 1 + epsilon_high = {self.upper}")
        if self.importance_sampling_mode != "token_truncate" and not self.corrects_sampler:
            raise ValueError(
                f"importance_sampling_mode: got {self.importance_sampling_mode!r} without bounds, wanted "
                "importance_sampling_clip_max or _min with it"
            )
        if kind == "vespo" and self.importance_sampling_mode.startswith("sequence"):
            raise ValueError(
                f"importance_sampling_mode: got {self.importance_sampling_mode!r} with vespo, wanted a token one: "
                "vespo multiplies the tokens' weights itself"
            )
        if self.use_bias_correction_kl and self.kl_estimator != "k3":
            raise ValueError(f"use_bias_correction_kl: got True with kl_estimator {self.kl_estimator!r}, wanted 'k3'")
        self._check_adaptive()

    def _check_adaptive(self) -> None:
        if not self.entropy_coef_min <= self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef_min: got {self.entropy_coef_min}, wanted at most entropy_coef_max, "
                f"{self.entropy_coef_max}"
            )
        changed = [name for name in _ADAPTIVE if getattr(self, name) != getattr(type(self), name)]
        if changed and not self.use_adaptive_entropy:
            raise ValueError(f"{changed[0]}: got {getattr(self, changed[0])}, wanted use_adaptive_entropy with it")


_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
_FROM_ZERO = (
    *("epsilon_high", "delta", "beta", "entropy_coef", "off_policy_mask_threshold", "vespo_k_pos", "vespo_k_neg"),
    *_ADAPTIVE,
)
