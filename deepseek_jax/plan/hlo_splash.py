"""What jax's splash attention costs in a compiled program, whose text gives its tiles and says nothing of their cost.

The mask is taken to be causal, and devices that share a sequence to see as many keys, as
where `parallel.causal_attention` divides heads or deals queries out. One of chosen keys is read with every tile; the
kernel leaves out those that are seen whole, but how many these are only the tokens tell.
Source: the grids and index maps of jax.experimental.pallas.ops.tpu.splash_attention.
"""

import math
import re

from deepseek_jax.plan.hlo import Instruction

_PASS = re.compile(r"splash_mha_(fwd|dq|dkv)")
_SIDES = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq"), "dkv": ("block_q_dkv", "block_kv_dkv")}
_Q, _K, _V = 0, 1, 2  # of the operands behind the tables of tiles: which comes next, whether it is masked, by what
_CHOOSING = 3  # tables, and the last operand is the mask itself, a tile in each row
_FUSED = 4  # results above this many, and the gradient of the queries is among them


def pass_of(call: Instruction) -> str | None:
    """Which pass of the kernel a custom call is, forward or one of two backward; None if it is another kernel."""
    found = _PASS.search(call.op_name) if "tpu_custom_call" in call.rest else None
    return found.group(1) if found else None


def splash_flops(operands: list[Instruction], call: Instruction) -> int:
    """Of the products of all tiles that the kernel computes, those in part behind the mask included."""
    operands = operands[_tables(operands) :]
    *lead, _, width = operands[_Q].leaves[0].dims
    width_v = operands[_V].leaves[0].dims[-1]
    products = {
        "fwd": width + width_v,
        "dq": 2 * width + width_v,
        "dkv": 2 * width + 2 * width_v + (width if len(call.leaves) > _FUSED else 0),
    }[pass_of(call)]
    tiles, side_q, side_k = _tiles(operands, call)
    return int(2 * math.prod(lead) * tiles * side_q * side_k * products)


def splash_bytes(operands: list[Instruction], call: Instruction) -> int:
    """Forward, keys and values are read for every tile; for their gradients, queries and what belongs to them are."""
    count = _tables(operands)
    tables, operands = sum(operand.hbm_bytes for operand in operands[:count]), operands[count:]
    tiles, side_q, side_k = _tiles(operands, call)
    queries, keys = (operands[at].leaves[0].dims for at in (_Q, _K))
    if pass_of(call) == "dkv":
        again = [_Q, *(at for at in range(_V + 1, len(operands)) if len(operands[at].leaves[0].dims) > 2)]
        times = tiles * side_q / queries[-2]
    else:
        again = [_K, _V]
        times = tiles * side_k / keys[-2] * queries[-3] / keys[-3]
    factors = dict.fromkeys(again, times)
    if count == _CHOOSING:  # for every head the tiles that it computes, of numbers of which there is one a pair
        factors[len(operands) - 1] = queries[-3] * tiles * side_q * side_k / (queries[-2] * keys[-2])
    read = sum(operand.hbm_bytes * factors.get(at, 1) for at, operand in enumerate(operands))
    return tables + int(read) + call.hbm_bytes


def _tables(operands: list[Instruction]) -> int:
    """How many tables there are."""
    first = operands[0].leaves[0].dims
    return next(at for at, operand in enumerate(operands) if operand.leaves[0].dims != first)


def _tiles(operands: list[Instruction], call: Instruction) -> tuple[float, int, int]:
    """How many tiles of a head a device computes, and their sides."""
    side_q, side_k = (int(re.search(rf'\\"{name}\\": (\d+)', call.rest).group(1)) for name in _SIDES[pass_of(call)])
    rows, keys = (operands[at].leaves[0].dims[-2] for at in (_Q, _K))
    of_all = sum(-(-min(end, keys) // side_k) for end in range(side_q, keys + side_q, side_q))
    return of_all * rows / keys, side_q, side_k
