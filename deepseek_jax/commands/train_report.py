"""What a training run measures and leaves: accuracies on the held-out questions, the model's folder, the report."""

import json
from typing import Any

import jax
from flax import nnx

from deepseek_jax import distributed
from deepseek_jax.checkpoint.owned import write_owned
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands.run_options import saved_dtype
from deepseek_jax.commands.train_settings import Config
from deepseek_jax.commands.train_setup import Setup
from deepseek_jax.evals.accuracy import Accuracy, greedy_accuracy
from deepseek_jax.model.precision import computed
from deepseek_jax.report.metrics import read_metrics
from deepseek_jax.report.page import write_report
from deepseek_jax.report.samples import read_samples
from deepseek_jax.train.runs import write_json


def evaluate(config: Config, setup: Setup, weights: nnx.State, most: int | None = None) -> Accuracy:
    """Greedy accuracy of weights in the sampler's layout on the held-out questions, or on the first `most` of them."""
    return greedy_accuracy(
        setup.generator,
        weights,
        setup.tokenizer,
        setup.held_out[:most],
        max_new_tokens=config.grpo.max_new_tokens,
        stop_ids=setup.tokenizer.eos_ids,
        grade=setup.rewards.accuracy,
    )


def evaluate_once(config: Config, setup: Setup, weights: nnx.State, name: str) -> dict[str, float]:
    """An evaluation that a resumed run reads back instead of repeating."""
    path = config.output / f"accuracy_{name}.json"
    if not distributed.on_main(path.exists):
        found = evaluate(config, setup, setup.to_sampler(weights))
        distributed.on_main(lambda: write_json(path, {"accuracy": found.mean, "stderr": found.stderr}))
    return distributed.on_main(lambda: json.loads(path.read_text(encoding="utf-8")))


def write_model(config: Config, setup: Setup, weights: nnx.State, run_id: str) -> None:
    """As a Hugging Face folder, in the place of the one that the run wrote when it had fewer steps."""
    trained = setup.model._replace(weights=computed(weights, saved_dtype(config.base.save_dtype, config.base.model)))
    save = lambda target: save_model(trained, target, source=config.base.model, tokenizer=setup.tokenizer.files)
    write_owned(config.output / "model", run=run_id, steps=config.grpo.steps, write=save)


def report(config: Config, setup: Setup, before: dict[str, float], after: Accuracy, seconds: float) -> None:
    """The report, and last the summary, which says that the run is whole."""
    rows = read_metrics(config.output / "metrics.jsonl")
    summary: dict[str, Any] = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after.mean,
        "stderr_before": before["stderr"],
        "stderr_after": after.stderr,
        "questions": len(setup.held_out),
        "wall_seconds": round(seconds, 1),
        "tokens": int(rows[-1]["num_tokens"]),
        "seed": config.seed,
        "control": config.control,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.model.weights)),
    }
    samples = [
        {"prompt": p.text, "completion": c.text, "rewards": {"accuracy": s}, "answer": p.columns.get("answer")}
        for p, c, s in zip(setup.held_out[:16], after.completions, after.scores, strict=False)
    ]
    drawn = read_samples(config.output, steps=3)
    write_report(config.output, title="R1-Zero", summary=summary, rows=rows, samples=samples, completions=drawn)
    write_json(config.output / "summary.json", summary)
    print(json.dumps(summary, indent=2))
    print(distributed.printable(f"report: {config.output / 'report.html'}   model: {config.output / 'model'}"))
