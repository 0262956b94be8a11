"""Fine-tune a model on conversations, or a tiny one on generated ones; what is learnt is what the assistant says."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from deepseek_jax import distributed
from deepseek_jax.checkpoint.adapters import save_adapter
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.folder import lay_out, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.checkpoint.owned import write_owned
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.options import command
from deepseek_jax.commands.run_options import LoggingOptions, MeshOptions, enter, saved_dtype, whole_paths
from deepseek_jax.commands.settings_file import settings_text, values_of, with_values
from deepseek_jax.commands.toy import small_config, small_model
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains, trace
from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.masked_rows import ConversationConfig, MaskedRows, open_rows, row_batches, rows_of
from deepseek_jax.model.precision import Precision, computed, dtype_of
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.sharding import AXES
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import RunSettings, check_folder, held_folder, room_needed, write_json
from deepseek_jax.train.sft import SFTTrainer, run_sft
from deepseek_jax.train.sft_config import SFTConfig
from deepseek_jax.train.step import TrainState

_LONGEST = 32_768  # tokens of a row in R1's stages of supervised fine-tuning
_MOST_PER_ROW = 64
_SHOWN = 8  # rows in the report


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
_TOY_CONVERSATIONS = 1_500
# What may change when a run goes on, because its weights do not depend on it. `steps`, of the epochs, may grow.
_FREE = {"output", "model", "epochs", "wandb_project", "wandb_offline", "save_dtype", "remat", "profile_steps"}
_FREE |= {"eval_every", "save_every", *(f"mesh_{axis}" for axis in AXES)}
_REMEDIES = {"lr", "skip_grad_norm"}


class Rows(NamedTuple):
    """What is learnt, and what is held out."""

    train: MaskedRows
    held_out: MaskedRows


def defaults(given: Mapping[str, Any]) -> Config:
    """The settings that a run begins with where nothing else is said: those of the library, or the toy's."""
    return with_values(Config(), TOY if given.get("model") in (None, "None") else {})


@command(Config, common=COMMON, deciding=DECIDING, defaults=defaults)
def main(config: Config) -> None:
    """Fine-tune a model on conversations; without --model and --data a tiny one on generated ones."""
    start = time.perf_counter()
    if (config.model is None) != (not config.conversations.data):
        given, other = ("--data", "--model") if config.model is None else ("--model", "--data")
        raise ValueError(f"{other[2:]}: got {given} without {other}; give both, or neither for the generated task")
    if config.model is not None:
        config = dataclasses.replace(config, model=model_folder(config.model))
    with room_needed(config.output), held_folder(config.output):
        architecture, tokenizer = _architecture(config)
        config.sft.check_model(architecture)
        rows = _rows(config, tokenizer, architecture)
        steps = config.sft.steps_of(len(rows.train))
        settings = distributed.on_main(lambda: _checked(config, steps))
        trainer = _trainer(config, architecture, tokenizer, rows, steps)
        run_id = distributed.on_main(lambda: enter(config.output, RunSettings(*settings), _repeatable(config)))
        with MetricLog(config.output, wandb=config.logging.wandb) as log:
            before = _before(config, trainer, rows)
            data = row_batches(rows.train, size=config.sft.batch_size, seed=config.seed)
            state = run_sft(trainer, data, folder=config.output, log=log, held_out=rows.held_out)
        _save(config, trainer, tokenizer, state, run_id)
        seconds = time.perf_counter() - start
        distributed.on_main(lambda: _report(config, trainer, tokenizer, rows, before, seconds))


# --- the folder -----------------------------------------------------------------------------------


def _checked(config: Config, steps: int) -> tuple:
    """The settings of the run; refuses a folder with one that cannot go on with them."""
    base = None if config.model is None else fingerprint(config.model)
    plain = with_values(Config(), {} if config.model else TOY)
    found = _settings(config, steps), _settings(plain, plain.sft.steps or 1), _FREE, base, _REMEDIES
    writes = ("model", "adapter") if config.sft.lora_rank else ("model",)
    check_folder(config.output, RunSettings(*found), stage="sft", writes=writes)
    return found


def _settings(config: Config, steps: int) -> dict[str, Any]:
    """All settings by the names of their options; files by their whole paths."""
    flat = json.loads(json.dumps(values_of(_whole(config)), default=str))
    del flat["config"]
    return flat | {"steps": steps, "dtype": dtype_of(config.sft.dtype).name}


def _whole(config: Config) -> Config:
    """The same with the whole paths of files, which hold from any folder."""
    return with_values(config, whole_paths(values_of(config), lists=("data", "held_out"), single=("model",)))


def _repeatable(config: Config) -> str:
    """config.toml: given as --config it repeats the run."""
    return settings_text(dataclasses.replace(_whole(config), config=None), Config())


# --- model and rows -------------------------------------------------------------------------------


def _architecture(config: Config) -> tuple[ModelConfig, Tokenizer]:
    if config.model is not None:
        return load_config(config.model), Tokenizer.from_folder(config.model)
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    return small_config(tokenizer, config.mtp_modules), tokenizer


def _rows(config: Config, tokenizer: Tokenizer, architecture: ModelConfig) -> Rows:
    """All rows, read and encoded, and what there is to say of them, said."""
    asked = config.conversations
    longest = _longest(config, architecture)
    if config.model is None:
        rows = rows_of(asked, tokenizer, _generated(config.seed))
    else:
        rows = open_rows(asked, tokenizer, max_length=longest)
    if config.held_out:
        found = Rows(rows, open_rows(asked, tokenizer, names=config.held_out, max_length=longest))
    else:
        count = min(len(rows) // 20, 256) if config.eval_rows is None else config.eval_rows
        if count >= len(rows):
            raise ValueError(f"eval_rows: got {count}, wanted fewer than the {len(rows)} rows there are")
        held_out, train = rows.split(count, seed=config.seed)
        found = Rows(train, held_out)
    highest = max(int(row.tokens.max()) for part in found for row in part)
    if highest >= architecture.vocab_size:
        raise ValueError(
            f"{config.model}: the tokenizer gives the id {highest}, wanted ids below the model's vocab_size "
            f"{architecture.vocab_size}; take both from the same checkpoint"
        )
    if distributed.is_main():
        for line in _told(config, found):
            print(distributed.printable(line))
    return found


def _longest(config: Config, architecture: ModelConfig) -> int:
    """Tokens that a row may have."""
    context, wanted = architecture.max_position_embeddings, config.conversations.max_length
    if wanted is None:
        return min(context, _LONGEST)
    if wanted > context:
        raise ValueError(f"max_length: got {wanted}, wanted at most {context}, the model's context")
    return wanted


def _told(config: Config, rows: Rows) -> list[str]:
    dropped = {line: None for part in rows for line in map(str, part.report)}
    noted = {f"note: {line}": None for part in rows for line in part.notes}
    steps, size = config.sft.steps_of(len(rows.train)), config.sft.batch_size
    return [
        *dropped,
        *noted,
        f"to learn: {rows.train.counts()}",
        f"held out: {rows.held_out.counts()}",
        f"{steps} updates of {size} rows, {steps * size / len(rows.train):.1f} epochs",
    ]


def _generated(seed: int) -> list[Conversation]:
    """Conversations of one or two questions each, answered step by step."""
    chains = draw_chains(_TOY_CONVERSATIONS * 2, terms=4, largest=9, operators="+", modulus=10, seed=seed)
    of = lambda chain: (
        {"role": "user", "content": chain.question},
        {"role": "assistant", "content": trace(chain, worked=True)},
    )
    twice = np.random.default_rng(seed).random(_TOY_CONVERSATIONS) < 0.5
    pairs = zip(chains[::2], chains[1::2], twice, strict=True)
    return [Conversation((*of(first), *of(second)) if two else of(first)) for first, second, two in pairs]


def _trainer(config: Config, architecture: ModelConfig, tokenizer: Tokenizer, rows: Rows, steps: int) -> SFTTrainer:
    layout = config.mesh.layout
    lengths = np.concatenate([part.lengths for part in rows])
    longest = _longest(config, architecture) if config.sft.pack else int(lengths.max())
    whole = int(np.lcm(32, layout.parts("tokens")))  # what differs little compiles to the same
    width = -(-(longest - 1) // whole) * whole
    if not config.sft.pack:
        layout.check_batch(config.sft.batch_size // config.sft.micro_batches, width)
    if config.model is None:
        model = lay_out(small_model(tokenizer, config.seed, config.mtp_modules), layout)
    else:
        # what an adapter leaves as it is needs no float32
        dtype = dtype_of(config.sft.dtype if config.sft.lora_rank else "float32")
        model = load_model(config.model, dtype=dtype, layout=layout)
    per_row = min(_MOST_PER_ROW, max(1, width // max(1, int(lengths.min()) - 1)))
    trainer = partial(SFTTrainer, config.sft, model, steps=steps, width=width, per_row=per_row)
    return trainer(seed=config.seed, donate=True)


# --- what is measured and left --------------------------------------------------------------------


def _before(config: Config, trainer: SFTTrainer, rows: Rows) -> dict[str, float]:
    """The loss of the held-out rows before training, which a resumed run reads back."""
    path = config.output / "loss_before.json"
    if not rows.held_out:
        return {}
    if not distributed.on_main(path.exists):
        found = trainer.evaluate_first(rows.held_out)
        distributed.on_main(lambda: write_json(path, found))
    return distributed.on_main(lambda: json.loads(path.read_text(encoding="utf-8")))


def _save(config: Config, trainer: SFTTrainer, tokenizer: Tokenizer, state: TrainState, run_id: str) -> None:
    """The model as a Hugging Face folder, and an adapter as PEFT has it."""
    base = config.model
    owned = partial(write_owned, run=run_id, steps=trainer.steps)
    if trainer.lora is not None:
        name = None if base is None else str(base)
        adapter = lambda target: save_adapter(state.weights, trainer.lora, trainer.model.config, target, base=name)
        owned(config.output / "adapter", write=adapter)
    trained = trainer.model._replace(weights=computed(trainer.trained(state), saved_dtype(config.save_dtype, base)))
    owned(
        config.output / "model",
        write=lambda target: save_model(trained, target, source=base, tokenizer=tokenizer.files),
    )


def _report(
    config: Config, trainer: SFTTrainer, tokenizer: Tokenizer, rows: Rows, before: dict[str, float], seconds: float
) -> None:
    """The report, and last the summary, which says that the run is whole."""
    metrics = read_metrics(config.output / "metrics.jsonl")
    counts = rows.train.counts()
    after = {name: metrics[-1][name] for name in before}
    left_out = Counter({dropped.reason: dropped.rows for part in rows for dropped in part.report})
    summary = {
        "loss": metrics[-1]["loss"],
        **{f"{name.removeprefix('eval/')}_before": value for name, value in before.items()},
        **{f"{name.removeprefix('eval/')}_after": value for name, value in after.items()},
        "rows": counts.rows,
        "tokens": counts.tokens,
        "learnt_tokens": counts.learnt,
        "held_out_rows": len(rows.held_out),
        "rows_left_out": dict(left_out),
        "steps": trainer.steps,
        "wall_seconds": round(seconds, 1),
        "seed": config.seed,
    }
    shown = [rows.train[index] for index in range(min(_SHOWN, len(rows.train)))]
    decode = lambda tokens: tokenizer.decode(tokens.tolist(), skip_special=False)
    first = lambda row: int(np.argmax(row.mask))
    samples = [
        {"prompt": decode(row.tokens[: first(row)]), "completion": decode(row.tokens[first(row) :])} for row in shown
    ]
    write_report(config.output, title="Supervised fine-tuning", summary=summary, rows=metrics, samples=samples)
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(distributed.printable(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}"))
