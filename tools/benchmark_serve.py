"""Many streams at a time from a server of its own: whether each is what its request draws, how soon, at what cost."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
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
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.connection import allow_files
from deepseek_jax.text.think import opens_thought, split_thinking
from deepseek_jax.text.tokenizer import Tokenizer
from tools.suite.table import spread

MIB = 1 << 20
DROPPED, SLOW = 3, 20  # one in so many
PAUSE = 0.2  # seconds that a slow reader takes nothing after each read
START_SECONDS = 600


class Asked(NamedTuple):
    """A request of the load."""

    question: str
    seed: int
    tokens: int


class Load(NamedTuple):
    """What is asked for, and how."""

    asked: list[Asked]
    slots: int

    @property
    def serving(self) -> ServingOptions:
        return ServingOptions(max_num_seqs=self.slots)

    def body(self, of: Asked) -> bytes:
        turns = [{"role": "user", "content": of.question}]
        wanted = {"messages": turns, "seed": of.seed, "max_tokens": of.tokens, "min_tokens": of.tokens}
        return json.dumps(wanted | {"stream": True}).encode()


def streams(
    model: Path | None = None, /, *, requests: int = 1000, tokens: int = 64, slots: int = 64, rounds: int = 3
) -> None:
    """All requests at once over a loopback connection each, every answer a stream, beside the bare engine.

    A round is the requests by the engine alone, then by the server with all streams read to their ends. After the
    rounds comes one with a third of the clients going away midway and one in twenty reading slowly. Every text is
    compared with the one that the engine drew for that request, and what the server holds is looked at before and
    after. Ends with an error where a stream failed, was mixed up, or left anything behind.

    Args:
        model: Hugging Face folder; None makes the train command's small model from random weights.
        requests: how many.
        tokens: of an answer in the mean; they have from half as many to half as many more, and so end apart.
        slots: requests that run at a time.
        rounds: timed rounds, engine and server in turn.
    """
    allow_files(requests)
    chains = draw_chains(requests, terms=5, largest=9, operators="+*", modulus=10, seed=0)
    lengths = np.random.default_rng(0).integers(tokens - tokens // 2, tokens + tokens // 2, requests, endpoint=True)
    triples = zip(chains, range(requests), lengths.tolist(), strict=True)
    load = Load([Asked(of.question, number, length) for of, number, length in triples], slots)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _toy(Path(scratch) / "toy") if model is None else model
        engine = engine_of(Config(model=folder, engine=load.serving, http=HttpOptions()), folder)
        for _ in track(engine.warm_up(), "compiling", transient=True, console=Console(stderr=True)):
            pass
        expected = _bare(engine, load)[0]
        with Server(folder, load) as server:
            _told(server.calm(load)[0], expected, range(requests))  # the first touch of everything
            level = server.settled()
            times: dict[str, list[float]] = {"bare engine": [], "server": []}
            found = []
            for _ in track(range(rounds), "rounds", transient=True, console=Console(stderr=True)):
                times["bare engine"].append(_bare(engine, load)[1])
                found, seconds = server.calm(load)
                times["server"].append(seconds)
                _told(found, expected, range(requests))
            _print_rates(times, load)
            _print_latencies("all read to the end", found)
            _storm(server, load, expected, level)


def _storm(server: "Server", load: Load, expected: Sequence[tuple[str, str]], level: "Level") -> None:
    """Clients that go and clients that are slow, and what is left after them."""
    rng, count = random.Random(0), len(load.asked)
    drops = {number: rng.randrange(1, 6) for number in range(0, count, DROPPED)}
    pauses = {number: PAUSE for number in range(1, count, SLOW) if number not in drops}
    found, _ = asyncio.run(_all(server.port, load, drops, pauses))
    kept = [number for number in range(count) if number not in drops]
    _told(found, expected, kept)
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


# --- the engine alone -----------------------------------------------------------------------------


def _toy(folder: Path) -> Path:
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    save_model(small_model(tokenizer, seed=0), folder, tokenizer=tokenizer.files)
    return folder


def _bare(engine: Engine, load: Load) -> tuple[list[tuple[str, str]], float]:
    """Thought and answer of each request, and the seconds that all took."""
    drawing = {"temperature": 0.6, "top_p": 0.95, "stop_ids": engine.tokenizer.eos_ids}
    prompts = [engine.tokenizer.chat([{"role": "user", "content": of.question}]) for of in load.asked]
    texts: dict[int, str] = {}
    begin = time.perf_counter()
    for of, prompt in zip(load.asked, prompts, strict=True):
        sampling = SamplingConfig(max_new_tokens=of.tokens, min_new_tokens=of.tokens, **drawing)
        texts[engine.add(prompt, sampling, seed=of.seed)] = ""
    for update in engine.run():
        texts[update.id] += update.text
    seconds = time.perf_counter() - begin
    opened = [opens_thought(engine.tokenizer.decode(prompt[-16:], skip_special=False)) for prompt in prompts]
    return [split_thinking(text, opened=of) for text, of in zip(texts.values(), opened, strict=True)], seconds


# --- the server -----------------------------------------------------------------------------------


class Level(NamedTuple):
    """What a server holds that nobody asks: bytes of memory, share of the cache's blocks, open files."""

    resident: int
    blocks: float
    files: int


class Server:
    """`deepseek-jax serve` in a process of its own."""

    def __init__(self, folder: Path, load: Load):
        words = ["--port", "0", "--rate-limit", "None", "--max-waiting", str(len(load.asked))]
        words += ["--max-num-seqs", str(load.slots)]
        command = [sys.executable, "-m", "deepseek_jax", "serve", str(folder), *words]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.port = 0

    def _read(self) -> None:
        for line in self._process.stderr:
            if not line.startswith("{"):  # a request
                self._said.append(line)

    def __enter__(self) -> "Server":
        self._reader.start()
        try:
            self._wait()
        except BaseException:  # Ctrl-C too: there is no __exit__ yet that would end the server
            self._process.kill()
            raise
        return self

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(self._said))
            if found:
                self.port = int(found[1])
                with contextlib.suppress(OSError):
                    self._ask("/ready")
                    return
            time.sleep(0.2)
        raise ValueError(f"the server did not start: {' '.join(self._said[-3:])}")

    def __exit__(self, *of: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join(10)

    def _ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def calm(self, load: Load) -> tuple[list["Read"], float]:
        """All streams, each read to its end."""
        return asyncio.run(_all(self.port, load, {}, {}))

    def settled(self) -> Level:
        """What it holds once nothing runs."""
        end = time.monotonic() + 30
        while True:
            text = self._ask("/metrics")
            value = lambda name, text=text: float(re.search(rf"^vllm:{name}{{[^\n]* (\S+)$", text, re.MULTILINE)[1])
            running = value("num_requests_running") + value("num_requests_waiting")
            files = len(os.listdir(f"/proc/{self._process.pid}/fd"))
            if not running:
                break
            if time.monotonic() > end:
                raise ValueError(f"streams: {running:g} requests run still, 30 s after the last client went")
            time.sleep(0.05)
        time.sleep(0.5)  # for closed connections to be forgotten
        files = len(os.listdir(f"/proc/{self._process.pid}/fd"))
        resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self._process.pid}/status").read_text())[1]) << 10
        return Level(resident, value("kv_cache_usage_perc"), files)


# --- the clients ----------------------------------------------------------------------------------


@dataclass
class Read:
    """What a client was sent, and when, in seconds from its call."""

    status: int
    texts: list[tuple[float, str, str]]  # when, thought, answer
    ended: bool
    problem: str | None

    @property
    def whole(self) -> tuple[str, str]:
        return "".join(of for _, of, _ in self.texts), "".join(of for _, _, of in self.texts)

    @property
    def times(self) -> list[float]:
        """Of the reads that had text."""
        return sorted({when for when, _, _ in self.texts})


class _Client(asyncio.Protocol):
    """One stream; it only keeps what comes, so that it costs the machine little."""

    def __init__(self, sent: bytes, drop_after: int | None, pause: float | None):
        self._sent, self._drop_after, self._pause = sent, drop_after, pause
        self.parts: list[tuple[float, bytes]] = []
        self.done = asyncio.get_running_loop().create_future()
        self.begin = time.perf_counter()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(self._sent)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter() - self.begin, data))
        if self._drop_after is not None and len(self.parts) > self._drop_after:
            self._transport.abort()
        elif self._pause is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._pause, self._go_on)

    def _go_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, problem: Exception | None) -> None:
        self.done.set_result(None)


async def _all(port: int, load: Load, drops: dict[int, int], pauses: dict[int, float]) -> tuple[list[Read], float]:
    """All streams at once, and the seconds from the first call to the last byte."""
    loop, clients = asyncio.get_running_loop(), []
    bodies = [load.body(of) for of in load.asked]
    begin = time.perf_counter()
    for number, body in enumerate(bodies):
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
        )
        sent = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
        line = socket.socket()
        if number in pauses:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        line.setblocking(False)
        await loop.sock_connect(line, ("127.0.0.1", port))
        make = lambda sent=sent, number=number: _Client(sent, drops.get(number), pauses.get(number))
        clients.append((await loop.create_connection(make, sock=line))[1])
    await asyncio.gather(*(client.done for client in clients))
    seconds = time.perf_counter() - begin
    return [_read(client.parts) for client in clients], seconds


def _read(parts: Sequence[tuple[float, bytes]]) -> Read:
    """The events of a stream in chunks, each at the time of the read that completed it."""
    held, status, read = b"", 0, Read(0, [], False, None)
    for when, data in parts:
        held += data
        if not status:
            head, blank, rest = held.partition(b"\r\n\r\n")
            if not blank:
                continue
            status, held = int(head.split()[1]), rest
            read.status = status
        for line in re.findall(rb"data: (.*)\n\n", held):
            _note(read, when, line)
        held = held[held.rfind(b"\n\n") + 2 :] if b"\n\n" in held else held
    if status != 200:
        read.problem = held.decode(errors="replace")[:200]
    return read


def _note(read: Read, when: float, line: bytes) -> None:
    if line == b"[DONE]":
        read.ended = True
        return
    event = json.loads(line)
    if "error" in event:
        read.problem = event["error"]["message"]
        return
    for choice in event["choices"]:
        delta = choice["delta"]
        if delta.get("reasoning_content") or delta.get("content"):
            read.texts.append((when, delta.get("reasoning_content") or "", delta.get("content") or ""))


# --- what is told ---------------------------------------------------------------------------------


def _told(found: Sequence[Read], expected: Sequence[tuple[str, str]], numbers: Sequence[int]) -> None:
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


def _print_rates(times: dict[str, list[float]], load: Load) -> None:
    total = sum(of.tokens for of in load.asked)
    print(f"{len(load.asked)} requests, {total} tokens of answers, {load.slots} at a time\n")
    print("| | seconds, median (min to max) | tok/s | x the engine's time |\n|---|---|---|---|")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["bare engine"], strict=True)]
        print(f"| {name} | {spread(seconds)} | {total / statistics.median(seconds):.0f} | {spread(ratios)} |")
    print("\n| streams | first text after, s: p50 | p99 | between reads with text, ms: p50 | p99 |")
    print("|---|---|---|---|---|", flush=True)


def _print_latencies(name: str, found: Sequence[Read]) -> None:
    found = [read for read in found if read.texts]  # some answers are special tokens alone
    first = [read.times[0] for read in found]
    between = np.concatenate([np.diff(read.times) for read in found]) * 1e3
    of = lambda values, digits: " | ".join(f"{np.percentile(values, p):.{digits}f}" for p in (50, 99))
    print(f"| {name} | {of(first, 2)} | {of(between, 1)} |", flush=True)


if __name__ == "__main__":
    run({"streams": streams})
