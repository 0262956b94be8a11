"""The text of a compiled XLA program, read into computations and instructions; and how often its loops turn.

Of every instruction only its name, type, opcode, operands and the rest of its line are kept; the rest is searched
when a rule asks for it. One pass over the lines, so that a text of tens of megabytes takes seconds.

Source: the printer in xla/hlo/ir/hlo_instruction.cc; forms that only the compilers make (memory spaces, while
loops without a trip count on TPU) were read off texts of libtpu 0.0.42 and XLA:CPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property

_INSTRUCTION = re.compile(r"  (ROOT )?%?([^ ]+) = (.+?) ([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^ ]+) \(.* -> .*\{$")
_OPERAND = re.compile(r"%([^ ,()]+)")
_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# The value is that of the first operand, whatever the layout or the memory.
_SAME = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "optimization-barrier"}
_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "and": lambda a, b: a & b,
}
_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_MOST_TRIPS = 2**31


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """An array of a type.

    Attributes:
        dims: its shape.
        bytes: its size, without the padding of its layout.
        hbm: whether it lies in the chip's main memory; TPU layouts say S(1) for VMEM, S(6) for SMEM.
    """

    dims: tuple[int, ...]
    bytes: int
    hbm: bool


@cache
def leaves(type_text: str) -> tuple[Leaf, ...]:
    """The arrays of a type, those of tuples in order."""
    found = []
    for dtype, dims_text, layout in _LEAF.findall(type_text):
        dims = tuple(int(d.removeprefix("<=")) for d in dims_text.split(",") if d)
        space = _SPACE.search(layout)
        found.append(Leaf(dims, -(-math.prod(dims) * _bits(dtype) // 8), space is None or space.group(1) == "0"))
    return tuple(found)


def _bits(dtype: str) -> int:
    """Of one element: the first number in its name, as in bf16 or f8e4m3fn, complex numbers included."""
    return _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype).group())


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """A line. `inside` holds what stands between the brackets, `rest` all attributes after them."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return leaves(self.type)

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def hbm_bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves if leaf.hbm)

    @property
    def op_name(self) -> str:
        found = _OP_NAME.search(self.rest)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> str:
        """The computation that an attribute such as `calls` or `body` names."""
        return re.search(rf"\b{attribute}=\{{?%?([^ ,}}]+)", self.rest).group(1)

    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(re.search(r"\bindex=(\d+)", self.rest).group(1))


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside))

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who reads an instruction, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, position))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A program for one of `partitions` chips."""

    computations: Mapping[str, Computation]
    entry: Computation
    partitions: int


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
        ValueError: a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _joined(text):
        if line.startswith("  "):
            match = _INSTRUCTION.match(line) if current else None
            if match:
                _add(current, match, line)
        elif line.endswith("{"):
            match = _COMPUTATION.match(line)
            if match:
                current = computations[match.group(2)] = Computation(match.group(2))
                entry = current if match.group(1) else entry
    if entry is None:
        raise ValueError("hlo: got a text without an ENTRY computation, wanted that of compiled.as_text()")
    partitions = _PARTITIONS.search(text, 0, text.find("\n"))
    return Module(computations=computations, entry=entry, partitions=int(partitions.group(1)) if partitions else 1)


def _joined(text: str) -> Iterator[str]:
    """Its lines; what kernels say of themselves may go on over several, of which the first ends in a brace."""
    kept: list[str] = []
    for line in text.splitlines():
        if kept or line.endswith("kernel_metadata={"):
            kept.append(line)
        if not kept:
            yield line
        elif line.startswith("}}"):
            yield "".join(kept)
            kept = []


def _add(computation: Computation, match: re.Match, line: str) -> None:
    root, name, type_text, opcode = match.groups()
    end = line.find(")", match.end())
    inside = line[match.end() : end]
    operands = () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(inside))
    instruction = Instruction(name, type_text, opcode, operands, inside, line[end + 1 :])
    computation.instructions[name] = instruction
    if root:
        computation.root = instruction


# --- how often a loop turns ----------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Frame:
    """A computation where it is called, so that scalars can be followed to the constants they come from.

    Attributes:
        caller: the frame of the calling instruction, None for the entry.
        call: the calling instruction.
        counter: values given to elements of a loop's state, by index.
    """

    module: Module
    computation: Computation
    caller: "Frame | None" = None
    call: Instruction | None = None
    counter: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def enter(self, call: Instruction, name: str, counter: Mapping[int, int] | None = None) -> "Frame":
        return Frame(self.module, self.module.computations[name], self, call, counter or {})

    def value(self, name: str) -> int | None:
        """The integer that a scalar always holds; None if that cannot be told."""
        instruction = self.computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return _constant(instruction.inside)
        if opcode in _SAME:
            return self.value(operands[0])
        if opcode == "get-tuple-element":
            return self.element(operands[0], instruction.index())
        if opcode == "parameter" and self.call is not None and self.call.opcode in ("fusion", "call"):
            return self.caller.value(self.call.operands[int(instruction.inside)])
        if opcode in ("fusion", "call"):
            inner = self.enter(instruction, instruction.called("calls" if opcode == "fusion" else "to_apply"))
            return inner.value(inner.computation.root.name)
        if opcode in _ARITHMETIC or opcode == "compare":
            return self._combined(instruction)
        return None

    def _combined(self, instruction: Instruction) -> int | None:
        values = [self.value(name) for name in instruction.operands]
        if None in values:
            return None
        if instruction.opcode == "compare":
            return int(_COMPARE[re.search(r"direction=(\w+)", instruction.rest).group(1)](*values))
        return _ARITHMETIC[instruction.opcode](*values)

    def element(self, name: str, index: int) -> int | None:
        """The integer in an element of a tuple."""
        instruction = self.computation.instructions[name]
        if instruction.opcode == "tuple":
            return self.value(instruction.operands[index])
        if instruction.opcode in _SAME:
            return self.element(instruction.operands[0], index)
        if instruction.opcode == "while":
            return self.element(instruction.operands[0], index) if self._kept(instruction, index) else None
        if instruction.opcode == "parameter" and self.call is not None and self.call.opcode == "while":
            if index in self.counter:
                return self.counter[index]
            kept = self.caller._kept(self.call, index)
            return self.caller.element(self.call.operands[0], index) if kept else None
        return None

    def _kept(self, loop: Instruction, index: int) -> bool:
        """Whether a loop leaves an element of its state as it was."""
        body = self.module.computations[loop.called("body")]
        inner = Frame(self.module, body)
        return body.root.opcode == "tuple" and inner._comes_from(body.root.operands[index], index)

    def _comes_from(self, name: str, index: int) -> bool:
        """Whether a value is element `index` of the computation's own parameter."""
        instruction = self.computation.instructions[name]
        if instruction.opcode in _SAME:
            return self._comes_from(instruction.operands[0], index)
        if instruction.opcode != "get-tuple-element":
            return False
        of, at = self.computation.instructions[instruction.operands[0]], instruction.index()
        if of.opcode == "while" and self._kept(of, at):
            of = self.computation.instructions[of.operands[0]]
            return of.opcode == "tuple" and self._comes_from(of.operands[at], index)
        return of.opcode == "parameter" and at == index

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop of this computation turns; None if only the data decide.

        The CPU compiler writes the number down. The TPU compiler does not, so that it is found from the loop's
        condition, the counter's first value and its step.
        """
        known = _TRIPS.search(loop.rest)
        if known:
            return int(known.group(1))
        condition, body = (self.module.computations[loop.called(name)] for name in ("condition", "body"))
        read = {i.index() for i in condition.instructions.values() if i.opcode == "get-tuple-element"}
        counters = [index for index in read if not self._kept(loop, index)]
        if len(counters) != 1 or body.root.opcode != "tuple":
            return None
        (counter,) = counters
        first = self.element(loop.operands[0], counter)
        if first is None:
            return None

        def after(value: int) -> int | None:
            return self.enter(loop, body.name, {counter: value}).value(body.root.operands[counter])

        def goes_on(value: int) -> int | None:
            return self.enter(loop, condition.name, {counter: value}).value(condition.root.name)

        second = after(first)
        if second in (None, first) or after(second) != 2 * second - first or goes_on(first) is None:
            return None
        return _first_false(lambda n: bool(goes_on(first + n * (second - first))))


def _constant(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    number = text.strip("{}")
    return int(number) if re.fullmatch(r"-?\d+", number) else None


def _first_false(holds) -> int | None:
    """The first n at which a condition that never comes back no longer holds."""
    if not holds(0):
        return 0
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
        if high > _MOST_TRIPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
