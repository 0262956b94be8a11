"""Batches of completions from the engine: for rollouts, evaluation and the command line."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.completion import NO_RECORD, Completion, Record
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig, row_buckets
from deepseek_jax.generation.live import Live
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.sharding import module_layout
from deepseek_jax.text.tokenizer import Tokenizer

BATCHES = EngineConfig(
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    block_size=16,
    decode_steps=16,
)
"""How an engine runs that has all requests from the beginning."""
_SCORED = SamplingConfig(max_new_tokens=1, temperature=0.0, prompt_logprobs=True)
_DEAR = 2**24  # parameters from which on a CPU's time for a row is worth a compilation


class PromptScores(NamedTuple):
    """Of the tokens of a sequence but the first: log-probs in nats, and whether each is the likeliest there."""

    logprobs: np.ndarray
    best: np.ndarray


class Generator:
    """Generation for one architecture; weights are an argument of every call, and nothing of them is kept after it.

    Args:
        config: the model's.
        graphdef: static part of the module, from `model.decoder.split`.
        settings: how the engine runs; no more slots than a call has completions, and none longer than it can become.

    Attributes:
        layout: the one that the module was made with.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        *,
        settings: EngineConfig = BATCHES,
    ):
        self.config, self.graphdef = config, graphdef
        self.settings, self.layout = settings, module_layout(graphdef)

    def __call__(
        self,
        weights: nnx.State,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int],
        samples: int = 1,
        record: Record = NO_RECORD,
        tokenizer: Tokenizer | None = None,
    ) -> list[Completion]:
        """Complete every prompt `samples` times.

        Args:
            weights: of the model, plain or beside an adapter (`model.lora.with_adapter`).
            prompts: token ids, each at least one and shorter than the context.
            sampling: how to draw. A completion also ends where the context does.
            seeds: one a completion, P x samples of them, prompt by prompt.
            samples: completions a prompt; what they have in common is computed once.
            record: what to keep for a trainer.
            tokenizer: the model's, for text, stop texts and budgets of thinking; None gives tokens alone.

        Returns:
            P x samples completions, prompt by prompt.

        Raises:
            ValueError: no or empty prompts, a prompt that fills the context, a wrong number of seeds, or a record that
                the model or the sampling has nothing for.
        """
        given = {"seeds": seeds, "samples": samples, "record": record, "tokenizer": tokenizer}
        found = dict(self.each(weights, prompts, sampling, **given))
        return [found[number] for number in range(len(seeds))]

    def each(
        self,
        weights: nnx.State,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int],
        samples: int = 1,
        record: Record = NO_RECORD,
        tokenizer: Tokenizer | None = None,
        slots: int | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """The same, each completion with its number as soon as it is there, while others are still drawn.

        slots: completions drawn at a time at most.
        """
        self.check(prompts, seeds, samples)
        count = len(seeds) if slots is None else min(slots, len(seeds))
        engine = self._engine(weights, prompts, sampling, count, self.settings, record=record, tokenizer=tokenizer)
        numbers = {
            engine.add(prompts[number // samples], sampling, seed=seed): number for number, seed in enumerate(seeds)
        }
        for update in engine.run():
            if update.live.error is not None:
                raise update.live.error
            if update.finished:
                yield numbers[update.id], _completion(update.live, record)

    def scores(
        self, weights: nnx.State, sequences: Sequence[Sequence[int]], *, slots: int | None = None
    ) -> Iterator[tuple[int, PromptScores]]:
        """What the model says of given sequences, each with its number as soon as it is there.

        Args:
            weights: of the model.
            sequences: token ids, each at least one and shorter than the context.
            slots: sequences computed at a time at most.

        Raises:
            ValueError: no or empty sequences, or one that fills the context.
        """
        self.check(sequences, sequences, 1)
        count = len(sequences) if slots is None else min(slots, len(sequences))
        engine = self._engine(weights, sequences, _SCORED, count, self.settings)
        numbers = {engine.add(tokens, _SCORED, seed=0): number for number, tokens in enumerate(sequences)}
        for update in engine.run():
            if update.live.error is not None:
                raise update.live.error
            if update.finished:
                live = update.live
                values = np.array(live.prompt_logprobs)
                yield numbers[update.id], PromptScores(values, values == np.array(live.prompt_likeliest))

    def stream(
        self,
        weights: nnx.State,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        steps: int = 8,
        tokenizer: Tokenizer | None = None,
    ) -> Iterator[Completion]:
        """Complete one prompt, and give what there is of it after every few tokens.

        Args:
            weights, prompt, sampling, seed, tokenizer: as for a call with one prompt and one sample.
            steps: tokens between two looks at it.

        Yields:
            The completion so far; the last is the whole one, that of a call.
        """
        self.check([prompt], [seed], 1)
        settings = dataclasses.replace(self.settings, decode_steps=steps)
        engine = self._engine(weights, [prompt], sampling, 1, settings, tokenizer=tokenizer)
        engine.add(prompt, sampling, seed=seed)
        for update in engine.run():
            if update.live.error is not None:
                raise update.live.error
            yield _completion(update.live, NO_RECORD)

    def _engine(
        self,
        weights: nnx.State,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        count: int,
        settings: EngineConfig,
        **given: Any,
    ) -> Engine:
        """One for these requests: slots, tables and chunks as large as they can use, up to the next power of two."""
        context = settings.max_model_len or self.config.max_position_embeddings
        longest_prompt = max(map(len, prompts))
        longest = min(longest_prompt + sampling.max_new_tokens, context)
        # rows are padded to a chunk; of a preempted request what it drew is computed again, too
        read = longest if settings.admission == "preempt" else longest_prompt
        slots = min(settings.max_num_seqs, bucket(count, least=1))
        settings = dataclasses.replace(
            settings,
            max_num_seqs=slots,
            chunk=min(settings.chunk, bucket(read)),
            batch_sizes=settings.batch_sizes or sizes_that_pay(weights, slots),
            max_model_len=min(bucket(longest), context),
        )
        return Engine(self.config, self.graphdef, weights, settings, **given)

    def check(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Any], samples: int) -> None:
        """Refuse arguments of a call that the model cannot work with; ValueError says why."""
        if not prompts:
            raise ValueError("prompts: got none, wanted at least one")
        if len(seeds) != len(prompts) * samples:
            raise ValueError(f"seeds: got {len(seeds)}, wanted {len(prompts) * samples}, one a completion")
        context = self.config.max_position_embeddings
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {number}: got {len(prompt)} tokens, wanted 1 to {context - 1}, "
                    f"fewer than the model's context of {context}; shorten it"
                )


def sizes_that_pay(weights: nnx.State, slots: int) -> tuple[int, ...]:
    """Numbers of rows to compile for: many where rows cost a CPU much, two on accelerators, one for a toy."""
    leaves = jax.tree.leaves(weights)
    if not isinstance(leaves[0], jax.Array) or next(iter(leaves[0].devices())).platform != "cpu":
        return (max(8, slots // 4),)
    dear = sum(leaf.size for leaf in leaves) > _DEAR
    return tuple(size for size in row_buckets(slots) if size >= 8 and dear) or (slots,)


def _completion(live: Live, record: Record) -> Completion:
    """What there is of a request."""
    request, penalised = live.request, live.sampling.repetition_penalty != 1
    joined = lambda parts, wanted: np.concatenate(parts) if wanted else None
    return Completion(
        np.asarray(request.tokens[request.prompt_length :], np.int32),
        np.asarray(live.logprobs, np.float32),
        live.stopped,
        routes=joined(live.routes, record.routes),
        support=joined(live.support, record.support),
        penalised=joined(live.penalised, record.support and penalised),
        text=live.text if live.stream is not None else None,
    )


def bucket(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
