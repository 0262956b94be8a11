"""Which weights a CPU's engine holds transposed, and that the model means the same with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import GQAConfig, preset
from deepseek_jax.model import transposed
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.model.transposed import transposed_weights
from deepseek_jax.ops.transposed import Transposed

GROUPED = dataclasses.replace(
    preset("distill-qwen-1.5b"),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    attention=GQAConfig(num_key_value_heads=2, head_dim=8, qkv_bias=True),
    tie_word_embeddings=True,
)


def held(weights):
    return {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(weights) if _is_transposed(leaf)}


def _is_transposed(leaf):
    return isinstance(leaf.get_raw_value(), Transposed)


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(transposed, "_WORTH", 0)


@pytest.mark.parametrize("config", [preset("tiny"), GROUPED], ids=["latent, experts", "grouped, tied"])
def test_the_model_means_the_same(config, every_size):
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    turned = transposed_weights(weights)
    assert held(turned) and not held(weights)
    assert not any("experts" in path or "router" in path or "norm" in path for path in held(turned))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 12)), jnp.int32)

    def logits(weights):
        model = nnx.merge(graphdef, weights)
        return model.logits(model(tokens).x_BTD), model.head_DV()

    (got, head), (wanted, plain) = jax.jit(logits)(turned), jax.jit(logits)(weights)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(head, plain)
    assert held(transposed_weights(turned)) == held(turned)


def test_small_models_and_other_dtypes_stay_as_they_are(monkeypatch):
    _, weights = split(Decoder(preset("tiny"), rngs=nnx.Rngs(0)))
    assert transposed_weights(weights) is weights
    monkeypatch.setattr(transposed, "_WORTH", 0)
    assert not held(transposed_weights(convert_dtype(weights, jnp.bfloat16)))
    monkeypatch.setattr(transposed, "_SHARE", 2**60)  # as if memory were short
    assert transposed_weights(weights) is weights
