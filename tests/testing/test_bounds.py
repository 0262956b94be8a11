"""What experts and attention may be off by does not hide faults: each is planted in a kernel of this project."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.ops import experts
from deepseek_jax.testing import Case, Kernel
from deepseek_jax.testing.declared.causal import FLASH_ATTENTION, FLASH_CHOSEN
from deepseek_jax.testing.declared.experts import EXPERT_MLP, SWIGLU_WEIGHED
from deepseek_jax.testing.search import check

pytestmark = pytest.mark.usefixtures("quick_compilation")


@jax.custom_jvp
def silu_half_sloped(x):
    return x * jax.nn.sigmoid(x)


silu_half_sloped.defjvp(lambda x, d: (silu_half_sloped(*x), d[0] * jax.nn.sigmoid(x[0])))


def with_silu(function, silu):
    def run(**of):
        with mock.patch.object(jax.nn, "silu", silu):
            return function(**of)

    return run


def hidden_in_bfloat16(**of):
    sound = experts.weighed_swiglu
    rounded = lambda *parts: jax.lax.reduce_precision(sound(*parts), exponent_bits=8, mantissa_bits=7)
    with mock.patch.object(experts, "weighed_swiglu", rounded):
        return experts.expert_mlp(**of)


def without_the_last_choice(experts, **of):
    return EXPERT_MLP.run(experts=experts.at[:, -1].set(of["gate"].shape[0]), **of)


def of_sums(**of):
    out, log_sum = FLASH_ATTENTION.run(**of)
    return out, jax.lax.stop_gradient(log_sum)


ALL = ("float32", "bfloat16")
SHAPES = {
    "expert_mlp": ({"W": 9, "A": 3, "E": 4, "D": 8, "M": 16}, {"load": 0}),
    "swiglu_weighed": ({"W": 12, "E": 3, "D": 8, "M": 16}, {"sizes": [3, 4, 5]}),
    "flash_attention": (
        {"B": 1, "T": 13, "N": 4, "G": 2, "K": 8, "H": 8, "cuts": 3, "kind": "whole", "side": 8},
        {"cuts": [[0, 4, 9]]},
    ),
}
SHAPES["flash_chosen"] = (SHAPES["flash_attention"][0], {"cuts": [[0, 4, 9]], "chosen": [6]})
FAULTS = {
    "no silu": (EXPERT_MLP, with_silu(EXPERT_MLP.run, lambda x: x), ALL, "values"),
    "half of silu's slope": (EXPERT_MLP, with_silu(EXPERT_MLP.run, silu_half_sloped), ALL, "gradient of gate"),
    "another choice's weight": (
        EXPERT_MLP,
        lambda weights, **of: EXPERT_MLP.run(weights=weights[:, ::-1], **of),
        ALL,
        "values",
    ),
    "a choice less": (EXPERT_MLP, without_the_last_choice, ALL, "values"),
    "hidden numbers in bfloat16": (EXPERT_MLP, hidden_in_bfloat16, ("float32",), "values"),
    "another row's weight": (
        SWIGLU_WEIGHED,
        lambda weights, **of: SWIGLU_WEIGHED.run(weights=jnp.roll(weights, 1, axis=0), **of),
        ALL,
        "values",
    ),
    "another head's keys": (
        FLASH_ATTENTION,
        lambda k, **of: FLASH_ATTENTION.run(k=k[:, ::-1], **of),
        ALL,
        "values",
    ),
    "a sum without its gradient": (FLASH_ATTENTION, of_sums, ALL, "gradient of k"),
    "a choice that is not looked at": (FLASH_CHOSEN, lambda chosen, **of: FLASH_CHOSEN.run(**of), ALL, "values"),
}


@pytest.mark.parametrize(("fault", "dtype"), [(name, dtype) for name, of in FAULTS.items() for dtype in of[2]])
def test_a_fault_is_more_than_rounding(fault, dtype):
    kernel, run, _, law = FAULTS[fault]
    sizes, ragged = SHAPES[kernel.name]
    found = check(dataclasses.replace(kernel, run=run, invariances=()), Case(sizes=sizes, ragged=ragged, dtype=dtype))
    assert found.fault is not None and found.fault.law == law, found.fault


def test_without_one_there_is_none():
    for kernel in (EXPERT_MLP, FLASH_CHOSEN):
        assert sound(kernel)


def sound(kernel: Kernel) -> bool:
    sizes, ragged = SHAPES[kernel.name]
    cases = (Case(sizes=sizes, ragged=ragged, dtype=dtype) for dtype in ALL)
    return all(check(dataclasses.replace(kernel, invariances=()), case).fault is None for case in cases)
