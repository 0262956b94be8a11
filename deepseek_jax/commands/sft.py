"""Fine-tune a model on conversations, or a tiny one on generated ones; what is learnt is what the assistant says."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import distributed
from deepseek_jax.checkpoint.adapters import save_adapter
from deepseek_jax.checkpoint.folder import Model, lay_out, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.checkpoint.owned import write_owned
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.options import command
from deepseek_jax.commands.run_options import enter, saved_dtype
from deepseek_jax.commands.sft_settings import COMMON, DECIDING, Config, defaults, repeatable, run_settings
from deepseek_jax.commands.toy import small_config, small_model
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains, trace
from deepseek_jax.data.conversations import Conversation
from deepseek_jax.data.masked_rows import MaskedRows, open_rows, row_batches, rows_of
from deepseek_jax.model.precision import computed, dtype_of
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.sharding import Layout
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import RunSettings, check_folder, held_folder, room_needed, write_json
from deepseek_jax.train.sft import SFTTrainer, run_sft
from deepseek_jax.train.sft_config import MOST_PER_ROW
from deepseek_jax.train.step import Objective, TrainState

_LONGEST = 32_768  # tokens of a row in R1's stages of supervised fine-tuning
_TOY_CONVERSATIONS = 1_500
_SHOWN = 8  # rows in the report


class Run(NamedTuple):
    """What a command that fine-tunes says of its run.

    title: of the report. settings: of the run, by its number of steps. text: of config.toml. objective: for a loss of
    its own, of the model to train: the objective, and what it is given. summary: what the summary has beside the rest.
    """

    title: str
    settings: Callable[[int], RunSettings]
    text: str
    objective: Callable[[Model], tuple[Objective, tuple[Any, ...]]] | None = None
    summary: Mapping[str, Any] = MappingProxyType({})


class Rows(NamedTuple):
    """What is learnt, and what is held out."""

    train: MaskedRows
    held_out: MaskedRows


@command(Config, common=COMMON, deciding=DECIDING, defaults=defaults)
def main(config: Config) -> None:
    """Fine-tune a model on conversations; without --model and --data a tiny one on generated ones."""
    start = time.perf_counter()
    if (config.model is None) != (not config.conversations.data):
        given, other = ("--data", "--model") if config.model is None else ("--model", "--data")
        raise ValueError(f"{other[2:]}: got {given} without {other}; give both, or neither for the generated task")
    if config.model is not None:
        config = dataclasses.replace(config, model=model_folder(config.model))
    run = Run("Supervised fine-tuning", partial(run_settings, config), repeatable(config))
    with room_needed(config.output), held_folder(config.output):
        learn(config, run, start)


def learn(config: Config, run: Run, start: float) -> None:
    """A whole run in its folder, which is held: rows, updates, model and report; `start` is when it began."""
    architecture, tokenizer = _architecture(config)
    config.sft.check_model(architecture)
    rows = _rows(config, tokenizer, architecture)
    steps = config.sft.steps_of(len(rows.train))
    settings = distributed.on_main(lambda: check_run(config, run.settings(steps)))
    trainer = _trainer(config, architecture, tokenizer, rows, steps, run)
    run_id = distributed.on_main(lambda: enter(config.output, RunSettings(*settings), run.text))
    with MetricLog(config.output, wandb=config.logging.wandb) as log:
        before = _before(config, trainer, rows)
        data = row_batches(rows.train, size=config.sft.batch_size, seed=config.seed)
        state = run_sft(trainer, data, folder=config.output, log=log, held_out=rows.held_out)
    save_trained(config, trainer, tokenizer, state, run_id)
    seconds = time.perf_counter() - start
    distributed.on_main(lambda: _report(config, run, trainer, tokenizer, rows, before, seconds))


# --- the folder -----------------------------------------------------------------------------------


def check_run(config: Config, settings: RunSettings, *, stage: str = "sft") -> tuple[Any, ...]:
    """The settings of the run; refuses a folder with one that cannot go on with them."""
    writes = ("model", "adapter") if config.sft.lora_rank else ("model",)
    check_folder(config.output, settings, stage=stage, writes=writes)
    return tuple(settings)


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


def _trainer(
    config: Config, architecture: ModelConfig, tokenizer: Tokenizer, rows: Rows, steps: int, run: Run
) -> SFTTrainer:
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
        model = load_trained(config, layout)
    objective, given = (None, ()) if run.objective is None else run.objective(model)
    per_row = min(MOST_PER_ROW, max(1, width // max(1, int(lengths.min()) - 1)))
    trainer = partial(SFTTrainer, config.sft, model, steps=steps, width=width, per_row=per_row)
    return trainer(seed=config.seed, donate=True, objective=objective, given=given)


def load_trained(config: Config, layout: Layout) -> Model:
    """The model to train; what an adapter leaves as it is needs no float32."""
    dtype = dtype_of(config.sft.dtype if config.sft.lora_rank else "float32")
    return load_model(config.model, dtype=dtype, layout=layout)


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


def save_trained(config: Config, trainer: SFTTrainer, tokenizer: Tokenizer, state: TrainState, run_id: str) -> None:
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
    config: Config,
    run: Run,
    trainer: SFTTrainer,
    tokenizer: Tokenizer,
    rows: Rows,
    before: dict[str, float],
    seconds: float,
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
        **run.summary,
    }
    shown = [rows.train[index] for index in range(min(_SHOWN, len(rows.train)))]
    decode = lambda tokens: tokenizer.decode(tokens.tolist(), skip_special=False)
    first = lambda row: int(np.argmax(row.mask))
    samples = [
        {"prompt": decode(row.tokens[: first(row)]), "completion": decode(row.tokens[first(row) :])} for row in shown
    ]
    write_report(config.output, title=run.title, summary=summary, rows=metrics, samples=samples)
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(distributed.printable(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}"))
