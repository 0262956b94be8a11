"""Laws of the decoder: caches and full forward agree, padding is never seen, scale and rope are the published ones."""

import dataclasses
import math
import zlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import (
    GQAConfig,
    IndexerConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
    preset,
)
from deepseek_jax.model.cache import empty_cache
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import Step
from deepseek_jax.model.precision import convert_dtype
from deepseek_jax.ops import rope
from deepseek_jax.ops.pool import CacheView

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 2e-5  # float32, of logits of magnitude 3 summed in another order

V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    attention=MLAConfig(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=6),
    rope=YarnConfig(
        theta=1e4,
        factor=8.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=256,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    moe=MoEConfig(
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
)
# Every query from the fifth on leaves keys out. 16 heads, because with few of them relu often leaves several keys a
# score of 0, and then rounding in a single product decides between them, differently on different paths.
INDEXER = IndexerConfig(index_n_heads=16, index_head_dim=12, index_topk=4)
V32 = dataclasses.replace(V3, model_type="deepseek_v32", attention=dataclasses.replace(V3.attention, indexer=INDEXER))
QWEN2 = dataclasses.replace(
    V3,
    model_type="qwen2",
    num_attention_heads=4,
    attention=GQAConfig(num_key_value_heads=2, head_dim=8, qkv_bias=True),
    rope=RopeConfig(theta=1e4),
    moe=None,
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    rms_norm_eps=1e-3,
    attention=GQAConfig(num_key_value_heads=2, head_dim=12, qkv_bias=False, qk_norm=True),
    rope=dataclasses.replace(V3.rope, mscale_all_dim=0.0),
)
LLAMA = dataclasses.replace(
    QWEN2,
    model_type="llama",
    tie_word_embeddings=True,
    attention=GQAConfig(num_key_value_heads=1, head_dim=8, qkv_bias=False),
    rope=Llama3RopeConfig(
        theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
)
B, T = 3, 12
BLOCKS, SIZE = 16, 4
# blocks in no order, with one that belongs to nobody
TABLE = jnp.asarray(np.random.RandomState(1).permutation(np.arange(1, BLOCKS)).reshape(B, -1), jnp.int32)


def random_weights(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Weights large enough to matter, with routing biases that are mostly negative."""
    graphdef, abstract = abstract_weights(config)
    arrays = {}
    for key, leaf in names.flat(abstract).items():
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(leaf.shape)
        if key.endswith("mlp.bias"):
            noise = 0.5 * noise - 0.8
        else:
            noise = 0.15 * noise + key.endswith("norm")
        arrays[key] = jnp.asarray(noise, jnp.float32)
    return graphdef, names.unflat(arrays, abstract)


# Llama and Qwen2 differ from Qwen3 by biases and norms, which the golden logits hold.
ALIKE = [pytest.param(config, marks=pytest.mark.slow) for config in (QWEN2, LLAMA)]


@pytest.fixture(scope="module", params=[V3, V32, QWEN3, *ALIKE], ids=lambda config: config.model_type)
def model(request):
    """A random model, its compiled functions, and the logits of a full forward pass over random tokens."""
    config = request.param
    graphdef, weights = random_weights(config)

    def full(tokens, mask=None):
        module = nnx.merge(graphdef, weights)
        return module.logits(module(tokens, mask).x_BTD)

    def extend(tokens, positions, cache, valid=None, *, phase):
        module = nnx.merge(graphdef, weights)
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        hidden, cache = module.extend(tokens, positions, valid, cache, TABLE, phase=phase)
        return module.logits(hidden.x_BTD), cache

    def prefill(tokens, cache):
        return extend(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), cache, phase="prefill")

    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (B, T))
    full = jax.jit(full)
    return SimpleNamespace(
        config=config,
        tokens=tokens,
        full=full,
        logits=full(tokens),
        prefill=jax.jit(prefill),
        extend=jax.jit(partial(extend, phase="decode")),
        continued=jax.jit(partial(extend, phase="prefill")),
    )


def cache_of(model, fill: float = 0.0):
    empty = empty_cache(model.config, BLOCKS, SIZE, jnp.float32)
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, fill), empty)


def close(got, wanted, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


# --- the whole decoder ---------------------------------------------------------------------------


def test_extending_an_empty_cache_equals_the_full_forward(model):
    """For MLA absorbed attention against expanded, for V3.2 gathered keys against masked ones, in the whole model."""
    positions = np.broadcast_to(np.arange(T), (B, T))
    logits, _ = model.extend(model.tokens, positions, cache_of(model))
    close(logits, model.logits)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 5, 8), (11, 4, 7)])
def test_prefill_then_extend_equals_the_full_forward(model, lengths):
    """Ragged prompts padded on the right, then one token at a time at each row's own position."""
    lengths, rows = np.array(lengths), np.arange(B)
    padded = np.where(np.arange(T) < lengths[:, None], model.tokens, 1)
    logits, cache = model.prefill(padded, cache_of(model))
    for row, length in enumerate(lengths):
        close(logits[row, :length], model.logits[row, :length])
    for step in range(T - lengths.max()):
        at = lengths + step
        logits, cache = model.extend(model.tokens[rows, at][:, None], at[:, None], cache)
        close(logits[:, 0], model.logits[rows, at])


def test_extending_by_several_tokens_at_ragged_positions(model):
    rows, starts = np.arange(B)[:, None], np.array([2, 5, 8])
    _, cache = model.prefill(model.tokens, cache_of(model))
    positions = starts[:, None] + np.arange(4)
    logits, _ = model.extend(model.tokens[rows, positions], positions, cache)
    close(logits, model.logits[rows, positions])


def test_padding_on_the_right_never_changes_real_tokens(model):
    lengths = np.array([3, 7, 12])
    real = np.arange(T) < lengths[:, None]
    for pad in (0, 1, 52):
        logits = model.full(np.where(real, model.tokens, pad))
        close(logits[real], model.logits[real], 1e-5)
    shorter = model.full(model.tokens[:, :7])
    close(shorter, model.logits[:, :7])


def test_what_lies_in_the_cache_beyond_a_position_is_never_seen(model):
    """Finite garbage in every slot that no token has written changes nothing."""
    prompt = np.where(np.arange(T) < 5, model.tokens, 3)  # slots 5 to T-1 hold padding, later ones the first fill
    step = lambda cache: model.extend(model.tokens[:, 5:6], np.full((B, 1), 5), cache)[0]
    clean = step(model.prefill(prompt, cache_of(model))[1])
    garbage = step(model.prefill(prompt, cache_of(model, 1e9))[1])
    np.testing.assert_array_equal(garbage, clean)
    close(clean[:, 0], model.logits[:, 5])


def test_the_cache_of_r1_is_the_latent_one():
    """70,272 bytes a token in bfloat16, 57 times less than keys and values of every head."""
    cache = jax.eval_shape(lambda: empty_cache(preset("r1-671b"), 1, 1, jnp.bfloat16))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == 70_272


def test_the_cache_of_v3_2_holds_a_key_of_the_indexer_more():
    """128 numbers a token and layer, one key for all its heads: 85,888 bytes a token in bfloat16."""
    cache = jax.eval_shape(lambda: empty_cache(preset("v3.2-671b"), 1, 1, jnp.bfloat16))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == 70_272 + 61 * 128 * 2


# --- sparse attention ----------------------------------------------------------------------------


def without_indexer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, indexer=None))


def with_topk(config: ModelConfig, count: int) -> ModelConfig:
    indexer = dataclasses.replace(config.attention.indexer, index_topk=count)
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, indexer=indexer))


def logits_of(config: ModelConfig, tokens):
    """By weights that depend on their names alone, so that an indexer leaves the rest as it is."""
    graphdef, weights = random_weights(config)

    @jax.jit
    def forward(weights):
        module = nnx.merge(graphdef, weights)
        return module.logits(module(tokens).x_BTD)

    return forward(weights)


def test_selection_bites_exactly_where_there_are_more_keys_than_index_topk():
    tokens = np.random.RandomState(0).randint(0, V32.vocab_size, (B, T))
    sparse, dense = logits_of(V32, tokens), logits_of(without_indexer(V32), tokens)
    close(sparse[:, :4], dense[:, :4])
    assert np.abs(sparse - dense).max(axis=-1)[:, 4:].min() > 1e-3
    np.testing.assert_array_equal(logits_of(with_topk(V32, T), tokens), dense)


@pytest.mark.parametrize("count, wanted", [(T - 1, True), (T, False)])
def test_nothing_is_ranked_where_all_keys_would_be_chosen(count, wanted):
    graphdef, weights = random_weights(with_topk(dataclasses.replace(V32, moe=None), count))
    forward = lambda weights, tokens: nnx.merge(graphdef, weights)(tokens).x_BTD
    real, table = jnp.ones((B, T), bool), jnp.zeros((B, 1), jnp.int32)
    over = lambda weights, *of: nnx.merge(graphdef, weights).extend(*of, table, phase="decode")[0].x_BTD
    extend = lambda weights, tokens, cache: over(weights, tokens, tokens, real, cache)
    tokens, cache = jnp.zeros((B, T), int), empty_cache(V32, 1, T, jnp.float32)
    assert ("packbits" in str(jax.make_jaxpr(forward)(weights, tokens))) is wanted
    assert ("top_k" in str(jax.make_jaxpr(extend)(weights, tokens, cache))) is wanted


def test_the_choice_of_keys_has_no_gradient():
    """The indexer's weights get none at all; every other parameter gets some."""
    graphdef, weights = random_weights(V32)
    tokens = np.random.RandomState(0).randint(0, V32.vocab_size, (B, T))

    def loss(weights):
        module = nnx.merge(graphdef, weights)
        return jnp.sum(module.logits(module(tokens).x_BTD) ** 2)

    gradients = names.flat(jax.jit(jax.grad(loss))(weights))
    gradients = {key: np.any(gradient) for key, gradient in gradients.items() if not key.endswith("mlp.bias")}
    assert {key for key, some in gradients.items() if not some} == {key for key in gradients if "indexer" in key}


# --- softmax scale -----------------------------------------------------------------------------------


def test_softmax_scale_is_the_published_one():
    """192^-0.5 alone would be 0.0722: YaRN's mscale enters squared."""
    assert preset("r1-671b").attention_scale == pytest.approx(0.1352338, abs=1e-7)
    assert preset("v2-lite").attention_scale == pytest.approx(0.1147214, abs=1e-7)


def test_the_scale_takes_mscale_all_dim_and_the_angles_take_the_ratio():
    yarn = dataclasses.replace(preset("r1-671b").rope, mscale=1.0, mscale_all_dim=0.5)
    config = dataclasses.replace(preset("r1-671b"), rope=yarn)
    all_dim, one = 0.05 * math.log(40) + 1, 0.1 * math.log(40) + 1
    assert config.attention_scale == pytest.approx(192**-0.5 * all_dim**2, rel=1e-12)
    assert rope.amplitude(yarn) == pytest.approx(one / all_dim, rel=1e-12)
    assert rope.amplitude(preset("r1-671b").rope) == rope.amplitude(preset("v2-lite").rope) == 1.0


# --- rope ----------------------------------------------------------------------------------------


def test_yarn_ramp_of_r1():
    """Pairs up to 10 keep their frequency, those from 23 are slowed 40 times, those between lie on a ramp."""
    config = preset("r1-671b")
    slowed = rope.frequencies(RopeConfig(theta=1e4), 64) / rope.frequencies(config.rope, 64)
    np.testing.assert_allclose(slowed[:11], 1, rtol=1e-12)
    np.testing.assert_allclose(slowed[23:], 40, rtol=1e-12)
    assert np.all((slowed[11:23] > 1) & (slowed[11:23] < 40))
    np.testing.assert_allclose(1 / slowed[11:23], 1 - (1 - 1 / 40) * np.arange(1, 13) / 13, rtol=1e-12)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    config = preset("distill-llama-8b")
    plain = rope.frequencies(RopeConfig(theta=5e5), 128)
    ratio = plain / rope.frequencies(config.rope, 128)
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8, rtol=1e-12)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.sum() > 3 and np.all((ratio[between] > 1) & (ratio[between] < 8))


@pytest.mark.parametrize(
    "rotate, pairs",
    [
        (rope.rotate_interleaved, lambda x: x[..., 0::2] + 1j * x[..., 1::2]),
        (rope.rotate_half, lambda x: x[..., :4] + 1j * x[..., 4:]),
    ],
)
def test_rope_equals_a_complex_twin(rotate, pairs):
    """Each pair is a complex number, turned by position times frequency; both layouts end as (real, imaginary)."""
    x = np.random.RandomState(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 3, 2047, 11]])
    turn = np.exp(1j * positions[..., None] * 1e4 ** -(np.arange(0, 8, 2) / 8))[:, :, None]
    wanted = pairs(x.astype(np.float64)) * turn
    angles = rope.angles(RopeConfig(theta=1e4), 8, jnp.asarray(positions))
    close(rotate(jnp.asarray(x), *angles), np.concatenate([wanted.real, wanted.imag], -1), 5e-4)  # 2047 rad in float32


def test_the_half_layout_is_wrong_for_deepseek():
    """A port that does not permute the rope rows of a checkpoint gets other dot products, not just another order."""
    q, k = jnp.asarray(np.random.RandomState(0).standard_normal((2, 1, 6, 1, 8)), jnp.float32)
    angles = rope.angles(RopeConfig(theta=1e4), 8, jnp.arange(6)[None])
    dots = lambda rotate: jnp.einsum("btnr,bsnr->ts", rotate(q, *angles), rotate(k, *angles))
    turn = np.exp(1j * np.arange(6)[:, None] * 1e4 ** -(np.arange(0, 8, 2) / 8))
    q_c, k_c = ((np.asarray(x)[0, :, 0, 0::2] + 1j * np.asarray(x)[0, :, 0, 1::2]) * turn for x in (q, k))
    wanted = (q_c @ k_c.conj().T).real
    close(dots(rope.rotate_interleaved), wanted, 1e-5)
    assert np.abs(dots(rope.rotate_half) - wanted).max() > 1


# --- routing -------------------------------------------------------------------------------------


def test_padding_goes_to_no_expert():
    """Over a cache it gets what the shared expert makes of it; the other tokens, what all of theirs do."""
    config = dataclasses.replace(V3, num_hidden_layers=1, moe=dataclasses.replace(V3.moe, first_k_dense_replace=0))
    graphdef, weights = random_weights(config)
    layer = nnx.merge(graphdef, weights).layers[0].mlp
    x, real = jax.random.normal(jax.random.key(2), (3, 5, 32)), np.random.RandomState(3).rand(3, 5) < 0.5
    nothing, at = x[:, :, :0], jnp.zeros((3, 5), jnp.int32)
    whole = Step("whole", at, nothing, nothing, jnp.asarray(real))
    over_cache = whole._replace(phase="decode", view=CacheView.of(at[:, :1], at, whole.valid_BT))
    out, wanted = (jax.jit(lambda x, step=step: layer(x, step)[0])(x) for step in (over_cache, whole))
    shared = jax.jit(layer.shared)(x)
    close(out[real], wanted[real], 1e-6)
    close(out[~real], shared[~real], 1e-6)
    assert np.abs(wanted - shared).max(axis=-1).min() > 1e-3


def test_routing_is_float32_in_a_bfloat16_model():
    """Each row is a sequence, so its load says which experts it chose; logits in bfloat16 would choose others."""
    moe = dataclasses.replace(V3.moe, n_routed_experts=16, n_group=1, topk_group=1, first_k_dense_replace=0)
    graphdef, weights = random_weights(dataclasses.replace(V3, num_hidden_layers=1, moe=moe))
    layer = nnx.merge(graphdef, convert_dtype(weights, jnp.bfloat16)).layers[0].mlp
    x = jax.random.normal(jax.random.key(1), (512, 1, 32)).astype(jnp.bfloat16)
    nowhere = jnp.zeros((512, 1), jnp.int32)
    step = Step("whole", nowhere, x[:, :, :0], x[:, :, :0], jnp.ones((512, 1), bool))
    stats = jax.jit(lambda layer, x: layer(x, step)[1])(layer, x)
    router, bias = layer.router[...], np.asarray(layer.bias[...], np.float64)
    assert router.dtype == jnp.bfloat16 and bias.mean() < -0.5

    def chosen(logits):
        best = np.argsort(-1 / (1 + np.exp(-logits)) - bias, axis=-1)[:, : moe.num_experts_per_tok]
        return np.sum(np.eye(16)[best], axis=1)

    exact = chosen(np.asarray(x[:, 0], np.float64) @ np.asarray(router, np.float64))
    np.testing.assert_array_equal(stats.load_BE, exact)
    assert np.any(chosen(np.asarray(x[:, 0] @ router, np.float64)) != exact)
