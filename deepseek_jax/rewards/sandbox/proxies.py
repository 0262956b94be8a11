"""Stand-ins for objects that live in the other process, and what their answers may decide.

A stand-in's class mirrors the object's: its name, its bases and the operators that it defines, so that `isinstance`,
`len`, `with`, `for`, `except` and sorting mean what they mean beside the object itself. Each operation is a question
to the other side.

In the judge (`peer.guarded`) the program answers these questions, and a test must not take its word for a verdict.
An object that a test made itself from a class of the program is `trusted`: its operators are what the test is about.
Any other, a function's result say, equals no data and hears of none: neither as the other side of `==`, `<`, `-` or
`in`, nor as the argument of a predicate that the builtin types have. Two of the program's objects are compared by the
program, but one that calls itself equal to a stranger is not believed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ALONE = (
    "bool len str repr hash int float complex index bytes neg pos abs invert trunc floor ceil reversed enter fspath"
    " length_hint aenter aiter anext"
).split()
_WITH_ARGUMENTS = "call getitem setitem delitem exit aexit round format".split()
_ORDER = "lt le gt ge".split()
_BINARY = "add sub mul truediv floordiv mod divmod pow matmul and or xor lshift rshift".split()
OPERATORS = frozenset(
    f"__{name}__"
    for name in [
        *_ALONE,
        *_WITH_ARGUMENTS,
        *_ORDER,
        *_BINARY,
        *(f"r{name}" for name in _BINARY),
        *(f"i{name}" for name in _BINARY),
        *"eq ne contains iter next await".split(),
    ]
)
_PREDICATES = frozenset(["startswith", "endswith", "issubset", "issuperset", "isdisjoint"])
_INTERFACES = ("__array", "__cuda_array", "__dlpack", "__buffer")
_FEW = 32
"""Items taken one by one from an iterator before the rest comes in bundles."""
STRANGER = object()
_LIKE = {
    "list": list,
    "dict": dict,
    "set": set,
    "bytearray": bytearray,
    "function": types.FunctionType,
    "method": types.MethodType,
    "generator": types.GeneratorType,
    "async_generator": types.AsyncGeneratorType,
    "module": types.ModuleType,
    "property": property,
}


class RemoteType(type):
    """The class of mirrored classes; `_peer` and `_number` say which object each mirrors."""

    def __call__(cls, *args: object, **kwargs: object) -> object:
        peer, number = _own(cls)
        made = peer.ask("call", number, args, kwargs)
        if not (peer.guarded and isinstance(made, Remote) and number in peer.classes_of_tests):
            return made
        if isinstance(made, _DATA):
            object.__setattr__(made, "_trusted", True)
            return made
        return peer.remote(number_of(made, peer), type(made), trusted=True)

    def __getattr__(cls, name: str) -> Any:
        if name in ("__abstractmethods__", "__signature__", "__wrapped__", "__text_signature__"):
            raise AttributeError(name)
        peer, number = _own(cls)
        return peer.ask("get", number, [name])

    def __setattr__(cls, name: str, value: object) -> None:
        if name.startswith("__") or name in ("_peer", "_number", "_operators"):
            return type.__setattr__(cls, name, value)
        peer, number = _own(cls)
        return peer.ask("set", number, [name, value])

    def __instancecheck__(cls, value: object) -> bool:
        if type.__instancecheck__(cls, value):
            return True
        if not isinstance(value, Remote) or "_number" not in vars(cls):
            return False
        peer, number = _own(cls)
        return bool(peer.ask("isinstance", number, [value]))

    def __iter__(cls) -> Iterator[object]:
        return iter(_class_operation(cls, "__iter__"))

    def __len__(cls) -> int:
        return _class_operation(cls, "__len__")

    def __getitem__(cls, key: object) -> object:
        return _class_operation(cls, "__getitem__", key)

    def __contains__(cls, item: object) -> bool:
        return bool(_class_operation(cls, "__contains__", item))

    def __bool__(cls) -> bool:
        return True


class Remote:
    """An object of the other side."""

    def __getattr__(self, name: str) -> Any:
        # NumPy would read this process's memory where such an attribute points.
        if name in ("_peer", "_number", "_trusted") or name.startswith(_INTERFACES):
            raise AttributeError(name)
        peer, number = _own(self)
        if peer.guarded and name in _PREDICATES and not _trusted(self):
            raise AttributeError(f"{name} of an object of the program's, which must not hear what a test wants")
        return peer.ask("get", number, [name])

    def __setattr__(self, name: str, value: object) -> None:
        peer, number = _own(self)
        peer.ask("set", number, [name, value])

    def __delattr__(self, name: str) -> None:
        peer, number = _own(self)
        peer.ask("del", number, [name])

    def __hash__(self) -> int:
        return hash(identity(self))

    def __eq__(self, other: object) -> bool:
        return NotImplemented if identity(self) != identity(other) else True

    def __copy__(self) -> object:
        peer, number = _own(self)
        return peer.ask("copy", number, [False])

    def __deepcopy__(self, memo: object) -> object:
        peer, number = _own(self)
        return peer.ask("copy", number, [True])

    @property
    def __class__(self) -> type:
        return _LIKE.get(type(self)._like, type(self))

    @property
    def __dict__(self) -> Any:
        peer, number = _own(self)
        return peer.ask("get", number, ["__dict__"])

    @property
    def __doc__(self) -> Any:
        peer, number = _own(self)
        return peer.ask("get", number, ["__doc__"])

    _like = ""
    _peer: Any = None


class RemoteIterator:
    """Items of an iterator of the other side: one by one at first, for it may never end, later in bundles."""

    def __init__(self, remote: Remote) -> None:
        self.peer, self.number = _own(remote)
        self.taken = 0
        self.ready: list[object] = []

    def next(self) -> object:
        if not self.ready:
            count = 1 if self.taken < _FEW else min(self.taken, 1024)
            self.ready = self.peer.ask("next", self.number, [count])
            if not self.ready:
                raise StopIteration
            self.ready.reverse()
        self.taken += 1
        return self.ready.pop()


def mirror(peer: Any, number: int, about: dict[str, Any], bases: list[type]) -> type:
    """The class that stands in for class `number` of the other side.

    Args:
      peer: who asks.
      number: of the class.
      about: "name", "module", "operators" (those that it defines or inherits), "like" (a builtin type that it derives
        from or is).
      bases: its own bases, as far as they are mirrored, exceptions or immutable builtins.
    """
    own = {name: _OPERATIONS[name] for name in about["operators"] if name in _OPERATIONS}
    if any(issubclass(base, BaseException) for base in bases):
        return _named(peer, number, RemoteType(about["name"], tuple(bases), _exception_namespace(about)))
    data = next((data for data in _DATA for base in bases if issubclass(base, data)), None)
    if data is not None:
        # Compared by what they hold, whatever the program says.
        own |= {name: getattr(data, name) for name in _HELD if hasattr(data, name)}
    elif about["unhashable"]:
        own["__hash__"] = None
    elif "__eq__" in own and "__hash__" not in own:
        own["__hash__"] = Remote.__hash__
    own["__doc__"] = vars(Remote)["__doc__"] if about["like"] in ("function", "method") else about["doc"]
    own |= {"_like": about["like"], "__module__": about["module"], "_operators": frozenset(about["operators"])}
    if not any(issubclass(base, Remote) for base in bases):
        bases = [Remote, *bases]
    try:
        made = RemoteType(about["name"], tuple(bases), own)
    except TypeError:  # an order of bases that mirrors cannot have
        made = RemoteType(about["name"], (Remote,), own)
    return _named(peer, number, made)


def _named(peer: Any, number: int, made: type) -> type:
    type.__setattr__(made, "_peer", peer)
    type.__setattr__(made, "_number", number)
    return made


def _exception_namespace(about: dict[str, Any]) -> dict[str, Any]:
    """An exception is a real one, with the state that it crossed with; the rest is asked for."""

    def ask(self: Any, name: str) -> object:
        state = BaseException.__getattribute__(self, "__dict__")
        if "_number" not in state or name.startswith("__"):
            raise AttributeError(name)
        return type(self)._peer.ask("get", state["_number"], [name])

    text = lambda self: BaseException.__getattribute__(self, "__dict__").get("_text", "")
    return {"__getattr__": ask, "__str__": text, "__module__": about["module"]}


def stand_in(peer: Any, number: int, kind: type, *, trusted: bool, base: object = None) -> Remote:
    """An instance of a mirrored class; `base` is what it holds where the class derives from an immutable builtin."""
    data = next((data for data in _DATA if issubclass(kind, data)), None)
    made = object.__new__(kind) if data is None else data.__new__(kind, *_parts(base))
    for name, value in (("_peer", peer), ("_number", number), ("_trusted", trusted), ("_items", None)):
        object.__setattr__(made, name, value)
    return made


def identity(value: object) -> object:
    """What tells objects apart: two stand-ins for one object are the same."""
    if isinstance(type(value), RemoteType) and issubclass(type(value), Remote):
        return ("remote", object.__getattribute__(value, "_number"))
    return id(value)


def same_object(one: object, other: object) -> bool:
    """`is`, for stand-ins too."""
    return identity(one) == identity(other)


def number_of(value: object, peer: Any) -> int | None:
    """The number of the other side's object that a value stands for."""
    kind = type(value)
    if isinstance(value, RemoteType):
        return vars(value).get("_number")
    if isinstance(value, BaseException):
        return vars(value).get("_number")
    if isinstance(kind, RemoteType) and issubclass(kind, Remote) and object.__getattribute__(value, "_peer") is peer:
        return object.__getattribute__(value, "_number")
    return None


_DATA = (int, float, complex, str, bytes, tuple, frozenset)
_HELD = [
    f"__{name}__"
    for name in [*_ORDER, *"eq ne hash bool len contains iter getitem int float index complex bytes".split()]
]


def _parts(base: object) -> tuple[object, ...]:
    return (base.real, base.imag) if isinstance(base, complex) else (base,)


def _own(value: Any) -> tuple[Any, int]:
    get = type.__getattribute__ if isinstance(value, type) else object.__getattribute__
    return get(value, "_peer"), get(value, "_number")


def _trusted(value: object) -> bool:
    return object.__getattribute__(value, "_trusted")


def _is_remote(value: object) -> bool:
    return issubclass(type(value), Remote) or isinstance(value, RemoteType)


def _hears(value: Remote, *others: object) -> bool:
    """Whether the program may hear what stands beside its object."""
    peer, _ = _own(value)
    return not peer.guarded or _trusted(value) or all(map(_is_remote, others))


def _class_operation(cls: type, name: str, *args: object) -> Any:
    peer, number = _own(cls)
    return peer.ask("op", number, [name, *args])


def _operate(value: Remote, name: str, *args: object, **kwargs: object) -> Any:
    peer, number = _own(value)
    return peer.ask("op", number, [name, *args], kwargs)


def _plain(name: str) -> Any:
    return lambda self, *args, **kwargs: _operate(self, name, *args, **kwargs)


def _guarded(name: str) -> Any:
    return lambda self, *others: _operate(self, name, *others) if _hears(self, *others) else NotImplemented


def _in_place(name: str) -> Any:
    def operate(self: Remote, other: object) -> object:
        if not _hears(self, other):
            return NotImplemented
        result = _operate(self, name, other)
        # The object that the test made is still the object that the test made.
        return self if same_object(result, self) else result

    return operate


def _call(self: Remote, *args: object, **kwargs: object) -> object:
    peer, number = _own(self)
    return peer.ask("call", number, args, kwargs)


def _iter(self: Remote) -> object:
    if type(self)._like == "generator":
        return self
    found = _operate(self, "__iter__")  # which may begin anew
    return self if same_object(found, self) else iter(found)


def _next(self: Remote) -> object:
    items = object.__getattribute__(self, "_items")
    if items is None:
        items = RemoteIterator(self)
        object.__setattr__(self, "_items", items)
    return items.next()


def _await(self: Remote) -> Iterator[object]:
    peer, number = _own(self)
    return peer.ask("await", number, [])
    yield


def _eq(self: Remote, other: object) -> object:
    if not _hears(self, other):
        return _data_equal(self, other)
    found = _operate(self, "__eq__", other)
    peer, _ = _own(self)
    if found is NotImplemented or not found or not peer.guarded:
        return found
    return bool(found) and not _equals_a_stranger(self)


def _equals_a_stranger(value: Remote) -> bool:
    try:
        found = _operate(value, "__eq__", STRANGER)
    except Exception:  # its __eq__ is the program's
        return False
    return found is not NotImplemented and bool(found)


def _data_equal(value: Remote, other: object) -> object:
    """A list of the program's own class equals a list that holds the same."""
    like = _LIKE.get(type(value)._like)
    if like in (list, dict, set, bytearray) and isinstance(other, like):
        peer, number = _own(value)
        return peer.ask("data", number, []) == other
    return NotImplemented


def _ne(self: Remote, other: object) -> object:
    if _hears(self, other) and "__ne__" in type(self)._operators:
        found = _operate(self, "__ne__", other)
        return found if found is NotImplemented else bool(found)
    found = self == other
    return not found


def _contains(self: Remote, item: object) -> bool:
    if _hears(self, item):
        return bool(_operate(self, "__contains__", item))
    if not {"__iter__", "__getitem__"} & type(self)._operators:
        raise TypeError("an object of the program's must not hear what a test looks for in it")
    return any(item is found or item == found for found in self)


_OPERATIONS: dict[str, Any] = {
    **{f"__{name}__": _plain(f"__{name}__") for name in (*_ALONE, *_WITH_ARGUMENTS)},
    **{f"__{name}__": _guarded(f"__{name}__") for name in (*_ORDER, *_BINARY, *(f"r{name}" for name in _BINARY))},
    **{f"__i{name}__": _in_place(f"__i{name}__") for name in _BINARY},
    "__call__": _call,
    "__iter__": _iter,
    "__next__": _next,
    "__await__": _await,
    "__eq__": _eq,
    "__ne__": _ne,
    "__contains__": _contains,
}
