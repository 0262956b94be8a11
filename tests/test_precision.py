"""Below float32: what stays float32 all the same, and how far the sampler is from the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import preset
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.ops.experts import tiled_matmul
from deepseek_jax.ops.logprobs import token_logprobs
from deepseek_jax.ops.routing import logits_of
from deepseek_jax.sharding import Layout
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from tests import test_on_policy as on_policy

pytestmark = pytest.mark.usefixtures("quick_compilation")


def halves(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_exact_product(temperature):
    hidden, head = halves(0, 2, 5, 64) * 4, halves(1, 64, 300)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 300, (2, 5)))
    found, _, _ = jax.jit(lambda h, w: token_logprobs(h, w, tokens, temperature=temperature))(hidden, head)
    logits = exact(hidden) @ exact(head) / temperature
    best = logits.max(axis=-1, keepdims=True)
    wanted = logits - best - np.log(np.exp(logits - best).sum(axis=-1, keepdims=True))
    wanted = np.take_along_axis(wanted, tokens[..., None], axis=-1)[..., 0]
    # rounded to bfloat16 first, logits of this size are off by up to 0.25
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-4)


def test_the_models_own_logits_are_exact_too():
    config = preset("tiny")
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = halves(3, 1, 4, config.hidden_size) * 30
    np.testing.assert_allclose(np.asarray(model.logits(x)), exact(x) @ exact(model.head_DV()), rtol=1e-5, atol=1e-4)


def test_router_logits_are_products_of_float32():
    """Nothing on the CPU shows the precision of a product; the program says it."""
    x, router = halves(0, 7, 32), halves(1, 32, 8)
    (product,) = [e for e in jax.make_jaxpr(logits_of)(x, router).eqns if e.primitive.name == "dot_general"]
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype(jnp.float32)}
    found = logits_of(x, router)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(x) @ exact(router), rtol=1e-5, atol=1e-5)


def test_an_experts_gradient_is_added_up_in_float32():
    """Equal small terms over many tiles: in bfloat16 the sum stops growing at 256 times one of them."""
    rows = 8192
    lhs, rhs = jnp.ones((rows, 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.bfloat16)
    sizes = jnp.asarray([rows - 3, 3], jnp.int32)
    found = jax.grad(lambda rhs: tiled_matmul(lhs, rhs, sizes).astype(jnp.float32).sum())(rhs)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(found)[:, 0, 0], [rows - 3, 3], rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_cache_has_the_weights_dtype(dtype):
    graphdef, weights = abstract_weights(preset("tiny"), dtype)
    engine = Engine(preset("tiny"), graphdef, weights, EngineConfig(max_num_seqs=1, max_model_len=32))
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.runner.state.cache)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_is_by_logical_axes(scan_layers):
    """A stack's scales and biases [L, D] are no matrices."""
    for name in ("tiny", "distill-qwen-1.5b"):
        params = nnx.split_state(
            abstract_weights(preset(name), layout=Layout(scan_layers=scan_layers))[1], nnx.Param, ...
        )[0]
        decayed = decayed_names(params)
        assert decayed.isdisjoint({"norm", "q_norm", "kv_norm", "q_bias", "k_bias", "v_bias"}), decayed
        assert {"embed", "o", "down"} <= decayed


def decayed_names(params: nnx.State) -> set[str]:
    """Last names of the weights that an update of zero gradients would shrink."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 5)

    def shrunk(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    like = nnx.to_flat_state(params)
    small = nnx.from_flat_state([(p, leaf.replace(jnp.ones((1,) * leaf.get_raw_value().ndim))) for p, leaf in like])
    found = nnx.to_flat_state(jax.jit(shrunk)(small))
    return {str(path[-1]) for path, leaf in found if np.any(np.asarray(leaf.get_raw_value()) != 0)}


# Rounded to 8 bits in 3 layers, log-probs differ by a hundredth. Where a router or an indexer chooses otherwise, a
# token's differ by more, whence the wide bound of the largest.
ON_POLICY = {"tiny": (0.02, 0.15, 0.05), "sparse": (0.04, 0.8, 0.08)}


@pytest.mark.parametrize("kind", ["tiny", pytest.param("sparse", marks=pytest.mark.slow)])
def test_the_sampler_is_nearly_the_trainer_in_bfloat16(kind):
    config = on_policy.CONFIGS[kind]
    half = lambda leaf: leaf if isinstance(leaf, RouterBias) else leaf.replace(leaf[...].astype(jnp.bfloat16))
    is_weight = lambda leaf: isinstance(leaf, nnx.Variable)
    weights = jax.tree.map(half, on_policy.first_weights(config), is_leaf=is_weight)
    graphdef, _ = abstract_weights(config, jnp.bfloat16)
    texts = on_policy.texts_of(config, on_policy.sampled(config, graphdef, weights))
    found = on_policy.scored(graphdef, weights, texts)
    difference = np.abs(found.logprobs_BT - texts.logprobs)[texts.mask]
    fed = texts.segments > 0
    elsewhere = np.any(np.sort(found.experts_BTLA[fed]) != np.sort(texts.routes[fed]), axis=(1, 2))
    mean, most, share = ON_POLICY[kind]
    assert 1e-5 < difference.mean() < mean  # more than float32's: it did run in bfloat16
    assert difference.max() < most
    assert elsewhere.mean() < share
