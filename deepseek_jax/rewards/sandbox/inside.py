"""What stands inside two linked sandboxes while assertions are graded: a judge, and a player who holds the program.

The judge runs the tests, and never the program: the program's functions are stand-ins that send their arguments to
the player and get values back. The player runs the program, and never sees a test's expected values. Only data
crosses, as JSON of the types in `encode`, so that nothing that the program does to its own process (builtins, `==`,
output, exit, memory) reaches the verdict; it can only answer calls.

Run by path as main.py beside solution.py (the player) or checks.py (the judge); standard library only.
"""

import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice

_MAX_ITEMS = 100_000
"""Items taken from an iterator that a program returns; one that gives more crosses as no value."""
_MAX_LINE = 64 << 20

# What a program's exception becomes in the judge. Never one that ends a loop or a process, such as StopIteration, by
# which a program could cut a test short.
_EXCEPTIONS = {
    kind.__name__: kind
    for kind in (
        *(ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError, OverflowError),
        *(NameError, RecursionError, NotImplementedError, RuntimeError),
    )
}


_TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object)
}


def encode(value: object, refer: Callable[[object], object]) -> object:
    """Writes a value as JSON data.

    Numbers, text, bytes, the builtin collections, range, Decimal, Fraction and the common builtin types cross as
    themselves, what derives from them as its base, and an iterator as its items.

    Args:
      value: anything.
      refer: what makes data of other objects.

    Returns:
      Data for `decode`.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return {"int": int.__format__(value, "x")}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: bytes(value).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": [encode(part, refer) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Decimal | Fraction):
        return {"Decimal" if isinstance(value, Decimal) else "Fraction": str(value)}
    if isinstance(value, Iterator) or type(value).__name__ in ("dict_keys", "dict_values", "dict_items"):
        items = list(islice(value, _MAX_ITEMS + 1))
        return {"iterator": [encode(item, refer) for item in items]} if len(items) <= _MAX_ITEMS else refer(value)
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    return refer(value)


def decode(data: object, referred: Callable[[object], object]) -> object:
    """Reads what `encode` wrote; `referred` reads what its `refer` made."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content)
    if kind in ("Decimal", "Fraction"):
        return {"Decimal": Decimal, "Fraction": Fraction}[kind](content)
    if kind == "type":
        return _TYPES[content]
    if kind == "dict":
        return {decode(key, referred): decode(item, referred) for key, item in content}
    if kind == "ref":
        return referred(content)
    items = [decode(item, referred) for item in content]
    return {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
        "iterator": iter,
        "range": lambda parts: range(*parts),
    }[kind](items)


class Player:
    """Holds the program and answers calls, one line of JSON each."""

    def __init__(self) -> None:
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}

    def run(self) -> None:
        requests = os.fdopen(os.dup(0), "r", encoding="ascii", newline="\n")
        replies = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        # A module's name that is not __main__: the demonstrations that models append do not run.
        program = importlib.import_module("solution")
        for line in requests:
            replies.write(json.dumps(self._answer(program, json.loads(line))) + "\n")
            replies.flush()

    def _answer(self, program: types.ModuleType, request: dict) -> dict:
        try:
            value = self._do(program, request)
            return {"value": encode(value, self._refer)}
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _EXCEPTIONS]
            return {"raise": [*names, "RuntimeError"][0], "text": str(error)[:1000]}

    def _do(self, program: types.ModuleType, request: dict) -> object:
        target = self.objects[request["on"]] if request["on"] is not None else program
        args = [decode(item, self.objects.__getitem__) for item in request["args"]]
        if request["do"] == "get":
            return getattr(target, *args)
        if request["do"] == "set":
            return setattr(target, *args)
        if request["do"] == "list":
            return list(islice(target, _MAX_ITEMS))
        return target(*args, **decode(request["kwargs"], self.objects.__getitem__))

    def _refer(self, value: object) -> object:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return {"ref": number}


class Judge:
    """Runs the tests and writes a verdict a line, 1 or 0, to standard error."""

    def __init__(self) -> None:
        self.replies = os.fdopen(os.dup(0), "r", encoding="ascii", newline="\n")
        self.requests = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
        self.verdicts = os.dup(2)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        self.remotes: dict[int, Remote] = {}

    def run(self) -> None:
        with open("names.json") as file:
            names = json.load(file)
        candidate = types.ModuleType("candidate")
        for local, name in names.items():
            self.bind(candidate, local, name)
        # `import *` then leaves out what the program does not define, and a test that reads it raises NameError.
        candidate.__all__ = sorted(vars(candidate).keys() & names)
        sys.modules["candidate"] = candidate
        checks = importlib.import_module("checks")
        for test in checks.CHECKS:
            os.write(self.verdicts, b"1\n" if _passes(test) else b"0\n")

    def bind(self, candidate: types.ModuleType, local: str, name: str) -> None:
        with contextlib.suppress(AttributeError):
            setattr(candidate, local, self.ask("get", None, [name]))

    def ask(self, do: str, on: int | None, args: Iterable[object], kwargs: dict | None = None) -> object:
        request = {
            "do": do,
            "on": on,
            "args": [encode(item, _refer) for item in args],
            "kwargs": encode(kwargs or {}, _refer),
        }
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        line = self.replies.readline(_MAX_LINE)
        if not line.endswith("\n"):
            raise EOFError("the program has ended, or said too much")
        reply = json.loads(line)
        if "raise" in reply:
            raise _EXCEPTIONS.get(reply["raise"], RuntimeError)(str(reply["text"]))
        return decode(reply["value"], self._referred)

    def _referred(self, number: object) -> object:
        if type(number) is not int:
            raise TypeError("a reference is a number")
        return self.remotes.setdefault(number, Remote(self, number))


class Remote:
    """An object of the program's, such as a function. Equal to nothing but itself, whatever its `__eq__` says."""

    def __init__(self, judge: Judge, number: int) -> None:
        self.__dict__.update(_judge=judge, _number=number)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._judge.ask("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> object:
        return self._judge.ask("get", self._number, [name])

    def __setattr__(self, name: str, value: object) -> None:
        self._judge.ask("set", self._number, [name, value])

    def __iter__(self) -> Iterator[object]:
        return iter(self._judge.ask("list", self._number, []))


def _refer(value: object) -> object:
    if not isinstance(value, Remote):
        raise TypeError(f"a test hands the program a {type(value).__name__}, which does not cross")
    return {"ref": value._number}


def _passes(test: Callable[[], None]) -> bool:
    try:
        test()
    except BaseException:
        return False
    return True


if __name__ == "__main__":
    if os.path.exists("checks.py"):
        Judge().run()
    else:
        Player().run()
