"""What weight decay reaches: matrices that are trained, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax.config import IndexerConfig, preset
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer

TINY = preset("tiny")
CONFIG = dataclasses.replace(
    TINY,
    model_type="deepseek_v32",
    num_nextn_predict_layers=1,
    attention=dataclasses.replace(
        TINY.attention, indexer=IndexerConfig(index_n_heads=2, index_head_dim=16, index_topk=4)
    ),
)


@pytest.mark.parametrize("untrained", [("indexer", "mtp"), ("indexer",)])
def test_weight_decay_reaches_trained_matrices_alone(untrained):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, nnx.split_state(abstract_weights(CONFIG)[1], nnx.Param, ...)[0])
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, 5, untrained=untrained)

    @jax.jit
    def updated(params):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    after = dict(nnx.to_flat_state(updated(params)))
    for path, before in nnx.to_flat_state(params):
        shrinks = before[...].ndim >= 2 and not set(path) & set(untrained)
        expected = np.asarray(before[...]) * np.float32(0.95 if shrinks else 1.0)
        np.testing.assert_allclose(after[path][...], expected, rtol=1e-6, atol=0, err_msg=str(path))
