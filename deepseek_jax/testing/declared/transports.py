"""Experts and embeddings that lie on many devices, by each way of moving rows to them."""

from typing import Any

import jax.numpy as jnp

from deepseek_jax.parallel.embedding import sharded_lookup
from deepseek_jax.parallel.experts import routed_experts
from deepseek_jax.sharding import Layout, make_mesh
from deepseek_jax.testing import Draw, Kernel
from deepseek_jax.testing.declared.experts import EXPERT_MLP, LOADS, mlp_inputs, mlp_twin

_BOTH = ("expert", "tensor")
# sizes of a mesh, and how arrays lie on it
_PLACES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "experts": ({"expert": 8}, {}),
    "parts": ({"expert": 4, "tensor": 2}, {}),
    "fsdp": ({"fsdp": 2, "expert": 4}, {"gathered": ("fsdp",)}),
    "long": (
        {"data": 2, "expert": 2, "context": 2},
        {"columns": ("context",), "gathered": ("fsdp", "context")},
    ),
    "both": ({"expert": 4, "tensor": 2}, {"columns": ("context", "tensor"), "over": _BOTH, "inner": None}),
}


def _run(x, weights, experts, gate, up, down, place, transport, tenths, devices):
    sizes, further = _PLACES[place]
    lie: dict[str, Any] = {"rows": ("data", "fsdp", "expert"), "columns": (), "gathered": (), **further}
    how = {"transport": transport, "capacity_factor": tenths / 10}
    return routed_experts(x, weights, experts, gate, up, down, mesh=make_mesh(devices, **sizes), **lie, **how)


def _inputs(draw: Draw) -> dict[str, Any]:
    how = {name: draw.sizes[name] for name in ("place", "transport", "tenths")}
    return {**mlp_inputs(draw, *draw.of("B", "T")), **how}


def _twin(place, transport, tenths, **arguments):
    return mlp_twin(**arguments)


TRANSPORTS = Kernel(
    name="transports",
    run=_run,
    twin=_twin,
    inputs=_inputs,
    sizes={
        "B": (8,),
        "T": (4,),
        "A": (3,),
        "E": (16,),
        "D": (8,),
        "M": (8,),
        "place": tuple(_PLACES),
        "transport": ("all_gather", "all_to_all", "ragged_all_to_all"),
        "tenths": (1000, 10),  # of the even share: room for any load, and further rounds
    },
    ragged={"load": LOADS},
    # hidden numbers are rounded twice before the last product
    tolerance={"float32": 2.0**-18, "bfloat16": 2.0**-6},
    gradients=EXPERT_MLP.gradients,
    gradient_tolerance={"float32": 2.0**-17, "bfloat16": 2.0**-5},
    numbers=("normal", "whole", "zeros"),
    compiled=tuple(
        {"B": 8, "T": 32, "A": 4, "E": 16, "D": 256, "M": 128, "place": "fsdp", "transport": transport, "tenths": 11}
        for transport in ("all_gather", "all_to_all", "ragged_all_to_all")
    ),
    devices=8,
)


def _lookup(table, tokens, mesh, devices):
    sizes = {"tensor": {"fsdp": 2, "tensor": 4}, "context": {"data": 2, "context": 2, "tensor": 2}}[mesh]
    return sharded_lookup(table, tokens, Layout(mesh=make_mesh(devices, **sizes), workload="train", remat="nothing"))


SHARDED_LOOKUP = Kernel(
    name="sharded_lookup",
    run=_lookup,
    twin=lambda table, tokens, mesh: jnp.asarray(table)[tokens],
    inputs=lambda draw: {
        "table": draw.numbers(*draw.of("V", "D")),
        "tokens": draw.integers(0, draw.sizes["V"], *draw.of("B", "T")),
        "mesh": draw.sizes["mesh"],
    },
    sizes={"B": (8,), "T": (2, 6), "V": (16, 64), "D": (8,), "mesh": ("tensor", "context")},
    gradients=("table",),
    gradient_tolerance={"float32": 2.0**-20, "bfloat16": 2.0**-5},
    tolerance={"float32": 0.0, "bfloat16": 0.0},
    compiled=({"B": 8, "T": 512, "V": 32768, "D": 1024, "mesh": "tensor"},),
    devices=8,
)
