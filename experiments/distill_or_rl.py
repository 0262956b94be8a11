"""A small dense model: does it learn more by imitating a reasoner's answers, or by reinforcement of its own?

    python experiments/r1.py --output runs/r1
    python experiments/distill_or_rl.py runs/r1

R1's central comparison (arXiv 2501.12948, section 4.1), on what a run of `r1` left. A dense model of grouped-query
attention and a third of the weights is made from nothing and reads the base's equations. From there it goes two ways:
`distilled` is fine-tuned on the mixture that the run's RL model wrote; `reinforced` imitates the same demonstrations
of easy puzzles as the run's own cold start (without them no answer has the form that rewards want), and then is
reinforced as RL-1 was. Both end on the same held-out questions. The distilled student gets `--epochs` of the mixture,
and is given no more seconds than the other, which is printed; the teacher's own training counts for neither.

Cost: five minutes on two CPU cores. Expected: the distilled student is ahead, as in the paper.
A killed run goes on when the same command is given again.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands import r1
from deepseek_jax.commands.r1_stages import Maker
from deepseek_jax.commands.report import write_run_report
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.config.model import GQAConfig
from deepseek_jax.data.puzzle_text import puzzle_tokenizer
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import held_folder
from deepseek_jax.train.stages import Done, Stage, run_stages

MIXTURE = Path("mixture") / "rows.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        run: folder of a run of `r1` that has its mixture.
        output: folder of the students; None is `students` beside the run's stages.
        epochs: passes of the distilled student over the mixture.
        steps: of the other's reinforcement.
        seed: that of the run.
        set: as the run was given it.
    """

    run: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path | None = None
    epochs: float = 6.0
    steps: int = 80
    seed: int = 0
    set: tuple[str, ...] = ()


def main(config: Config) -> None:
    """Run what is not done, and print what became of each student."""
    keep_compiled()
    if not (config.run / MIXTURE).exists():
        raise ValueError(f"{config.run / MIXTURE}: no such file; wanted the folder of a run of r1 that has its mixture")
    output = config.output or config.run / "students"
    output.mkdir(exist_ok=True)
    with held_folder(output):
        done = run_stages(output, stages(config))
        write_run_report(output)
    for name in ("base", "cold_start", "reinforced", "distilled"):
        print(json.dumps({"student": name, **done[name].report}))


def stages(config: Config) -> list[Stage]:
    """One base, and two ways from it."""
    options = r1.options_by_stage(r1.Config(seed=config.seed, set=config.set))
    options["reinforced"] = options["rl_1"] | {"steps": config.steps}
    options["distilled"] = options["sft"] | {"epochs": config.epochs}
    questions = config.run / "questions"
    make = Maker(options, questions / "held_out.jsonl", r1.PUZZLES, config.seed)
    return [
        Stage("start", lambda folder, model, data: start(folder, config.seed), {"seed": config.seed}),
        make.sft("base", model="start", learn=questions / "facts.jsonl"),
        make.sft("distilled", model="base", learn=config.run / MIXTURE),
        make.sft("cold_start", model="base", learn=questions / "demonstrations.jsonl"),
        make.rl("reinforced", model="cold_start", ask=questions / "train.jsonl"),
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
