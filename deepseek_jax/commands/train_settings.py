"""The settings of a training run: options by groups, defaults for each kind of model, and what its folder holds."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.run_options import LoggingOptions, SamplingMeshOptions, whole_paths
from deepseek_jax.commands.settings_file import settings_text, values_of, with_values
from deepseek_jax.commands.toy import QUICK, TOY, ToyOptions
from deepseek_jax.data.prompts import DataConfig, EasyToHard, SourceConfig
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.rewards.own import own_rewards
from deepseek_jax.rewards.recipe import RewardConfig
from deepseek_jax.sharding import AXES
from deepseek_jax.text.think import opens_thought
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.runs import RunSettings, check_folder

LONGEST = 4_096
"""Tokens that a completion has by default at most, half of the model's context otherwise; R1-Zero began with 32,768."""
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
TAGS = (
    "{question}\nThink about it first, then answer: the reasoning process and the answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, i.e., <think> reasoning process here </think> <answer> answer here "
    "</answer>."
)
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""The template of R1-Zero, for base models: arXiv 2501.12948, Table 1."""
_OF_ALL = ("data", "eval_questions")  # what is not of given data alone


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained, and how it is asked.

    Args:
        model: Hugging Face or converted folder to start from, or a name on the hub; without it a small model is made
            from nothing.
        prompt: what a given model is asked; {question} stands for the question. None asks for the --format that is
            rewarded.
        chat: put the prompt into the model's chat template; base models, which have none, want --no-chat.
        save_dtype: dtype of the model's folder; auto is that of the model to start from, and float32 without one.
    """

    model: Path | None = None
    prompt: str | None = None
    chat: bool = True
    save_dtype: Precision = "auto"

    def __post_init__(self) -> None:
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(f"prompt: got {self.prompt!r}, wanted {{question}} somewhere in it")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The questions of a run; without `data` they are chains of arithmetic.

    Args:
        data: files (.jsonl, .jsonl.gz, .json, .csv, .parquet), folders or patterns of such, or hub data sets
            (owner/name:config); with a question and an answer in every row, as GSM8K has them.
        eval_questions: held-out questions for the accuracies before and after.
        question_columns: of `data`: what is asked. Without it the columns are found by the names in use: question,
            Body and Question, problem, prompt, messages.
        tasks: the benchmarks that the rows are of, for --accuracy task: one for each of `data`, in order, or one for
            all. A row is asked and graded as `evaluate` does it. Names are those of `evaluate`.
        answer_column: of `data`, with dots for what is inside a column. Without it: answer, ground_truth,
            reward_model.ground_truth, solution, ...
        tests_column: of `data`: the hidden tests for --accuracy code. Without it: tests, test_list, ...
        without_answer: what to do where a row has no final answer: refuse the data, or drop such rows and say how many.
        late_data: as `data`, but with no answers: questions that join late, to which accuracy does not apply (R1's
            second stage: general ones in the last 400 of 1,700 updates).
        late_step: steps before they do.
        late_weight: their share of the questions from then on, relative to that of each of `data`, which is 1.
        held_out: as `data`, to evaluate on; without it rows of `data` are drawn for that by the seed, at most a tenth
            of them.
        held_out_tasks: as `tasks`, of `held_out`; without it that one of `tasks`.
        held_out_question_columns: of `held_out`, where its names are others.
        held_out_answer_column: of `held_out`, where its name is another.
        held_out_tests_column: of `held_out`, where its name is another.
        pass_rates: JSON Lines of {"index", "pass_rate"} as measured; questions always or never solved are left out.
        difficulty_column: of `data`; numbers, or text such as "Level 3".
        min_difficulty: of the questions to train on.
        max_difficulty: of the questions to train on.
        max_prompt_tokens: longer questions are left out.
        easy_to_hard: train from easy to hard questions, shuffled among so many neighbours; None shuffles all.
    """

    data: tuple[str, ...] = ()
    eval_questions: int = 512
    question_columns: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    answer_column: str | None = None
    tests_column: str | None = None
    without_answer: Literal["refuse", "drop"] = "refuse"
    late_data: tuple[str, ...] = ()
    late_step: int = 0
    late_weight: float = 1.0
    held_out: tuple[str, ...] = ()
    held_out_tasks: tuple[str, ...] = ()
    held_out_question_columns: tuple[str, ...] = ()
    held_out_answer_column: str | None = None
    held_out_tests_column: str | None = None
    pass_rates: Path | None = None
    difficulty_column: str | None = None
    min_difficulty: float | None = None
    max_difficulty: float | None = None
    max_prompt_tokens: int | None = None
    easy_to_hard: int | None = None

    def __post_init__(self) -> None:
        if self.eval_questions < 1:
            raise ValueError(f"eval_questions: got {self.eval_questions}, wanted at least 1")
        if self.pass_rates is not None and len(self.data) != 1:
            raise ValueError(f"pass_rates: got rates by row with {len(self.data)} data sets, wanted one --data")
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        given = [name for name, value in vars(self).items() if value != plain[name] and name not in _OF_ALL]
        if given and not self.data:
            raise ValueError(f"{given[0]}: got a setting for data, but no --data; give both, or neither")
        if (late := [name for name in given if name.startswith("late_")]) and not self.late_data:
            raise ValueError(f"{late[0]}: got it without --late-data, whose it is; give both")
        _ = self._late  # refuses steps and weights that cannot be
        of_held_out = [name for name in given if name.startswith("held_out_")]
        if of_held_out and not self.held_out:
            raise ValueError(f"{of_held_out[0]}: got a setting for held-out data, but no --held-out; give both")

    @property
    def _late(self) -> list[SourceConfig]:
        joins = {"first_step": self.late_step, "weight": self.late_weight}
        return [SourceConfig(name=name, need_answer=False, **joins) for name in self.late_data]

    def config(self, *, need_answer: bool) -> DataConfig:
        """As the data's own settings. Where programs are graded by hidden tests, no answers are needed."""
        source = partial(
            SourceConfig,
            need_answer=need_answer,
            question_columns=self.question_columns,
            answer_column=self.answer_column,
            tests_column=self.tests_column,
        )
        of_held_out = {
            "question_columns": self.held_out_question_columns or self.question_columns,
            "answer_column": self.held_out_answer_column or self.answer_column,
            "tests_column": self.held_out_tests_column or self.tests_column,
        }
        return DataConfig(
            sources=(*(source(name=name, pass_rates=self.pass_rates) for name in self.data), *self._late),
            held_out=tuple(source(name=name, **of_held_out) for name in self.held_out),
            without_answer=self.without_answer,
            difficulty_column=self.difficulty_column,
            min_difficulty=self.min_difficulty,
            max_difficulty=self.max_difficulty,
            max_prompt_tokens=self.max_prompt_tokens,
            curriculum=None if self.easy_to_hard is None else EasyToHard(window=self.easy_to_hard),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run.

    Args:
        output: folder of the run; it gets metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json, report.html.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
            A run's own config.toml repeats it.
        seed: of weights, data and sampling; the same seed gives the same run.
        quick: a short run for a first look and for CI; a smaller cold start, few steps, few questions. What is given
            beside it counts.
        control: "shuffled" hands every reward to a random sample of its group: nothing should be learnt.
        base: What is trained, and how it is asked.
        questions: The questions; without --data they are chains of arithmetic.
        rewards: Which rewards count, and how much.
        grpo: The algorithm, GRPO.
        mesh: How the model is divided over devices.
        toy: Without --data or --model: chains of arithmetic, and a cold start on them.
        logging: Where numbers go beside metrics.jsonl and TensorBoard.
    """

    output: Path = Path("runs/r1_zero")
    config: Path | None = None
    seed: int = 0
    quick: bool = False
    control: Literal["none", "shuffled"] = "none"
    base: Annotated[ModelOptions, tyro.conf.arg(name="model")] = ModelOptions()
    questions: Annotated[DataOptions, tyro.conf.arg(name="data")] = DataOptions()
    rewards: RewardConfig = RewardConfig()
    grpo: Annotated[GRPOConfig, tyro.conf.arg(name="algorithm")] = field(default_factory=GRPOConfig)
    mesh: SamplingMeshOptions = SamplingMeshOptions()
    toy: ToyOptions = ToyOptions()
    logging: LoggingOptions = LoggingOptions()

    @property
    def prompt(self) -> str:
        """What a given model is asked."""
        if self.base.prompt is not None:
            return self.base.prompt
        if self.rewards.format == "boxed":
            return BOXED
        return TAGS if self.base.chat else R1_ZERO


# The options that the short help shows, and those that defaults depend on.
COMMON = (
    *("output", "config", "quick", "model", "chat", "data", "held_out", "eval_questions", "accuracy", "format"),
    *("reward", "weight_format", "steps", "prompts_per_step", "group_size", "max_new_tokens", "temperature", "lr"),
    *("micro_batches", "lora_rank", "beta", "loss_type", "mesh_fsdp", "wandb_project"),
)
DECIDING = ("model", "chat", "quick")
# What may change when a run goes on, because its weights do not depend on it: names, where and how it is computed, and
# how often it saves and reports. The model's name is free, but not its fingerprint. `steps` may be raised.
NAMES = {"output", "model", "quick", "wandb_project", "wandb_offline", "save_dtype"}
PLACE = {"remat", "at_once", "profile_steps", *(f"mesh_{axis}" for axis in AXES)}
PLACE |= {"serve_expert", "serve_tensor", "serve_unrolled"}
INTERVALS = {"save_every", "eval_every", "samples_every"}
# What may change too where numbers that were not finite ended the run: what such a run wants changed.
REMEDIES = {"lr", "cold_start_lr", "skip_grad_norm"}


# --- defaults ------------------------------------------------------------------------------------


def defaults(given: Mapping[str, Any]) -> Config:
    """The settings that a run begins with where nothing else is said: the papers' numbers, which are those of the
    library, for a given model what suits it, and without one the toy's.

    Args:
        given: of `DECIDING`, as far as they are given.
    """
    folder = given.get("model")
    values = (
        TOY if folder in (None, "None") else fitting(model_folder(folder, weights=False), chat=given.get("chat", True))
    )
    return with_values(Config(), values | (QUICK if given.get("quick") else {}))


def fitting(folder: Path, *, chat: bool) -> dict[str, Any]:
    """What suits a model: completions that its context has room for, and the format that its template begins.

    Raises:
        ValueError: a folder that holds no model.
    """
    tokenizer = Tokenizer.from_folder(folder)
    opened = False
    if chat and (tokenizer.chat_template or tokenizer.chat_encoding):
        asked = tokenizer.render([{"role": "user", "content": "1+1=?"}], add_generation_prompt=True)
        opened = opens_thought(asked)
    context = load_config(folder).max_position_embeddings
    return {"max_new_tokens": min(max(context // 2, 1), LONGEST), "format": "boxed" if opened else "tags"}


def stated(config: Config) -> list[str]:
    """What a run is set to, where options leave it to the kind of model, in a few lines."""
    grpo, given = config.grpo, config.base.model is not None
    kind = "a given model: the papers' numbers" if given else "a small model made from nothing: the toy task's numbers"
    lines = [
        f"settings of {kind}, but for what options and --config say",
        f"  {grpo.steps} steps of {grpo.prompts_per_step} questions x {grpo.group_size} samples of up to "
        f"{grpo.max_new_tokens} tokens, temperature {grpo.temperature:g}, lr {grpo.lr:g}, KL {grpo.loss.beta:g}",
    ]
    if given:
        lines[1] += f" (tokens by default: half of the model's context, at most {LONGEST})"
        asked = repr(config.prompt)
        if config.questions.tasks and config.base.prompt is None:
            asked = f"as {', '.join(config.questions.tasks)} asks"
        lines.append(f"  format {config.rewards.format}, {'a chat' if config.base.chat else 'plain text'}: {asked}")
    return lines


# --- what a run's folder holds -------------------------------------------------------------------


def check(config: Config) -> str | None:
    """Refuse a folder with a run that cannot go on with these settings; what `base_of` gives."""
    base = base_of(config)
    writes = ("model", "adapter") if config.grpo.lora_rank else ("model",)
    check_folder(config.output, run_settings(config, base), stage="grpo", writes=writes)
    return base


def base_of(config: Config) -> str | None:
    """What the model to start from is known by, if there is one."""
    if config.base.model is None:
        return None
    return fingerprint(config.base.model)


def run_settings(config: Config, base: str | None) -> RunSettings:
    """The settings as a run's folder keeps them, beside the defaults of that kind of run."""
    plain = with_values(Config(), {} if config.base.model else TOY)
    return RunSettings(settings(config), settings(plain), NAMES | PLACE | INTERVALS, base, REMEDIES)


def settings(config: Config) -> dict[str, Any]:
    """All settings that a run can be known by, under the names of their options."""
    flat = json.loads(json.dumps(values_of(whole(config)), default=str))
    flat["dtype"] = dtype_of(config.grpo.dtype).name  # what "auto" is here: elsewhere it may be another
    flat["prompt"] = config.prompt
    flat["reward"] = [f"{own.text} (content {own.digest})" for own in own_rewards(config.rewards.reward)]
    del flat["config"]
    return flat


def whole(config: Config) -> Config:
    """The same with the whole paths of files, which hold from any folder."""
    values = whole_paths(values_of(config), lists=("data", "late_data", "held_out"), single=("pass_rates", "model"))
    values["reward"] = tuple(own.text for own in own_rewards(config.rewards.reward))
    return with_values(config, values)


def repeatable(config: Config) -> str:
    """config.toml: given as --config it repeats the run."""
    return settings_text(dataclasses.replace(whole(config), config=None), Config())
