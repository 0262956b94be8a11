"""What comes over a socket before it is a request: what is no HTTP, and clients that begin one and go no further."""

import asyncio
import json
import resource
import time

import pytest

from deepseek_jax.serve.connection import allow_files
from deepseek_jax.serve.server import listen
from tests.serve.client import Scripted, listening, tokenizer

BODY = json.dumps({"messages": [{"role": "user", "content": "1"}]}).encode()
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD
SMUGGLED = b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def length(body: bytes = BODY) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


WRONG = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "a version that is none": b"GET /health HTTP/9.x\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost: localhost\r\nevil\r\n\r\n",
    "a header without a name": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    "nul in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "nul in the path": b"GET /hea\x00lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a blank in the path": b"GET /hea lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "headers without an end": b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000,
    "one header without an end": b"GET /health HTTP/1.1\r\nX: " + b"y" * 100_000,
    "a line without an end": b"GET /" + b"x" * 100_000,
    "a length that is none": POST + b"Content-Length: ten\r\n\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -5\r\n\r\n" + BODY,
    "two lengths": POST + b"Content-Length: 5\r\n" + length(),
    "lengths in a list": POST + b"Content-Length: 5, 60\r\n\r\n" + BODY,
    "a length and chunks": POST + b"Transfer-Encoding: chunked\r\n" + length(b"0\r\n\r\n" + SMUGGLED),
    "an unknown encoding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a chunk of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk of 2**68 bytes": POST + b"Transfer-Encoding: chunked\r\n\r\n100000000000000000\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer than it says": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}}}\r\n0\r\n\r\n",
}


async def answered(port: int, sent: bytes) -> bytes:
    """All that the server says before it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 2)
    except TimeoutError:
        raise AssertionError(f"not closed after {sent[:200]!r}") from None
    finally:
        writer.close()


@pytest.fixture(scope="module")
def replies():
    """To each of them, by one server; and what the engine was asked for meanwhile."""
    of = Scripted(tokenizer(), "ok")

    async def main():
        async with listening(of, body_seconds=0.5) as (_, port):
            found = {name: await answered(port, sent) for name, sent in WRONG.items()}
            before = len(of.added)
            return found, before, await answered(port, POST + b"Connection: close\r\n" + length())

    return asyncio.run(main())


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_http_is_refused_in_a_sentence(replies, name):
    head, _, body = replies[0][name].partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in (400, 404, 408), head
    error, _ = json.JSONDecoder().raw_decode(body.decode())
    assert error["error"]["type"] == "invalid_request_error" and len(error["error"]["message"]) > 10
    assert b"405" not in replies[0][name]  # nothing that was smuggled behind it was looked at


def test_none_of_that_reached_the_engine_and_the_server_goes_on(replies):
    _, added, after = replies
    assert added == 0 and after.startswith(b"HTTP/1.1 200") and b"ok" in after


@pytest.mark.parametrize("way", ["nothing", "bytes that drip", "a second request that drips"])
def test_a_head_that_does_not_come_holds_no_place(way):
    """Slowloris: uvicorn itself waits for ever, and each byte would begin the time anew."""

    async def main():
        async with listening(Scripted(tokenizer(), "ok"), head_seconds=0.3) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if way == "a second request that drips":
                writer.write(POST + length())
                await reader.readuntil(b'"total_tokens"')
            begin = time.monotonic()
            closed = asyncio.ensure_future(reader.read())
            for byte in b"" if way == "nothing" else b"GET /health HTTP/1.1\r\nX: " + b"y" * 100:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
                if closed.done():
                    break
            try:
                said = await asyncio.wait_for(closed, 10)
            except ConnectionResetError:  # a byte that crossed the answer can cost a client the answer, not its end
                said = b"HTTP/1.1 408" if way != "nothing" else b""
            writer.close()
            return said, time.monotonic() - begin

    said, seconds = asyncio.run(main())
    assert b"HTTP/1.1 408" in said and seconds < 2


def test_a_request_in_time_is_not_cut_by_a_late_clock():
    """The time is of heads: an answer, and a connection that is kept, may take longer."""

    async def main():
        async with listening(Scripted(tokenizer(), "x" * 50, seconds=0.02), head_seconds=0.2) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(POST + length())
                await reader.readuntil(b"x" * 50)
                await reader.readuntil(b"}}}")
                await asyncio.sleep(0.3)
            writer.close()

    asyncio.run(main())


def test_a_broken_body_ends_a_call_that_reads_it():
    """The refusal is one, and the route says nothing of its own behind it."""

    async def main():
        async with listening(Scripted(tokenizer(), "ok")) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
            await asyncio.sleep(0.1)
            writer.write(b"zz\r\n")
            said = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return said

    said = asyncio.run(main())
    assert said.startswith(b"HTTP/1.1 400") and said.count(b"HTTP/1.1") == 2  # of the status, and in the sentence


def test_files_are_allowed_for_every_call(monkeypatch, capsys):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda of: limits[-1] if limits else (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda of, both: limits.append(both))
    allow_files(1000)
    assert limits == [(4096, 4096)] and not capsys.readouterr().err
    allow_files(5000)
    assert limits == [(4096, 4096)] and "raise ulimit -n" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["TRACE", "DELETE", "POST"])
def test_a_body_that_no_route_wants_costs_nobody_the_answer(method):
    """To close over bytes that were not read resets the connection, and takes the answer with it."""

    async def main():
        async with listening(Scripted(tokenizer(), "ok")) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{method} /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 120000\r\n\r\n".encode())
            for _ in range(2):
                await asyncio.sleep(0.1)
                writer.write(b"x" * 60_000)
            await asyncio.sleep(0.2)
            said = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return said

    assert asyncio.run(main()).startswith(b"HTTP/1.1 40")


def test_the_port_is_free_while_the_last_answers_are_finished():
    """So that the next server can start."""

    async def main():
        engine = Scripted(tokenizer(), "x" * 50, seconds=0.02)
        async with listening(engine) as (client, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + length())
            await client.until(lambda: engine.lives)
            client.end()
            while True:
                try:
                    listen("127.0.0.1", port).close()
                    break
                except OSError:
                    await asyncio.sleep(0.02)
            ran = bool(engine.lives)
            said = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return ran, said

    ran, said = asyncio.run(main())
    assert ran and b"x" * 50 in said
