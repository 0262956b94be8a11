"""Arithmetic of one instruction of a compiled program: matrix products and convolutions, by whatever name they go.

Source: the rules of xla/service/hlo_cost_analysis.cc and xla/service/gpu/model/gpu_hlo_cost_analysis.cc.
"""

import math
import re
from collections.abc import Iterator
from functools import cache

import numpy as np

from deepseek_jax.plan.hlo import Computation, Instruction, Leaf
from deepseek_jax.plan.hlo_bytes import declared, library
from deepseek_jax.plan.hlo_splash import pass_of, splash_flops

# Kernels whose text says nothing of what they compute, unless they declare it.
_KERNELS = re.compile(r'custom_call_target="[^"]*(mosaic|triton|tpu_custom_call|fmha)[^"]*"', re.IGNORECASE)
_OFFSETS = "ragged-dot-metadata"  # on TPU, where the groups of a grouped product begin
_LEFT = r"lhs_contracting_dims=\{([\d,]*)\}"


def flops(computation: Computation, instruction: Instruction) -> int:
    """A multiplication and an addition are two; elementwise work is none.

    Raises:
        ValueError: a ragged-dot, which says nothing of its rows.
    """
    operands = computation.operands(instruction)
    if instruction.opcode == "dot":
        return _product(operands[0].leaves[0], instruction.leaves[0], _numbers(instruction.rest, _LEFT))
    if instruction.opcode == "convolution":
        return _convolution(operands[0].leaves[0], instruction.leaves[0], instruction.rest)
    if instruction.opcode == "custom-call":
        return _call(operands, instruction)
    if instruction.opcode == "ragged-dot":
        raise ValueError(f"cost: {instruction.name}: got a ragged-dot, wanted what a compiler makes of it")
    return 0


def is_unknown(instruction: Instruction) -> bool:
    """Whether it is a kernel whose arithmetic nothing tells."""
    kernel = instruction.opcode == "custom-call" and _KERNELS.search(instruction.rest)
    told = declared(instruction, "flops") is not None or pass_of(instruction) or instruction.op_name == _OFFSETS
    return bool(kernel) and not told


def _product(left: Leaf, result: Leaf, contracted: list[int]) -> int:
    return 2 * math.prod(result.dims) * math.prod(left.dims[d] for d in contracted)


def _call(operands: list[Instruction], call: Instruction) -> int:
    """Of a custom call: what it declares, or the product or convolution of one of the GPU's libraries."""
    if pass_of(call) is not None:
        return splash_flops(operands, call)
    of_library = library(call)
    if of_library is None:
        return declared(call, "flops") or 0
    (left, *_), (right, *_), (result, *_) = operands[0].leaves, operands[1].leaves, call.leaves
    if of_library == "cublas":
        return _product(left, result, _numbers(call.rest, r'"lhs_contracting_dimensions":\[([\d",]*)\]'))
    # the gradients are written down with the dimensions of the convolution that they are gradients of
    if "BackwardInput" in call.rest:
        left, result = result, left
    elif "BackwardFilter" in call.rest:
        result = right
    return _convolution(left, result, call.rest)


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in re.findall(r"\d+", found.group(1))] if found else []


def _convolution(left: Leaf, result: Leaf, rest: str) -> int:
    left_labels, _, result_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    features, batch = (left.dims[left_labels.index(label)] for label in "fb")
    shared = math.prod(_numbers(rest, r"feature_group_count=(\d+)") + _numbers(rest, r"batch_group_count=(\d+)"))
    products = features * batch // shared * result.dims[result_labels.index("f")]
    return 2 * products * math.prod(_positions(left, left_labels, result, result_labels, rest))


def _positions(left: Leaf, left_labels: str, result: Leaf, result_labels: str, rest: str) -> Iterator[int]:
    """For each spatial dimension, how many pairs of a kernel and an output position meet an input."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    for number, size in enumerate(fields["size"].split("x") if fields else ()):
        label = str(number)
        field = lambda name, default, at=number: fields[name].split("x")[at] if name in fields else default
        yield _meeting(
            int(size),
            left.dims[left_labels.index(label)],
            result.dims[result_labels.index(label)],
            int(field("stride", "1")),
            int(field("pad", "0_0").split("_")[0]),
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )


@cache
def _meeting(kernel: int, inputs: int, outputs: int, stride: int, pad: int, spread: int, step: int) -> int:
    start = np.arange(outputs) * stride - pad
    met = 0
    for position in range(kernel):
        at = start + position * step
        met += int(np.sum((at >= 0) & (at < inputs * spread) & (at % spread == 0)))
    return met
