"""What weight decay reaches: matrices that are trained, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from deepseek_jax.config import IndexerConfig, preset
from deepseek_jax.model.decoder import Decoder, split
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
    params, _ = nnx.split_state(split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1], nnx.Param, ...)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, 5, untrained=untrained)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = dict(nnx.to_flat_state(optax.apply_updates(params, updates)))
    for path, before in nnx.to_flat_state(params):
        shrinks = before[...].ndim >= 2 and not set(path) & set(untrained)
        expected = before[...] * (0.95 if shrinks else 1.0)
        assert jnp.allclose(after[path][...], expected, rtol=1e-6, atol=0), path
