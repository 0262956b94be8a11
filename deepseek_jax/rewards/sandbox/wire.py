"""Values as JSON, between the judge of tests and the player of a program; standard library only.

Numbers, text, bytes, the builtin collections and the common types of the standard library and NumPy cross as
themselves, and shared containers stay shared. What crosses by reference is `peer`'s part. Nothing that arrives is
believed: whatever is malformed raises.
"""

import builtins
import importlib
import math
import sys
from collections.abc import Callable, Iterable
from types import EllipsisType, MappingProxyType, NotImplementedType, TracebackType

_SMALL = 1 << 53
_DTYPES = "?biufcSU"
# Types that cross by value beside the builtin ones, as "module:name".
_VALUES = {
    "collections:deque",
    "collections:OrderedDict",
    "collections:defaultdict",
    "collections:Counter",
    "decimal:Decimal",
    "fractions:Fraction",
    "datetime:date",
    "datetime:datetime",
    "datetime:time",
    "datetime:timedelta",
    "datetime:timezone",
    "array:array",
    "uuid:UUID",
}
_FOREIGN = {"pathlib:PosixPath", "pathlib:PurePosixPath", "types:SimpleNamespace"}
_BASES = (int, float, complex, str, bytes, tuple, frozenset)
CONTAINERS = (list, dict, set, bytearray)
Data = object


class Encoder:
    """Writes the values of one message.

    Args:
      export: makes data of what does not cross by value.
      containers: mutable containers that the other side has from the message that this one answers.
    """

    def __init__(self, export: Callable[[object], Data], containers: Iterable[object] = ()) -> None:
        self.export = export
        self.containers = list(containers)
        self.numbers = {id(container): number for number, container in enumerate(self.containers)}

    def __call__(self, value: object) -> Data:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_SMALL < value < _SMALL else {"int": format(value, "x")}
        if kind is float:
            return value if math.isfinite(value) else {"float": float.hex(value)}
        write = _WRITERS.get(kind)
        if write is not None:
            return write(self, value)
        if is_container(value):
            return self._container(value)
        write = _LIBRARY_WRITERS.get(name_of(kind))
        if write is not None:
            return {name_of(kind): write(self, value)}
        if kind.__module__ == "numpy":
            return self._numpy(value)
        for base in _BASES:
            if isinstance(value, base):
                return {"sub": [self(_plain(value, base)), self.export(value)]}
        if isinstance(value, type):
            name = type_name(value)
            return self.export(value) if name is None else {"type": name}
        return self.export(value)

    def contents(self, value: object) -> Data:
        """A container's items."""
        if isinstance(value, bytearray):
            return bytes(value).hex()
        if isinstance(value, dict):
            return [[self(key), self(item)] for key, item in dict.items(value)]
        return [self(item) for item in list(value)]

    def _container(self, value: object) -> Data:
        number = self.numbers.get(id(value))
        if number is not None:
            return {"same": number}
        self.numbers[id(value)] = len(self.containers)
        self.containers.append(value)
        kind = type(value)
        if kind is list:
            return self.contents(value)
        if name_of(kind) == "collections:deque":
            return {"collections:deque": [value.maxlen, self.contents(value)]}
        if name_of(kind) == "collections:defaultdict":
            factory = value.default_factory
            named = isinstance(factory, type) and type_name(factory) is not None
            return {"collections:defaultdict": [self(factory) if named else None, self.contents(value)]}
        return {kind.__name__ if kind in CONTAINERS else name_of(kind): self.contents(value)}

    def _numpy(self, value: object) -> Data:
        dtype = getattr(value, "dtype", None)
        if dtype is None or dtype.kind not in _DTYPES.replace("?", "b"):
            return self.export(value)
        content = [dtype.str, list(getattr(value, "shape", ())), value.tobytes().hex()]
        return {"scalar" if type(value).__name__ != "ndarray" else "ndarray": content}


class Decoder:
    """Reads the values of one message; the other side's `Encoder` wrote them in the same order.

    Args:
      import_: reads what the other side's `export` made.
      containers: the mutable containers of the message that this one answers.
    """

    def __init__(self, import_: Callable[[dict, "Decoder"], object], containers: Iterable[object] = ()) -> None:
        self.import_ = import_
        self.containers = list(containers)

    def __call__(self, data: Data) -> object:
        if isinstance(data, list):
            return self._fill([], data)
        if not isinstance(data, dict):
            return data
        kind = next(iter(data))
        content = data[kind]
        if kind == "same":
            return self.containers[natural(content)]
        if kind in _EMPTY:
            return self._fill(_EMPTY[kind](), content)
        if kind in _READERS:
            return _READERS[kind](self, content)
        if kind in _VALUES:
            return self._library(kind, content)
        return self.import_(data, self)

    def refill(self, container: object, content: Data) -> None:
        """Gives a container the items that it has on the other side."""
        if isinstance(container, bytearray):
            replace(container, bytes.fromhex(content))
        elif isinstance(container, dict):
            replace(container, {self(key): self(item) for key, item in content})
        else:
            replace(container, [self(item) for item in content])

    def _fill(self, container: object, content: Data) -> object:
        self.containers.append(container)
        self.refill(container, content)
        return container

    def _library(self, kind: str, content: Data) -> object:
        module, _, name = kind.partition(":")
        maker = getattr(importlib.import_module(module), name)
        if name == "deque":
            return self._fill(maker(maxlen=None if content[0] is None else natural(content[0])), content[1])
        if name == "defaultdict":
            return self._fill(maker(self(content[0])), content[1])
        if name in ("OrderedDict", "Counter"):
            return self._fill(maker(), content)
        if name == "array":
            return maker(content[0], bytes.fromhex(content[1]))
        if name in ("datetime", "time"):
            return maker(*map(self, content[0]), fold=natural(content[1]))
        return maker(*map(self, content))


def is_container(value: object) -> bool:
    """Whether both sides keep a value's changes: the mutable collections, exactly."""
    kind = type(value)
    return kind in CONTAINERS or (
        kind.__module__ == "collections" and kind.__name__ in ("deque", "OrderedDict", "defaultdict", "Counter")
    )


def replace(container: object, items: object) -> None:
    """Gives a container other items; it stays the same object."""
    if isinstance(container, bytearray):
        container[:] = items
        return
    container.clear()
    if isinstance(container, dict):
        for key, item in items.items():
            container[key] = item
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def name_of(kind: type) -> str:
    """A class as "module:name"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def type_name(kind: type) -> str | None:
    """The name by which the other side knows a class, None for one that is the program's or the tests' own."""
    if vars(builtins).get(kind.__name__) is kind:
        return kind.__name__
    name = name_of(kind)
    known = name in _VALUES or name in _FOREIGN or (issubclass(kind, BaseException) and kind.__module__ in _library())
    return name if known and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind else None


def named_type(name: str) -> type:
    """The class of a name that `type_name` gave; no module is imported because a message says so."""
    module, _, own = name.rpartition(":")
    if not module:
        found = vars(builtins).get(own)
    else:
        if name in _VALUES | _FOREIGN:
            importlib.import_module(module)
        found = getattr(sys.modules.get(module), own, None) if module in _library() else None
        if not (name in _VALUES | _FOREIGN or (isinstance(found, type) and issubclass(found, BaseException))):
            found = None
    if not isinstance(found, type):
        raise ValueError(f"no type {name!r}")
    return found


def natural(number: Data) -> int:
    """A number of an object or a size, which must be one."""
    if type(number) is not int or number < 0:
        raise ValueError(f"wanted a number, got {number!r}")
    return number


def _library() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in sys.stdlib_module_names}


def _plain(value: object, base: type) -> object:
    """The value without its class, past whatever the class overrides."""
    if base in (tuple, bytes):
        return base.__getitem__(value, slice(None))
    if base is frozenset:
        return frozenset.union(frozenset(), value)
    if base is complex:
        return complex(complex.real.__get__(value), complex.imag.__get__(value))
    return {int: int.__int__, float: float.__float__, str: str.__str__}[base](value)


def _scalar(_: Decoder, content: Data) -> object:
    return _array(_, content)[()]


def _array(_: Decoder, content: Data) -> object:
    dtype, shape, text = content
    if dtype[1] not in _DTYPES.replace("?", "b") or not dtype[2:].isdigit():
        raise ValueError(f"no dtype {dtype!r}")
    numpy = importlib.import_module("numpy")
    return numpy.frombuffer(bytearray.fromhex(text), dtype).reshape([natural(size) for size in shape])


def _view(kind: str) -> Callable[[Encoder, object], Data]:
    return lambda encode, value: {kind: [encode(item) for item in list(value)]}


_EMPTY = {"dict": dict, "set": set, "bytearray": bytearray}
_WRITERS: dict[type, Callable[[Encoder, object], Data]] = {
    tuple: lambda encode, value: {"tuple": [encode(item) for item in value]},
    frozenset: lambda encode, value: {"frozenset": [encode(item) for item in value]},
    bytes: lambda encode, value: {"bytes": value.hex()},
    memoryview: lambda encode, value: {"bytes": value.tobytes().hex()},
    complex: lambda encode, value: {"complex": [encode(value.real), encode(value.imag)]},
    range: lambda encode, value: {"range": [encode(part) for part in (value.start, value.stop, value.step)]},
    slice: lambda encode, value: {"slice": [encode(part) for part in (value.start, value.stop, value.step)]},
    EllipsisType: lambda encode, value: {"Ellipsis": 0},
    TracebackType: lambda encode, value: None,
    NotImplementedType: lambda encode, value: {"NotImplemented": 0},
    MappingProxyType: lambda encode, value: encode(dict(value)),
    type({}.keys()): _view("keys"),
    type({}.values()): _view("values"),
    type({}.items()): _view("items"),
}
_LIBRARY_WRITERS: dict[str, Callable[[Encoder, object], Data]] = {
    "decimal:Decimal": lambda encode, value: [str(value)],
    "fractions:Fraction": lambda encode, value: [encode(value.numerator), encode(value.denominator)],
    "datetime:date": lambda encode, value: [value.year, value.month, value.day],
    "datetime:datetime": lambda encode, value: [
        [
            value.year,
            value.month,
            value.day,
            value.hour,
            value.minute,
            value.second,
            value.microsecond,
            _zone(encode, value),
        ],
        value.fold,
    ],
    "datetime:time": lambda encode, value: [
        [value.hour, value.minute, value.second, value.microsecond, _zone(encode, value)],
        value.fold,
    ],
    "datetime:timedelta": lambda encode, value: [value.days, value.seconds, value.microseconds],
    "datetime:timezone": lambda encode, value: [encode(value.utcoffset(None))],
    "array:array": lambda encode, value: [value.typecode, value.tobytes().hex()],
    "uuid:UUID": lambda encode, value: [value.hex],
}
_READERS: dict[str, Callable[[Decoder, Data], object]] = {
    "int": lambda decode, content: int(content, 16),
    "float": lambda decode, content: float.fromhex(content),
    "complex": lambda decode, content: complex(*map(decode, content)),
    "bytes": lambda decode, content: bytes.fromhex(content),
    "tuple": lambda decode, content: tuple([decode(item) for item in content]),
    "frozenset": lambda decode, content: frozenset([decode(item) for item in content]),
    "range": lambda decode, content: range(*map(decode, content)),
    "slice": lambda decode, content: slice(*map(decode, content)),
    "Ellipsis": lambda decode, content: ...,
    "NotImplemented": lambda decode, content: NotImplemented,
    "keys": lambda decode, content: dict.fromkeys(decode(item) for item in content).keys(),
    "values": lambda decode, content: dict(enumerate([decode(item) for item in content])).values(),
    "items": lambda decode, content: dict([decode(item) for item in content]).items(),
    "type": lambda decode, content: named_type(content),
    "ndarray": _array,
    "scalar": _scalar,
}


def _zone(encode: Encoder, value: object) -> Data:
    """A time zone as its offset, so that what the other side does not know (zoneinfo, the program's) crosses too."""
    offset = value.utcoffset()
    if offset is None:
        return None
    timezone = importlib.import_module("datetime").timezone
    return encode(timezone(offset))
