"""Complete prompts with a model: a Hugging Face folder, a converted one, or a name on the hub."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.data.sources import open_source
from deepseek_jax.distributed import on_main, printable, say
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import Messages, encode_prompt, thinking_and_answer
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.sharding import LOCAL, Layout, lanes_of, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer


def main(
    model: Path,
    /,
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    system: str | None = None,
    chat: bool = True,
    thinking: bool | None = None,
    samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch: int = 16,
    dtype: Precision = "auto",
    serve_expert: int | None = None,
    serve_tensor: int | None = None,
    json: bool = False,
) -> None:
    """Complete prompts with MODEL; text goes to stdout, tokens a second to stderr.

    A single completion is printed as it comes. Several are kept apart by a line each before them.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub.
        prompt: the text, or the user's turn of a chat; - reads it from standard input.
        prompts: a file of them: .txt, one a line, or rows (.jsonl, .json, .csv, .parquet) with "prompt", a text, or
            "messages", a conversation.
        system: text that the conversations begin with.
        chat: put prompts into the checkpoint's chat template; base models, which have none, want --no-chat.
        thinking: the template's switch of that name (DeepSeek-V3.1, V3.2); by default the template decides.
        samples: completions of each prompt.
        max_tokens: limit of new tokens, thinking included.
        temperature: 0 takes the best token each time (DeepSeek-R1: 0.6).
        top_p: sample among the smallest set of tokens that reaches this probability (DeepSeek-R1: 0.95).
        top_k: sample among the k best; 0 is no limit.
        repetition_penalty: divides the odds of tokens seen before; 1 is none.
        seed: the same seed draws the same tokens.
        batch: completions drawn at once.
        dtype: of weights, activations and cache; auto is bfloat16 on accelerators and float32 on the CPU.
        serve_expert: divide the model over all devices: groups that whole experts are divided between, with
            serve_tensor. Where one of the two is given, the other is chosen to suit the model; what is left of the
            devices are replicas. Without both the model is on one device.
        serve_tensor: parts of heads, inner widths and vocabulary.
        json: print one JSON object a completion: prompt and sample (numbers from 0), text, thinking and answer apart,
            tokens (how many), finish_reason (stop or length) and seconds (of its batch).
    """
    for name, count in (("samples", samples), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, wanted at least 1")
    folder = model_folder(model)
    tokenizer = Tokenizer.from_folder(folder)
    asked = _encoded(tokenizer, read(prompt, prompts), system=system, chat=chat, thinking=thinking)
    if not tokenizer.eos_ids:
        say(f"{model}: names no end-of-sequence token; sampling ends at --max-tokens alone", kind="warning")
    sampling = SamplingConfig(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop_ids=tokenizer.eos_ids,
    )
    layout = _layout(folder, serve_expert, serve_tensor)
    loaded = load_model(folder, dtype=dtype_of(dtype), layout=layout)
    job = _Job(Generator(loaded.config, loaded.graphdef), loaded, tokenizer, asked, sampling, seed)
    _check(job, samples, folder)
    start = time.perf_counter()
    if len(asked) * samples == 1 and not json:
        count = _stream(job)
    else:
        count = _print_all(_drawn(job, samples, batch), as_json=json)
    print(f"{count} tokens in {time.perf_counter() - start:.1f} s, compilation included", file=sys.stderr)


def read(prompt: str | None, prompts: Path | None) -> list[str | Messages]:
    """The prompts that are asked for.

    Raises:
        ValueError: neither or both, no such file, no prompts in it, or a row without one.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("wanted either --prompt TEXT or --prompts FILE")
    if prompts is None:
        return [on_main(sys.stdin.read).removesuffix("\n") if prompt == "-" else prompt]
    if prompts.suffix == ".txt" and prompts.is_file():
        try:
            lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as problem:
            raise ValueError(f"{prompts}: got no UTF-8 text ({problem}); save it as such") from None
        if not lines:
            raise ValueError(f"{prompts}: got no line with a prompt, wanted at least one")
        return lines
    rows = open_source(str(prompts))
    return [_of_row(rows[number], rows.where(number)) for number in range(len(rows))]


def _of_row(row: dict, where: str) -> str | Messages:
    found = row.get("messages", row.get("prompt"))
    if not isinstance(found, str | list):
        raise ValueError(f'{where}: got {sorted(row)}, wanted "prompt", a text, or "messages", a conversation')
    return found


def _encoded(tokenizer: Tokenizer, prompts: Sequence[str | Messages], **how: Any) -> list[list[int]]:
    """The prompts' tokens; of several, what is wrong with one is said with its number."""
    tokens = []
    for number, each in enumerate(prompts):
        try:
            tokens.append(encode_prompt(tokenizer, each, **how))
        except ValueError as problem:
            raise ValueError(f"prompt {number}: {problem}" if len(prompts) > 1 else str(problem)) from None
    return tokens


def _layout(folder: Path, expert: int | None, tensor: int | None) -> Layout:
    if expert is None and tensor is None:
        return LOCAL
    every = Layout(mesh=make_mesh(data=jax.device_count()), lanes=lanes_of(jax.default_backend()))
    return serving_layout(load_config(folder), every, expert=expert, tensor=tensor)


class _Job(NamedTuple):
    """What is to be completed, and with what."""

    generator: Generator
    model: Model
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    sampling: SamplingConfig
    seed: int


def _check(job: _Job, samples: int, folder: Path) -> None:
    """Refuse what the model cannot read, before the first batch."""
    job.generator.check(job.prompts, range(len(job.prompts) * samples), samples)
    highest, size = max(token for tokens in job.prompts for token in tokens), job.model.config.vocab_size
    if highest >= size:
        raise ValueError(
            f"{folder}: the tokenizer gives the prompt the id {highest}, wanted ids below the model's vocab_size"
            f" {size}; take both from the same checkpoint"
        )


def _stream(job: _Job) -> int:
    """Print the only completion as it comes; returns its tokens."""
    given, tokens = 0, 0
    of = {"seed": job.seed, "tokenizer": job.tokenizer}
    for found in job.generator.stream(job.model.weights, job.prompts[0], job.sampling, **of):
        _write(found.text[given:])
        given, tokens = len(found.text), len(found.tokens)
    _write("\n")
    return tokens


def _drawn(job: _Job, samples: int, batch: int) -> Iterator[dict]:
    """All completions in order, as --json prints them."""
    at_once = max(1, batch // samples)
    for first in range(0, len(job.prompts), at_once):
        start, asked = time.perf_counter(), job.prompts[first : first + at_once]
        seeds = range(job.seed + first * samples, job.seed + (first + len(asked)) * samples)
        given = {"seeds": seeds, "samples": samples, "tokenizer": job.tokenizer}
        found = job.generator(job.model.weights, asked, job.sampling, **given)
        seconds = round(time.perf_counter() - start, 3)
        for number, completion in enumerate(found):
            thinking, answer = thinking_and_answer(job.tokenizer, asked[number // samples], completion.text)
            yield {
                "prompt": first + number // samples,
                "sample": number % samples,
                "text": completion.text,
                "thinking": thinking,
                "answer": answer,
                "tokens": len(completion.tokens),
                "finish_reason": "stop" if completion.finished else "length",
                "seconds": seconds,
            }


def _print_all(found: Iterator[dict], *, as_json: bool) -> int:
    """Print completions as their batches are done; returns their tokens."""
    count = 0
    for each in found:
        count += each["tokens"]
        if as_json:
            print(json.dumps(each), flush=True)
        else:
            head = f"--- prompt {each['prompt']}, sample {each['sample']}, {each['tokens']} tokens"
            _write(f"{head}, {each['finish_reason']} ---\n{each['text']}\n")
    return count


def _write(text: str) -> None:
    """A terminal would obey what a model writes; a file or a pipe is to get it unchanged."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
