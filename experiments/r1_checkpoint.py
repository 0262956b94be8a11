"""Does the recipe train a checkpoint that others pre-trained, in its own template and with its own tokens?

    python experiments/r1_checkpoint.py SMOLLM2_FOLDER --gsm8k gsm8k/train.jsonl --output runs/smollm2

The stages of `r1` on SmolLM2-135M or another small chat model: sums of three numbers, in the form of GSM8K's rows, and
with `--gsm8k` as many of that file's questions as `--asked-of-gsm8k` beside them, to be reinforced on; demonstrations
of easier sums, of two numbers; held-out sums of three. Its tokenizer has no token for <think>, which is then several;
its template opens no thought, and its end of a turn is its end of text.

Cost: an hour of two CPU cores for 135 million parameters, 7 GB of memory, and 10 GB of disk.
Expected: the form is learnt from the demonstrations, sums of three numbers by reinforcement; of GSM8K nothing.
Found: the form, and nothing beyond it: 5.0 % of 40 held-out sums after the cold start, 7.5 % after every later stage,
one sum more (LOG.md). 4 % of its samples are right, too few for 24 steps of 32 to learn from.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.cli import run
from deepseek_jax.commands import r1
from deepseek_jax.commands.r1_stages import read_rows, write_rows
from deepseek_jax.commands.train_settings import BOXED

_SFT = {"batch_size": 8, "lr": 1e-4, "warmup": 2, "max_length": 160, "eval_rows": 4, "save_every": 1_000}
_RL = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 48, "lr": 2e-5, "warmup": 1, "eval_questions": 8}
_RL |= {"save_every": 1_000, "weight_language": 0.0}
NUMBERS: dict[str, dict[str, Any]] = {
    "cold_start": _SFT | {"epochs": 2.0},
    "rl_1": _RL | {"steps": 24},
    "rejection": {"limit": 80, "samples": 8, "max_tokens": 48, "form": "boxed", "thought_language": "any"},
    "sft": _SFT | {"epochs": 3.0, "eval_rows": 2},
    "rl_2": _RL | {"steps": 4},
    "evaluation": {"max_tokens": 48},
}
"""What is not the laptop's, by stage."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        model: a chat model's folder.
        output: folder of the run.
        gsm8k: GSM8K's rows, to ask some of them beside the sums; None asks sums alone.
        asked_of_gsm8k: how many.
        train: sums to be reinforced on.
        held_out: sums that every model is scored on.
        demonstrations: to begin with.
        largest: number in a sum.
        seed: of everything.
        set: as of `r1`.
    """

    model: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path = Path("runs/r1_checkpoint")
    gsm8k: Path | None = None
    asked_of_gsm8k: int = 40
    train: int = 160
    held_out: int = 40
    demonstrations: int = 64
    largest: int = 20
    seed: int = 0
    set: tuple[str, ...] = ()


def main(config: Config) -> None:
    """Write the data, and run the recipe on it."""
    files = write_data(config)
    numbers = [
        f"{stage}.{name}={json.dumps(value)}" for stage, values in NUMBERS.items() for name, value in values.items()
    ]
    given = {"model": config.model, "output": config.output / "run", "benchmark": "gsm8k", "seed": config.seed}
    r1.main(r1.Config(**given, **files, set=(*numbers, *config.set)))


def write_data(config: Config) -> dict[str, Path]:
    """Questions and demonstrations, under the names of `r1`'s options; the same seed writes the same."""
    rng = np.random.default_rng(config.seed)
    threes = _different(rng, 3, config.largest, config.train + config.held_out)
    train = [_row(numbers) for numbers in threes[: config.train]]
    if config.gsm8k is not None:
        train += [_pair(row) for row in islice(read_rows(config.gsm8k), config.asked_of_gsm8k)]
    rows = {
        "data": [train[place] for place in rng.permutation(len(train))],
        "held_out": [_row(numbers) for numbers in threes[config.train :]],
        "cold_start": [_demonstration(of) for of in _different(rng, 2, config.largest, config.demonstrations)],
    }
    folder = config.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_rows(folder / f"{name}.jsonl", found) for name, found in rows.items()}


def _different(rng: np.random.Generator, terms: int, largest: int, count: int) -> list[tuple[int, ...]]:
    if count > largest**terms // 2:
        raise ValueError(f"largest: got {largest}, wanted more for {count} different sums of {terms} numbers")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(map(int, rng.integers(1, largest + 1, size=terms)))] = None
    return list(found)


def _row(numbers: Iterable[int]) -> dict[str, str]:
    return {"question": f"What is {' + '.join(map(str, numbers))}?", "answer": f"#### {sum(numbers)}"}


def _pair(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: row[name] for name in ("question", "answer")}


def _demonstration(numbers: tuple[int, ...]) -> dict[str, Any]:
    """A conversation, asked as the benchmark asks: the thought adds one number after another."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    asked = BOXED.replace("{question}", _row(numbers)["question"])
    text = f"<think>{'. '.join(steps)}.</think>\n\n\\boxed{{{total}}}"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]}


if __name__ == "__main__":

    def command(config: Config) -> None:
        """The recipe of R1 on a small chat model."""
        main(config)

    run(command)
