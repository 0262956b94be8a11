"""What the expert layer costs on a GPU that is not there: its rows' products, and little beside."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from deepseek_jax.ops.experts import Tiles, expert_mlp
from deepseek_jax.plan.cost_analysis import cost_analysis
from deepseek_jax.plan.topology import GPU_OPTIONS, topology
from tests.laws import found_of

# Tokens, choices of each, experts, width, inner width: V2-Lite's layer, and of R1's on 32 devices, 4,096 tokens on
# each, the 8 experts of one and the rows that come to them.
LAYERS = {"V2-Lite": (4096, 6, 64, 2048, 1408), "R1": (32768, 1, 8, 7168, 2048)}


def flops(tokens: int, choices: int, experts: int, width: int, inner: int, *, gradient: bool) -> int:
    """Of matrix products, as XLA compiles the layer for an H200, with an even load."""
    where = SingleDeviceSharding(topology("h200:8")[1][0])
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=where)
    chosen = shape(jnp.float32, tokens, choices), shape(jnp.int32, tokens, choices)
    matrices = [shape(jnp.bfloat16, experts, *of) for of in ((width, inner), (width, inner), (inner, width))]
    loss = lambda *of: jnp.sum(expert_mlp(*of).astype(jnp.float32) ** 2)
    function = jax.grad(loss, (0, 1, 3, 4, 5)) if gradient else expert_mlp
    compiled = jax.jit(function).lower(shape(jnp.bfloat16, tokens, width), *chosen, *matrices)
    return cost_analysis(compiled.compile(GPU_OPTIONS).as_text(), {"expert": 1}).flops


def an_even_load_costs_its_rows_alone():
    """2 FLOPs a number of three matrices, and with gradients three times that."""
    for name, (tokens, choices, experts, width, inner) in LAYERS.items():
        rows = 2 * 3 * tokens * choices * width * inner
        for gradient, ideal in ((False, rows), (True, 3 * rows)):
            found = flops(tokens, choices, experts, width, inner, gradient=gradient) / ideal
            print(name, "with gradients" if gradient else "forward", round(found, 3))
            assert 0.99 < found < 1.02, (name, gradient, found)


@pytest.mark.slow
def test_the_layer_compiled_for_h200():
    if find_spec("jax_cuda12_plugin") is None:
        pytest.skip("needs the GPU compiler: pip install -e '.[gpu-compiler]'")
    (said,) = found_of([an_even_load_costs_its_rows_alone], devices=1).values()
    assert said == "", said


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("skew", [None, 2.0])
def test_tiles_that_are_not_full_cost_less_than_a_fifth(name, skew):
    """Of loads as they are drawn: from all experts alike, or from some more than twice as often."""
    tokens, choices, experts, _, _ = LAYERS[name]
    rng = np.random.default_rng(0)
    likely = None if skew is None else np.log(rng.dirichlet(np.full(experts, skew)))
    drawn = rng.gumbel(size=(tokens, experts)) + (0 if likely is None else likely)
    sizes = np.bincount(np.argsort(-drawn, axis=1)[:, :choices].ravel(), minlength=experts)
    block = Tiles.of(tokens * choices, experts, 16, 512).rows
    assert 1 < np.sum(-(-sizes // block) * block) / sizes.sum() < 1.2
