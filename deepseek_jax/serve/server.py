"""The server's process: its port, its signals, its end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn

from deepseek_jax.distributed import say
from deepseek_jax.generation.engine import Engine
from deepseek_jax.interrupt import end
from deepseek_jax.serve.app import application
from deepseek_jax.serve.calls import Served
from deepseek_jax.serve.connection import allow_files, protocol
from deepseek_jax.serve.engine_thread import EngineThread
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.log import Log
from deepseek_jax.serve.metrics import Metrics
from deepseek_jax.serve.prompts import Prompts
from deepseek_jax.serve.settings import ServeConfig

_LAST_SECONDS = 5.0  # for clients to hear of an end, before the process ends without them
_LOG_SECONDS = 2.0  # for the log's last lines

_SWITCH_SECONDS = 5e-4  # else the engine's thread, back from the device, waits 5 ms for an event loop that is busy


class _Server(uvicorn.Server):
    """Uvicorn's, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A port, taken before a model is loaded for it.

    Raises:
        OSError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as problem:
        raise OSError(f"{host}:{port}: {problem.strerror.lower()}; choose another --port or --host") from None


def http_server(served: Served) -> uvicorn.Server:
    """Uvicorn's, as a model is served with it."""
    settings = served.settings
    config = uvicorn.Config(
        application(served),
        http=protocol(settings.head_seconds, served.log.note),
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(settings.grace_seconds + _LAST_SECONDS),
        h11_max_incomplete_event_size=1 << 16,
        ws="none",
        proxy_headers=False,
    )
    return _Server(config)


class Process:
    """A server over an engine.

    Args:
        engine: with a tokenizer; nobody else uses it.
        settings: of the server.
    """

    def __init__(self, engine: Engine, settings: ServeConfig):
        thread = EngineThread(engine, max_waiting=settings.max_waiting, on_death=self._died)
        log = Log()
        metrics = Metrics(thread, settings.names[0], log)
        self.served = Served(thread, Prompts(engine.tokenizer, engine.config.vocab_size), settings, metrics, log)
        self._server: uvicorn.Server | None = None
        self._interrupted = False

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal comes. SIGTERM ends it when what runs is done, Ctrl-C at once.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            RuntimeError: the engine has ended.
        """
        allow_files(self.served.engine.most)
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            asyncio.run(self._serve(listener))
        finally:
            self.served.log.flush(_LOG_SECONDS)
        if self._interrupted:
            raise KeyboardInterrupt
        if self.served.engine.problem is not None:
            raise RuntimeError("the engine has ended") from self.served.engine.problem

    async def _serve(self, listener: socket.socket) -> None:
        self._server = http_server(self.served)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        await self._server.serve(sockets=[listener])

    def _drain(self) -> None:
        """Take no more calls, and end when what runs is done; what is not done in time is told so."""
        self._end_after(self.served.settings.grace_seconds)

    def _interrupt(self) -> None:
        if self._interrupted:
            end(program=True)
        self._interrupted = True
        self._end_after(0.0)

    def _end_after(self, seconds: float) -> None:
        self.served.drains = True
        self._server.should_exit = True
        ends = ApiError(503, "the server is ending; ask another one", retry_after=5)
        asyncio.get_running_loop().call_later(seconds, self.served.engine.give_up, ends)

    def _died(self, problem: BaseException) -> None:
        """In the engine's thread: a server without an engine ends, whatever its clients do."""
        timer = threading.Timer(_LAST_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()
        if self._server is not None:
            self._server.should_exit = True
        said = " ".join(str(problem).split()) or type(problem).__name__
        with contextlib.suppress(OSError):  # a full disk is not to keep calls from hearing of it
            say(f"the engine has ended: {type(problem).__name__}: {said:.500}")
