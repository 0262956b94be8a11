"""Answers: JSON, and streams of server-sent events."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from deepseek_jax.serve.errors import ApiError

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


class JsonReply(JSONResponse):
    """JSON whose every character outside ASCII is spelled out, halves of surrogate pairs too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refused(error: ApiError) -> JsonReply:
    """The answer that an error is."""
    return JsonReply(error.body, status_code=error.status, headers=error.headers)


class _Stream(StreamingResponse):
    """One that is ended however it ends, also where nothing of it was ever asked for."""

    def __init__(self, lines: AsyncIterator[str], end: Callable[[], None]):
        super().__init__(lines, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def event_stream(events: AsyncIterator[dict[str, Any] | None], end: Callable[[], None]) -> StreamingResponse:
    """Events as they come.

    Args:
        events: None is a sign of life. An `ApiError` that it raises is the last event.
        end: called when the answer ends, in whatever way.
    """
    return _Stream(_lines(events), end)


async def _lines(events: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield KEEP_ALIVE if event is None else _line(event)
    except ApiError as error:
        yield _line(error.body)
    yield DONE


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, allow_nan=False, separators=(',', ':'))}\n\n"
