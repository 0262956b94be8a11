"""A decoder of stacks against the same one with a module a layer, on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import IndexerConfig, ModelConfig
from deepseek_jax.model.cache import empty_cache
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.scan_layers import stack_layers, unstack_layers
from deepseek_jax.model.scoring import score_ahead
from deepseek_jax.sharding import LOCAL, Layout
from tests.checkpoint.folders import QWEN3, V3

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 8
STACKED = Layout(scan_layers=True)
# more than one layer of each kind
MLA = dataclasses.replace(V3, num_hidden_layers=4, num_nextn_predict_layers=1)
MLA = dataclasses.replace(MLA, moe=dataclasses.replace(MLA.moe, first_k_dense_replace=2))
INDEXER = dataclasses.replace(MLA.attention, indexer=IndexerConfig(index_n_heads=2, index_head_dim=16, index_topk=4))
CONFIGS = {
    "mla": MLA,
    "indexer": dataclasses.replace(MLA, model_type="deepseek_v32", attention=INDEXER, num_nextn_predict_layers=0),
    "gqa": dataclasses.replace(QWEN3, num_hidden_layers=3),  # whose norms of heads are stacked too
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (B, T + 1)), jnp.int32)


@pytest.fixture(scope="module", params=["mla", "indexer", pytest.param("gqa", marks=pytest.mark.slow)])
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def weights(config) -> nnx.State:
    return jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()


def of_layout(config, weights, layout):
    lies = stack_layers(weights, config, layout) if layout.scan_layers else weights
    return abstract_weights(config, layout=layout)[0], lies


def test_weights_come_back_from_a_stack_bit_for_bit(config, weights):
    there = stack_layers(weights, config, STACKED)
    like = abstract_weights(config, layout=STACKED)[1]
    assert jax.tree.map(jnp.shape, names.flat(there)) == jax.tree.map(jnp.shape, names.flat(like))
    back = unstack_layers(there, config, LOCAL)
    jax.tree.map(np.testing.assert_array_equal, names.flat(back), names.flat(weights))


@pytest.mark.parametrize("layout", [STACKED, Layout(scan_layers=True, workload="serve", lanes=32)])
def test_stacks_decode_as_layers_do(config, weights, layout):
    """A prompt in two chunks and tokens more, over blocks of a cache in no order."""
    table = jnp.asarray([[4, 1], [2, 5]], jnp.int32)

    def run(layout):
        graphdef, lies = of_layout(config, weights, layout)

        @jax.jit
        def decode(weights):
            model = nnx.merge(graphdef, weights)
            cache, found = empty_cache(config, 6, 4, jnp.float32, layout), []
            for first, end, phase in ((0, 5, "prefill"), (5, 7, "prefill"), (6, T, "decode"), (T - 1, T, "decode")):
                at = jnp.broadcast_to(jnp.arange(first, end), (B, end - first))
                real = jnp.ones(at.shape, bool)
                hidden, cache = model.extend(TOKENS[:, first:end], at, real, cache, table, phase=phase)
                found.append(model.logits(hidden.x_BTD))
            return found

        return decode(lies)

    for got, wanted in zip(run(layout), run(LOCAL), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def test_stacks_learn_as_layers_do(config, weights):
    """Scores, routing and gradients, whatever the backward pass works out again."""
    remat = {"deepseek_v3": "all_but_attention", "deepseek_v32": "layers", "qwen3": "nothing"}[config.model_type]

    def run(layout):
        graphdef, lies = of_layout(config, weights, layout)
        params, rest = nnx.split_state(lies, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            scored, further = score_ahead(model, TOKENS[:, :-1], TOKENS[:, 1:], jnp.ones((B, T), bool))
            total = scored.logprobs_BT.sum() + sum(of.logprobs_BT.sum() for of in further) + scored.balance
            return total, scored

        gradient, scored = jax.jit(jax.grad(loss, has_aux=True))(params)
        gradient = nnx.merge_state(gradient, rest)
        return names.flat(unstack_layers(gradient, config, LOCAL) if layout.scan_layers else gradient), scored

    got, wanted = (run(layout) for layout in (Layout(scan_layers=True, remat=remat), LOCAL))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
