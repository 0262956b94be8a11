"""Bytes of main memory that one instruction of a compiled program reads and writes.

Source: the rules of xla/service/hlo_cost_analysis.cc.
Differs: buffers that TPU keeps in VMEM or SMEM are free, and a fusion that updates a slice of a buffer made inside
it is charged the whole buffer, which it must write.
"""

import math
import re
from collections.abc import Mapping

from deepseek_jax.parallel.experts import LAYER_OF
from deepseek_jax.plan.hlo import Computation, Frame, Instruction
from deepseek_jax.plan.hlo_splash import pass_of, splash_bytes

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "optimization-barrier",
    "partition-id",
    "replica-id",
    "async-done",
    "async-update",
    "call-done",
    "custom-call-done",
    "custom-call-update",
}
_LAYER_OF = re.compile(rf'op_name="[^"]*{LAYER_OF}(\d+)')
# How the TPU compiler marks a product whose tiles outside their group are skipped.
_SKIPS_GROUPS = re.compile(r"ITERATION_SKIPPER_MODE_(GROUP_STARTS|ITERATION_INDICES)")
_LIBRARY = re.compile(r'custom_call_target="__(cublas|cudnn)\$(?:gemm|lt|conv)')
_FREE_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
    "SliceBitcast",
)
# What an update in place moves: the new values, and for a scatter, which may add, the old ones.
_UPDATES = {
    "dynamic-update-slice": lambda operands: operands[1].bytes,
    "scatter": lambda operands: 2 * operands[2].bytes,
}
_TAKES = {"slice", "dynamic-slice", "gather"}
_ASYNC_START, _ASYNC_DONE = (f'custom_call_target="AsyncCollective{part}"' for part in ("Start", "Done"))
# A fusion computes such a thing only where it is read.
_SEEN_THROUGH = {"bitcast", "reshape", "convert", "copy"}


def instruction_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes of main memory that an instruction outside fusions reads and writes."""
    opcode, operands = instruction.opcode, computation.operands(instruction)
    read = sum(operand.hbm_bytes for operand in operands)
    if opcode in _FREE:
        return 0
    if opcode == "custom-call":
        return _call_bytes(instruction, operands)
    if opcode in _TAKES:
        taken = instruction.bytes if operands[0].hbm_bytes else 0
        return taken + sum(operand.hbm_bytes for operand in operands[1:]) + instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
        written = operands[1].bytes if instruction.hbm_bytes else 0
        return read - operands[0].hbm_bytes + written
    if opcode == "scatter":
        changed = 2 * operands[2].bytes if instruction.hbm_bytes else 0
        return read - operands[0].hbm_bytes + changed
    if opcode == "slice-start":
        return instruction.leaves[1].bytes if operands[0].hbm_bytes else 0
    if opcode == "ragged-all-to-all-start":
        return read - operands[1].hbm_bytes
    if opcode.endswith("-start"):
        return read
    if opcode.endswith("-done"):
        return instruction.hbm_bytes
    if opcode == "ragged-all-to-all":
        return read - operands[1].hbm_bytes + instruction.hbm_bytes
    return read + instruction.hbm_bytes


def declared(call: Instruction, what: str) -> int | None:
    """What a custom call says that it costs: `flops` or `bytes_accessed`."""
    at = call.rest.find('"cost_estimate":{')
    found = re.compile(rf'"{what}":"(\d+)"').search(call.rest, at) if at >= 0 else None
    return int(found.group(1)) if found else None


def library(call: Instruction) -> str | None:
    """Whether a custom call is a matrix product of "cublas" or a convolution of "cudnn"; None if neither."""
    found = _LIBRARY.search(call.rest)
    return None if found is None else "cublas" if found.group(1) == "cublas" else "cudnn"


def _call_bytes(call: Instruction, operands: list[Instruction]) -> int:
    if any(f'custom_call_target="{name}"' in call.rest for name in _FREE_CALLS):
        return 0
    if pass_of(call) is not None:
        return splash_bytes(operands, call)
    if library(call) is not None:  # the rest of its result is scratch
        return sum(i.hbm_bytes for i in operands) + call.leaves[0].bytes
    estimate = declared(call, "bytes_accessed")
    if estimate is None:
        return sum(i.hbm_bytes for i in (*operands, call))
    unread = sum(i.bytes - i.hbm_bytes for i in (*operands, call)) + _other_layers(call, operands)
    return max(0, estimate - unread)


def skips_groups(fusion: Instruction) -> bool:
    """Whether a fusion is the dense form of a ragged product, of which each row meets the tiles of its own group."""
    return _SKIPS_GROUPS.search(fusion.rest) is not None


def _other_layers(call: Instruction, operands: list[Instruction]) -> int:
    """Bytes of a stack of layers' experts that a grouped product over one layer leaves alone: its grid skips them."""
    found = _LAYER_OF.search(call.rest)
    if found is None:
        return 0
    stack, layers = max(operand.hbm_bytes for operand in operands), int(found.group(1))
    return stack - stack // layers


def fusion_bytes(frame: Frame, fusion: Instruction) -> int:
    """Bytes of main memory that a fusion reads and writes."""
    computations = frame.module.computations
    inside = computations[fusion.called("calls")]
    operands = frame.computation.operands(fusion)
    read = sum(
        _read(computations, inside, parameter)
        for operand, parameter in zip(operands, inside.parameters, strict=True)
        if operand.hbm_bytes
    )
    if skips_groups(fusion):
        read -= _other_layers(fusion, operands)
    written = _written(computations, inside, inside.root)
    return read + sum(size for size, leaf in zip(written, fusion.leaves, strict=True) if leaf.hbm)


def _read(computations: Mapping[str, Computation], inside: Computation, value: Instruction) -> int:
    """How much of a value the users within a fusion read; of what is only sliced, the slices."""
    read = 0
    for user, position in inside.users.get(value.name, ()):
        if user.opcode in _TAKES and position == 0:
            read += _taken(value, user)
        elif _leaves_alone(inside, user, position):
            continue
        elif user.opcode in _SEEN_THROUGH and user is not inside.root:
            read += min(value.bytes, _read(computations, inside, user))
        elif user.opcode == "fusion":
            called = computations[user.called("calls")]
            parameter = called.parameters[position]
            if user is not inside.root and _source(called, called.root) is parameter:  # only another layout of it
                read += min(value.bytes, _read(computations, inside, user))
            else:
                read += _read(computations, called, parameter)
        else:
            return value.bytes
    return min(read, value.bytes)


def _taken(value: Instruction, slice_: Instruction) -> int:
    """Bytes of a value in a slice or gather of it, which on v7x may be of another dtype."""
    numbers = lambda i: sum(math.prod(leaf.dims) for leaf in i.leaves)
    return numbers(slice_) * value.bytes // max(1, numbers(value))


def _leaves_alone(inside: Computation, user: Instruction, position: int) -> bool:
    """Whether a user reads nothing of an operand: an update in place, or a collective that is already under way."""
    if user.opcode in _UPDATES:
        return position == 0 and _updated(user, inside)
    if user.opcode == "tuple":
        return user is inside.root and inside.instructions[user.operands[position]].opcode == "parameter"
    return continues(inside, user) or _ASYNC_DONE in user.rest


def continues(inside: Computation, collective: Instruction) -> bool:
    """Whether a collective within a fusion is the continuation of one that an earlier fusion has started.

    The TPU compiler spreads a collective over several fusions to overlap it with their arithmetic, and writes it
    down in each; the first hands it to a custom call AsyncCollectiveStart.
    """
    if "async_collective_fusion_config" not in collective.rest:
        return False
    return not any(_ASYNC_START in user.rest for user, _ in inside.users.get(collective.name, ()))


def _updated(user: Instruction, inside: Computation) -> bool:
    """Whether a dynamic-update-slice or scatter changes a buffer of the fusion's caller in place."""
    return _source(inside, inside.instructions[user.operands[0]]).opcode == "parameter"


def _source(inside: Computation, value: Instruction) -> Instruction:
    while value.opcode in _SEEN_THROUGH:
        value = inside.instructions[value.operands[0]]
    return value


def _written(computations: Mapping[str, Computation], inside: Computation, value: Instruction) -> list[int]:
    """Bytes that a fusion writes, for each array of its result."""
    operands = inside.operands(value)
    source = _source(inside, value)
    if value.opcode == "tuple":
        parts = ([0] if o.opcode == "parameter" else _written(computations, inside, o) for o in operands)
        return [size for part in parts for size in part]
    if continues(inside, value) or _ASYNC_DONE in value.rest:
        return [0]
    if _ASYNC_START in value.rest:
        return [0, operands[0].bytes] + [0] * (len(value.leaves) - 2)
    if source.opcode in _UPDATES and _updated(source, inside):
        return [_UPDATES[source.opcode](inside.operands(source))]
    if value.opcode == "fusion":
        called = computations[value.called("calls")]
        return _written(computations, called, called.root)
    return [leaf.bytes for leaf in value.leaves]
