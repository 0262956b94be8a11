"""What each side of the line has of the other's: objects by number, mirrored classes, exceptions that cross whole."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Iterator

from deepseek_jax.rewards.sandbox import proxies
from deepseek_jax.rewards.sandbox.wire import Decoder, Encoder, name_of, named_type, natural, type_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# By these a program could end a test's loop rather than fail the test.
ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type(str.upper), type(str.__len__))
_CALLABLES = ("functools:partial", "operator:itemgetter", "operator:attrgetter", "operator:methodcaller")


class Objects:
    """This side's objects of which the other has heard, and its stand-ins for the other's.

    Args:
      guarded: whether this is the judge, who believes nothing.
    """

    def __init__(self, *, guarded: bool) -> None:
        self.guarded = guarded
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}
        self.described: set[int] = set()
        self.kinds: dict[int, type] = {}
        self.remotes: dict[tuple[int, bool], proxies.Remote] = {}

    def _encoder(self, containers: Any = ()) -> tuple[Encoder, dict[int, dict]]:
        new: dict[int, dict] = {}
        encode: Encoder
        encode = Encoder(lambda value: self._export(value, encode, new), containers)
        return encode, new

    def _export(self, value: object, encode: Encoder | None = None, new: dict[int, dict] | None = None) -> dict:
        """Data of an object that does not cross by value."""
        new = {} if new is None else new
        if value is proxies.STRANGER:
            return {"stranger": 0}
        number = proxies.number_of(value, self)
        if number is not None:
            return {"yours": number}
        if isinstance(value, BaseException):
            return {"error": self._exception_data(value, encode or Encoder(self._export))}
        if isinstance(value, type):
            return {"class": self._describe(value, new)}
        if self.guarded:
            named = _library_function(value)
            if named is not None:
                return {"function": named}
            self._check_export(value)
        data = {"ref": self.number(value), "class": self._describe(type(value), new)}
        if isinstance(value, types.CoroutineType):
            data["coroutine"] = True
        return data

    def number(self, value: object) -> int:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return number

    def _check_export(self, value: object) -> None:
        if not (is_own(value) or is_callback(value) or isinstance(value, types.CoroutineType | Iterator)):
            raise TypeError(f"a test hands the program a {type(value).__name__}, which does not cross")

    def _describe(self, kind: type, new: dict[int, dict]) -> int:
        """The number of a class, which the other side is told about once."""
        number = self.number(kind)
        if number in self.described or number in new:
            return number
        new[number] = {}
        bases = []
        for base in kind.__bases__ if kind.__module__ not in ("builtins", "types") else ():
            name = type_name(base)
            if name is None:
                bases.append({"class": self._describe(base, new)})
            elif name != "object":
                bases.append({"type": name})
        held = {name for base in kind.__mro__ if base is not object for name in vars(base)}
        new[number] |= {
            "name": kind.__name__,
            "module": "candidate",
            "doc": kind.__doc__ if isinstance(kind.__doc__, str) else None,
            "operators": sorted(held & proxies.OPERATORS),
            "unhashable": kind.__hash__ is None,
            "like": next((base.__name__ for base in kind.__mro__ if base.__module__ == "builtins"), ""),
            "bases": bases,
        }
        return number

    def _learn(self, message: dict) -> None:
        pending = {natural(number): about for number, about in message.get("classes", ())}
        for number in pending:
            self._mirror(number, pending)

    def _mirror(self, number: int, pending: dict[int, dict]) -> type:
        if number in self.kinds:
            return self.kinds[number]
        about = pending[number]
        bases = []
        for base in about["bases"]:
            kind = self._mirror(natural(base["class"]), pending) if "class" in base else _known(base["type"])
            if isinstance(kind, proxies.RemoteType) or issubclass(kind, (BaseException, *proxies._DATA)):
                bases.append(RuntimeError if issubclass(kind, ENDS) else kind)
        self.kinds[number] = proxies.mirror(self, number, about, bases)
        return self.kinds[number]

    def remote(self, number: object, kind: type, *, trusted: bool = False, base: object = None) -> proxies.Remote:
        """The stand-in for object `number`, always the same one for the same trust."""
        own = number[1] if isinstance(number, tuple) else natural(number)
        found = self.remotes.get((own, trusted))
        if found is None or base is not None:
            found = proxies.stand_in(self, own, kind, trusted=trusted, base=base)
            self.remotes[own, trusted] = found
        return found

    def _import(self, data: dict, decode: Decoder) -> object:
        if "stranger" in data:
            return object()
        if "yours" in data:
            return self.objects[natural(data["yours"])]
        if "error" in data:
            return self._made_exception(data["error"], decode)
        if "function" in data and not self.guarded:
            return _found_function(*data["function"])
        if "sub" in data:
            base, reference = data["sub"]
            base = decode(base)
            return (
                self.objects[natural(reference["yours"])] if "yours" in reference else self._reference(reference, base)
            )
        return self._reference(data, None)

    def _reference(self, data: dict, base: object) -> object:
        if "ref" not in data:
            return self.kinds[natural(data["class"])]
        kind = self.kinds[natural(data["class"])] if "class" in data else self._unknown()
        if base is not None and not issubclass(kind, type(base)):
            raise ValueError("a value of another type than its class")
        made = self.remote(data["ref"], kind, base=base)
        return _awaiting(made) if data.get("coroutine") else made

    def _unknown(self) -> type:
        """For an object that is told without its class: something to call."""
        about = {"name": "object", "module": "candidate", "operators": ["__call__"], "like": ""}
        about |= {"unhashable": False, "doc": None}
        if -1 not in self.kinds:
            self.kinds[-1] = proxies.mirror(self, -1, about, [])
        return self.kinds[-1]

    def _exception_data(self, error: BaseException, encode: Encoder) -> dict:
        kinds = [encode(kind) for kind in type(error).__mro__ if issubclass(kind, BaseException)]
        number = self.number(error)
        state = {key: value for key, value in vars(error).items() if key != "__notes__"}
        return {
            "kinds": kinds,
            "args": encode(list(error.args)),
            "text": error_text(error),
            "state": encode(state),
            "ref": number,
            "cause": encode(error.__cause__),
        }

    def _made_exception(self, data: dict, decode: Decoder) -> BaseException:
        kind = next(kind for kind in map(self._exception_kind, data["kinds"]) if kind is not None)
        args, state = decode(data["args"]), decode(data["state"])
        if issubclass(kind, ENDS):
            kind = RuntimeError
        made = kind.__new__(kind, *args)
        if kind.__module__ == "builtins":
            kind.__init__(made, *args)  # sets what is no part of vars, such as the code of SystemExit
        made.args = tuple(args)
        vars(made).update(state)
        made.__cause__ = decode(data["cause"])
        if isinstance(type(made), proxies.RemoteType):
            vars(made).update(_text=str(data["text"]), _number=natural(data["ref"]))
        return made

    def _exception_kind(self, data: object) -> type | None:
        try:
            kind = Decoder(self._import)(data)
        except ValueError:
            return None
        return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def is_own(value: object) -> bool:
    """Whether a value is a class of the tests', an instance of one, a mock or a text stream."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__ in ("checks", "unittest.mock") or (
        kind.__module__ == "_io" and kind.__name__ in ("StringIO", "BytesIO")
    )


def is_callback(value: object) -> bool:
    """Whether a value of the tests' may be called by the program: a function, or a method of a container."""
    if isinstance(value, types.BuiltinFunctionType):
        return type(value.__self__).__module__ in ("builtins", "collections") and not isinstance(
            value.__self__, type | types.ModuleType
        )
    return isinstance(value, types.FunctionType | types.MethodType) or name_of(type(value)) in _CALLABLES


def error_text(error: BaseException) -> str:
    """What an exception says, cut at 10,000 characters; "" where it cannot say it."""
    try:
        return str.__str__(str(error))[:10_000]
    except Exception:  # its __str__ is the program's
        return ""


def _known(name: str) -> type:
    try:
        return named_type(name)
    except ValueError:
        return object


async def _awaiting(remote: Any) -> object:
    return await remote


def _library_function(value: object) -> list[str] | None:
    """Where the program's side finds a function of Python's own."""
    if not isinstance(value, _FUNCTIONS):
        return None
    owner = getattr(value, "__objclass__", None)
    module = owner.__module__ if owner is not None else getattr(value, "__module__", None)
    if not isinstance(module, str) or module.partition(".")[0] not in sys.stdlib_module_names or module == "__main__":
        return None
    name = value.__qualname__
    return (
        [module, name]
        if "<" not in name and getattr(value, "__self__", None) in (None, builtins, sys.modules.get(module))
        else None
    )


def _found_function(module: str, name: str) -> object:
    found: object = __import__(module, fromlist=["*"])
    for part in name.split("."):
        found = getattr(found, part)
    return found
