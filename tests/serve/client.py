"""A server in this process, asked by messages of ASGI: a client that may be slow, go away, or send anything."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from deepseek_jax.generation.engine import Metrics as EngineMetrics
from deepseek_jax.generation.engine import Update
from deepseek_jax.generation.live import Live
from deepseek_jax.generation.requests import Request
from deepseek_jax.serve.app import application
from deepseek_jax.serve.calls import Served
from deepseek_jax.serve.engine_thread import EngineThread
from deepseek_jax.serve.log import Log
from deepseek_jax.serve.metrics import Metrics
from deepseek_jax.serve.prompts import Prompts
from deepseek_jax.serve.server import http_server, listen
from deepseek_jax.serve.settings import ServeConfig
from deepseek_jax.text.stream import TextStream
from deepseek_jax.text.tokenizer import Tokenizer

ALPHABET = "".join(map(chr, range(32, 127))) + "\n\té漢\U0001f600｜"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
OPENING = TEMPLATE.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
"""As R1's, which opens the thought."""


@cache
def tokenizer(template: str = TEMPLATE) -> Tokenizer:
    return Tokenizer.characters(ALPHABET, chat_template=template)


@cache
def prompts_of(tokenizer: Tokenizer) -> Prompts:
    """With its processes, which take longer to start than most tests."""
    found = Prompts(tokenizer, tokenizer.vocab_size)
    found.warm_up()
    return found


class Scripted:
    """An engine that answers what it is told to, a token of every request a step.

    Args:
        tokenizer: a model's.
        answer: a text, or one for each seed; an end of sequence follows.
        seconds: that a step takes.
        logprob: of a completion's token, by its number.
        context: tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer,
        *,
        seconds: float = 0.0,
        context: int = 4096,
        slots: int = 64,
        logprob: Callable[[int], float] = lambda number: -0.5,
    ):
        self._logprob = logprob
        self.tokenizer, self._answer, self._seconds, self._context = tokenizer, answer, seconds, context
        self.config = SimpleNamespace(vocab_size=tokenizer.vocab_size)
        pool = SimpleNamespace(used=0, num_blocks=11)
        self.scheduler = SimpleNamespace(
            config=SimpleNamespace(max_num_seqs=slots, max_model_len=context),
            running=[],
            cache=SimpleNamespace(pools=[pool]),
        )
        self.runner, self.metrics = SimpleNamespace(compiled=3), EngineMetrics()
        self.added: list[SimpleNamespace] = []
        self.cancelled: list[int] = []
        self.lives: dict[int, tuple[Live, list[int]]] = {}
        self.steps, self.fails = 0, None

    @property
    def has_work(self) -> bool:
        return bool(self.lives) or self.fails is not None

    def warm_up(self):
        yield 1, 1

    def add(self, tokens, sampling, *, seed, salt="", constraint=None) -> int:
        limit = sampling.limit(len(tokens), self._context)
        id = len(self.added)
        self.added.append(SimpleNamespace(tokens=list(tokens), sampling=sampling, seed=seed, salt=salt))
        request = Request(id=id, tokens=list(tokens), max_new_tokens=limit, salt=salt)
        stream = TextStream(self.tokenizer, stop=sampling.stop, least=sampling.min_new_tokens)
        live = Live(request=request, sampling=sampling, seed=seed, opened=False, stream=stream)
        live.prompt_logprobs = live.prompt_likeliest = [-0.25] * (len(tokens) - 1)
        answer = self._answer(seed) if callable(self._answer) else self._answer
        drawn = [*self.tokenizer.encode(answer, add_bos=False), self.tokenizer.eos_ids[0]][:limit]
        self.lives[id] = live, drawn
        return id

    def cancel(self, id: int) -> bool:
        self.cancelled.append(id)
        return self.lives.pop(id, None) is not None

    def step(self) -> list[Update]:
        if self.fails is not None:
            raise self.fails
        time.sleep(self._seconds)
        self.steps += 1
        found = []
        for id, (live, drawn) in list(self.lives.items()):
            token = drawn.pop(0)
            live.request.tokens.append(token)
            live.logprobs.append(self._logprob(len(live.logprobs)))
            if live.sampling.top_logprobs:
                pad = live.sampling.top_logprobs - 1
                live.top.append((Ids([token] + [-1] * pad), Ids([-0.5] + [float("-inf")] * pad)))
            live.text += live.stream.feed([token])
            live.request.stopped = token in live.sampling.stop_ids or live.stream.stopped is not None
            finished = live.request.stopped or not drawn
            if finished:
                del self.lives[id]
            found.append(Update(id, [token], live.new_text(finished=finished), finished, live))
        return found


class Ids(list):
    """Looks like an array."""

    def tolist(self) -> list:
        return list(self)


@dataclass
class Reply:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream, all but its comments; the last is "[DONE]"."""
        lines = self.body.decode().split("\n\n")
        found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in found]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


def _scope(path: str, method: str, headers: list[tuple[str, str]], host: str, *, has_body: bool) -> dict[str, Any]:
    """A request as a server hands it on, with the headers that every client sends."""
    names = {name.lower() for name, _ in headers}
    if has_body and "content-type" not in names:
        headers = [*headers, ("Content-Type", "application/json")]
    headers = [("Host", "localhost"), *headers] if "host" not in names else headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": (host, 1234),
        "server": ("localhost", 8000),
    }


class Client:
    """Asks an ASGI application."""

    def __init__(self, app, served: Served):
        self.app, self.served = app, served
        self.deaths: list[BaseException] = []

    async def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        raw: bytes | None = None,
        pieces: list[bytes] | None = None,
        headers: dict[str, str] | list[tuple[str, str]] = (),
        drop_after: int | None = None,
        drop_when: Callable[[], Any] | None = None,
        pause: float = 0.0,
        stalls: bool = False,
        host: str = "127.0.0.1",
    ) -> Reply:
        """One request.

        Args:
            raw: the body's bytes in the place of JSON; pieces: likewise, as they come.
            drop_after: messages of the answer after which the client goes away; drop_when: or when this is true.
            pause: seconds that the client takes for each.
            stalls: it takes none at all.
        """
        content = json.dumps(body).encode() if body is not None else raw
        parts = pieces if pieces is not None else [content or b""]
        given = list(headers.items()) if isinstance(headers, dict) else list(headers)
        posts = content is not None or pieces is not None
        scope = _scope(path, method or ("POST" if posts else "GET"), given, host, has_body=posts)
        reply, gone, queue = Reply(), asyncio.Event(), list(parts)

        async def receive():
            if queue:
                part = queue.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(queue)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if stalls:
                await asyncio.Event().wait()
            await asyncio.sleep(pause)
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.body += message.get("body", b"")
                reply.chunks.append(message.get("body", b""))
            if drop_after is not None and len(reply.chunks) >= drop_after:
                gone.set()

        async def drop():
            await self.until(drop_when)
            gone.set()

        dropping = asyncio.ensure_future(drop()) if drop_when else None
        await asyncio.wait_for(self.app(scope, receive, send), 60)
        if dropping is not None:
            await dropping
        return reply

    async def chat(self, text: str = "1", **body: Any) -> Reply:
        """A question of one turn."""
        return await self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})

    async def until(self, condition, seconds: float = 10.0) -> None:
        """Wait for something that becomes true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not become true"
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(engine, **settings):
    """A server over an engine, warm."""
    deaths: list[BaseException] = []
    config = ServeConfig(**{"names": ("tiny", "other"), "rate_limit": None, **settings})
    thread = EngineThread(engine, max_waiting=config.max_waiting, on_death=deaths.append)
    log = Log()
    served = Served(thread, prompts_of(engine.tokenizer), config, Metrics(thread, config.names[0], log), log)
    client = Client(application(served), served)
    client.deaths = deaths
    thread.start()
    try:
        await client.until(lambda: thread.ready or thread.problem, 300)
        yield client
    finally:
        thread.close()
        log.flush(5)


@asynccontextmanager
async def listening(engine, **settings):
    """The same behind a port of this machine; yields the client, whose `end` begins the end, and the port."""
    async with serving(engine, **settings) as client:
        client.served.engine.start = client.served.prompts.warm_up = client.served.prompts.close = lambda: None
        server = http_server(client.served)
        client.end = lambda: setattr(server, "should_exit", True)
        with listen("127.0.0.1", 0) as listener:
            running = asyncio.ensure_future(server.serve(sockets=[listener]))
            await client.until(lambda: server.started)
            try:
                yield client, listener.getsockname()[1]
            finally:
                server.should_exit = True
                await running


def run(call, engine, **settings):
    """What `call(client)` gives, over a server that runs for it."""

    async def main():
        async with serving(engine, **settings) as client:
            return await call(client)

    return asyncio.run(main())
