"""The numbers of the recipe's stages, by the names of their commands' options: the paper's, and a laptop's."""

from pathlib import Path
from typing import Any

from deepseek_jax.rewards import preference

Options = dict[str, Any]
KINDNESS = f"{Path(preference.__file__)}:{preference.kindness.__name__}"

# DeepSeek-R1 (arXiv 2501.12948 v2), sections 2.2 and 2.3 and appendix B. A step here is a rollout: 8,192 outputs, in 16
# updates of 512 of one pass, so that 10,400 updates are 650 steps, and 400 between two references 25.
_PAPER_SFT: Options = {
    "epochs": 2.0,
    "batch_size": 128,
    "lr": 5e-5,
    "final_ratio": 0.1,
    "max_length": 32_768,
    "pack": True,
}
_PAPER_RL: Options = {
    "steps": 650,
    "prompts_per_step": 512,
    "group_size": 16,
    "updates_per_rollout": 16,
    "num_iterations": 1,
    "lr": 3e-6,
    "beta": 0.001,
    "epsilon": 1.0,  # no bound below
    "epsilon_high": 10.0,
    "temperature": 1.0,
    "max_new_tokens": 32_768,
    "reference_every": 25,
    "weight_accuracy": 1.0,
    "weight_format": 1.0,
    "weight_language": 1.0,
}
PAPER: dict[str, Options] = {
    "cold_start": _PAPER_SFT,
    "rl_1": _PAPER_RL,
    # samples a prompt and the temperature are not published
    "rejection": {"samples": 16, "temperature": 1.0, "top_p": 1.0, "max_tokens": 32_768, "max_paragraph": 2_000},
    "mixture": {"general_share": 0.25},
    "sft": _PAPER_SFT,
    # 1,700 updates, general data in the last 400 of them alone
    "rl_2": _PAPER_RL | {"steps": 106, "temperature": 0.7, "late_step": 81},
    # of a later report of DeepSeek's, which gives no numbers for it: R1's distillation's, as far as they are the same
    "distill": {"epochs": 2.0, "batch_size": 64, "lr": 1e-5},
    "evaluation": {"samples": 16, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768},
}

_SMALL_SFT: Options = {"batch_size": 32, "lr": 2e-3, "warmup": 20, "bias_gamma": 1e-3, "eval_rows": 32}
_SMALL_SFT |= {"pack": True, "max_length": 128, "loss_mean": "examples", "eval_every": 10_000, "save_every": 200}
_SMALL_RL: Options = {
    "prompts_per_step": 32,
    "group_size": 8,
    "max_new_tokens": 64,
    "pack": True,
    "lr": 2e-4,
    "beta": 0.001,
    "bias_gamma": 0.0,  # routes that move by themselves are noise here
    "loss_type": "dapo",  # a long right answer counts as much a token as a short one
    "scale_rewards": "batch",  # a group that differs in language alone counts less than one that differs in accuracy
    "language": "row",
    "weight_accuracy": 1.0,
    "weight_format": 0.3,
    "weight_language": 0.2,
    "difficulty_column": "level",
    "eval_questions": 128,
    "eval_every": 50,
    "save_every": 25,
}
LAPTOP: dict[str, Options] = {
    "questions": {"train": 3_000, "held_out": 400, "demonstrations": 3_000, "facts": 10_000}
    | {"mixed": 0.3, "guessed": 0.6}
    | {"easy": [1, 2, 3], "train_levels": [2, 3, 4], "held_out_levels": [3, 4]},
    "base": _SMALL_SFT | {"epochs": 5.0, "lr": 3e-3, "batch_size": 48},
    "cold_start": _SMALL_SFT | {"epochs": 7.0, "lr": 1e-3},
    "rl_1": _SMALL_RL | {"steps": 60},
    "rejection": {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "batch": 64, "limit": 2_400}
    | {"thought_language": "row", "keep": 3},
    "mixture": {"general_share": 0.25},
    "sft": _SMALL_SFT | {"epochs": 6.0, "batch_size": 48},
    "rl_2": _SMALL_RL | {"steps": 80, "temperature": 0.7, "late_step": 10, "late_weight": 0.25},
    "distill": {"epochs": 1.0, "batch_size": 64, "lr": 3e-4, "warmup": 5, "bias_gamma": 1e-3, "max_new_tokens": 64}
    | {"eval_rows": 32, "eval_every": 10_000, "save_every": 50},
    "evaluation": {"samples": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "batch": 64},
}
PUZZLES_ONLY = {"language", "difficulty_column", "thought_language"}
"""Options of the laptop's stages that other questions do not want."""
PRESETS = {"laptop": LAPTOP, "paper": PAPER}
