"""What a quantised cache costs in quality: log-probs and best tokens of texts that are read through it in pieces."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import BATCHES, Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.cache import empty_cache
from deepseek_jax.text.tokenizer import Tokenizer

KINDS = ("auto", "bfloat16", "int8", "fp8")
_BLOCK = 16


class _Read(NamedTuple):
    """Of all tokens but the first of every text: nats, the best token, and how many tokens there are."""

    nats: np.ndarray
    best: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats.mean())


def main(
    model: Path,
    rows: Path,
    /,
    *,
    texts: int = 64,
    tokens: int = 256,
    piece: int = 32,
    drawn: int = 64,
    prompts: int = 16,
) -> None:
    """Perplexity and greedy agreement of every kind of cache beside the exact one, as Markdown.

    A text is a row's question and answer, read in pieces as a long prompt is, so that what a token sees is the cache.
    Agreement is the share of tokens at which the best next one is the exact cache's, of the same text before it; and of
    continuations drawn greedily after the questions, the share of tokens before the first that differs.

    Args:
        model: Hugging Face folder.
        rows: JSON lines with "question" and "answer".
        texts: that are read.
        tokens: of a text at most.
        piece: tokens of it that are read at a time.
        drawn: tokens of a continuation.
        prompts: questions that are continued.
    """
    config, graphdef, weights = load_model(model)
    tokenizer = Tokenizer.from_folder(model)
    found = [json.loads(line) for line in rows.read_text().splitlines()[:texts]]
    ids = [tokenizer.encode(f"{row['question']}\n{row['answer']}", add_bos=True)[:tokens] for row in found]
    asked = [tokenizer.chat([{"role": "user", "content": row["question"]}]) for row in found[:prompts]]
    print("| cache | bytes a token | perplexity | best token as exact | drawn as exact |\n|---|---|---|---|---|")
    exact = None
    for kind in KINDS:
        dtype = EngineConfig(cache_dtype=kind).dtype_of_cache(jax.tree.leaves(weights)[0].dtype)
        made = jax.eval_shape(lambda dtype=dtype: empty_cache(config, 1, 1, dtype))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
        texts_read = _read(config, graphdef, weights, ids, dtype, piece)
        continued = _continued(Generator(config, graphdef, settings=_settings(kind)), weights, asked, drawn)
        exact = exact or (texts_read, continued)
        agreed = np.mean(texts_read.best == exact[0].best)
        alike = np.mean([np.cumprod(np.equal(*pair)).mean() for pair in zip(continued, exact[1], strict=True)])
        print(f"| {kind} | {size:,} | {texts_read.perplexity:.4f} | {agreed:.2%} | {alike:.2%} |", flush=True)
    print(f"\n{len(exact[0].nats):,} tokens of {len(ids)} texts, {len(asked)} continuations of {drawn} tokens")


def _settings(kind: str) -> EngineConfig:
    return EngineConfig(**{**vars(BATCHES), "cache_dtype": kind})


def _read(config, graphdef, weights, ids, dtype, piece: int) -> _Read:
    """All texts at once, padded on the right to whole pieces."""
    length = -(-max(map(len, ids)) // piece) * piece
    rows = np.zeros((len(ids), length + 1), np.int32)
    for row, of in zip(rows, ids, strict=True):
        row[: len(of)] = of
    counts_B1 = np.array([[len(of)] for of in ids])
    blocks = -(-length // _BLOCK)
    table_BM = np.arange(len(ids) * blocks, dtype=np.int32).reshape(len(ids), blocks)
    cache, step = empty_cache(config, table_BM.size, _BLOCK, dtype), _step(graphdef)
    nats, best = [], []
    for start in range(0, length, piece):
        at = np.broadcast_to(np.arange(start, start + piece), (len(ids), piece))
        fed, follows = rows[:, start : start + piece], rows[:, start + 1 : start + piece + 1]
        cache, *found = step(weights, cache, fed, at, at < counts_B1, follows, table_BM)
        scored = at < counts_B1 - 1
        nats.append(np.asarray(found[0])[scored])
        best.append(np.asarray(found[1])[scored])
    return _Read(np.concatenate(nats).astype(float), np.concatenate(best))


def _step(graphdef):
    @partial(jax.jit, donate_argnums=1)
    def step(weights, cache, tokens, at, valid, follows, table):
        decoder = nnx.merge(graphdef, weights)
        hidden, cache = decoder.extend(tokens, at, valid, cache, table, phase="prefill")

        def of_column(x_BD):  # never the logits of all tokens at once
            logprobs = jax.nn.log_softmax(decoder.logits(x_BD[:, None])[:, 0])
            return logprobs, jnp.argmax(logprobs, axis=-1)

        def scored(column):
            logprobs, best = of_column(hidden.x_BTD[:, column])
            return -jnp.take_along_axis(logprobs, follows[:, column, None], axis=-1)[:, 0], best

        nats, best = jax.lax.map(scored, jnp.arange(tokens.shape[1]))
        return cache, nats.T, best.T

    return step


def _continued(generator: Generator, weights, asked, drawn: int) -> list[np.ndarray]:
    """Of every prompt, to the end whatever comes."""
    sampling = SamplingConfig(max_new_tokens=drawn, temperature=0.0)
    return [np.asarray(of.tokens) for of in generator(weights, asked, sampling, seeds=[0] * len(asked))]


if __name__ == "__main__":
    run(main)
