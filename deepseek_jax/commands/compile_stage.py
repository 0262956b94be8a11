"""What a stage of R1's recipe computes, by the paper's numbers: the step that `compile` is to prove."""

from typing import Literal, NamedTuple, get_args

from deepseek_jax.commands import evaluate, rejection
from deepseek_jax.commands.r1_presets import PAPER
from deepseek_jax.commands.settings_file import with_values
from deepseek_jax.generation.generator import BATCHES
from deepseek_jax.plan.compiled import Step
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.sft_config import SFTConfig

StageName = Literal["cold_start", "rl_1", "rejection", "sft", "rl_2", "evaluation"]


class StageStep(NamedTuple):
    """A step of a stage.

    step: which, for the compiler. batch: sequences of it, of an update those of one optimizer step; a sync has none.
    context: tokens of each at most; those of a prompt come on top of what is drawn after it. run: the settings that
    the stage learns by, None where it learns nothing in this step.
    """

    step: Step
    batch: int
    context: int
    run: SFTConfig | GRPOConfig | None = None


def stage_step(name: StageName, step: Step | None = None) -> StageStep:
    """A stage's update, or its decoding where it only samples; `step` names another one of its steps.

    Raises:
        ValueError: the stage has no such step.
    """
    steps = {found.step: found for found in _steps(name)}
    if step is not None and step not in steps:
        raise ValueError(f"step: got {step} of the stage {name}, wanted {' or '.join(steps)}")
    return steps[step or next(iter(steps))]


def _steps(name: StageName) -> list[StageStep]:
    """All steps of a stage, the one first that it is for."""
    if name not in get_args(StageName):
        raise ValueError(f"stage: got {name!r}, wanted one of {', '.join(get_args(StageName))}")
    options = PAPER[name]
    if name in ("cold_start", "sft"):
        learns = with_values(SFTConfig(), options)
        return [StageStep("train", learns.batch_size, options["max_length"], learns)]
    if name in ("rl_1", "rl_2"):
        learns = with_values(GRPOConfig(), options)
        samples, length = learns.prompts_per_step * learns.group_size, learns.max_new_tokens
        return [
            StageStep("grpo", samples // learns.updates_per_rollout, length, learns),
            StageStep("sync", 0, length, learns),
            StageStep("decode", min(BATCHES.max_num_seqs, samples), length),
        ]
    draws = with_values({"rejection": rejection, "evaluation": evaluate}[name].Config(), options)
    return [StageStep("decode", draws.engine.batch, draws.drawing.max_tokens)]
