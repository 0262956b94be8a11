"""Requests that are wrong or meant ill: each gets a clear answer of 4xx, and nothing changes."""

import json

import pytest

from tests.serve.client import Scripted, run, tokenizer

TURN = {"role": "user", "content": "1"}


def chat(**more):
    return {"messages": [TURN], **more}


def turn(**more):
    return {"messages": [TURN | more]}


DEEP = {"a": 1}
for _ in range(60):
    DEEP = {"a": DEEP}

BODIES = {
    # wrong types and values
    "no body": b"",
    "no object": [],
    "null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "no messages": {},
    "messages null": {"messages": None},
    "messages a text": {"messages": "hello"},
    "no message": {"messages": []},
    "a message that is a text": {"messages": ["hello"]},
    "too many messages": {"messages": [TURN] * 1025},
    "no role": {"messages": [{"content": "1"}]},
    "an unknown role": turn(role="root"),
    "a role of another type": turn(role=["user"]),
    "content a number": turn(content=1),
    "content an object": turn(content={"text": "1"}),
    "no content": turn(content=None),
    "an image": turn(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    "a part without text": turn(content=[{"type": "text"}]),
    "an unknown field of a message": turn(contents="1"),
    "an unknown field": chat(temprature=0.5),
    "a prototype": chat(__proto__={"a": 1}),
    "tools": chat(tools=[{"type": "function", "function": {"name": "rm"}}]),
    "a tool's call": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, TURN]},
    "temperature a text": chat(temperature="0.5"),
    "temperature true": chat(temperature=True),
    "temperature negative": chat(temperature=-1),
    "temperature nan": b'{"messages": [{"role": "user", "content": "1"}], "temperature": NaN}',
    "temperature infinite": b'{"messages": [{"role": "user", "content": "1"}], "temperature": Infinity}',
    "temperature too large to write": b'{"messages": [{"role": "user", "content": "1"}], "temperature": 1e999}',
    "temperature too small to divide by": chat(temperature=1e-9),
    "top_p 0": chat(top_p=0),
    "top_p 2": chat(top_p=2),
    "top_k -5": chat(top_k=-5),
    "min_p 3": chat(min_p=3),
    "penalty 9": chat(presence_penalty=9),
    "repetition_penalty 0": chat(repetition_penalty=0),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens negative": chat(max_tokens=-1),
    "max_tokens a fraction": chat(max_tokens=1.5),
    "max_tokens of thousands of digits": b'{"messages": [{"role": "user", "content": "1"}], "max_tokens": %s}'
    % (b"9" * 5000),
    "max_tokens beyond 31 bits": chat(max_tokens=2**40),
    "two limits": chat(max_tokens=3, max_completion_tokens=4),
    "min_tokens beyond max_tokens": chat(min_tokens=5, max_tokens=3),
    "n 0": chat(n=0),
    "n a million": chat(n=10**6),
    "n beyond the server's": chat(n=17),
    "a seed beyond 64 bits": chat(seed=2**70),
    "an empty stop": chat(stop=""),
    "17 stops": chat(stop=["a"] * 17),
    "a long stop": chat(stop="a" * 300),
    "stop a number": chat(stop=3),
    "logit_bias of a word": chat(logit_bias={"hello": 1}),
    "logit_bias negative": chat(logit_bias={"-1": 1}),
    "logit_bias of 301": chat(logit_bias={str(n): 1 for n in range(301)}),
    "logit_bias infinite": b'{"messages": [{"role": "user", "content": "1"}], "logit_bias": {"1": -Infinity}}',
    "logit_bias a list": chat(logit_bias=[1, 2]),
    "top_logprobs without logprobs": chat(top_logprobs=3),
    "top_logprobs 21": chat(logprobs=True, top_logprobs=21),
    "stream a text": chat(stream="yes"),
    "stream_options without a stream": chat(stream_options={"include_usage": True}),
    "thinking of another type": chat(thinking={"type": "maybe"}),
    "thinking negative": chat(thinking={"type": "enabled", "budget_tokens": -1}),
    "an unknown effort": chat(reasoning_effort="utmost"),
    "an unknown format": chat(response_format={"type": "xml"}),
    "a schema that is none": chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
    "no schema": chat(response_format={"type": "json_schema"}),
    "a schema that asks the network": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x"}}}
    ),
    "another model": chat(model="gpt-4"),
    "a model as a path": chat(model="../../etc/passwd"),
    # texts
    "half of a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "what the vocabulary lacks": turn(content="\x00\x01"),
    "the character of breaks": turn(content="\ufdd2"),
    "a prompt longer than the context": turn(content="1" * 5000),
    # JSON
    "no JSON": b"{",
    "cut JSON": b'{"messages": [{"role": "us',
    "no UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "two documents": json.dumps(chat()).encode() * 2,
    "deep objects": chat(metadata=DEEP),
    "a hundred thousand brackets": b"[" * 100_000,
    "brackets behind a quote": b'{"a": "\\"' + b"[" * 100_000,
    "half a million lists": b'{"messages": [' + b"[]," * 250_000 + b"[]]}",
    "YAML": b"messages:\n- role: user\n",
    "a form": b"messages=1&stream=true",
    "pickle": b"cos\nsystem\n(S'id'\ntR.",
}


async def state(client, of: Scripted) -> tuple:
    """What a request could change: the engine's requests, its clock, who waits, and every count but that of answers."""
    told = (await client.ask("/metrics")).body.decode().splitlines()
    counts = [line for line in told if "http_responses" not in line]
    return len(of.added), list(of.cancelled), dict(of.lives), of.steps, client.served.engine.live, counts


@pytest.fixture(scope="module")
def statuses():
    """Of every body, from one server, which then still answers."""
    of = Scripted(tokenizer(), "ok", context=1000)

    async def ask(client):
        await client.chat()
        found, states = {}, {}
        for name, body in BODIES.items():
            given = {"raw": body} if isinstance(body, bytes) else {"body": body}
            if body in (b"",):
                given = {"pieces": [b""]}
            before = await state(client, of)
            found[name] = await client.ask("/v1/chat/completions", **given)
            states[name] = before, await state(client, of)
        return found, states, await client.chat()

    return run(ask, of)


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_is_refused_in_a_sentence(statuses, name):
    reply = statuses[0][name]
    assert reply.status in (400, 404, 413), reply.body
    error = reply.error
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) <= 400 and "\n" not in error["message"] and error["message"].isprintable()
    assert "Traceback" not in error["message"] and reply.headers["content-type"] == "application/json"


def test_nothing_of_that_changed_anything_and_the_server_goes_on(statuses):
    _, states, after = statuses
    assert after.status == 200
    for name, (before, behind) in states.items():
        assert before == behind, name


def test_there_are_sixty_of_them():
    """Bodies alone; paths, headers, keys (test_limits.py) and what is no HTTP (test_connection.py) come beside them."""
    assert len(BODIES) >= 60


PATHS = [
    ("GET", "/v1/../../etc/passwd", 404),
    ("GET", "/page/../../../../etc/passwd", 404),
    ("GET", "/page/..%2f..%2fserver.py", 404),
    ("GET", "/page//etc/passwd", 404),
    ("GET", "/page/", 404),
    ("GET", "/page/../server.py", 404),
    ("GET", "/page/\x00", 404),
    ("GET", "/docs", 404),
    ("GET", "/v1/models/../../x", 404),
    ("GET", "/v1/models/" + "x" * 5000, 404),
    ("GET", "/v1/chat/completions", 405),
    ("DELETE", "/v1/models", 405),
    ("TRACE", "/health", 405),
    ("GET", "/\x1b[2J", 404),
]


@pytest.mark.parametrize("method, path, status", PATHS)
def test_paths_lead_nowhere_else(method, path, status):
    reply = run(lambda client: client.ask(path, method=method), Scripted(tokenizer(), "ok"))
    assert reply.status == status and reply.error["message"].isprintable()
    assert status != 405 or reply.headers["allow"]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 200),
        ({"Content-Length": "9" * 40}, 413),
        ({"Host": "evil.example"}, 403),
        ([("Host", "localhost"), ("Host", "evil.example")], 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"X-Request-Id": "a\r\nX-Evil: 1"}, 200),
        ({"X-Forwarded-For": "10.0.0.1", "X-Forwarded-Host": "evil.example"}, 200),
    ],
)
def test_headers_play_no_tricks(headers, status):
    allowed = ("localhost", "127.0.0.1", "[::1]")
    ask = lambda client: client.ask("/v1/chat/completions", chat(), headers=headers)
    reply = run(ask, Scripted(tokenizer(), "ok"), allowed_hosts=allowed)
    assert reply.status == status
    assert "\n" not in reply.headers["x-request-id"] and reply.headers["x-content-type-options"] == "nosniff"
