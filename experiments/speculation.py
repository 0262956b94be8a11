"""Speculation: how many steps does a module for multi-token prediction save that was trained with its model?

    deepseek-jax sft --mtp-modules 1 --output runs/mtp
    python experiments/speculation.py runs/mtp/model --output runs/speculation.json

The engine completes questions of the toy task, greedily and at temperature 1, without drafts and with 1 to 3 of them.
Tokens are the same with and without, which is checked. Then it asks what the module's first guess is worth, position
by position of what was drawn at temperature 1. "best": the most probable token is guessed. "same noise": the guess is
drawn with the noise that verification draws with, which is what the engine does. "rejection": the guess is drawn, and
kept or refused as in rejection sampling; that accepts the sum of min(p, q), more than any other rule for drawn guesses.

Cost: two minutes of training and five to run, most of them compiling, on two CPU cores.
Expected: more than 30 % of the steps saved (see LOG.md).
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.cli import run
from deepseek_jax.data.arithmetic import draw_chains
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import encode_prompt
from deepseek_jax.text.tokenizer import Tokenizer

RULES = ("best", "same noise", "rejection")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings.

    Args:
        model: folder of a model with an MTP module that was trained on the toy task.
        output: a file for the figures, as JSON.
        questions: to complete.
        max_tokens: of a completion.
        drafts: guessed tokens at most.
        temperatures: to draw at.
        seed: of questions and completions.
    """

    model: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    output: Path | None = None
    questions: int = 64
    max_tokens: int = 64
    drafts: int = 3
    temperatures: tuple[float, ...] = (0.0, 1.0)
    seed: int = 1


def main(config: Config) -> dict[str, Any]:
    """Measure, print, and write down."""
    model, tokenizer = load_model(config.model), Tokenizer.from_folder(config.model)
    chains = draw_chains(config.questions, terms=4, largest=9, operators="+", modulus=10, seed=1000 + config.seed)
    prompts = [encode_prompt(tokenizer, chain.question) for chain in chains]
    drawn: dict[float, list[list[int]]] = {}
    found: dict[str, Any] = {"engine": [], "first guess": []}
    for drafts in range(config.drafts + 1):
        for temperature in config.temperatures:
            tokens, figures = complete(config, model, tokenizer, prompts, temperature, drafts)
            if drafts == 0:
                drawn[temperature] = tokens
            elif tokens != drawn[temperature]:
                raise AssertionError(f"{drafts} drafts changed tokens at temperature {temperature}")
            else:
                found["engine"].append(told({"temperature": temperature, "drafts": drafts} | figures))
    for temperature in filter(None, config.temperatures):
        worth = first_guess(model, prompts, drawn[temperature], temperature)
        found["first guess"].append(told({"temperature": temperature} | worth))
    if config.output is not None:
        config.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def told(row: dict[str, float]) -> dict[str, float]:
    """The same, printed."""
    print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    return row


def complete(
    config: Config, model: Model, tokenizer: Tokenizer, prompts: list[list[int]], temperature: float, drafts: int
) -> tuple[list[list[int]], dict[str, float]]:
    """Prompts and completions, and what became of the drafts."""
    settings = EngineConfig(
        max_num_seqs=16,
        max_model_len=128,
        block_size=16,
        decode_steps=16,
        batch_sizes=(16,),
        drafts="mtp" if drafts else None,
        draft_tokens=drafts,
    )
    engine = Engine(model.config, model.graphdef, model.weights, settings)
    sampling = SamplingConfig(
        max_new_tokens=config.max_tokens, temperature=temperature, stop_ids=tokenizer.eos_ids, top_p=1.0
    )
    numbers = {engine.add(prompt, sampling, seed=config.seed + at): at for at, prompt in enumerate(prompts)}
    ended = {numbers[update.id]: update.live.request.tokens for update in engine.run() if update.finished}
    of = engine.metrics
    figures = {"acceptance": of.acceptance, "accept length": of.accept_length, "steps saved": of.saved}
    return [ended[at] for at in range(len(prompts))], figures | {"tokens": of.drawn}


def first_guess(
    model: Model, prompts: list[list[int]], sequences: list[list[int]], temperature: float
) -> dict[str, float]:
    """The share of first guesses that each rule accepts, over all positions that a guess can be for."""
    width = max(map(len, sequences))
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
    of_model, of_module = jax.jit(partial(both, model.graphdef))(model.weights, tokens, mask)
    scaled = lambda logits: jax.nn.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)
    sums = np.zeros(len(RULES))
    count = 0
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        of_guess = slice(len(prompt) - 1, len(sequence) - 2)  # states that a token after the next was drawn for
        verified = slice(len(prompt), len(sequence) - 1)
        p, q = np.asarray(scaled(of_model[row, verified])), np.asarray(scaled(of_module[row, of_guess]))
        sums += np.stack(accepted(p, q)).sum(axis=1)
        count += len(p)
    return dict(zip(RULES, (sums / count).tolist(), strict=True)) | {"positions": count}


def both(graphdef: nnx.GraphDef, weights: nnx.State, tokens_BT: jax.Array, mask_BT: jax.Array):
    """Logits of the model, and of its first module, over whole sequences."""
    decoder = nnx.merge(graphdef, weights)
    x_BTD = decoder(tokens_BT, mask_BT).x_BTD
    follows_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    first, *_ = decoder.draft(x_BTD, follows_BT, mask_BT)
    return decoder.logits(x_BTD), decoder.logits(first.x_BTD)


def accepted(p_TV: np.ndarray, q_TV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chance, by position, that each of the rules accepts a guess from q of what is drawn from p.

    With the same number in [0, 1) both draw the token in whose part of their cumulative sums it lies, so they agree
    where those parts overlap.

    >>> [part.round(2).tolist() for part in accepted(np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.75, 0.0]]))]
    [[0.25], [0.5], [0.5]]
    """
    best = np.take_along_axis(p_TV, q_TV.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    ends = [np.cumsum(of, axis=-1) for of in (p_TV, q_TV)]
    starts = [end - of for end, of in zip(ends, (p_TV, q_TV), strict=True)]
    overlap = np.maximum(np.minimum(*ends) - np.maximum(*starts), 0).sum(axis=-1)
    return best, overlap, np.minimum(p_TV, q_TV).sum(axis=-1)


if __name__ == "__main__":

    def command(config: Config) -> None:
        """Measure what a trained MTP module saves."""
        main(config)

    run(command)
