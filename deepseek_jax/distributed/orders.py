"""Orders that the main process gives the others while all of them work: JSON, over a connection to each."""

import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import distributed

from deepseek_jax.distributed.identity import START_SECONDS, main_host, process_count
from deepseek_jax.distributed.wire import connected, listener, received

_PLACE = "deepseek_jax/orders"
_SIZE = struct.Struct("!Q")  # bytes of an order, on the wire
_TOKEN = 32  # characters that say that a connection is one of ours


class Leading:
    """The main process's end. Every process makes its own end once, at the same place of the program.

    Args:
        asked: called, in a thread, when another process asks for the end.
    """

    def __init__(self, asked: Callable[[], None]):
        self._asked, self._lines = asked, []
        token = secrets.token_hex(_TOKEN // 2)
        with listener() as port:
            distributed.global_state.client.key_value_set(_PLACE, json.dumps([port.getsockname()[1], token]))
            port.settimeout(START_SECONDS)
            while len(self._lines) < process_count() - 1:
                self._take(port.accept()[0], token)
        for line in self._lines:
            threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def _take(self, line: socket.socket, token: str) -> None:
        line.settimeout(START_SECONDS)
        if not hmac.compare_digest(received(line, _TOKEN), token.encode()):  # whoever else found the port
            line.close()
            return
        line.settimeout(None)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines.append(line)

    def _listen(self, line: socket.socket) -> None:
        try:
            while line.recv(1):
                self._asked()
        except OSError:
            return  # it ended, which the watch over all processes tells

    def give(self, order: Any) -> None:
        """The same order to all others; anything that JSON holds."""
        said = json.dumps(order, separators=(",", ":")).encode()
        for line in self._lines:
            line.sendall(_SIZE.pack(len(said)) + said)

    def close(self) -> None:
        """The last order was given."""
        self.give(None)


class Following:
    """Another process's end."""

    def __init__(self) -> None:
        client = distributed.global_state.client
        port, token = json.loads(client.blocking_key_value_get(_PLACE, START_SECONDS * 1000))
        self._line = connected(main_host(), port, START_SECONDS)
        self._line.sendall(token.encode())

    def __iter__(self) -> Iterator[Any]:
        """Orders as they come, until the last.

        Raises:
            RuntimeError: the main process ended before that.
        """
        while True:
            size = received(self._line, _SIZE.size)
            said = received(self._line, *_SIZE.unpack(size)) if size else b""
            if not said:
                raise RuntimeError("process 0 gives no orders any more")
            order = json.loads(said)
            if order is None:
                return
            yield order

    def ask_to_end(self) -> None:
        """Ask the main process to come to an end."""
        self._line.sendall(b"e")
