"""A small dense model: does it learn more by imitating a reasoner's answers, or by reinforcement of its own?

    python experiments/ablations/distill_or_rl.py runs/r1

R1's central comparison (arXiv 2501.12948, section 4.1), on what a run of `r1` left. A dense model of grouped-query
attention and a third of the weights is made from nothing and reads the base's equations. From there it goes two ways:
`distilled` is fine-tuned on the mixture that the run's RL model wrote; `reinforced` imitates the same demonstrations
of easy puzzles as the run's own cold start (without them no answer has the form that rewards want), and then is
reinforced for 80 steps by RL-1's rewards. Both end on the same held-out questions. Seconds of all are printed, by the
median of their updates; the teacher's own training counts for neither.
Cost: fifteen minutes on two cores. Expected: the distilled student is ahead in less time, as in the paper.
Found: that, on two seeds: 49.8 % in 224 s where the other has 38.3 % in 542 s (seed 3), 48.8 % in 79 s where it has
45.3 % in 195 s (seed 4), 11.5 points ± 2.6 and 3.5 ± 2.4, 7.5 ± 4.0 over both (LOG.md). After 6 epochs it was behind.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from any folder, without an install too

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands.r1_again import RL, Config, again, done, seconds
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.config.model import GQAConfig
from deepseek_jax.data.puzzle_text import puzzle_tokenizer
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import held_folder
from deepseek_jax.train.stages import Done, Stage, run_stages

STUDENTS = "students"
EPOCHS = 24.0
"""Of the distilled student over the mixture; of 1,200 sampled questions, less than half of the other's seconds."""


def main(config: Config) -> None:
    """Run what is not done, and print what became of each student."""
    keep_compiled()
    found = stages(config.run)
    output = config.output or config.run / STUDENTS
    output.mkdir(exist_ok=True)
    with held_folder(output):
        given = run_stages(output, found)
        write_run_report(output)
    for name in ("base", "cold_start", "reinforced", "distilled"):
        print(json.dumps({"student": name, **given[name].report, "seconds": round(seconds(output / name))}))


def stages(run: Path) -> list[Stage]:
    """One base, and two ways from it."""
    seed = done(run, RL)["settings"]["seed"]
    return [
        Stage("start", lambda folder, model, data: start(folder, seed), {"seed": seed}),
        again(run, "base", "base")._replace(model="start"),
        again(run, "sft", "distilled", epochs=EPOCHS)._replace(model="base"),
        again(run, "cold_start", "cold_start")._replace(model="base"),
        again(run, RL, "reinforced", steps=80)._replace(model="cold_start"),
    ]


def start(folder: Path, seed: int) -> Done:
    """A dense model from random weights, with the tokenizer of the run."""
    tokenizer = puzzle_tokenizer()
    architecture = dense(tokenizer)
    graphdef, weights = split(Decoder(architecture, rngs=nnx.Rngs(seed)))
    save_model(Model(architecture, graphdef, weights), folder / "model", tokenizer=tokenizer.files)
    return Done(model=folder / "model")


def dense(tokenizer: Tokenizer) -> ModelConfig:
    """Qwen2's architecture, which R1 was distilled into, at a width of 64."""
    sizes: Mapping[str, Any] = {
        "vocab_size": -(-tokenizer.vocab_size // 32) * 32,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,  # about width**-0.5, as of the preset `tiny`
    }
    attention = GQAConfig(num_key_value_heads=2, head_dim=16, qkv_bias=True)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0]}
    return dataclasses.replace(preset("distill-qwen-1.5b"), attention=attention, **sizes, **ids)


if __name__ == "__main__":

    def command(config: Config) -> None:
        """Distil a run's reasoner into a small dense model, and reinforce the same model by itself."""
        main(config)

    run(command)
