"""The planner's arithmetic against the model itself: its weights, its cache, its products, its published bytes."""

import dataclasses
import math
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.checkpoint.names import packed
from deepseek_jax.checkpoint.summary import of_preset
from deepseek_jax.config import PRESETS, GQAConfig, IndexerConfig, preset
from deepseek_jax.model.cache import empty_cache
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.plan import model_bytes, model_flops, weights
from deepseek_jax.plan.compiled import CACHE_DTYPES

R1, TINY = preset("r1-671b"), preset("tiny")
GIB = 2**30


def tiny(indexer: bool = False, **changes):
    attention = TINY.attention
    if indexer:
        attention = dataclasses.replace(
            attention, indexer=IndexerConfig(index_n_heads=3, index_head_dim=16, index_topk=5)
        )
    return dataclasses.replace(TINY, **{"attention": attention, **changes})


GROUPED = GQAConfig(num_key_value_heads=2, head_dim=24, qkv_bias=True)
MODELS = {
    **{name: preset(name) for name in PRESETS},
    "tiny with a module": tiny(num_nextn_predict_layers=2),
    "tiny with an indexer": tiny(indexer=True),
    "tiny tied": tiny(tie_word_embeddings=True, moe=None),
    "tiny grouped": tiny(attention=GROUPED, moe=None),
    "tiny with normed heads": tiny(attention=dataclasses.replace(GROUPED, qkv_bias=False, qk_norm=True), moe=None),
}


@cache
def arrays(config):
    """The model's own, by path; a large one takes a second to make."""
    return nnx.to_flat_state(abstract_weights(config)[1])


every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


# --- weights -------------------------------------------------------------------------------------


@every_model
def test_the_table_lists_the_models_arrays_with_their_axes(config):
    listed, there = Counter(), Counter()
    for weight in weights.weights(config):
        listed[weight.shape, weight.axes, weight.module, weight.kind == "router_bias"] += weight.count
    for path, leaf in arrays(config):
        axes = leaf.get_metadata()["axes"]
        there[leaf.get_raw_value().shape, axes, path[0] == "mtp", not isinstance(leaf, nnx.Param)] += 1
    assert listed == there


@every_model
def test_parameters_sum_to_what_is_trained(config):
    sizes = Counter()
    for path, leaf in arrays(config):
        if isinstance(leaf, nnx.Param):
            sizes[path[0] == "mtp"] += math.prod(leaf.get_raw_value().shape)
    found = weights.parameters(config)
    assert (found.main, found.mtp) == (sizes[False], sizes[True])
    assert found.total == sum(dataclasses.asdict(found).values())


def test_the_published_sizes():
    found = weights.parameters(R1)
    assert found.main == 671_026_404_352
    assert found.routed_experts == 58 * 256 * 3 * 7168 * 2048
    assert 0.974 < found.routed_experts / found.main < 0.975
    assert found.embedding == found.head == 129280 * 7168
    assert round(weights.active_parameters(R1) / 1e9) == 37
    assert (
        weights.active_parameters(preset("distill-qwen-7b"))
        == weights.parameters(preset("distill-qwen-7b")).main - (152064 - 1) * 3584
    )


def test_the_sizes_of_kimi_k2_and_of_qwen3():
    """Kimi K2: a trillion parameters, of which a token uses 32 billion; R1's cache, whatever the heads."""
    kimi, qwen3 = preset("kimi-k2"), preset("distill-qwen3-8b")
    assert weights.parameters(kimi).main == 1_026_408_232_448 - 60 * 384  # router biases are not trained
    assert weights.parameters(kimi).routed_experts == 60 * 384 * 3 * 7168 * 2048 and weights.parameters(kimi).mtp == 0
    assert round(weights.active_parameters(kimi) / 1e9) == 32
    assert model_bytes.cache_bytes_per_token(kimi) == model_bytes.cache_bytes_per_token(R1) == 70_272
    assert weights.parameters(qwen3).main == 8_190_735_360
    assert model_bytes.cache_bytes_per_token(qwen3) == 2 * 36 * 8 * 128 * 2
    by_hand = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert weights.parameters(qwen3).main == by_hand + 2 * 151936 * 4096 + 4096


@every_model
def test_fp8_bytes_are_those_of_the_published_files(config):
    assert weights.checkpoint_bytes(config, "fp8") == of_preset(packed(config)).bytes


@every_model
def test_bfloat16_bytes_are_those_of_the_published_files(config):
    assert weights.checkpoint_bytes(config, "bf16") == of_preset(dataclasses.replace(config, quantization=None)).bytes


def test_r1_in_every_format():
    assert weights.weight_bytes(R1, "fp8") == 673_150_611_808
    assert weights.checkpoint_bytes(R1, "fp8") == 688_574_839_360
    assert round(weights.weight_bytes(R1, "fp8") / GIB, 1) == 626.9
    assert round(weights.weight_bytes(R1, "bf16") / GIB, 1) == 1249.9
    assert round(weights.weight_bytes(R1, "int4") / GIB) == 332
    # one byte a packed weight and one float32 an output, beside the rest
    scales = 4 * sum(
        w.count * math.prod(w.shape) // w.shape[-2] for w in weights.weights(R1) if w.packable and not w.module
    )
    unpacked = sum(w.size for w in weights.weights(R1) if not w.packable and not w.module)
    counted = weights.parameters(R1).main - unpacked + 58 * 256 + scales + 2 * unpacked + 2 * 58 * 256
    assert weights.weight_bytes(R1, "int8") == counted


@every_model
def test_fewer_bits_never_weigh_more(config):
    sizes = [weights.weight_bytes(config, dtype, mtp=True) for dtype in ("f32", "bf16", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    by_kind = weights.weight_bytes_by_kind(config, "int4", mtp=True)
    assert sum(by_kind.values()) == sizes[-1]


@pytest.mark.parametrize("function", [weights.weight_bytes, weights.checkpoint_bytes, weights.weight_bytes_by_kind])
def test_an_unknown_format_is_refused(function):
    with pytest.raises(ValueError, match="dtype: got 'fp4', wanted one of f32, bf16, fp8, int8, int4"):
        function(TINY, "fp4")


def test_training_state():
    """Float32 masters and gradient, whatever is computed in; moments as they are kept."""
    state = model_bytes.train_state_bytes(R1)
    trained = 671_026_404_352 + 11_610_067_968
    assert state == (4 * trained + 4 * 59 * 256, 4 * trained, 8 * trained)
    assert state.total == sum(state) and state == model_bytes.train_state_bytes(
        R1, model_bytes.StateDTypes(compute="f32")
    )
    main = model_bytes.train_state_bytes(R1, model_bytes.StateDTypes(moments="bf16"), mtp=False)
    assert main == (4 * (671_026_404_352 + 58 * 256), 4 * 671_026_404_352, 4 * 671_026_404_352)
    with pytest.raises(ValueError, match="compute: got 'fp8', wanted f32 or bf16; quantized weights are not trained"):
        model_bytes.StateDTypes(compute="fp8")


# --- cache ---------------------------------------------------------------------------------------


def test_the_published_cache_sizes():
    assert model_bytes.cache_bytes_per_token(R1) == 70_272
    assert model_bytes.cache_bytes_per_token(R1, multiple=128) == 78_080
    assert model_bytes.cache_bytes_per_token(preset("v3.2-671b")) == 70_272 + 61 * 128 * 2
    assert model_bytes.cache_bytes_per_token(preset("distill-llama-70b")) == 2 * 80 * 8 * 128 * 2
    assert round(128 * 32768 * model_bytes.cache_bytes_per_token(R1) / GIB, 1) == 274.5
    with pytest.raises(ValueError, match="dtype: got 'int4'"):
        model_bytes.cache_bytes_per_token(R1, "int4")


@every_model
@pytest.mark.parametrize("dtype", ["f32", "bf16", "fp8", "int8"])
def test_a_cache_has_the_bytes_of_the_models(config, dtype):
    cache = jax.eval_shape(lambda: empty_cache(config, 3, 7, CACHE_DTYPES[dtype]))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert total == 3 * 7 * model_bytes.cache_bytes_per_token(config, dtype)


def test_codes_take_a_byte_and_what_is_beside_them_two():
    """Rotated keys and a scale; of V3.2 its indexer's keys; of grouped heads two scales each, padded on TPUs."""
    of = model_bytes.cache_bytes_per_token
    assert of(R1, "fp8") == of(R1, "int8") == 61 * (512 + 2 * (64 + 1))
    assert of(R1, "fp8", multiple=128) == 61 * (512 + 2 * 128)
    assert of(preset("v3.2-671b"), "fp8") == of(R1, "fp8") + 61 * 128 * 2
    llama = preset("distill-llama-70b")
    assert of(llama, "int8") == 80 * (2 * 8 * 128 + 2 * 2 * 8)
    assert of(llama, "int8", multiple=128, parts=8) == 80 * (2 * 8 * 128 + 8 * 2 * 128)


# --- FLOPs ---------------------------------------------------------------------------------------


def products(jaxpr) -> int:
    """FLOPs of all matrix products of a traced function that has no loop around them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (value.aval.shape for value in equation.invars)
            (summed, _), (batched, _) = equation.params["dimension_numbers"]
            rows = math.prod(left)
            columns = math.prod(right) // math.prod(left[axis] for axis in (*summed, *batched))
            total += 2 * rows * columns
        params = dict(equation.params)
        if "branches" in params:  # by platform; the last is that of any other
            params = {"branch": params["branches"][-1]}
        for value in params.values():
            inner = getattr(value, "jaxpr", None)
            total += 0 if inner is None else products(getattr(inner, "jaxpr", inner))
    return total


def traced(config, call) -> int:
    graphdef, weights = abstract_weights(config)
    return products(jax.make_jaxpr(lambda weights: call(nnx.merge(graphdef, weights)))(weights).jaxpr)


@pytest.mark.parametrize("attention", [TINY.attention, GROUPED], ids=["latent", "grouped"])
def test_flops_are_those_of_the_traced_model(attention):
    """Without experts, whose loop a trace counts once. The model computes all pairs, the arithmetic causal ones."""
    config, B, T, S = tiny(attention=attention, moe=None, num_nextn_predict_layers=1), 2, 6, 64
    tokens = jnp.zeros((B, T), jnp.int32)

    def whole(model):
        hidden = model(tokens)
        (ahead,) = model.draft(hidden.x_BTD, tokens)
        return model.logits(hidden.x_BTD), model.logits(ahead.x_BTD)

    found = model_flops.prefill_flops(config, B, T, logits=B * T, mtp=True)
    hidden_pairs = found.attention // (T * (T + 1) // 2) * (T * T - T * (T + 1) // 2)
    unseen = hidden_pairs * (config.num_hidden_layers + 1) // config.num_hidden_layers
    assert found.total + unseen == traced(config, whole)

    def one_more(model):
        one, cache = tokens[:, :1], empty_cache(config, B, S, jnp.float32)
        hidden, _ = model.extend(one, one, one == 0, cache, jnp.arange(B)[:, None], phase="decode")
        return model.logits(hidden.x_BTD)

    assert model_flops.decode_flops(config, B, S).total == traced(config, one_more)


def test_flops_of_r1_by_hand():
    found = model_flops.prefill_flops(R1, 2, 4096)
    assert found.attention == 61 * 2 * (4096 * 4097 // 2) * 2 * 128 * (192 + 128)
    assert found.routed_experts == 58 * 8192 * 8 * 3 * 2 * 7168 * 2048
    assert found.shared_experts == found.routed_experts // 8
    assert found.router == 58 * 8192 * 2 * 7168 * 256
    assert found.dense_mlp == 3 * 8192 * 3 * 2 * 7168 * 18432
    assert found.head == 2 * 2 * 7168 * 129280
    assert (found.indexer, found.mtp) == (0, 0)
    one = model_flops.decode_flops(R1, 1, 4096)
    assert one.attention == 61 * 4096 * 2 * 128 * (512 + 64 + 512)
    # every matrix that a token meets takes part once
    met = weights.active_parameters(R1) - weights.parameters(R1).norms - 7168
    assert one.total - one.attention == 2 * met


@every_model
def test_training_is_three_forward_passes(config):
    forward = model_flops.prefill_flops(config, 2, 64, logits=128, mtp=True)
    assert model_flops.train_flops(config, 2, 64, mtp=True) == forward * 3
    assert model_flops.train_flops(config, 2, 64, mtp=True).total == 3 * forward.total
    without = model_flops.train_flops(config, 2, 64, mtp=False)
    assert (without.total < 3 * forward.total) == (config.num_nextn_predict_layers > 0)


@given(
    st.sampled_from(["r1-671b", "v3.2-671b", "v2-lite", "distill-qwen-7b"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5000),
)
def test_flops_add_up_over_sequences(name, some, others, length):
    config = preset(name)
    for flops in (model_flops.prefill_flops, model_flops.decode_flops):
        assert flops(config, some, length) + flops(config, others, length) == flops(config, some + others, length)


@pytest.mark.parametrize("config", [TINY, tiny(indexer=True), MODELS["tiny grouped"]], ids=["all", "chosen", "grouped"])
def test_prefill_sees_the_pairs_that_decoding_sees(config):
    T = 23
    decoded = [model_flops.decode_flops(config, 1, context).attention for context in range(1, T + 1)]
    a_pair = model_flops.decode_flops(config, 1, 1).attention
    whole, of_one = model_flops.prefill_flops(config, 1, T).attention, model_flops.prefill_flops(config, 1, 1).attention
    assert whole * a_pair == sum(decoded) * of_one


def test_the_indexer_chooses_only_among_more_keys_than_it_keeps():
    config = preset("v3.2-671b")
    few, many = model_flops.decode_flops(config, 1, 2048), model_flops.decode_flops(config, 1, 2049)
    assert few.attention == many.attention == 61 * 2048 * 2 * 128 * (512 + 64 + 512)
    assert few.indexer == 61 * 2 * 7168 * 128
    assert many.indexer - few.indexer == 61 * (2 * (1536 * 8192 + 7168 * 64) + 2 * (64 * 128 + 64) * 2049)


@pytest.mark.parametrize("flops", [model_flops.prefill_flops, model_flops.decode_flops])
def test_nothing_to_compute_is_refused(flops):
    with pytest.raises(ValueError, match="sequences: got 0, wanted at least 1"):
        flops(TINY, 0, 4)


# --- traffic -------------------------------------------------------------------------------------


def test_experts_touched():
    assert model_bytes.experts_touched(R1, 1) == pytest.approx(8 / 256, rel=1e-12)
    assert model_bytes.experts_touched(R1, 2) == pytest.approx(1 - (1 - 8 / 256) ** 2, rel=1e-12)
    assert 0.999999 < model_bytes.experts_touched(R1, 512) < 1
    assert model_bytes.experts_touched(preset("distill-qwen-7b"), 9) == 0


def test_decoding_one_token_of_r1_moves_its_active_weights_and_its_cache():
    moved = model_bytes.decode_bytes(R1, 1, 4096, "bf16")
    biases = 58 * 256
    assert moved.weights == pytest.approx(2 * weights.active_parameters(R1) + 4 * biases, rel=1e-12)
    assert moved.cache_read == 4096 * 70_272 and moved.cache_written == 70_272
    assert moved.total == moved.weights + 4097 * 70_272
    chosen = model_bytes.decode_bytes(preset("v3.2-671b"), 1, 4096, "bf16")
    assert chosen.cache_read == 2048 * 70_272 + 4096 * 61 * 128 * 2


@given(st.sampled_from(list(PRESETS)), st.integers(1, 2000), st.integers(1, 200), st.sampled_from(weights.DTYPES))
def test_traffic_grows_with_sequences_and_context(name, sequences, context, dtype):
    config = preset(name)
    one = model_bytes.decode_bytes(config, sequences, context, dtype)
    assert one.total <= model_bytes.decode_bytes(config, sequences + 1, context, dtype).total
    assert one.total <= model_bytes.decode_bytes(config, sequences, context + 1, dtype).total
    assert one.weights <= weights.weight_bytes(config, dtype)
    whole = model_bytes.prefill_bytes(config, sequences, context, dtype)
    assert whole.cache_written == sequences * context * model_bytes.cache_bytes_per_token(config)


def test_an_update_moves_its_state():
    state, moved = model_bytes.train_state_bytes(TINY), model_bytes.train_bytes(TINY)
    assert (moved.weights, moved.gradient, moved.moments) == (4 * state[0], 2 * state[1], 2 * state[2])
