"""Complete prompts with a model: a Hugging Face folder, a converted one, or a name on the hub."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from rich.console import Console

from deepseek_jax import distributed
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.chat import converse, write
from deepseek_jax.commands.generate_prompts import check, encoded, how, probe, read
from deepseek_jax.commands.generate_settings import COMMON, MAX_TOKENS, Config, EngineOptions
from deepseek_jax.commands.options import command
from deepseek_jax.config import ModelConfig
from deepseek_jax.distributed import say
from deepseek_jax.generation.engine import Engine, Metrics, Update
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import BATCHES, bucket, sizes_that_pay
from deepseek_jax.generation.live import Live
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import encode_prompt, thinking_and_answer
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.report.progress import Progress
from deepseek_jax.sharding import LOCAL, Layout, lanes_of, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer

T = TypeVar("T")
_STREAMED = 8  # tokens between two looks at the only completion, or at an answer, which Ctrl-C may stop
_OF_PROMPTS = {"asked": ("samples", "chat"), "engine": ("batch",), "output": ("json", "logprobs")}


@command(Config, common=COMMON, deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    """Complete prompts with MODEL; text goes to stdout, tokens a second to stderr.

    A single completion is printed as it comes. Several are kept apart by a line each before them, in the order of the
    prompts. Without a prompt, on a terminal, it is a conversation.
    """
    talks = _talks(config)
    folder = model_folder(config.model)
    tokenizer, model = Tokenizer.from_folder(folder), load_config(folder)
    asked = probe(tokenizer, config.asked) if talks else encoded(tokenizer, read(config.asked), config.asked)
    if not tokenizer.eos_ids:
        say(f"{config.model}: names no end-of-sequence token; sampling ends at --max-tokens alone", kind="warning")
    most = model.max_position_embeddings if talks else MAX_TOKENS
    sampling = config.drawing(tokenizer.eos_ids, max_tokens=most)
    check(folder, model, tokenizer, asked, sampling)
    layout, dtype = engine_layout(model, config.engine), dtype_of(config.engine.dtype)
    job = _Job(config, tokenizer, asked, sampling)
    settings = _talking(config) if talks else _completing(job, model)
    settings.of_scheduler(model, layout, dtype)  # refuses what the model cannot do
    loaded = load_model(folder, dtype=dtype, layout=layout, quantization=config.engine.quantization)
    if talks:
        settings = within_memory(settings, model, layout, dtype)
    else:
        settings = dataclasses.replace(settings, batch_sizes=sizes_that_pay(loaded.weights, settings.max_num_seqs))
    engine = Engine(loaded.config, loaded.graphdef, loaded.weights, settings, tokenizer=tokenizer)
    if talks:
        _warm_up(engine)
        converse(engine, sampling, partial(encode_prompt, tokenizer, **how(config.asked)), config.sampling.seed)
    else:
        _complete(engine, job)


class _Job(NamedTuple):
    """What is to be completed, and how."""

    config: Config
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    sampling: SamplingConfig

    @property
    def samples(self) -> int:
        return self.config.asked.samples

    @property
    def count(self) -> int:
        """Of the completions."""
        return len(self.prompts) * self.samples


# --- what is asked for ----------------------------------------------------------------------------


def _talks(config: Config) -> bool:
    """Whether it is a conversation.

    Raises:
        ValueError: it cannot be one, or not with these settings.
    """
    if config.asked.prompt is not None or config.asked.prompts is not None:
        return False
    if not sys.stdin.isatty():
        raise ValueError("wanted either --prompt TEXT or --prompts FILE; without them, a conversation wants a terminal")
    if distributed.process_count() > 1:
        raise ValueError("wanted --prompt TEXT or --prompts FILE; a conversation is of one process")
    plain = Config()
    for group, names in _OF_PROMPTS.items():
        for name in names:
            got = getattr(getattr(config, group), name)
            if got != getattr(getattr(plain, group), name):
                raise ValueError(f"{name}: got {got} for a conversation, wanted --prompt or --prompts with it")
    return True


def engine_layout(model: ModelConfig, engine: EngineOptions) -> Layout:
    """How a model lies on the devices."""
    return layout_of(model, expert=engine.serve_expert, tensor=engine.serve_tensor)


def layout_of(model: ModelConfig, *, every: bool = False, **sizes: int | None) -> Layout:
    """How a model lies on the devices; on one of them where no size is given, unless it is to be on every one."""
    lanes = lanes_of(jax.default_backend())
    if all(size is None for size in sizes.values()) and not every:
        return dataclasses.replace(LOCAL, lanes=lanes)
    return serving_layout(model, Layout(mesh=make_mesh(data=jax.device_count()), lanes=lanes), **sizes)


def _completing(job: _Job, model: ModelConfig) -> EngineConfig:
    """How an engine runs that has all requests from the beginning."""
    context = model.max_position_embeddings
    longest = max(len(tokens) + job.sampling.limit(len(tokens), context) for tokens in job.prompts)
    slots, length = min(job.config.engine.batch, bucket(job.count, least=1)), min(bucket(longest), context)
    steps = BATCHES.decode_steps if job.count > 1 else _STREAMED
    of_job = {"max_num_seqs": slots, "max_model_len": length, "decode_steps": steps}
    return dataclasses.replace(BATCHES, **of_job, **job.config.engine.of_engine)


def _talking(config: Config) -> EngineConfig:
    """How one runs that has a request at a time, which begins as the last one did."""
    return EngineConfig(
        max_num_seqs=1, block_size=BATCHES.block_size, decode_steps=_STREAMED, **config.engine.of_engine
    )


def within_memory(settings: EngineConfig, model: ModelConfig, layout: Layout, dtype: jnp.dtype) -> EngineConfig:
    """The same settings with a context that the cache has memory for."""
    of_host = settings.of_scheduler(model, layout, dtype)
    room = (of_host.num_blocks - 1) * of_host.block_size - of_host.draft_tokens
    return dataclasses.replace(settings, max_model_len=min(of_host.max_model_len, room))


def _warm_up(engine: Engine) -> None:
    """Compile all that a conversation can need, so that no answer waits for it."""
    compiled = engine.warm_up()
    with Progress(next(compiled)[1], "compile", start=1, console=_notes()) as progress:
        for done, _ in compiled:
            progress.update(done)


# --- completions ----------------------------------------------------------------------------------


def _complete(engine: Engine, job: _Job) -> None:
    """Draw and print all of them."""
    start = time.perf_counter()
    printed = _stream if job.count == 1 and not job.config.output.json else _print_all
    tokens = printed(engine, job)
    print(f"{tokens} tokens in {time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)
    if engine.settings.drafts is not None:
        print(_of_drafts(engine.metrics), file=sys.stderr)


def _of_drafts(of: Metrics) -> str:
    """How well they were guessed, in a line."""
    right = f"{of.accepted} of {of.offered} drafts were right ({of.acceptance:.1%})"
    return f"{right}, {of.accept_length:.2f} tokens a step, {of.saved:.1%} of the steps saved"


def _updates(engine: Engine, job: _Job) -> Iterator[tuple[int, Update]]:
    """What comes of each completion, with its number."""
    seed, numbers = job.config.sampling.seed, {}
    for number in range(job.count):
        numbers[engine.add(job.prompts[number // job.samples], job.sampling, seed=seed + number)] = number
    for update in engine.run():
        yield numbers[update.id], update


def _stream(engine: Engine, job: _Job) -> int:
    """Print the only completion as it comes; returns its tokens."""
    tokens = 0
    for _, update in _updates(engine, job):
        write(update.text)
        tokens += len(update.tokens)
    write("\n")
    return tokens


def _print_all(engine: Engine, job: _Job) -> int:
    """Print completions in order, each as soon as all before it are done; returns their tokens."""
    count = 0
    with Progress(job.count, "generate", console=_notes()) as progress:
        for found in in_order(_drawn(engine, job, progress)):
            count += found["tokens"]
            with progress.aside():
                _print(found, as_json=job.config.output.json)
    return count


def _notes() -> Console:
    """Standard error, where it is a terminal."""
    return Console(stderr=True, quiet=not sys.stderr.isatty() or not distributed.is_main())


def _drawn(engine: Engine, job: _Job, progress: Progress) -> Iterator[tuple[int, dict]]:
    """All completions with their numbers, as they come and as --json prints them."""
    start, first, tokens, done = time.perf_counter(), None, 0, 0
    logprobs = _Logprobs(job.tokenizer) if job.config.output.logprobs is not None else None
    for number, update in _updates(engine, job):
        now = time.perf_counter()
        tokens, done = tokens + len(update.tokens), done + update.finished
        first = first or (now, tokens)  # what came before it was mostly compilation
        speed = (tokens - first[1]) / (now - first[0]) if now > first[0] else 0.0
        progress.update(done, **{"tokens/s": speed})
        if update.finished:
            found = _as_json(number, update.live, job) | {"seconds": round(now - start, 3)}
            yield number, found if logprobs is None else found | {"logprobs": logprobs(update.live)}


def in_order(found: Iterable[tuple[int, T]]) -> Iterator[T]:
    """What comes with its number, in the order of the numbers.

    >>> list(in_order([(1, "b"), (0, "a"), (2, "c")]))
    ['a', 'b', 'c']
    """
    waiting: dict[int, T] = {}
    due = 0
    for number, each in found:
        waiting[number] = each
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _as_json(number: int, live: Live, job: _Job) -> dict:
    request = live.request
    thinking, answer = thinking_and_answer(job.tokenizer, request.tokens[: request.prompt_length], live.text)
    return {
        "prompt": number // job.samples,
        "sample": number % job.samples,
        "text": live.text,
        "thinking": thinking,
        "answer": answer,
        "tokens": len(request.tokens) - request.prompt_length,
        "finish_reason": "stop" if live.stopped else "length",
    }


class _Logprobs:
    """The log-probs of a completion's tokens as --json prints them."""

    def __init__(self, tokenizer: Tokenizer):
        self._text = cache(lambda token: tokenizer.decode([token], skip_special=False))

    def __call__(self, live: Live) -> list[dict]:
        drawn = zip(live.request.tokens[live.request.prompt_length :], live.logprobs, strict=True)
        best = [self._best(*each) for each in live.top] or [[] for _ in live.logprobs]
        return [self._of(*each) | {"top": top} for each, top in zip(drawn, best, strict=True)]

    def _best(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[dict]:
        return [self._of(int(token), float(value)) for token, value in zip(ids, logprobs, strict=True) if token >= 0]

    def _of(self, token: int, logprob: float) -> dict:
        return {"id": token, "text": self._text(token), "logprob": logprob}


def _print(found: dict, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        head = f"--- prompt {found['prompt']}, sample {found['sample']}, {found['tokens']} tokens"
        write(f"{head}, {found['finish_reason']} ---\n{found['text']}\n")
