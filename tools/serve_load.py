"""A load for a server in a process of its own: who asks, what came back and when, and what the server takes for it."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

START_SECONDS = 600
_TICK = os.sysconf("SC_CLK_TCK")
_NOBODY: Mapping[int, float] = MappingProxyType({})


class Asked(NamedTuple):
    """A request of the load."""

    question: str
    seed: int
    tokens: int

    @property
    def body(self) -> bytes:
        turns = [{"role": "user", "content": self.question}]
        wanted = {"messages": turns, "seed": self.seed, "max_tokens": self.tokens, "min_tokens": self.tokens}
        return json.dumps(wanted | {"stream": True}).encode()


def processor_seconds(pid: int) -> float:
    """That a process and those which it has started, and which live, have taken so far."""
    of: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                of[int(folder.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICK
    total, wanted = 0.0, {pid}
    while wanted:
        total += sum(of[each][1] for each in wanted if each in of)
        wanted = {each for each, (parent, _) in of.items() if parent in wanted}
    return total


# --- the server -----------------------------------------------------------------------------------


class Level(NamedTuple):
    """What a server holds that nobody asks: bytes of memory, share of the cache's blocks, open files."""

    resident: int
    blocks: float
    files: int


class Server:
    """A program that serves, in a process of its own.

    Args:
        words: what Python is to run; it says on stderr where it listens, and /ready when it may be asked.
    """

    def __init__(self, *words: object):
        self._process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE, text=True)
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

    @property
    def processor_seconds(self) -> float:
        """That it has taken so far, with its tokenizers' processes."""
        return processor_seconds(self._process.pid)

    def settled(self) -> Level:
        """What it holds once nothing runs."""
        end = time.monotonic() + 30
        while True:
            text = self._ask("/metrics")
            value = lambda name, text=text: float(re.search(rf"^vllm:{name}{{[^\n]* (\S+)$", text, re.MULTILINE)[1])
            running = value("num_requests_running") + value("num_requests_waiting")
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


def stream(
    port: int,
    asked: Sequence[Asked],
    *,
    in_flight: int,
    drops: Mapping[int, int] = _NOBODY,
    pauses: Mapping[int, float] = _NOBODY,
) -> tuple[list[Read], float]:
    """Streams over a connection each, and the seconds from the first call to the last byte.

    Args:
        port: of the server on this machine.
        asked: the requests.
        in_flight: how many run at a time; as one ends the next is sent.
        drops: by their numbers those whose clients go away, and after how many reads.
        pauses: those that read slowly, and the seconds between two of their reads.
    """
    return asyncio.run(_streams(port, asked, in_flight, drops, pauses))


async def _streams(
    port: int, asked: Sequence[Asked], in_flight: int, drops: Mapping[int, int], pauses: Mapping[int, float]
) -> tuple[list[Read], float]:
    parts: list[list[tuple[float, bytes]]] = [[] for _ in asked]
    numbers = iter(range(len(asked)))
    bodies = [of.body for of in asked]

    async def ask_on() -> None:
        for number in numbers:
            client = await _call(port, bodies[number], drops.get(number), pauses.get(number))
            await client.done
            parts[number] = client.parts

    begin = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(min(in_flight, len(asked)))))
    seconds = time.perf_counter() - begin
    return [read(of) for of in parts], seconds


async def _call(port: int, body: bytes, drop_after: int | None, pause: float | None) -> _Client:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
    sent = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
    loop, line = asyncio.get_running_loop(), socket.socket()
    if pause is not None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.setblocking(False)
    await loop.sock_connect(line, ("127.0.0.1", port))
    return (await loop.create_connection(lambda: _Client(sent, drop_after, pause), sock=line))[1]


def read(parts: Sequence[tuple[float, bytes]]) -> Read:
    """The events of a stream in chunks, each at the time of the read that completed it."""
    held, status, found = b"", 0, Read(0, [], False, None)
    for when, data in parts:
        held += data
        if not status:
            head, blank, rest = held.partition(b"\r\n\r\n")
            if not blank:
                continue
            status, held = int(head.split()[1]), rest
            found.status = status
        for line in re.findall(rb"data: (.*)\n\n", held):
            _note(found, when, line)
        held = held[held.rfind(b"\n\n") + 2 :] if b"\n\n" in held else held
    if status != 200:
        found.problem = held.decode(errors="replace")[:200]
    return found


def _note(found: Read, when: float, line: bytes) -> None:
    if line == b"[DONE]":
        found.ended = True
        return
    event = json.loads(line)
    if "error" in event:
        found.problem = event["error"]["message"]
        return
    for choice in event["choices"]:
        delta = choice["delta"]
        if delta.get("reasoning_content") or delta.get("content"):
            found.texts.append((when, delta.get("reasoning_content") or "", delta.get("content") or ""))
