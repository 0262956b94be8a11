"""What experts and attention may be off by does not hide faults: each is planted in a kernel of this project."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.ops import experts
from deepseek_jax.testing import Case, Fault, Kernel
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


_FLASH = {"B": 1, "T": 13, "N": 4, "G": 2, "K": 8, "H": 8, "cuts": 3, "kind": "whole", "side": 8}
CASES = {
    "expert_mlp": Case(sizes={"W": 9, "A": 3, "E": 4, "D": 8, "M": 16}, ragged={"load": 0}),
    "swiglu_weighed": Case(sizes={"W": 12, "E": 3, "D": 8, "M": 16}, ragged={"sizes": [3, 4, 5]}),
    "flash_attention": Case(sizes=_FLASH, ragged={"cuts": [[0, 4, 9]]}),
    "flash_chosen": Case(sizes=_FLASH, ragged={"cuts": [[0, 4, 9]], "chosen": [6]}),
}
FAULTS = {
    "no silu": (EXPERT_MLP, with_silu(EXPERT_MLP.run, lambda x: x), "values"),
    "half of silu's slope": (EXPERT_MLP, with_silu(EXPERT_MLP.run, silu_half_sloped), "gradient of gate"),
    "another choice's weight": (
        EXPERT_MLP,
        lambda weights, **of: EXPERT_MLP.run(weights=weights[:, ::-1], **of),
        "values",
    ),
    "a choice less": (EXPERT_MLP, without_the_last_choice, "values"),
    "another row's weight": (
        SWIGLU_WEIGHED,
        lambda weights, **of: SWIGLU_WEIGHED.run(weights=jnp.roll(weights, 1, axis=0), **of),
        "values",
    ),
    "another head's keys": (FLASH_ATTENTION, lambda k, **of: FLASH_ATTENTION.run(k=k[:, ::-1], **of), "values"),
    "a sum without its gradient": (FLASH_ATTENTION, of_sums, "gradient of k"),
    "a choice that is not looked at": (FLASH_CHOSEN, lambda chosen, **of: FLASH_CHOSEN.run(**of), "values"),
}


def found_of(kernel: Kernel, dtype: str, **changes) -> Fault | None:
    case = dataclasses.replace(CASES[kernel.name], dtype=dtype)
    return check(dataclasses.replace(kernel, invariances=(), **changes), case).fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_more_than_rounding_to_bfloat16(name):
    kernel, run, law = FAULTS[name]
    fault = found_of(kernel, "bfloat16", run=run)
    assert fault is not None and fault.law == law, fault


def test_rounding_to_bfloat16_is_a_fault_in_float32():
    fault = found_of(EXPERT_MLP, "float32", run=hidden_in_bfloat16)
    assert fault is not None and fault.law == "values", fault


@pytest.mark.parametrize("kernel", [EXPERT_MLP, SWIGLU_WEIGHED, FLASH_ATTENTION, FLASH_CHOSEN], ids=lambda of: of.name)
def test_without_one_there_is_none(kernel):
    assert found_of(kernel, "bfloat16") is None
