"""The settings of `sft`, and what its run's folder holds of them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.commands.run_options import LoggingOptions, MeshOptions, whole_paths
from deepseek_jax.commands.settings_file import settings_text, values_of, with_values
from deepseek_jax.data.masked_rows import ConversationConfig
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.sharding import AXES
from deepseek_jax.train.runs import RunSettings
from deepseek_jax.train.sft_config import SFTConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run; it gets metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json, report.html.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
            A run's own config.toml repeats it.
        seed: of weights, of the rows that are held out, and of the order; the same seed gives the same run.
        model: Hugging Face or converted folder to start from, or a name on the hub; without it a small model is made
            from nothing and learns generated conversations, with numbers that suit it.
        mtp_modules: modules for multi-token prediction that the small model has and learns too: what
            `generate --speculate mtp` guesses with. A model to start from has its own.
        conversations: What is learnt.
        held_out: as `data`, for the loss before, in between and after.
        eval_rows: rows of `data` to hold out by chance where `held_out` names none; None takes a twentieth of them, at
            most 256.
        sft: How it is learnt.
        logging: Where numbers go beside metrics.jsonl and TensorBoard.
        mesh: How the model is divided over devices.
        save_dtype: dtype of the model's folder; auto is that of the model to start from, and float32 without one.
    """

    output: Path = Path("runs/sft")
    config: Path | None = None
    seed: int = 0
    model: Path | None = None
    mtp_modules: int = 0
    conversations: Annotated[ConversationConfig, tyro.conf.arg(name="data")] = ConversationConfig()
    held_out: tuple[str, ...] = ()
    eval_rows: int | None = None
    sft: Annotated[SFTConfig, tyro.conf.arg(name="training")] = field(default_factory=SFTConfig)
    logging: LoggingOptions = LoggingOptions()
    mesh: MeshOptions = MeshOptions()
    save_dtype: Precision = "auto"

    def __post_init__(self) -> None:
        if self.eval_rows is not None and self.eval_rows < 0:
            raise ValueError(f"eval_rows: got {self.eval_rows}, wanted 0, for none, or more")
        if self.mtp_modules < 0 or (self.mtp_modules and self.model is not None):
            wanted = "0 or more" if self.model is None else "it without --model, which has its own or none"
            raise ValueError(f"mtp_modules: got {self.mtp_modules}, wanted {wanted}")


# The options that the short help shows, and those that defaults depend on.
COMMON = (
    *("output", "config", "model", "data", "columns", "chat", "max_length", "held_out", "eval_rows", "epochs"),
    *("batch_size", "pack", "lr", "micro_batches", "lora_rank", "mesh_fsdp", "save_dtype", "wandb_project"),
)
DECIDING = ("model",)
# What suits the small model, where nothing else is given: it learns from nothing, and quickly.
TOY: dict[str, Any] = {"batch_size": 32, "epochs": 3.0, "lr": 3e-3, "warmup": 20, "bias_gamma": 1e-3, "eval_every": 25}
# What may change when a run goes on, because its weights do not depend on it. `steps`, of the epochs, may grow.
FREE = {"output", "model", "epochs", "wandb_project", "wandb_offline", "save_dtype", "remat", "profile_steps"}
FREE |= {"eval_every", "save_every", *(f"mesh_{axis}" for axis in AXES)}
REMEDIES = {"lr", "skip_grad_norm"}


def defaults(given: Mapping[str, Any]) -> Config:
    """The settings that a run begins with where nothing else is said: those of the library, or the toy's."""
    return with_values(Config(), TOY if given.get("model") in (None, "None") else {})


def run_settings(config: Config, steps: int) -> RunSettings:
    base = None if config.model is None else fingerprint(config.model)
    plain = with_values(Config(), {} if config.model else TOY)
    return RunSettings(_settings(config, steps), _settings(plain, plain.sft.steps or 1), FREE, base, REMEDIES)


def _settings(config: Config, steps: int) -> dict[str, Any]:
    """All settings by the names of their options; files by their whole paths."""
    flat = json.loads(json.dumps(values_of(_whole(config)), default=str))
    del flat["config"]
    return flat | {"steps": steps, "dtype": dtype_of(config.sft.dtype).name}


def _whole(config: Config) -> Config:
    """The same with the whole paths of files, which hold from any folder."""
    return with_values(config, whole_paths(values_of(config), lists=("data", "held_out"), single=("model",)))


def repeatable(config: Config) -> str:
    """config.toml: given as --config it repeats the run."""
    return settings_text(dataclasses.replace(_whole(config), config=None), Config())
