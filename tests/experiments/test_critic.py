"""The critic: the policy's trunk, a vector, and nothing else."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.scoring import score
from deepseek_jax.sharding import Layout
from experiments.ppo.critic import Critic, critic_from, value_of

V, B, T = 16, 4, 9
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    attention=MLAConfig(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=1),
    num_nextn_predict_layers=1,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True, num_nextn_predict_layers=0)
FORMS = {"untied": (CONFIG, Layout()), "tied": (TIED, Layout()), "scan_layers": (CONFIG, Layout(scan_layers=True))}


@cache
def policy(name="untied"):
    config, layout = FORMS[name]
    graphdef, _ = abstract_weights(config, layout=layout)
    return graphdef, jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0), layout=layout))[1])()


@cache
def critic():
    """With a vector that is not 0."""
    graphdef, weights = critic_from(CONFIG, policy()[1])
    vector = jnp.linspace(-1, 2, CONFIG.hidden_size)
    return graphdef, nnx.from_flat_state(
        [(path, leaf.replace(vector) if path == ("value_D",) else leaf) for path, leaf in nnx.to_flat_state(weights)]
    )


def inputs(seed=0):
    """Prompts of 2 tokens, completions of 1 to 6, then padding."""
    rng = np.random.default_rng(seed)
    ends = 1 + rng.integers(1, 7, B)
    mask = (np.arange(T) >= 1) & (np.arange(T) < ends[:, None])
    return rng.integers(3, V, (B, T)).astype(np.int32), mask


@partial(jax.jit, static_argnums=0)
def compiled(graphdef, weights, tokens, mask):
    return value_of(nnx.merge(graphdef, weights), tokens, mask)


def valued(tokens, mask):
    return compiled(*critic(), tokens, mask)


def test_the_trunks_states_are_the_policys_and_values_their_product():
    """The same weights through the same code, so bit for bit; the product against float64."""
    tokens, _ = inputs()
    graphdef, weights = policy()
    of_critic, critic_weights = critic()
    states = jax.jit(lambda w: nnx.merge(graphdef, w)(tokens).x_BTD)(weights)
    values, hidden = jax.jit(lambda w: nnx.merge(of_critic, w)(tokens))(critic_weights)
    np.testing.assert_array_equal(hidden.x_BTD, states)
    wanted = np.float64(states) @ np.linspace(-1, 2, CONFIG.hidden_size)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FORMS)
def test_a_critic_holds_the_trunk_and_one_vector(name):
    config, layout = FORMS[name]
    _, weights = critic_from(config, policy(name)[1], layout)
    have = {path: leaf for path, leaf in nnx.to_flat_state(policy(name)[1]) if path[0] not in ("head", "mtp")}
    found = dict(nnx.to_flat_state(weights))
    np.testing.assert_array_equal(found.pop(("value_D",))[...], np.zeros(config.hidden_size))
    assert found.keys() == {("trunk", *path) for path in have}
    for path, leaf in have.items():
        assert type(found["trunk", *path]) is type(leaf)
        np.testing.assert_array_equal(found["trunk", *path][...], leaf[...])


def test_a_critic_made_from_nothing_has_the_same_form():
    graphdef, weights = critic()
    made, fresh = nnx.split(Critic(CONFIG, rngs=nnx.Rngs(0)))
    assert made == graphdef and jax.tree.structure(fresh) == jax.tree.structure(weights)


def test_a_critic_starts_without_opinion():
    tokens, mask = inputs()
    np.testing.assert_array_equal(compiled(*critic_from(CONFIG, policy()[1]), tokens, mask).values_BT, np.zeros((B, T)))


def test_a_critic_shares_no_memory_with_the_policy():
    _, mine = critic_from(CONFIG, policy()[1])
    for leaf in jax.tree.leaves(mine):
        leaf.delete()
    for leaf in jax.tree.leaves(policy()[1]):
        assert np.isfinite(np.asarray(leaf)).all()


def test_routing_is_counted_as_for_the_policy():
    tokens, mask = map(jnp.asarray, inputs())
    graphdef, weights = policy()
    scored = jax.jit(lambda w: score(nnx.merge(graphdef, w), tokens, tokens, mask))(weights)
    mine = valued(tokens, mask)
    np.testing.assert_array_equal(mine.load_LE, scored.load_LE)
    assert mine.load_LE.sum() == CONFIG.moe.num_experts_per_tok * (mask.sum() + B)  # a prompt token before each
    assert float(mine.balance) == pytest.approx(float(scored.balance), rel=1e-6) and mine.balance > 0


def test_the_value_of_a_state_knows_nothing_of_what_follows():
    tokens, _ = inputs()
    mask = np.ones((B, T), bool)
    changed = tokens.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    before, after = valued(tokens, mask).values_BT, valued(changed, mask).values_BT
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5] != after[:, 5]).all()


def test_padding_changes_nothing_that_counts():
    tokens, mask = inputs()
    real = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    assert not real.all()
    first, second = valued(tokens, mask), valued(np.where(real, tokens, 7), mask)
    np.testing.assert_array_equal(np.asarray(first.values_BT)[mask], np.asarray(second.values_BT)[mask])
    np.testing.assert_array_equal(first.load_LE, second.load_LE)
    assert first.balance == second.balance


def test_values_of_a_bfloat16_trunk_are_float32():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), policy()[1])
    graphdef, weights = critic_from(CONFIG, half)
    assert weights["trunk"]["embed"][...].dtype == jnp.bfloat16 and weights["value_D"][...].dtype == jnp.float32
    shape = jax.eval_shape(lambda w: value_of(nnx.merge(graphdef, w), *inputs()), weights).values_BT
    assert shape.dtype == jnp.float32 and shape.shape == (B, T)


def test_weights_of_something_else_are_refused():
    _, weights = policy()
    with pytest.raises(ValueError, match=r"weights: embed: got \[16, 16\], wanted \[20, 16\]; give those of this"):
        critic_from(dataclasses.replace(CONFIG, vocab_size=20), weights)
    with pytest.raises(ValueError, match="weights: stacks.0.* got nothing, wanted"):
        critic_from(CONFIG, weights, Layout(scan_layers=True))
    with pytest.raises(ValueError, match="weights: layers.2.* got nothing, wanted"):
        critic_from(dataclasses.replace(CONFIG, num_hidden_layers=3), weights)
