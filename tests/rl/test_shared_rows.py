"""How many samples share a row: what it comes to by hand, and that it is the least of all that is computed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import preset
from deepseek_jax.rl.shared_rows import Shape, Work, shared_shape, work_of
from tests.checkpoint.folders import QWEN2

SMOLLM2 = Work(134.5e6, 30 * 9 * 128)


def test_long_prompts_are_shared_by_the_whole_group_and_long_completions_by_nobody():
    rows = lambda prompt, completion: shared_shape(
        SMOLLM2, groups=2, group_size=8, prompt=prompt, completion=completion, width_of=8
    )
    assert rows(512, 64) == Shape(2, 1024, 8)
    assert rows(4, 64) == Shape(16, 67, 1)
    assert rows(512, 32_768) == Shape(16, 33_279, 1)
    assert 1 < rows(512, 1024).per_row < 8


def test_rows_are_a_multiple_of_what_divides_them():
    shape = shared_shape(SMOLLM2, groups=3, group_size=8, prompt=512, completion=64, rows_of=8, width_of=96)
    assert shape.rows % 8 == 0 and shape.width % 96 == 0 and shape.rows * shape.per_row >= 24


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 3))
def test_the_rows_cost_no_more_than_those_of_one_sample_and_hold_all(groups, size, prompt, completion, doubled):
    size, rows_of = size * 2**doubled, 2**doubled
    shape = shared_shape(SMOLLM2, groups=groups, group_size=size, prompt=prompt, completion=completion, rows_of=rows_of)
    alone = SMOLLM2.of_rows(groups * size, prompt - 1 + completion)
    assert SMOLLM2.of_rows(shape.rows, shape.width) <= alone
    assert shape.rows >= groups * -(-size // shape.per_row) and shape.rows % rows_of == 0
    assert shape.width >= prompt - 1 + shape.per_row * completion


@pytest.mark.parametrize(
    ("config", "token", "pair"),
    [
        # attention, SwiGLU and head of one layer after another, by hand
        (
            dataclasses.replace(
                QWEN2, hidden_size=8, intermediate_size=16, vocab_size=32, num_hidden_layers=2, num_attention_heads=4,
                attention=dataclasses.replace(QWEN2.attention, num_key_value_heads=2, head_dim=2),
                tie_word_embeddings=False,
            ),
            2 * (8 * (8 + 4 + 4 + 8) + 3 * 8 * 16) + 8 * 32,
            2 * 4 * 4,
        ),
    ],
)  # fmt: skip
def test_the_work_of_a_token_and_a_pair_by_hand(config, token, pair):
    assert work_of(config) == Work(token, pair)


def test_of_experts_a_token_meets_those_that_it_goes_to():
    config = preset("tiny")
    more = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, n_routed_experts=2 * config.moe.n_routed_experts)
    )
    routers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers)) * config.hidden_size
    assert work_of(more).token - work_of(config).token == pytest.approx(routers * config.moe.n_routed_experts)
    assert work_of(dataclasses.replace(config, num_nextn_predict_layers=1)).token == work_of(config).token
