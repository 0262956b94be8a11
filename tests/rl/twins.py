"""The GRPO loss and the advantages once more: float64 NumPy, one token at a time, written from the papers.

Samples are ragged lists here; where they stand in padded or packed arrays is for the tests to choose.
"""

import cmath
import math
from typing import NamedTuple

import numpy as np

# Derivatives by a complex step, f(x + ih).imag / h: exact to rounding and, unlike differences, right beside a kink,
# because every choice below is made on real parts.
STEP = 1e-30


class Sample(NamedTuple):
    """Per-token float arrays [n] of a sample's completion."""

    logprobs: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    advantages: np.ndarray
    entropy: np.ndarray
    sampler: np.ndarray
    high: np.ndarray


def smaller(a: complex, b: complex) -> complex:
    return a if a.real <= b.real else b


def clip(x: complex, least: float, most: float) -> complex:
    return complex(least) if x.real < least else complex(most) if x.real > most else x


def ratios(sample: Sample, level: str) -> list[complex]:
    logs = [lp - old for lp, old in zip(sample.logprobs, sample.old, strict=True)]
    if level == "sequence":
        logs = [sum(logs) / len(logs)] * len(logs)
    return [cmath.exp(x) for x in logs]


def upper(config) -> float:
    return 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)


def acting(sample: Sample, config) -> np.ndarray:
    """Tokens whose policy term counts."""
    return sample.high if config.top_entropy_quantile < 1 else np.ones(len(sample.old), bool)


def phi(sample: Sample, A: float, config) -> float:
    """VESPO's weight of a sample, of its ratio to the sampler's."""
    log_w = sum(float(np.real(lp)) - old for lp, old in zip(sample.logprobs, sample.old, strict=True))
    log_w += sum(math.log(max(w, 1e-8)) for w in sampler_weights(sample, config))
    w = math.exp(min(max(log_w, math.log(1e-8)), 20))
    k, lam = (config.vespo_k_pos, config.vespo_lambda_pos) if A >= 0 else (config.vespo_k_neg, config.vespo_lambda_neg)
    return math.exp(lam) * w**k * math.exp(-lam * w)


def policy_of_token(ratio: complex, logprob: complex, A: float, config) -> complex:
    if config.loss_type == "sapo":
        tau = config.sapo_temperature_pos if A > 0 else config.sapo_temperature_neg
        return -A * 4 / tau / (1 + cmath.exp(-tau * (ratio - 1)))
    if config.loss_type == "cispo":
        return -min(ratio.real, config.epsilon_high) * A * logprob
    capped = ratio if config.delta is None or ratio.real <= config.delta else complex(config.delta)
    return -smaller(capped * A, clip(ratio, 1 - config.epsilon, upper(config)) * A)


def sampler_weights(sample: Sample, config) -> list[float]:
    """min(pi_old / pi_sampler, C) and its relatives."""
    least, most = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if least is None and most is None:
        return [1.0] * len(sample.old)
    unit, treatment = config.importance_sampling_mode.split("_")
    logs = [float(a - b) for a, b in zip(sample.old, sample.sampler, strict=True)]
    weights = [math.exp(sum(logs))] * len(logs) if unit == "sequence" else [math.exp(x) for x in logs]
    least, most = 0.0 if least is None else least, math.inf if most is None else most
    if treatment == "truncate":
        return [min(max(w, least), most) for w in weights]
    return [w if least <= w <= most else 0.0 for w in weights]


def dropped(sample: Sample, config) -> list[bool]:
    """V3.2's M = 0: negative advantage, and the sampler found the sample likelier than the policy does."""
    if config.off_policy_mask_threshold is None:
        return [False] * len(sample.old)
    gap = np.mean(sample.sampler - np.real(sample.logprobs))
    return [A < 0 and gap > config.off_policy_mask_threshold for A in sample.advantages]


def kl_of_token(logprob: complex, old: float, ref: float, config, ratio: complex = 1.0) -> complex:
    """`ratio`: of the level, with which use_bias_correction_kl corrects."""
    d = ref - logprob
    if config.kl_estimator == "k2":
        return d * d / 2
    k3 = cmath.exp(d) - d - 1
    if config.use_bias_correction_kl:
        return ratio * k3
    return cmath.exp(logprob - old) * k3 if config.kl_estimator == "unbiased" else k3


def kls(sample: Sample, config) -> list[complex]:
    rows = zip(sample.logprobs, sample.old, sample.ref, ratios(sample, config.importance_sampling_level), strict=True)
    return [kl_of_token(lp, old, ref, config, ratio) for lp, old, ref, ratio in rows]


def contribution(sample: Sample, config, samples: int, tokens: int, high: int) -> complex:
    """What a sample adds to the loss of a batch of so many samples and tokens, so many of high entropy."""
    n = len(sample.old)
    if not n:
        return 0.0
    terms = []
    rows = zip(
        ratios(sample, config.importance_sampling_level),
        sample.logprobs,
        sample.advantages,
        sampler_weights(sample, config),
        dropped(sample, config),
        sample.old,
        sample.ref,
        acting(sample, config),
        strict=True,
    )
    for ratio, logprob, A, weight, drop, old, ref, acts in rows:
        if config.loss_type == "vespo":
            policy = -phi(sample, A, config) * A * logprob
        else:
            policy = weight * policy_of_token(ratio, logprob, A, config)
        policy = policy if acts and not drop else 0.0
        terms.append(policy + (config.beta * kl_of_token(logprob, old, ref, config, ratio) if config.beta else 0.0))
    divisor = {
        "grpo": n * samples,
        "sapo": n * samples,
        "luspo": samples,
        "dr_grpo": samples * (config.max_completion_length or 0),
    }.get(config.loss_type, tokens)
    bonus = config.entropy_coef * sum(sample.entropy[acting(sample, config)]) / high
    return sum(terms) / divisor - bonus


def of_whole(batch: list[Sample], config) -> tuple[int, int, int]:
    """Samples, tokens, and tokens of high entropy."""
    return len(batch), max(sum(len(s.old) for s in batch), 1), max(int(sum(acting(s, config).sum() for s in batch)), 1)


def loss(batch: list[Sample], config) -> float:
    return sum(complex(contribution(s, config, *of_whole(batch, config))).real for s in batch)


def gradient(batch: list[Sample], config) -> list[np.ndarray]:
    """d loss / d logprobs, an array [n] a sample."""
    found = []
    for sample in batch:
        steps = STEP * 1j * np.eye(len(sample.old))
        moved = [sample._replace(logprobs=sample.logprobs + step) for step in steps]
        found.append(np.array([contribution(m, config, *of_whole(batch, config)).imag / STEP for m in moved]))
    return found


def metrics(batch: list[Sample], config) -> dict[str, float]:
    """What grpo_loss reports, for a batch in which every sample has tokens and a sampler of its own."""
    level = config.importance_sampling_level
    per_token = lambda of: [[v.real for v in of(s)] for s in batch]
    mean_of = lambda lists: float(np.mean(np.concatenate(lists)))
    mean_of_means = lambda lists: float(np.mean([np.mean(x) for x in lists]))
    average = mean_of_means if level == "sequence" else mean_of

    r = per_token(lambda s: ratios(s, level))
    A = [s.advantages for s in batch]
    apart = np.concatenate([np.abs(s.old - s.sampler) for s in batch])
    found = {
        "policy_loss": loss(batch, config)
        + config.entropy_coef * sum(sum(s.entropy[acting(s, config)]) for s in batch) / of_whole(batch, config)[2],
        "ratio": average(r),
        "kl": mean_of(per_token(lambda s: kls(s, config))) if config.beta else 0.0,
        "entropy": mean_of([s.entropy for s in batch]),
        "sampling/sampling_logp_difference/mean": float(apart.mean()),
        "sampling/sampling_logp_difference/max": float(apart.max()),
    }
    each = lambda test: [[test(x, a) for x, a in zip(rs, As, strict=True)] for rs, As in zip(r, A, strict=True)]
    if config.loss_type == "cispo":
        found["cispo_clip_ratio"] = mean_of(each(lambda x, a: x > config.epsilon_high and a > 0))
    elif config.loss_type == "vespo":
        found["vespo/phi_seq_mean"] = mean_of_means([[phi(s, a, config) for a in s.advantages] for s in batch])
    elif config.loss_type != "sapo":
        low = each(lambda x, a: x < 1 - config.epsilon and a < 0)
        high = each(lambda x, a: x > upper(config) and a > 0)
        found["clip_ratio/low_mean"], found["clip_ratio/high_mean"] = average(low), average(high)
        found["clip_ratio/region_mean"] = average(low) + average(high)
        found["clip_ratio/low_min"] = min(float(np.mean(x)) for x in low)
        found["clip_ratio/high_max"] = max(float(np.mean(x)) for x in high)
    if config.off_policy_mask_threshold is not None:
        found["sampling/off_policy_masked"] = mean_of_means([dropped(s, config) for s in batch])
    if config.importance_sampling_clip_max is not None or config.importance_sampling_clip_min is not None:
        weights = [sampler_weights(s, config) for s in batch]
        by_sample = config.importance_sampling_mode.startswith("sequence")
        found["sampling/importance_sampling_ratio/min"] = float(min(map(min, weights)))
        found["sampling/importance_sampling_ratio/max"] = float(max(map(max, weights)))
        found["sampling/importance_sampling_ratio/mean"] = (mean_of_means if by_sample else mean_of)(weights)
    return found


def deviation(values) -> float:
    """Of a sample: ddof 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def group_advantages(groups, scale: str, epsilon: float) -> np.ndarray:
    everything = [x for group in groups for x in group]
    rows = []
    for group in groups:
        by = {"group": lambda g=group: deviation(g), "batch": lambda: deviation(everything)}
        divisor = 1.0 if scale == "none" else by[scale]() + epsilon
        rows.append([(x - sum(group) / len(group)) / divisor for x in group])
    return np.array(rows)


def rloo_advantages(groups) -> np.ndarray:
    """Each reward less the mean of the others."""
    others = lambda group, i: [x for j, x in enumerate(group) if j != i]
    return np.array([[x - np.mean(others(group, i)) for i, x in enumerate(group)] for group in groups])


def reinforce_advantages(groups, epsilon: float) -> np.ndarray:
    everything = [x for group in groups for x in group]
    mean, std = sum(everything) / len(everything), deviation(everything)
    return np.array([[(x - mean) / (std + epsilon) for x in group] for group in groups])


def reinforce_baseline_advantages(groups, epsilon: float) -> np.ndarray:
    differences = [[x - sum(group) / len(group) for x in group] for group in groups]
    std = deviation([x for group in differences for x in group])
    return np.array(differences) / (std + epsilon)
