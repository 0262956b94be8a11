"""Rotary embeddings in config.json: every spelling, what transformers fills in, and what is refused."""

import math

import numpy as np
import pytest

from deepseek_jax.config import RopeConfig, YarnConfig, from_hf, preset, to_hf
from deepseek_jax.ops.rope import amplitude, frequencies

R1, LITE, KIMI = "r1-671b", "v2-lite", "kimi-k2"
QWEN, QWEN3, LLAMA = "distill-qwen-7b", "distill-qwen3-8b", "distill-llama-8b"
ATTN_FACTOR = 0.8782488562869419  # DeepSeek-R1-0528-Qwen3-8B's
CARD = {"factor": 4.0, "original_max_position_embeddings": 32768}  # what Qwen's model cards ask for, but the type
FULL = {"type": "yarn", **CARD, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}


def rope_of(name: str, scaling, **changes) -> RopeConfig:
    return from_hf(to_hf(preset(name)) | {"rope_scaling": scaling} | changes).rope


def refusal(name: str, scaling, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        rope_of(name, scaling, **changes)
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    return message


# --- what may be left out ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [R1, LITE, KIMI, QWEN, QWEN3, LLAMA])
@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", **CARD},
        {"rope_type": "yarn", **CARD},
        {"type": "yarn", "rope_type": "yarn", **CARD},
        {"type": "yarn", **CARD, "beta_fast": 32.0},
        {"type": "yarn", **CARD, "beta_slow": 1.0},
        {"type": "yarn", **CARD, "truncate": True, "attention_factor": None, "attn_factor": None},
        {"type": "yarn", **CARD, "partial_rotary_factor": 1.0, "mrope_section": None},
    ],
    ids=str,
)
def test_yarn_without_its_betas_is_yarn_with_32_and_1(name, scaling):
    rope = rope_of(name, scaling)
    assert rope == rope_of(name, FULL)
    assert isinstance(rope, YarnConfig) and (rope.beta_fast, rope.beta_slow) == (32, 1)
    theta = rope.theta
    in_parameters = {**scaling, "rope_theta": theta}
    values = {key: value for key, value in to_hf(preset(name)).items() if not key.startswith("rope_")}
    assert from_hf(values | {"rope_parameters": in_parameters}).rope == rope


@pytest.mark.parametrize("name", [QWEN, LLAMA, R1])
def test_yarn_without_an_original_length_has_the_longest(name):
    """transformers' rule, though such a file stretches what was not short."""
    rope = rope_of(name, {"rope_type": "yarn", "factor": 2.0})
    assert rope.original_max_position_embeddings == preset(name).max_position_embeddings
    assert rope_of(name, {"rope_type": "yarn", "factor": 2.0}, original_max_position_embeddings=4096) == rope_of(
        name, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    )


def test_llama3_without_an_original_length_is_refused():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert "original_max_position_embeddings" in refusal(LLAMA, scaling)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "default", "factor": 1.0}, {"factor": 1}, {}])
@pytest.mark.parametrize("name", [QWEN, R1])
def test_plain_rope_may_say_that_it_is_not_scaled(name, scaling):
    assert rope_of(name, scaling) == RopeConfig(theta=to_hf(preset(name))["rope_theta"])


def test_numbers_of_the_published_yarns():
    """Against the formulas of the YaRN paper, worked out here: amplitude, and frequencies at both ends of the ramp."""
    qwen3, kimi = preset(QWEN3).rope, preset(KIMI).rope
    assert amplitude(qwen3) == pytest.approx(0.1 * math.log(4) + 1, abs=1e-15)
    assert amplitude(kimi) == 1.0
    plain = 1e6 ** -(np.arange(64) / 64)
    found = frequencies(qwen3, 128)
    np.testing.assert_allclose(found[:15], plain[:15], rtol=1e-15)
    np.testing.assert_allclose(found[-24:], plain[-24:] / 4, rtol=1e-15)
    plain = 5e4 ** -(np.arange(32) / 32)
    place = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(5e4))  # the ramp's only place, between two pairs
    found = frequencies(kimi, 64)
    np.testing.assert_allclose(found[: math.floor(place) + 1], plain[: math.floor(place) + 1], rtol=1e-15)
    np.testing.assert_allclose(found[math.ceil(place) :], plain[math.ceil(place) :] / 32, rtol=1e-15)
    assert preset(KIMI).attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2, rel=1e-15)
    assert preset(QWEN3).attention_scale == 128**-0.5


# --- two places, two names -----------------------------------------------------------------------


def test_what_is_said_twice_must_agree():
    parameters = {"rope_type": "yarn", **CARD, "rope_theta": 10000.0}
    same = to_hf(preset(QWEN)) | {"rope_scaling": {"type": "yarn", **CARD}, "rope_parameters": parameters}
    assert from_hf(same).rope == rope_of(QWEN, FULL)
    assert from_hf(same | {"rope_theta": None}).rope == rope_of(QWEN, FULL)
    with pytest.raises(
        ValueError, match="rope_theta: got 1000000.0 and, in rope_parameters, 10000.0; wanted one value"
    ):
        from_hf(same | {"rope_theta": 1e6})
    with pytest.raises(ValueError, match="factor: got 2.0 and, in rope_parameters, 4.0; wanted one value"):
        from_hf(same | {"rope_scaling": {"type": "yarn", **CARD, "factor": 2.0}})
    assert "rope type: got rope_type 'yarn' and type 'llama3'" in refusal(
        QWEN, {**FULL, "rope_type": "yarn", "type": "llama3"}
    )


# --- what is not computed ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "su", "mrope", "proportional", "ntk", 3, ["yarn"]])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_another_kind_is_refused(kind, spelling):
    message = refusal(QWEN, {spelling: kind, "factor": 2.0})
    assert f"rope type: got {kind!r}, wanted 'default', 'yarn' or 'llama3'; no other is computed here" in message


@pytest.mark.parametrize(
    "further, says",
    [
        ({"truncate": False}, "rope key 'truncate': got False, wanted True or none; "),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: got 0.25, wanted 1; "),
        ({"mrope_section": [16, 24, 24]}, "mrope_section: got [16, 24, 24], wanted None; "),
        ({"short_factor": [1.0]}, "rope parameters of type 'yarn': got an unexpected keyword argument 'short_factor'"),
        ({"finetuned": True}, "rope parameters of type 'yarn': got an unexpected keyword argument 'finetuned'"),
        ({"mscale": -1.0}, "mscale: got -1.0, wanted a number from 0 to 100"),
        ({"mscale_all_dim": 1e308}, "mscale_all_dim: got 1e+308, wanted a number from 0 to 100"),
        ({"attention_factor": 1.0}, "attention_factor: got 1.0, wanted 1.13862944 or none; it follows from"),
        ({"attention_factor": "1"}, "attention_factor: got '1', wanted 1.13862944 or none"),
        ({"attention_factor": True}, "attention_factor: got True, wanted 1.13862944 or none"),
        ({"attn_factor": 0.5}, "attn_factor: got 0.5, wanted none; transformers passes over it"),
        ({"attn_factor": [1]}, "attn_factor: got [1], wanted none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [QWEN, QWEN3])
def test_what_yarn_does_not_do_here_is_refused(name, further, says):
    assert says in refusal(name, FULL | further)


@pytest.mark.parametrize("factor", [4.0, 0.5, None, "1"])
def test_plain_rope_with_a_factor_is_refused(factor):
    if factor is None:
        assert rope_of(QWEN, {"rope_type": "default", "factor": None}) == preset(QWEN).rope
    else:
        says = f"rope key 'factor': got {factor!r}, wanted 1 or none; rope of type 'default' is not scaled"
        assert says in refusal(QWEN, {"rope_type": "default", "factor": factor})


# --- attention_factor and attn_factor ------------------------------------------------------------


def test_an_attention_factor_that_follows_anyway_is_read():
    follows = 0.1 * math.log(4) + 1
    assert rope_of(QWEN, FULL | {"attention_factor": follows}) == rope_of(QWEN, FULL)
    assert rope_of(R1, to_hf(preset(R1))["rope_scaling"] | {"attention_factor": 1.0}) == preset(R1).rope


def test_the_attn_factor_of_r1_0528_qwen3_is_passed_over_with_a_word():
    published = {"rope_type": "yarn", **CARD, "attn_factor": ATTN_FACTOR}
    with pytest.warns(
        UserWarning, match="attn_factor 0.878248856 is passed over, as by transformers: .* by 1.13862944"
    ):
        assert rope_of(QWEN3, published) == preset(QWEN3).rope
    assert "attn_factor: got 0.878" in refusal(QWEN3, published | {"factor": 8.0})
    assert rope_of(QWEN3, published | {"attn_factor": 1.0}) == preset(QWEN3).rope
