"""HTTP/1.1 on a connection: uvicorn's protocol, with a time for a request's head and refusals in OpenAI's form."""

import asyncio
import json
import resource
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek_jax.distributed import say
from deepseek_jax.serve.errors import ApiError

_FILES = 1 << 16  # that a server may have open, where the system lets it
_OTHER_FILES = 128  # beside its calls: libraries, the model, connections that are kept alive


class Connection(H11Protocol):
    """A client's.

    Attributes:
        head_seconds: a request's line and headers must be there within, from its first byte, or from the connection's
            begin; uvicorn itself would wait for ever.
        log: told of requests that were none.
    """

    head_seconds: float
    log: Callable[[Mapping[str, Any]], None]
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Keep the time while a head is incomplete; bytes that drip do not begin it anew."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self._give_up)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._refuse(ApiError(408, f"request: its head did not come within {self.head_seconds:g} s; send it again"))

    def send_400_response(self, msg: str) -> None:
        """Where h11 found no HTTP."""
        self._refuse(ApiError(400, "request: got no well-formed HTTP/1.1, wanted a request line, headers and a body"))

    def _refuse(self, error: ApiError) -> None:
        """Say what is wrong, unless an answer is under way, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.log({"method": None, "path": None, "status": error.status})
            body = json.dumps(error.body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            reason = HTTPStatus(error.status).phrase
            head = h11.Response(status_code=error.status, headers=list(headers.items()), reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None:  # a route that still reads the body is not to answer too
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def protocol(head_seconds: float, log: Callable[[Mapping[str, Any]], None]) -> type[Connection]:
    """The class of a server's connections, with these attributes."""
    return type("Connection", (Connection,), {"head_seconds": head_seconds, "log": staticmethod(log)})


def allow_files(calls: int) -> None:
    """Raise the number of files that the process may have open, so that it has one for every call.

    Args:
        calls: that may run and wait.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if 0 <= soft < calls + _OTHER_FILES:
        wanted = calls + _OTHER_FILES
        say(f"{soft} open files allowed, {wanted} wanted for {calls} calls; raise ulimit -n", kind="warning")
