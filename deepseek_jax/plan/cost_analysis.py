"""What a compiled step costs a chip: arithmetic, traffic of its main memory and collectives, from the HLO text.

`compiled.cost_analysis()` counts the body of a loop once, so that a scan over layers costs it one layer. Here the
bodies are multiplied by their trip counts, and collectives are told apart by the mesh axis they run over.

Source of the rules for one instruction: xla/service/hlo_cost_analysis.cc.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from deepseek_jax.ops.experts import TILES
from deepseek_jax.plan.hlo import Computation, Frame, Instruction, parse
from deepseek_jax.plan.hlo_bytes import continues, fusion_bytes, instruction_bytes, skips_groups
from deepseek_jax.plan.hlo_flops import flops, is_unknown
from deepseek_jax.plan.replica_groups import Axes

# Bytes that a chip sends, of an operand of so many bytes and a group of n chips.
_SENT: Mapping[str, Callable[[int, int], int]] = {
    "all-gather": lambda operand, n: operand * (n - 1),
    "all-reduce": lambda operand, n: 2 * operand * (n - 1) // n,
    "reduce-scatter": lambda operand, n: operand * (n - 1) // n,
    "all-to-all": lambda operand, n: operand * (n - 1) // n,
    "ragged-all-to-all": lambda operand, n: operand * (n - 1) // n,
    "collective-permute": lambda operand, n: operand,
}
# What calls a computation, and the attribute that names it: all but the first on TPU, of what its sparse cores do.
_CALLS = {
    "call": "to_apply",
    "call-start": "to_apply",
    "async-start": "calls",
    "custom-call-start": "called_computations",  # libtpu 0.0.52
}
# Loops that a step may have no turn of: rounds of dispatch that only skewed loads of the experts need, and the blocks
# that a sequence had before its new tokens, of which a fresh prompt has none.
_RARE = ("overflow_rounds", "earlier_blocks")
# A loop over so many tiles of the experts' rows, if the load is even.
_TILED = re.compile(rf"{TILES}(\d+)/while$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over one axis.

    Attributes:
        op: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all or collective-permute.
        axis: of the mesh; several are joined with "+", in the mesh's order.
        bytes: that a chip sends in a step.
        count: how many a chip runs in a step.
    """

    op: str
    axis: str
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one run of a program costs each chip.

    Attributes:
        flops: of matrix products; a multiplication and an addition are two.
        masked_flops: of the dense form of a ragged product, marked to be skipped and not in `flops`.
        bytes_accessed: read from and written to main memory.
        collectives: sorted by bytes, largest first.
        unknown_loops: op names of loops whose trip count only the data decide, counted once.
        skipped_loops: those of them that only a skewed load of the experts or a continued prompt needs, not counted.
        unknown_kernels: op names of custom calls that do not declare their arithmetic, which is not in `flops`.
    """

    flops: int
    masked_flops: int
    bytes_accessed: int
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    skipped_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...] = ()


def cost_analysis(text: str, mesh_shape: Mapping[str, int], *, loop: str | None = None) -> StepCost:
    """Adds up what a compiled program costs each chip, or what one turn of a loop of it does.

    FLOPs are those of dot and convolution as XLA counts them, within Triton's fusions and the calls of cuBLAS and
    cuDNN as well, and those that a custom call declares. The weight gradient of `ragged_dot` on TPU (of libtpu 0.0.52
    the product itself too) is a dense convolution over all groups whose masked tiles the compiler marks to be skipped:
    one group's share is counted, which leaves out only that tiles at the border of two groups run twice; no run on a
    TPU has confirmed it. Elementwise work is not counted.

    Bytes are operands and results of every instruction outside fusions, without the padding of tiles; a slice or
    gather reads what it takes, a dynamic-update-slice writes what it updates, inside a fusion as well. Buffers
    in VMEM cost nothing, and a declared estimate of a custom call loses its operands in VMEM.

    A collective over n chips sends, as a ring does: all-gather (n-1)/n of its result, reduce-scatter and
    all-to-all (n-1)/n of their operand, all-reduce twice that, a permute its operand, ragged-all-to-all
    (n-1)/n of its whole send buffer (an upper bound).

    Loops multiply what is inside; a conditional costs what its largest branch does, one for what a fresh prompt lacks
    its smallest. A loop over tiles of the experts'
    rows, which is what GPUs and CPUs compute them by, turns as often as an even load has it, and prompts are fresh.

    Args:
        text: of `compiled.as_text()`, partitioned and scheduled.
        mesh_shape: sizes by axis, in the mesh's order; the chips are numbered row by row.
        loop: op name of a while loop of the program itself, such as jit(_decode_loop)/while, of which a turn is wanted.

    Raises:
        ValueError: the program is not one for the mesh, has no such loop, or has groups of chips or an operation not
            understood.
    """
    module = parse(text)
    chips = math.prod(mesh_shape.values())
    if module.partitions != chips:
        raise ValueError(
            f"cost: got a program for {module.partitions} chips, wanted one for the mesh's {chips}: compile for it"
        )
    walk = _Walk(Axes(mesh_shape))
    frame = Frame(module, module.entry)
    total = walk.total(frame if loop is None else _turn(frame, loop))
    sums = (
        Collective(op=op, axis=axis, bytes=sent, count=total.counts[op, axis])
        for (op, axis), sent in total.sent.items()
    )
    return StepCost(
        flops=total.flops,
        masked_flops=total.masked_flops,
        bytes_accessed=total.bytes,
        collectives=tuple(sorted(sums, key=lambda c: (-c.bytes, c.op, c.axis))),
        unknown_loops=tuple(walk.unknown),
        skipped_loops=tuple(walk.skipped),
        unknown_kernels=tuple(walk.kernels),
    )


def _turn(entry: Frame, loop: str) -> Frame:
    """The body of a loop of the entry computation."""
    for instruction in entry.computation.instructions.values():
        if instruction.opcode == "while" and instruction.op_name == loop:
            return entry.enter(instruction, instruction.called("body"))
    raise ValueError(f"cost: got a program without the loop {loop!r}, wanted the op name of one")


@dataclasses.dataclass
class _Sum:
    flops: int = 0
    masked_flops: int = 0
    bytes: int = 0
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "_Sum", times: int = 1) -> None:
        self.flops += times * other.flops
        self.masked_flops += times * other.masked_flops
        self.bytes += times * other.bytes
        for mine, its in ((self.sent, other.sent), (self.counts, other.counts)):
            for key, value in its.items():
                mine[key] += times * value


class _Walk:
    """Totals of computations, each computed once."""

    def __init__(self, axes: Axes):
        self.axes = axes
        self.unknown: list[str] = []
        self.skipped: list[str] = []
        self.kernels: list[str] = []
        self._totals: dict[str, _Sum] = {}

    def total(self, frame: Frame) -> _Sum:
        """Of a computation; its loops turn as often as where it is first called."""
        name = frame.computation.name
        if name not in self._totals:
            total = _Sum()
            for instruction in frame.computation.instructions.values():
                self._add(total, frame, instruction)
            self._totals[name] = total
        return self._totals[name]

    def _add(self, total: _Sum, frame: Frame, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            times = self._trips(frame, instruction)
            if times:
                total.add(self.total(frame.enter(instruction, instruction.called("body"))), times)
        elif opcode == "conditional":
            branches = [self.total(frame.enter(instruction, name)) for name in _branches(instruction)]
            choose = min if _is_rare(instruction) else max
            total.add(choose(branches, key=lambda branch: (branch.flops, branch.bytes)))
        elif opcode in _CALLS:
            total.add(self.total(frame.enter(instruction, instruction.called(_CALLS[opcode]))))
        elif opcode == "fusion":
            self._add_fusion(total, frame, instruction)
        else:
            total.bytes += instruction_bytes(frame.computation, instruction)
            total.flops += flops(frame.computation, instruction)
            if is_unknown(instruction):
                self.kernels.append(instruction.op_name or instruction.name)
            self._add_collective(total, frame.computation, instruction)

    def _trips(self, frame: Frame, loop: Instruction) -> int:
        times = frame.trips(loop)
        if times is None:
            tiled = _TILED.search(loop.op_name)
            times = int(tiled.group(1)) if tiled else None
        if times is None:
            rare = _is_rare(loop)
            (self.skipped if rare else self.unknown).append(loop.op_name or loop.name)
            times = 0 if rare else 1
        return times

    def _add_fusion(self, total: _Sum, frame: Frame, fusion: Instruction) -> None:
        """What is inside, but for its bytes: only the fusion itself touches memory."""
        inside = self.total(frame.enter(fusion, fusion.called("calls")))
        part = dataclasses.replace(inside, bytes=fusion_bytes(frame, fusion))
        # the newer compiler wraps such a product in a second fusion, marked again
        if part.flops and skips_groups(fusion) and not inside.masked_flops:
            part.flops //= _groups(frame, fusion)
            part.masked_flops = inside.flops - part.flops
        total.add(part)

    def _add_collective(self, total: _Sum, computation: Computation, instruction: Instruction) -> None:
        op = instruction.opcode.removesuffix("-start")
        if op not in _SENT or continues(computation, instruction):
            return
        operands = computation.operands(instruction)
        if op == "ragged-all-to-all":
            operands = operands[:1]  # the others are the receiving buffer, offsets and sizes
        size = sum(operand.bytes for operand in operands)
        if op == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            op = "reduce-scatter"  # the TPU compiler's form of it: an all-reduce and a slice in one fusion
        axis, n = self.axes.of(instruction.rest)
        if n > 1:
            total.sent[op, axis] += _SENT[op](size, n)
            total.counts[op, axis] += 1


def _is_rare(instruction: Instruction) -> bool:
    return any(scope in instruction.op_name for scope in _RARE)


def _branches(conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
    if listed:
        return re.findall(r"%([^ ,]+)", listed.group(1))
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def _groups(frame: Frame, fusion: Instruction) -> int:
    """Of a masked dense form of a ragged product: the groups are the one spatial dimension of its convolution."""
    inside = frame.module.computations[fusion.called("calls")]
    sizes = [
        math.prod(int(n) for n in window.group(1).split("x"))
        for i in inside.instructions.values()
        if i.opcode == "convolution" and (window := re.search(r"window=\{size=([\dx]+)", i.rest))
    ]
    if len(sizes) != 1:
        raise ValueError(f"cost: {fusion.name}: got {len(sizes)} batched convolutions in a masked product, wanted 1")
    return sizes[0]
