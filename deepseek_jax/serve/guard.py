"""What every request passes first: host, key, rate, size and depth of its body; and what ends it: its client, time."""

import asyncio
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import limits
from limits import storage, strategies
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.patience import Patience
from deepseek_jax.serve.replies import refused
from deepseek_jax.serve.settings import ServeConfig

OPEN_PATHS = ("/health", "/ready", "/version", "/")
OPEN_FOLDER = "/page/"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_MAX_PARTS = 200_000
_DRAIN_SECONDS, _DRAIN_BYTES = 0.5, 1 << 20


class Guard:
    """An ASGI application around another.

    Args:
        app: that application.
        settings: of the server.
        takes_body: paths that a body may be posted to; of others none is read.
        answered: told of every answer: its path, status, seconds and the notes that routes made.
        failed: called where an exception that nobody expected is handled.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeConfig,
        takes_body: Collection[str],
        answered: Callable[[Mapping[str, Any]], None],
        failed: Callable[[], None],
    ):
        self._app, self._settings, self._takes_body, self._answered = app, settings, takes_body, answered
        self._failed = failed
        self._rates = _Rates(settings.rate_limit)
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, scope["notes"], scope["salt"] = time.monotonic(), {}, ""
        # a body that nobody reads is not waited for, however slowly it comes
        answer = _Answer(send, self._settings.write_seconds, _id_of(scope), closes=_has_body(scope))
        try:
            self._admit(scope)
            body = await self._body(scope, receive, answer)
            await self._run(scope, body, receive, answer)
        except ApiError as error:
            await _drain(receive, answer)
            await answer.refuse(scope, receive, error)
        finally:
            answer.close()
            about = {"id": answer.id, "method": scope["method"], "path": scope["path"], "status": answer.status}
            self._answered(about | {"seconds": round(time.monotonic() - began, 4)} | scope["notes"])

    def _admit(self, scope: Scope) -> None:
        """Whether the request may be looked at."""
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            raise ApiError(400, "content-length: got it beside transfer-encoding, wanted one of them")
        hosts, path = self._settings.allowed_hosts, scope["path"]
        if hosts is not None and _host(scope) not in hosts:
            raise ApiError(403, f"host: got {_host(scope)!r:.80}, wanted one of {', '.join(hosts)}")
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        who = self._who(scope)
        if self._keys:
            scope["salt"] = who  # what one key's prompts left in the cache tells the others nothing, by no time
        if scope["method"] == "POST":
            self._rates.count(who)

    def _who(self, scope: Scope) -> str:
        """Whose requests are counted together."""
        address = (scope.get("client") or ("unknown",))[0]
        if not self._keys:
            return f"address {address}"
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # all are compared, so that the time says neither which one it is nor how much of it is right
        same = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(same):
            self._rates.count(f"wrong {address}")
            raise ApiError(
                401, "authorization: got no key that is known, wanted Bearer and a key", code="invalid_api_key"
            )
        return f"key {same.index(True)}"

    async def _body(self, scope: Scope, receive: Receive, answer: "_Answer") -> bytes:
        """All of it, which may be parsed."""
        if scope["method"] != "POST" or scope["path"] not in self._takes_body:
            await _drain(receive, answer)
            return b""
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            raise ApiError(408, f"body: did not come within {self._settings.body_seconds:g} s; send it again") from None
        answer.closes = False
        check_json(body, self._settings.max_depth)
        return body

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        most, headers = self._settings.max_body, dict(scope["headers"])
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "content-type: got another one, wanted application/json")
        too_large = ApiError(413, f"body: got more than {most} bytes, wanted fewer", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > most):
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "body: the connection ended before it did")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """The application, ended when its client goes away, or takes nothing, or when the time is over."""
        running = asyncio.ensure_future(self._app(scope, _given(body), answer.send))
        ends = {"client gone": asyncio.ensure_future(_gone(receive)), "client slow": answer.stuck}
        try:
            await asyncio.wait(
                {running, *ends.values()}, timeout=self._settings.call_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if running.done():
                running.result()
                return
        except Exception:  # a mistake of ours: the client has its answer, and the operator the traceback
            self._failed()
            scope["notes"]["ended"] = "failed"
            if answer.status is None:
                raise ApiError(500, "the server made a mistake; its log says which") from None
            return
        finally:
            every = [running, *ends.values()]
            for task in every:
                task.cancel()
            await asyncio.gather(*every, return_exceptions=True)
        scope["notes"]["ended"] = next((why for why, task in ends.items() if not task.cancelled()), "out of time")
        if scope["notes"]["ended"] == "out of time" and answer.status is None:
            raise ApiError(504, f"the answer took more than {self._settings.call_seconds:g} s; ask for fewer tokens")


async def _drain(receive: Receive, answer: "_Answer") -> None:
    """Read on in a body that nobody wants, if it comes soon: closing over unread bytes would reset the connection."""
    size, more = 0, answer.closes
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while more and size <= _DRAIN_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return


class _Answer:
    """What is sent to a client.

    Attributes:
        id: of the request.
        closes: the connection ends with it.
        status: of the answer, once it began.
        stuck: done when the client takes nothing any more; what is being sent then waits to be ended.
    """

    def __init__(self, send: Send, seconds: float, id: str, *, closes: bool):
        self._send, self._seconds, self.id, self.closes = send, seconds, id, closes
        self.status: int | None = None
        self.stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._patience = Patience(seconds, self._give_up)

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = {"X-Request-Id": self.id, "X-Content-Type-Options": "nosniff"}
            more |= {"Connection": "close"} if self.closes else {}
            headers = [*message.get("headers", ()), *((k.lower().encode(), v.encode()) for k, v in more.items())]
            message = {**message, "headers": headers}
        with self._patience:
            await self._send(message)

    async def refuse(self, scope: Scope, receive: Receive, error: ApiError) -> None:
        """Answer with an error."""
        async with asyncio.timeout(self._seconds):
            await refused(error)(scope, receive, self.send)

    def close(self) -> None:
        """Nothing is sent any more."""
        self._patience.close()

    def _give_up(self) -> None:
        if not self.stuck.done():
            self.stuck.set_result(None)


class _Rates:
    """How often somebody may call.

    Args:
        limit: such as "60/minute"; None is no limit.
    """

    def __init__(self, limit: str | None):
        self._limiter = strategies.MovingWindowRateLimiter(storage.MemoryStorage())
        self._limit = None if limit is None else limits.parse(limit)

    def count(self, who: str) -> None:
        """One more call.

        Raises:
            ApiError: it is one too many.
        """
        if self._limit is None or self._limiter.hit(self._limit, who):
            return
        wait = self._limiter.get_window_stats(self._limit, who).reset_time - time.time()
        raise ApiError(
            429,
            f"rate limit: got more than {self._limit}, wait",
            code="rate_limit_exceeded",
            retry_after=math.ceil(max(1.0, wait)),
        )


def check_json(body: bytes, depth: int) -> None:
    """Refuse JSON that is nested too deeply, or of too many parts, before anybody parses it.

    Raises:
        ApiError: it is so.
    """
    brackets = _STRING.sub(b"", body).translate(None, delete=_NO_BRACKETS)
    if len(brackets) > 2 * _MAX_PARTS:
        raise ApiError(400, f"body: got more than {_MAX_PARTS} lists and objects, wanted fewer")
    level = 0
    for bracket in brackets:
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            raise ApiError(400, f"body: got JSON nested deeper than {depth}, wanted it flatter")


def _given(body: bytes) -> Receive:
    """The body in one piece, and then nothing: the guard itself looks out for the client's end."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets that event")

    return receive


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _id_of(scope: Scope) -> str:
    """The client's name for its request, where it is harmless; else one of ours."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else secrets.token_hex(8)


def _has_body(scope: Scope) -> bool:
    given = dict(scope["headers"])
    return b"transfer-encoding" in given or given.get(b"content-length", b"0") != b"0"


def _host(scope: Scope) -> str:
    """The name in the Host header, without its port."""
    given = [value for name, value in scope["headers"] if name == b"host"]
    host = given[0].decode("latin-1").lower() if len(given) == 1 else ""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
