"""Many streams at a time from a server of its own: whether each is what its request draws, how soon, at what cost."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands.serve import engine_of
from deepseek_jax.commands.serve_settings import Config, HttpOptions, ServingOptions
from deepseek_jax.commands.toy import small_model
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.connection import allow_files
from deepseek_jax.text.think import opens_thought, split_thinking
from deepseek_jax.text.tokenizer import Tokenizer
from tools.serve_load import Asked, Level, Read, Server, processor_seconds, stream
from tools.serve_speaker import CHUNK_TOKENS
from tools.suite.table import spread

MIB = 1 << 20
DROPPED, SLOW = 3, 20  # one in so many
PAUSE = 0.2  # seconds that a slow reader takes nothing after each read
SPEAKER = Path(__file__).with_name("serve_speaker.py")


class Cost(NamedTuple):
    """Of a load: seconds, and seconds of processors of who answered and of the clients."""

    seconds: float
    processor: float
    clients: float = 0.0


def streams(
    model: Path | None = None, /, *, requests: int = 1000, tokens: int = 64, slots: int = 64, rounds: int = 3
) -> None:
    """All requests at once over a loopback connection each, every answer a stream, beside the bare engine.

    A round is the requests by the engine alone and by the server with all streams read to their ends, the one first
    that was second before. After the rounds comes one with a third of the clients going away midway and one in twenty
    reading slowly. Every text is compared with the one that the engine drew for that request, and what the server holds
    is looked at before and after. Ends with an error where a stream failed, was mixed up, or left anything behind.

    Args:
        model: Hugging Face folder; None makes the train command's small model from random weights.
        requests: how many.
        tokens: of an answer in the mean; they have from half as many to half as many more, and so end apart.
        slots: requests that run at a time.
        rounds: timed rounds.
    """
    with _side_by_side(model, asked_for(requests, tokens), slots) as (engine, server, asked):
        costs, found, expected = _rounds(engine, server, asked, requests, rounds)
        level = server.settled()
        _print_costs(costs, asked, slots)
        print("\n| streams | first text after, s: p50 | p99 | between reads with text, ms: p50 | p99 |")
        print("|---|---|---|---|---|", flush=True)
        _print_latencies("all read to the end", found)
        _storm(server, asked, expected, level)


def overhead(
    model: Path | None = None, /, *, requests: int = 96, tokens: int = 64, slots: int = 32, rounds: int = 5
) -> None:
    """What a server takes beside the bare engine, with as many requests in flight as there are slots in both.

    As one ends the next is sent, or added. Prompts are tokens beforehand for the engine alone; for the server that is
    its work. Processor time is that of the process which has the engine, with its tokenizers' processes; the clients'
    is another's, but they share this machine's processors with the server.

    Args:
        model: Hugging Face folder; None makes the train command's small model from random weights.
        requests: of a round.
        tokens: of an answer in the mean.
        slots: requests in flight.
        rounds: timed rounds, of both, the one first that was second before.
    """
    with _side_by_side(model, asked_for(requests, tokens), slots) as (engine, server, asked):
        costs, _, _ = _rounds(engine, server, asked, slots, rounds)
        _print_costs(costs, asked, slots)


def chunks(*, requests: int = 192, slots: int = 64, seconds: float = 0.02, rounds: int = 3) -> None:
    """Processor time that a server takes for a request, and for a chunk of its stream, over an engine that takes none.

    Args:
        requests: of a round.
        slots: in flight.
        seconds: that a step takes, in which each of them gets a chunk.
        rounds: of short answers and of long ones, in turn.
    """
    few, many = 4, 64
    found: dict[int, list[float]] = {few: [], many: []}
    with Server(SPEAKER, "--slots", slots, "--seconds", seconds) as server:
        for _ in range(rounds + 1):
            for count, taken in found.items():
                asked = [Asked("1+2", number, count * CHUNK_TOKENS) for number in range(requests)]
                before = server.processor_seconds
                reads, _ = stream(server.port, asked, in_flight=slots)
                taken.append((server.processor_seconds - before) / requests)
                if any(not read.ended for read in reads):
                    raise ValueError("chunks: got a stream without its end")
    a_chunk = [(long - short) / (many - few) * 1e6 for short, long in zip(found[few][1:], found[many][1:], strict=True)]
    a_request = [short * 1e6 - few * chunk for short, chunk in zip(found[few][1:], a_chunk, strict=True)]
    print(f"{slots} streams in flight, microseconds of processor time, median (min to max)\n")
    print(f"| a chunk of {CHUNK_TOKENS} tokens | {spread(a_chunk, 0)} |\n| a request | {spread(a_request, 0)} |")


# --- both sides -----------------------------------------------------------------------------------


def asked_for(requests: int, tokens: int) -> list[Asked]:
    """Questions whose answers have from half to one and a half times as many tokens."""
    chains = draw_chains(requests, terms=5, largest=9, operators="+*", modulus=10, seed=0)
    lengths = np.random.default_rng(0).integers(tokens - tokens // 2, tokens + tokens // 2, requests, endpoint=True)
    return [
        Asked(of.question, number, int(length)) for number, (of, length) in enumerate(zip(chains, lengths, strict=True))
    ]


@contextmanager
def _side_by_side(model: Path | None, asked: list[Asked], slots: int) -> Iterator[tuple[Engine, Server, list[Asked]]]:
    """An engine in this process and a server in its own, of the same model and settings, both warm."""
    allow_files(len(asked))
    keep_compiled()  # the server has the same programs
    options = ServingOptions(max_num_seqs=slots)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _toy(Path(scratch) / "toy") if model is None else model
        engine = engine_of(Config(model=folder, engine=options, http=HttpOptions()), folder)
        for _ in track(engine.warm_up(), "compiling", transient=True, console=Console(stderr=True)):
            pass
        words = ["-m", "deepseek_jax", "serve", folder, "--port", "0", "--rate-limit", "None"]
        words += ["--max-waiting", len(asked), "--max-num-seqs", slots]
        with Server(*words) as server:
            yield engine, server, asked


def _rounds(
    engine: Engine, server: Server, asked: list[Asked], in_flight: int, rounds: int
) -> tuple[dict[str, list[Cost]], list[Read], list[tuple[str, str]]]:
    """Costs of both by round, the last reads, and what the engine alone drew, which every stream must be."""
    expected, _ = _bare(engine, asked, in_flight)
    found, _ = _served(server, asked, in_flight)  # the first touch of everything
    told(found, expected, range(len(asked)))
    costs: dict[str, list[Cost]] = {"bare engine": [], "server": []}
    for number in track(range(rounds), "rounds", transient=True, console=Console(stderr=True)):
        for who in sorted(costs, reverse=number % 2 == 1):
            if who == "server":
                found, cost = _served(server, asked, in_flight)
                told(found, expected, range(len(asked)))
            else:
                again, cost = _bare(engine, asked, in_flight)
                if again != expected:
                    raise ValueError("bare engine: got other texts than before, wanted the same")
            costs[who].append(cost)
    return costs, found, expected


def _served(server: Server, asked: list[Asked], in_flight: int) -> tuple[list[Read], Cost]:
    before, of_clients = server.processor_seconds, time.process_time()
    found, seconds = stream(server.port, asked, in_flight=in_flight)
    return found, Cost(seconds, server.processor_seconds - before, time.process_time() - of_clients)


def _bare(engine: Engine, asked: list[Asked], in_flight: int) -> tuple[list[tuple[str, str]], Cost]:
    """Thought and answer of each request, and what all took."""
    drawing = {"temperature": 0.6, "top_p": 0.95, "stop_ids": engine.tokenizer.eos_ids}
    prompts = [engine.tokenizer.chat([{"role": "user", "content": of.question}]) for of in asked]
    texts: dict[int, str] = {}
    waiting = iter(zip(asked, prompts, strict=True))

    def add() -> None:
        for of, prompt in waiting:
            sampling = SamplingConfig(max_new_tokens=of.tokens, min_new_tokens=of.tokens, **drawing)
            texts[engine.add(prompt, sampling, seed=of.seed)] = ""
            return

    begin, before = time.perf_counter(), processor_seconds(os.getpid())
    for _ in range(in_flight):
        add()
    for update in engine.run():
        texts[update.id] += update.text
        if update.finished:
            add()
    cost = Cost(time.perf_counter() - begin, processor_seconds(os.getpid()) - before)
    opened = [opens_thought(engine.tokenizer.decode(prompt[-16:], skip_special=False)) for prompt in prompts]
    return [split_thinking(text, opened=of) for text, of in zip(texts.values(), opened, strict=True)], cost


def _toy(folder: Path) -> Path:
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    save_model(small_model(tokenizer, seed=0), folder, tokenizer=tokenizer.files)
    return folder


def _storm(server: Server, asked: list[Asked], expected: Sequence[tuple[str, str]], level: Level) -> None:
    """Clients that go and clients that are slow, and what is left after them."""
    rng, count = random.Random(0), len(asked)
    drops = {number: rng.randrange(1, 6) for number in range(0, count, DROPPED)}
    pauses = {number: PAUSE for number in range(1, count, SLOW) if number not in drops}
    found, _ = stream(server.port, asked, in_flight=count, drops=drops, pauses=pauses)
    kept = [number for number in range(count) if number not in drops]
    told(found, expected, kept)
    _print_latencies("a third dropped", [found[number] for number in kept if number not in pauses])
    after = server.settled()
    print(
        f"\nOf {count} streams {len(drops)} were dropped and {len(pauses)} read slowly; the other texts and those of "
        f"slow readers ({len(kept)}) are the engine's own. Resident memory {level.resident / MIB:.0f} MiB before and "
        f"{after.resident / MIB:.0f} MiB after, blocks in use {level.blocks:g} and {after.blocks:g}, "
        f"open files {level.files} and {after.files}."
    )
    if (after.blocks, after.files) != (level.blocks, level.files):
        raise ValueError(f"streams: got {after} after dropped streams, wanted {level}, as before them")


# --- what is told ---------------------------------------------------------------------------------


def told(found: Sequence[Read], expected: Sequence[tuple[str, str]], numbers: Sequence[int]) -> None:
    """Every one of these streams is whole, and its request's own.

    Raises:
        ValueError: one is not.
    """
    for number in numbers:
        read = found[number]
        if read.problem is not None or not read.ended:
            raise ValueError(f"stream {number}: got status {read.status}, {read.problem or 'no end'}, wanted all of it")
        if read.whole != expected[number]:
            raise ValueError(f"stream {number}: got {read.whole!r:.200}, wanted {expected[number]!r:.200}")


def _print_costs(costs: dict[str, list[Cost]], asked: Sequence[Asked], slots: int) -> None:
    total = sum(of.tokens for of in asked)
    print(f"{len(asked)} requests, {total} tokens of answers, {slots} at a time; median (min to max)\n")
    print("| | seconds | tok/s | x the engine's | processor seconds | x the engine's | clients' processor seconds |")
    print("|---|---|---|---|---|---|---|")
    for who, of in costs.items():
        ratios = [
            spread([getattr(a, what) / getattr(b, what) for a, b in zip(of, costs["bare engine"], strict=True)])
            for what in ("seconds", "processor")
        ]
        seconds, processor, clients = ([getattr(cost, name) for cost in of] for name in Cost._fields)
        rate = f"{total / statistics.median(seconds):.0f}"
        cells = [who, spread(seconds), rate, ratios[0], spread(processor), ratios[1], spread(clients)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _print_latencies(name: str, found: Sequence[Read]) -> None:
    found = [read for read in found if read.texts]  # some answers are special tokens alone
    first = [read.times[0] for read in found]
    between = np.concatenate([np.diff(read.times) for read in found]) * 1e3
    of = lambda values, digits: " | ".join(f"{np.percentile(values, p):.{digits}f}" for p in (50, 99))
    print(f"| {name} | {of(first, 2)} | {of(between, 1)} |", flush=True)


if __name__ == "__main__":
    run({"streams": streams, "overhead": overhead, "chunks": chunks})
