"""One end of the line between judge and player: questions and answers."""

from __future__ import annotations

import array
import builtins
import copy
import fcntl
import json
import os
import sys
import termios
import threading
import time
import types
from collections.abc import Iterator

from deepseek_jax.rewards.sandbox import proxies
from deepseek_jax.rewards.sandbox.objects import ENDS, Objects, error_text, is_callback, is_own
from deepseek_jax.rewards.sandbox.wire import CONTAINERS, Decoder, Encoder, is_container, natural, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_LINE = 64 << 20
_MAX_HELD = 1000
"""Items of an attribute's container up to which both sides keep its changes."""
_MOST_HELD = 16
_SLICE_SECONDS = 0.001


class Ended(BaseException):
    """The other side has ended or speaks nonsense; no test passes after that."""


class Peer(Objects):
    """One end of the line.

    Args:
      reader: a file descriptor to read from.
      writer: one to write to.
      guarded: whether this is the judge, who believes nothing.
    """

    def __init__(self, reader: int, writer: int, *, guarded: bool) -> None:
        super().__init__(guarded=guarded)
        self.lines = os.fdopen(reader, "r", encoding="ascii", newline="\n")
        self.out = os.fdopen(writer, "w", encoding="ascii", newline="\n")
        self.ended = False
        self.received = 0
        self.crossed: list[BaseException] = []
        self.classes_of_tests: set[int] = set()
        self.lock = threading.RLock()
        self.loop: Any = None
        self.captured: Any = None
        self.late: dict[int, BaseException] = {}
        # Containers that are attributes of the player's objects, which both sides keep: by the player's number, with
        # the contents of which the other side knows.
        self.held: dict[int, tuple[object, str]] = {}
        self.root: object = None

    def ask(self, do: str, on: int | None, args: Any, kwargs: dict[str, object] | None = None) -> Any:
        """Puts a question to the other side and waits for the answer, answering its own questions meanwhile."""
        with self.lock:
            if self.ended:
                raise Ended
            encode, new = self._encoder()
            request = {"do": do, "on": on, "args": [encode(item) for item in args]}
            request["kwargs"] = {key: encode(value) for key, value in (kwargs or {}).items()}
            if self.guarded and sys.stdout is not sys.__stdout__:
                request["out"] = True
            self._tell_held(request, encode)
            self._send(request, new)
            reply = self._receive()
            while "do" in reply:
                self.answer(reply)
                reply = self._receive()
            if do == "await" and reply.get("raise") == "StopAsyncIteration":
                raise StopAsyncIteration  # the end of an asynchronous iterator, as [] is of another
            return self._result(reply, encode.containers)

    def _result(self, reply: dict, containers: list[object]) -> object:
        decode = Decoder(self._import, containers)
        try:
            self._learn(reply)
            if "raise" in reply:
                error = self._exception(reply, decode)
            else:
                error, value = None, decode(reply["value"])
            for number, content in reply.get("changed", ()):
                decode.refill(containers[number], content)
            self._hear_held(reply, decode)
            if "holds" in reply:
                value = self._hold(natural(reply["holds"]), value)
        except Exception as problem:  # whatever the other side's line holds: it ends the talk
            self._end(problem)
        if reply.get("out") and sys.stdout is not sys.__stdout__:
            sys.stdout.write(str(reply["out"]))
        if error is not None:
            self.crossed = [*self.crossed[-9:], error]
            raise error
        return value

    def _exception(self, reply: dict, decode: Decoder) -> BaseException:
        if "error" in reply:
            return self._made_exception(reply["error"], decode)
        kind = vars(builtins).get(reply["raise"])
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, ENDS):
            kind = RuntimeError
        return kind(str(reply["text"]))

    def _send(self, message: dict, new: dict[int, dict]) -> None:
        if new:
            message["classes"] = [[number, about] for number, about in new.items()]
        text = json.dumps(message)
        self.described |= set(new)
        try:
            self.out.write(text + "\n")
            self.out.flush()
        except OSError as problem:
            self._end(problem)

    def _receive(self) -> dict:
        line = self.lines.readline(_MAX_LINE)
        try:
            if not line.endswith("\n"):
                raise EOFError("the other side has ended, or said too much")
            self.received += len(line)
            if self.guarded and _unread(self.out.fileno()):
                raise ValueError("an answer from before the question")
            message = json.loads(line, parse_constant=_no_constant)
            if not isinstance(message, dict) or not ({"do", "value", "raise"} & set(message)):
                raise ValueError("no message")
        except (Exception, MemoryError) as problem:
            self._end(problem)
        return message

    def _end(self, problem: BaseException) -> None:
        self.ended = True
        raise Ended(str(problem)) from None

    def serve(self) -> None:
        """Answers questions until the line ends."""
        while True:
            try:
                self.answer(self._receive())
            except Ended:
                return

    def answer(self, request: dict) -> None:
        """Does what the other side asks for, and says what came of it."""
        decode = Decoder(self._import)
        sent = list(request["args"])
        try:
            self._learn(request)
            args = [decode(item) for item in sent]
            kwargs = {str(key): decode(value) for key, value in dict(request["kwargs"]).items()}
            self._hear_held(request, decode)
        except Exception as problem:  # as above
            self._end(problem)
        encode, new = self._encoder(decode.containers)
        try:
            value = self._do(request["do"], request["on"], args, kwargs)
            reply: dict = {"value": encode(value)}
            if request["do"] == "get" and is_container(value) and not self.guarded:
                reply["holds"] = self.number(value)
                self._hold(reply["holds"], value)
        except Ended:
            raise
        except BaseException as error:  # what the call raised is its answer
            if self.guarded and not isinstance(error, Exception):
                raise
            encode, new = self._encoder(decode.containers)
            reply = self._raised(error, encode)
        if decode.containers:
            reply["changed"] = self._changes(sent, request["kwargs"], args, kwargs, decode.containers, encode)
        self._tell_held(reply, encode)
        if self.captured is not None and request.get("out"):
            reply["out"] = self.captured()
        self._send(reply, new)

    def _tell_held(self, message: dict, encode: Encoder) -> None:
        """Adds to a message the containers that have changed since the other side heard of them."""
        for number, (container, known) in self.held.items():
            text = self._held_text(container)
            if text != known:
                self.held[number] = (container, text)
                message.setdefault("held", []).append([number, encode.contents(container)])

    def _hear_held(self, message: dict, decode: Decoder) -> None:
        for number, content in message.get("held", ()):
            container = self.held[natural(number)][0]
            decode.refill(container, content)
            self.held[number] = (container, self._held_text(container))

    def _hold(self, number: int, value: object) -> object:
        """Keeps a container; one that is kept already takes the new contents, and stays the same object."""
        if not is_container(value):
            raise ValueError("wanted a container")
        kept = self.held[number][0] if number in self.held else value
        if kept is not value:
            replace(kept, value)
        self.held[number] = (kept, self._held_text(kept))
        if len(self.held) > _MOST_HELD:  # the same one on both sides
            del self.held[next(iter(self.held))]
        return kept

    def _held_text(self, container: object) -> str:
        return json.dumps(Encoder(self._export).contents(container)) if len(container) <= _MAX_HELD else ""

    def _raised(self, error: BaseException, encode: Encoder) -> dict:
        known = next((kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind), RuntimeError)
        reply: dict = {"raise": known.__name__, "text": error_text(error)}
        try:
            reply["error"] = self._exception_data(error, encode)
        except Exception:  # an exception that is too strange to cross whole
            reply.pop("error", None)
        return reply

    def _changes(
        self, sent: list, sent_kwargs: dict, args: list, kwargs: dict, containers: list[object], encode: Encoder
    ) -> list:
        again = Encoder(self._export)
        try:
            if [again(item) for item in args] == sent and {k: again(v) for k, v in kwargs.items()} == sent_kwargs:
                return []
        except RecursionError:
            return []
        return [[number, encode.contents(container)] for number, container in enumerate(list(containers))]

    def _do(self, do: str, on: object, args: list, kwargs: dict) -> object:
        target = self.root if on is None else self.objects[natural(on)]
        if self.guarded:
            self._check(do, target, args)
        if do == "get":
            return self.get(target, *args)
        if do == "set":
            return setattr(target, *args)
        if do == "del":
            return delattr(target, *args)
        if do == "call":
            return target(*args, **kwargs)
        if do == "op" and args[0] == "__getitem__":
            return target[args[1]]  # of a generic class too
        if do == "op":
            kind = type(target)
            return getattr(kind, args[0])(target, *args[1:], **kwargs)
        if do == "next":
            return self._next(natural(on), target, args[0])
        if do == "isinstance":
            return isinstance(args[0], target)
        if do == "data":
            return next(base(target) for base in CONTAINERS if isinstance(target, base))
        if do == "copy":
            return (copy.deepcopy if args[0] else copy.copy)(target)
        if do == "await":
            return self._await(target)
        raise ValueError(f"no such question: {do!r}")

    def get(self, target: object, name: str) -> object:
        return getattr(target, name)

    def _check(self, do: str, target: object, args: list) -> None:
        """What a program may do with an object of the tests': call a function, use an instance of their own class."""
        own = is_own(target)
        name = args[0] if args else ""
        plain = isinstance(name, str) and not name.startswith("__")
        allowed = {
            "call": own or is_callback(target),
            "get": own and plain,
            "set": own
            and plain
            and not isinstance(target, type)
            and not callable(getattr(type(target), str(name), None)),
            "op": own and name in proxies.OPERATORS,
            "next": isinstance(target, Iterator),
            "await": True,
            "isinstance": own,
        }
        if do == "op" and isinstance(target, Iterator) and name == "__iter__":
            return
        if do == "get" and name in _NAMES and isinstance(target, types.FunctionType):
            return
        if not allowed.get(do, False):
            raise (AttributeError if do == "get" else TypeError)(f"a program may not {do} this object of the tests'")

    def _next(self, number: int, target: Any, count: int) -> list[object]:
        """Up to `count` items; fewer where they take long. An error waits until what came before it is told."""
        items: list[object] = []
        late = self.late.pop(number, None)
        if late is not None:
            raise late
        end = time.monotonic() + _SLICE_SECONDS
        while len(items) < count and (not items or time.monotonic() < end):
            try:
                items.append(next(target))
            except StopIteration:
                break
            except Exception as error:  # of the iterator; what came before it is given first
                if not items:
                    raise
                self.late[number] = error
                break
        return items

    def _await(self, target: Any) -> object:
        if self.guarded:
            return _drive(target)
        asyncio = sys.modules.get("asyncio") or __import__("asyncio")
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)

        async def wait() -> object:
            return await target

        return self.loop.run_until_complete(wait())


_NAMES = ("__name__", "__qualname__", "__doc__")


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _unread(fd: int) -> int:
    """Bytes in a pipe that its reader has not yet taken."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, size)
    return size[0]


def _drive(coroutine: Any) -> object:
    """Runs a coroutine of the tests' that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a coroutine of the tests' waits inside the program")
