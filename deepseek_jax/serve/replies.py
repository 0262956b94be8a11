"""Answers: JSON, and streams of server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deepseek_jax.serve.errors import ApiError

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class JsonReply(JSONResponse):
    """JSON whose every character outside ASCII is spelled out, halves of surrogate pairs too."""

    def render(self, content: Any) -> bytes:
        return _encode(content).encode()


def refused(error: ApiError) -> JsonReply:
    """The answer that an error is."""
    return JsonReply(error.body, status_code=error.status, headers=error.headers)


class EventStream(Response):
    """Server-sent events as they come.

    Args:
        events: those that there are at a time, as text, which are sent together; none are a sign of life. An `ApiError`
            that it raises is the last event.
        end: called when the answer ends, in whatever way, also where nothing of it was ever asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Sequence[str], None], end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = lambda text, more: {"type": "http.response.body", "body": text.encode(), "more_body": more}
        last = DONE
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with aclosing(self._events) as every:
                    async for events in every:
                        await send(body("".join(events) or KEEP_ALIVE, more=True))
            except ApiError as error:
                last = f"data: {_encode(error.body)}\n\n{DONE}"
            await send(body(last, more=False))
        finally:
            self._end()


def events_with(common: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    """Makes events that have a part in common, which is written down once.

    >>> events_with({"id": "a"})({"choices": []})
    'data: {"id":"a","choices":[]}\\n\\n'
    """
    head = f"data: {_encode(common)[:-1]},"
    return lambda event: f"{head}{_encode(event)[1:]}\n\n"
