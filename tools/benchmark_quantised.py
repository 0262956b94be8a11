"""What quantised weights, and quantised caches, cost in quality: perplexity and the likeliest tokens of given texts."""

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
from deepseek_jax.model.packing import Quantization
from deepseek_jax.plan.weights import weight_bytes
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


def weights(
    model: Path,
    /,
    *,
    data: Path = Path("test.jsonl"),
    rows: int = 100,
    length: int = 256,
    batch: int = 4,
    formats: tuple[Quantization, ...] = ("none", "fp8", "int8", "int4"),
) -> None:
    """What packing costs in quality: perplexity of given answers, and how often the likeliest token stays the same.

    Answers follow their questions, each token after those of the text before it; computed in float32 with all formats.

    Args:
        model: Hugging Face folder.
        data: rows of question and answer as GSM8K has them, .jsonl.
        rows: of the file, from its beginning; those of more tokens than `length` are left out.
        length: tokens of a row at most.
        batch: rows at a time.
        formats: of the projections, compared with the first.
    """
    tokens, targets = _answers(Tokenizer.from_folder(model), data, rows, length)
    first, held = None, tokens.shape[0] // batch * batch
    print(f"{held} rows, {int(targets[:held].sum())} tokens of answers\n")
    print("| weights | GB in bf16 or packed | perplexity | x the first's | same greedy token |\n|---|---|---|---|---|")
    for quantization in formats:
        config, graphdef, packed = load_model(model, quantization=quantization)
        run = jax.jit(lambda weights, tokens, graphdef=graphdef: _scored(graphdef, weights, tokens))
        parts = [run(packed, tokens[at : at + batch]) for at in range(0, held, batch)]
        logprobs, best = (np.concatenate([np.asarray(part[of]) for part in parts]) for of in (0, 1))
        counted = targets[:held, 1:]
        perplexity = math.exp(-float(logprobs[counted].astype(np.float64).mean()))
        first = first or (perplexity, best)
        same = float((best == first[1])[counted].mean())
        gigabytes = weight_bytes(config, "bf16" if quantization == "none" else quantization) / 1e9
        cells = f"{gigabytes:.3f} | {perplexity:.3f} | {perplexity / first[0]:.3f} | {100 * same:.2f} %"
        print(f"| {quantization} | {cells} |", flush=True)


def _answers(tokenizer: Tokenizer, data: Path, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, length], padded on the right, and which of them are an answer's."""
    kept = []
    for line in data.read_text().splitlines()[:rows]:
        row = json.loads(line)
        texts = (row["question"] + "\n", True), (row["answer"], False)
        question, answer = (tokenizer.encode(text, add_bos=first) for text, first in texts)
        if len(question) + len(answer) <= length:
            kept.append((question, answer))
    tokens, targets = np.zeros((len(kept), length), np.int32), np.zeros((len(kept), length), bool)
    for number, (question, answer) in enumerate(kept):
        end = len(question) + len(answer)
        tokens[number, :end], targets[number, len(question) : end] = [*question, *answer], True
    return tokens, targets


def _scored(graphdef, weights, tokens):
    """Of every token but the first: its log-prob, and which was the likeliest."""
    module = nnx.merge(graphdef, weights)
    logits = module.logits(module(tokens[:, :-1]).x_BTD)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)


def caches(
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
    run({"weights": weights, "caches": caches})
