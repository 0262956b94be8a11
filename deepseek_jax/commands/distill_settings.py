"""The settings of `distill`: options by groups, what of them contradicts each other, and R1's rates by size."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands import sft_settings
from deepseek_jax.commands.run_options import LoggingOptions, SamplingMeshOptions, whole_paths
from deepseek_jax.commands.settings_file import settings_text, values_of, with_values
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.masked_rows import ConversationConfig
from deepseek_jax.data.prompts import DataConfig, SourceConfig
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.plan.weights import parameters
from deepseek_jax.train.distill_loss import DistillConfig
from deepseek_jax.train.runs import RunSettings
from deepseek_jax.train.sft_config import SFTConfig

MOST_TOKENS = 8_192
"""New tokens that a sample has by default at most."""


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Who teaches.

    Args:
        teacher: Hugging Face or converted folder, or a name on the hub; with --loss reverse-kl one or several. For its
            text alone, also the address of a server that speaks OpenAI's /v1/chat/completions.
        teacher_samples: files with a conversation in every row, as `sft` reads them: what a teacher wrote, in the
            place of drawing it from --data.
        teacher_quantization: of a teacher that writes: projections in fp8, int8 or int4.
        server_model: a server's name of the teacher; None takes the first that it names.
        server_key: name of the environment variable that holds the server's key.
    """

    teacher: tuple[str, ...] = ()
    teacher_samples: tuple[str, ...] = ()
    teacher_quantization: Quantization = "none"
    server_model: str | None = None
    server_key: str | None = None

    @property
    def server(self) -> str | None:
        """The address of the teacher's server, where it is one."""
        return next((name for name in self.teacher if name.startswith(("http://", "https://"))), None)


@dataclass(frozen=True, kw_only=True)
class AskedOptions:
    """What teacher or student are asked.

    Args:
        data: files (.jsonl, .jsonl.gz, .json, .csv, .parquet), folders or patterns of such, or hub data sets
            (owner/name:config), with a question in every row; answers are not looked at.
        question_columns: of `data`; without it the usual names are found.
        prompt: what is asked; {question} stands for the question.
        system: text that conversations begin with.
        chat: put prompts into the chat template of whoever answers; base models, which have none, want --no-chat.
        prompts: so many, the first ones after duplicates are left out; None takes all.
        samples: of each prompt.
        sample_temperature: of sampling; None is 0.6 for a teacher (R1's) and 1 for a student, who samples on-policy.
        sample_top_p: of sampling; None is 0.95 for a teacher and 1 for a student.
        max_new_tokens: that a sample may have, no more than the context has room for.
        at_once: samples drawn at a time.
    """

    data: tuple[str, ...] = ()
    question_columns: tuple[str, ...] = ()
    prompt: str = "{question}"
    system: str | None = None
    chat: bool = True
    prompts: int | None = None
    samples: int = 1
    sample_temperature: float | None = None
    sample_top_p: float | None = None
    max_new_tokens: int = MOST_TOKENS
    at_once: int = 64

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "at_once"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt: got {self.prompt!r}, wanted {{question}} somewhere in it")
        if self.system is not None and not self.chat:
            raise ValueError("system: got it with --no-chat, wanted a chat, which it begins; leave one out")
        self.sampling((), on_policy=False)

    def sampling(self, stop_ids: tuple[int, ...], *, on_policy: bool, most: int | None = None) -> SamplingConfig:
        """How samples are drawn: a teacher's, or a student's own; `most` new tokens."""
        temperature, top_p = (1.0, 1.0) if on_policy else (0.6, 0.95)
        try:
            return SamplingConfig(
                max_new_tokens=min(self.max_new_tokens, most or self.max_new_tokens),
                temperature=temperature if self.sample_temperature is None else self.sample_temperature,
                top_p=top_p if self.sample_top_p is None else self.sample_top_p,
                stop_ids=stop_ids,
            )
        except ValueError as problem:
            message = str(problem)
            for name in ("temperature", "top_p"):
                message = f"sample_{message}" if message.startswith(name) else message
            raise ValueError(message) from None

    def config(self) -> DataConfig:
        """As the data's own settings."""
        given = {"question_columns": self.question_columns, "need_answer": False}
        return DataConfig(sources=tuple(SourceConfig(name=name, **given) for name in self.data))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run; it gets samples.jsonl and rows.jsonl of a teacher that writes, metrics.jsonl,
            tensorboard/, checkpoints/, model/, summary.json, report.html.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
            A run's own config.toml repeats it.
        seed: of samples, of the rows that are held out, and of the order; the same seed gives the same run.
        student: Hugging Face or converted folder to train, or a name on the hub.
        taught_by: Who teaches.
        asked: What teacher or student are asked, and how they answer.
        loss: What the student learns from.
        max_length: tokens that a row to learn may have; None is the context of student and teacher, at most 32,768.
        eval_rows: rows to hold out by chance; None takes a twentieth of them, at most 256.
        sft: How it is learnt.
        logging: Where numbers go beside metrics.jsonl and TensorBoard.
        mesh: How models are divided over devices.
        save_dtype: dtype of the model's folder; auto is that of the student to start from.
    """

    output: Path = Path("runs/distill")
    config: Path | None = None
    seed: int = 0
    student: Path | None = None
    taught_by: Annotated[TeacherOptions, tyro.conf.arg(name="teacher")] = TeacherOptions()
    asked: Annotated[AskedOptions, tyro.conf.arg(name="data")] = AskedOptions()
    loss: Annotated[DistillConfig, tyro.conf.arg(name="objective")] = DistillConfig()
    max_length: int | None = None
    eval_rows: int | None = None
    sft: Annotated[SFTConfig, tyro.conf.arg(name="training")] = field(default_factory=SFTConfig)
    logging: LoggingOptions = LoggingOptions()
    mesh: SamplingMeshOptions = SamplingMeshOptions()
    save_dtype: Precision = "auto"

    @property
    def draws(self) -> bool:
        """Whether a teacher writes what is learnt."""
        return self.loss.loss != "reverse-kl" and not self.taught_by.teacher_samples

    def of_sft(self, rows: Sequence[str], most: int) -> sft_settings.Config:
        """What fine-tuning on rows is set to; `most` tokens a row fit student and teacher."""
        if self.max_length is not None and self.max_length > most:
            raise ValueError(f"max_length: got {self.max_length}, wanted at most {most}, the context that models have")
        longest = self.max_length or min(most, 32_768)
        conversations = ConversationConfig(data=tuple(rows), chat=self.asked.chat, max_length=longest)
        same = ("output", "seed", "eval_rows", "sft", "logging", "mesh", "save_dtype")
        given = {name: getattr(self, name) for name in same}
        return sft_settings.Config(model=self.student, conversations=conversations, **given)


COMMON = (
    *("output", "config", "student", "teacher", "teacher_samples", "data", "chat", "samples", "max_new_tokens"),
    *("loss", "temperature", "max_length", "epochs", "batch_size", "pack", "lr", "micro_batches", "lora_rank"),
    *("mesh_fsdp", "save_dtype", "wandb_project"),
)
DECIDING = ("student", "loss")
# As of fine-tuning. Names of models are free, their contents not.
FREE = sft_settings.FREE | {"student", "teacher", "server_key", "at_once", "serve_expert", "serve_tensor"}
FREE |= {"serve_unrolled"}
# R1's peaks by billions of parameters: arXiv 2501.12948, "Training details of distillation".
_RATES = {"qwen2": {1.5: 1e-4, 7.6: 8e-5, 14.8: 7e-5, 32.8: 6e-5}, "llama": {8.0: 5e-5, 70.6: 2e-5}}
_DISTILLED = {"batch_size": 64, "epochs": 2.0}


def defaults(given: Mapping[str, Any]) -> Config:
    """The settings that a run begins with where nothing else is said: R1's for a student of this size."""
    student = given.get("student")
    if student in (None, "None") or given.get("loss") == "reverse-kl":
        return with_values(Config(), _DISTILLED)
    return with_values(Config(), _DISTILLED | {"lr": rate_of(load_config(model_folder(student, weights=False)))})


def rate_of(architecture: ModelConfig) -> float:
    """The learning rate that R1's students had whose size is the nearest, Llamas' among Llamas."""
    published = _RATES.get(architecture.model_type, _RATES["qwen2"])
    size = parameters(architecture).main / 1e9
    return published[min(published, key=lambda of: abs(math.log(of / size)))]


def check(config: Config) -> None:
    """Refuse what is missing or contradicts itself."""
    by, loss = config.taught_by, config.loss.loss
    if config.student is None:
        raise ValueError("student: got none, wanted a model's folder: --student FOLDER")
    if not by.teacher and (loss != "sequence" or not by.teacher_samples):
        raise ValueError("teacher: got none, wanted a model's folder or a server's address: --teacher FOLDER")
    if bool(config.asked.data) == bool(by.teacher_samples):
        got = "both" if by.teacher_samples else "neither"
        raise ValueError(f"data: got {got} of --data and --teacher-samples, wanted one: prompts, or what is answered")
    if loss == "sequence" and by.teacher and by.teacher_samples:
        raise ValueError("teacher: got it beside --teacher-samples, which is all that --loss sequence wants")
    if loss == "reverse-kl" and by.teacher_samples:
        raise ValueError("teacher_samples: got some with --loss reverse-kl, for which the student samples; give --data")
    if loss != "reverse-kl" and len(by.teacher) > 1:
        raise ValueError(f"teacher: got {len(by.teacher)} with --loss {loss}, wanted one; several want reverse-kl")
    if loss != "sequence":
        config.loss.divergence(len(by.teacher))
        if by.server is not None:
            raise ValueError(
                f"teacher: got a server with --loss {loss}, wanted a folder: a server has no logits to give; or take "
                "--loss sequence"
            )
        if config.sft.mtp_weight:
            raise ValueError(f"mtp_weight: got {config.sft.mtp_weight} with --loss {loss}, wanted 0: logits teach none")


def run_settings(config: Config, teachers: Sequence[str], steps: int) -> RunSettings:
    """The settings as a run's folder keeps them, with what the teachers are known by."""
    values, plain = (_values(of, steps) for of in (config, with_values(Config(), _DISTILLED)))
    names = {"taught_by": list(teachers)}
    return RunSettings(values | names, plain | names, FREE, fingerprint(config.student), sft_settings.REMEDIES)


def _values(config: Config, steps: int) -> dict[str, Any]:
    flat = json.loads(json.dumps(values_of(whole(config)), default=str))
    del flat["config"]
    return flat | {"steps": steps, "dtype": dtype_of(config.sft.dtype).name}


def whole(config: Config) -> Config:
    """The same with the whole paths of files, which hold from any folder."""
    lists = ("data", "teacher", "teacher_samples")
    return with_values(config, whole_paths(values_of(config), lists=lists, single=("student",)))


def repeatable(config: Config) -> str:
    """config.toml: given as --config it repeats the run."""
    return settings_text(dataclasses.replace(whole(config), config=None), Config())
