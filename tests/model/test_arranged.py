"""Which weights a CPU's engine holds transposed and joined, and that the model means the same with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import GQAConfig, preset
from deepseek_jax.model import arranged
from deepseek_jax.model.arranged import arranged_weights
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.ops.transposed import Joined, Transposed

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
    """What is not as the model made it, by its path."""
    flat = {".".join(map(str, path)): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}
    return {path: value for path, value in flat.items() if isinstance(value, Joined | Transposed)}


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(arranged, "_WORTH", 0)


@pytest.mark.parametrize("config", [preset("tiny"), GROUPED], ids=["latent, experts", "grouped, tied"])
def test_the_model_means_the_same(config, every_size):
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    turned = arranged_weights(weights)
    assert held(turned) and not held(weights)
    assert not any("experts" in path or "router" in path or "norm" in path for path in held(turned))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 12)), jnp.int32)

    def logits(weights):
        model = nnx.merge(graphdef, weights)
        return model.logits(model(tokens).x_BTD), model.head_DV()

    (got, head), (wanted, plain) = jax.jit(logits)(turned), jax.jit(logits)(weights)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(head, plain)
    again = arranged_weights(turned)
    assert held(again).keys() == held(turned).keys() and jax.tree.all(jax.tree.map(jnp.array_equal, again, turned))


def test_matrices_of_one_input_are_one(every_size):
    """In the order of their columns; what stands for the others holds nothing."""
    _, weights = split(Decoder(GROUPED, rngs=nnx.Rngs(0)))
    plain = {".".join(map(str, path)): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(weights)}
    found = held(arranged_weights(weights))
    joined = {path: value for path, value in found.items() if isinstance(value, Joined)}
    assert {path.rpartition(".")[2] for path in joined} == {"q", "k", "v", "gate", "up"} and len(joined) == 2 * 5
    assert {path.rpartition(".")[2] for path in found.keys() - joined.keys()} == {"o", "down"}
    for path, value in joined.items():
        name = path.rpartition(".")[2]
        if name in ("k", "v", "up"):
            assert value == Joined(None, ())
            continue
        of = [path.removesuffix(name) + each for each in ({"q": "qkv"}.get(name) or ("gate", "up"))]
        np.testing.assert_array_equal(value.w.w.T, np.concatenate([plain[each] for each in of], axis=1))
        assert value.widths == tuple(plain[each].shape[1] for each in of)


def test_a_matrix_whose_neighbour_lacks_is_alone(every_size):
    _, weights = split(Decoder(GROUPED, rngs=nnx.Rngs(0)))
    cast = lambda path, leaf: leaf.replace(leaf.get_raw_value().astype(jnp.bfloat16)) if path[-1] == "v" else leaf
    flat = nnx.to_flat_state(weights)
    found = held(arranged_weights(nnx.from_flat_state([(path, cast(path, leaf)) for path, leaf in flat])))
    kinds = {path.rpartition(".")[2]: type(value) for path, value in found.items()}
    single = dict.fromkeys(("q", "k", "o", "down"), Transposed)
    assert kinds == single | {"gate": Joined, "up": Joined}


def test_small_models_and_other_dtypes_stay_as_they_are(monkeypatch):
    _, weights = split(Decoder(preset("tiny"), rngs=nnx.Rngs(0)))
    assert arranged_weights(weights) is weights
    monkeypatch.setattr(arranged, "_WORTH", 0)
    assert not held(arranged_weights(convert_dtype(weights, jnp.bfloat16)))
    monkeypatch.setattr(arranged, "_SHARE", 2**60)  # as if memory were short
    assert arranged_weights(weights) is weights
