"""Who may ask, how much, how long; and what becomes of a call whose client is slow or gone."""

import asyncio
import contextlib
import io
import json
import sys
import threading

import pytest

from deepseek_jax.serve.settings import ServeConfig
from tests.serve.client import Scripted, run, tokenizer

KEYS = ("secret-key-1", "secret-key-2")
LONG = "x" * 3000


def engine(answer="ok", **settings) -> Scripted:
    return Scripted(tokenizer(), answer, **settings)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


CHAT = {"messages": [{"role": "user", "content": "1"}]}


def test_everything_but_health_and_the_page_wants_a_key():
    async def ask(client):
        paths = "/health", "/ready", "/v1/models", "/metrics", "/openapi.json", "/v1/nowhere"
        without = {path: (await client.ask(path)).status for path in paths}
        with_key = {path: (await client.ask(path, headers=bearer(KEYS[1]))).status for path in paths}
        chat = await client.ask("/v1/chat/completions", CHAT)
        return without, with_key, chat, await client.ask("/v1/chat/completions", CHAT, headers=bearer(KEYS[0]))

    without, with_key, refused, answered = run(ask, engine(), api_keys=KEYS)
    assert set(without.values()) == {200, 401} and [p for p, s in without.items() if s == 200] == ["/health", "/ready"]
    assert list(with_key.values()) == [200, 200, 200, 200, 200, 404]
    assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer" and answered.status == 200
    assert refused.error["code"] == "invalid_api_key" and KEYS[0] not in refused.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": KEYS[0]},
        {"Authorization": "Bearer é"},
        {"X-Api-Key": KEYS[0]},
        [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", "Bearer x")],
    ],
)
def test_what_is_no_key_opens_nothing(headers):
    of = engine()
    assert (
        run(lambda client: client.ask("/v1/chat/completions", CHAT, headers=headers), of, api_keys=KEYS).status == 401
    )
    assert not of.added


def test_guessing_keys_is_limited_by_address_and_a_keys_owner_is_not():
    async def ask(client):
        guesses = [await client.ask("/metrics", headers=bearer(f"guess-{n}")) for n in range(4)]
        return [reply.status for reply in guesses], await client.ask("/metrics", headers=bearer(KEYS[0]))

    statuses, owner = run(ask, engine(), api_keys=KEYS, rate_limit="2/minute")
    assert statuses == [401, 401, 429, 429] and owner.status == 200


def test_calls_of_a_key_are_limited_and_told_when_to_come_again():
    async def ask(client):
        replies = [await client.ask("/v1/chat/completions", CHAT, headers=bearer(KEYS[0])) for _ in range(4)]
        return replies, await client.ask("/v1/chat/completions", CHAT, headers=bearer(KEYS[1]))

    replies, other = run(ask, engine(), api_keys=KEYS, rate_limit="3/minute")
    assert [reply.status for reply in replies] == [200, 200, 200, 429] and other.status == 200
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 60 and replies[-1].error["code"] == "rate_limit_exceeded"


def test_without_keys_calls_are_limited_by_address():
    async def ask(client):
        return [(await client.ask("/v1/chat/completions", CHAT, host=host)).status for host in ("a", "a", "b")]

    assert run(ask, engine(), rate_limit="1/minute") == [200, 429, 200]


def test_a_full_queue_says_so_and_takes_calls_again_when_there_is_room():
    of = engine(LONG, slots=2, seconds=0.001)

    async def ask(client):
        running = [asyncio.ensure_future(client.chat(stream=True)) for _ in range(3)]
        await client.until(lambda: client.served.engine.live == 3)
        full = await client.chat()
        two = await client.chat(n=2)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await client.until(lambda: client.served.engine.live == 0)
        return full, two, await client.chat(max_tokens=2)

    full, two, later = run(ask, of, max_waiting=1)
    assert full.status == two.status == 503 and int(full.headers["retry-after"]) >= 1
    assert full.error["code"] == "overloaded" and later.status == 200


def test_before_everything_is_compiled_calls_are_told_to_come_again():
    of = engine()

    async def ask(client):
        client.served.engine.ready = False
        return await client.ask("/ready"), await client.chat(), await client.ask("/health")

    ready, chat, health = run(ask, of)
    assert (ready.status, chat.status, health.status) == (503, 503, 200) and "retry-after" in chat.headers


def test_a_server_that_ends_takes_no_calls_and_finishes_those_it_has():
    of = engine("x" * 50, seconds=0.002)

    async def ask(client):
        running = asyncio.ensure_future(client.chat())
        await client.until(lambda: of.lives)
        client.served.drains = True
        refused = await client.chat()
        return refused, await client.ask("/ready"), await running

    refused, ready, answered = run(ask, of)
    assert refused.status == ready.status == 503 and "retry-after" in refused.headers
    assert answered.status == 200 and answered.json["choices"][0]["message"]["content"] == "x" * 50


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["length", "chunks", "lying length"])
def test_a_body_that_is_too_large_is_refused_however_it_comes(way):
    body = json.dumps(CHAT | {"user": "x" * 5000}).encode()
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
    headers = {"length": {"Content-Length": str(len(body))}, "chunks": {}, "lying length": {"Content-Length": "10"}}
    given = {"pieces": pieces, "headers": headers[way]}
    of = engine()
    reply = run(lambda client: client.ask("/v1/chat/completions", **given), of, max_body=4096)
    assert reply.status == 413 and reply.error["code"] == "body_too_large" and not of.added
    assert run(lambda client: client.ask("/v1/chat/completions", **given), of, max_body=10_000).status == 200


def test_a_body_that_does_not_come_is_not_waited_for():
    async def ask(client):
        sent = []

        async def never():
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "client": ("a", 1)}
        await asyncio.wait_for(client.app(scope, never, send), 10)
        return sent[0]["status"]

    assert run(ask, engine(), body_seconds=0.1) == 408


# --- clients that go, or are slow -----------------------------------------------------------------


@pytest.mark.parametrize("stream, drop_after", [(False, 0), (True, 0), (True, 5)])
def test_a_client_that_goes_is_cancelled_within_a_step(stream, drop_after):
    """sglang#36333: a decode went on for nobody."""
    of = engine(LONG, seconds=0.002)
    body = CHAT | {"stream": stream, "n": 2}

    async def ask(client):
        when = (lambda: of.lives) if drop_after == 0 else None
        await client.ask("/v1/chat/completions", body, drop_after=drop_after or None, drop_when=when)
        await client.until(lambda: not of.lives)
        steps, cancelled = of.steps, sorted(of.cancelled)
        await asyncio.sleep(0.05)
        assert of.steps == steps and cancelled == [0, 1] and client.served.engine.live == 0
        assert steps < 1000 and not client.deaths
        assert (await client.chat(max_tokens=1)).status == 200

    run(ask, of)


def test_a_slow_reader_loses_nothing_and_holds_nobody_up():
    of = engine(lambda seed: f"{seed}" * 300)

    async def ask(client):
        slow = asyncio.ensure_future(client.ask("/v1/chat/completions", CHAT | {"stream": True, "seed": 7}, pause=0.05))
        await client.until(lambda: len(of.added) == 1)
        fast = await client.chat(seed=8)
        assert not slow.done()
        return fast, await slow

    fast, slow = run(ask, of)
    assert fast.json["choices"][0]["message"]["content"] == "8" * 300
    texts = [c["delta"].get("content", "") for event in slow.events[:-1] for c in event["choices"]]
    assert "".join(texts) == "7" * 300 and len(texts) < 100  # what came meanwhile came together


def test_a_client_that_takes_nothing_is_let_go():
    of = engine(LONG, seconds=0.002)

    async def ask(client):
        await client.ask("/v1/chat/completions", CHAT | {"stream": True}, stalls=True)
        await client.until(lambda: not of.lives)

    run(ask, of, write_seconds=0.1)
    assert of.cancelled == [0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(stream):
    of = engine(LONG, seconds=0.01)

    async def ask(client):
        reply = await client.chat(stream=stream)
        await client.until(lambda: not of.lives)
        return reply

    reply = run(ask, of, call_seconds=0.2)
    assert reply.status == (200 if stream else 504) and of.cancelled == [0]
    assert not stream or b"[DONE]" not in reply.body


def test_a_stream_without_tokens_shows_that_it_lives():
    of = engine("ab", seconds=0.15)
    reply = run(lambda client: client.chat(stream=True), of, keep_alive_seconds=0.03)
    assert reply.body.count(b": keep-alive\n\n") >= 2 and reply.events[-1] == "[DONE]"


# --- the engine's end -----------------------------------------------------------------------------


def test_an_engine_that_dies_ends_its_calls_and_says_so_once():
    of = engine(LONG, seconds=0.002)

    async def ask(client):
        stream = asyncio.ensure_future(client.chat(stream=True))
        whole = asyncio.ensure_future(client.chat())
        await client.until(lambda: len(of.lives) == 2)
        of.fails = RuntimeError("the device burned")
        replies = await stream, await whole, await client.chat()
        return replies, client.deaths, await client.ask("/ready")

    (stream, whole, later), deaths, ready = run(ask, of)
    assert [str(problem) for problem in deaths] == ["the device burned"]
    assert whole.status == 500 and later.status == ready.status == 503
    assert "error" in stream.events[-2] and stream.events[-2]["error"]["type"] == "server_error"


# --- what is logged and counted -------------------------------------------------------------------


def test_the_log_has_no_prompt_and_no_answer(capsys):
    secret = "my-secret-prompt"

    async def ask(client):
        await client.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}]})
        await client.ask("/v1/chat/completions", {"messages": secret})
        await client.ask("/v1/\x1b[2Jsomewhere", headers={"X-Request-Id": "mine-1"})
        client.served.log.flush(10)

    run(ask, engine("the-answer"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 404]
    assert (lines[0]["completion_tokens"], lines[0]["finish"]) == (11, ["stop"]) and lines[0]["prompt_tokens"] == 19
    text = json.dumps(lines)
    assert secret not in text and "the-answer" not in text and lines[2]["id"] == "mine-1"
    assert lines[2]["path"] == "/v1/\\x1b[2Jsomewhere"


class Stuck(io.StringIO):
    """A pipe whose reader takes nothing until it is told to."""

    def __init__(self):
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.goes_on.wait(30)
        return super().write(text)


def test_a_log_that_nobody_reads_holds_no_call_up(monkeypatch):
    """What there is room for comes when the reader goes on; what there is none for is counted."""
    pipe = Stuck()
    monkeypatch.setattr(sys, "stderr", pipe)

    async def ask(client):
        client.served.log._lines.maxsize = 3
        statuses = [(await client.chat(max_tokens=1)).status for _ in range(6)]
        lost = client.served.log.lost
        pipe.goes_on.set()
        await client.until(lambda: pipe.getvalue().count("\n") == 6 - lost)
        return statuses, lost, (await client.ask("/metrics")).body.decode()

    statuses, lost, metrics = run(ask, engine())
    assert statuses == [200] * 6 and lost in (2, 3)  # one may be on its way beside the three that wait
    assert f'deepseek_jax:log_lines_lost_total{{model_name="tiny"}} {lost:.1f}' in metrics


def test_a_log_on_a_full_disk_costs_lines_and_no_answers(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)

        async def ask(client):
            statuses = [(await client.chat(max_tokens=1)).status for _ in range(3)]
            client.served.log.flush(10)
            return statuses, client.served.log.lost

        assert run(ask, engine()) == ([200] * 3, 3)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_metrics_have_the_names_that_dashboards_know():
    async def ask(client):
        await client.chat("1")
        await client.chat("1", max_tokens=1)
        return (await client.ask("/metrics")).body.decode()

    text = run(ask, engine("abc"))
    value = lambda name: float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])
    label = '{model_name="tiny"}'
    assert value(f"vllm:prompt_tokens_total{label}") == 8 and value(f"vllm:generation_tokens_total{label}") == 5
    assert value('vllm:request_success_total{finished_reason="stop"') == 1
    assert value('vllm:request_success_total{finished_reason="length"') == 1
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert value(f"vllm:{name}_seconds_count{label}") == 2
    assert value(f"vllm:inter_token_latency_seconds_count{label}") == 3
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total")
    names += ("prefix_cache_hits_total", "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total")
    for name in (*names, "spec_decode_num_accepted_tokens_total"):
        assert value(f"vllm:{name}{label}") == 0


def test_a_wrong_setting_is_one_line():
    for name, value in dict(names=(), api_keys=("short",), max_body=1, max_depth=0, call_seconds=0).items():
        with pytest.raises(ValueError, match=f"^{name}: got [^\n]*, wanted [^\n]*$"):
            ServeConfig(**({"names": ("m",)} | {name: value}))


def test_the_page_and_its_files_come_under_a_policy_and_without_a_key():
    async def ask(client):
        return [await client.ask(path) for path in ("/", "/page/chat.js", "/page/page.css", "/version")]

    page, script, style, version = run(ask, engine(), api_keys=KEYS)
    assert [reply.status for reply in (page, script, style, version)] == [200] * 4
    assert page.headers["content-type"].startswith("text/html") and b"<html" in page.body
    assert script.headers["content-type"].startswith("text/javascript")
    for reply in (page, script, style):
        assert "default-src 'none'; script-src 'self'" in reply.headers["content-security-policy"]
    assert version.json.keys() == {"version"}
