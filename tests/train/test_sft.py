"""Supervised batches and their loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.model.decoder import Decoder
from deepseek_jax.ops.metrics import values
from deepseek_jax.train.sft import sft_batch, sft_objective

EXAMPLES = [([3, 4], [5, 6, 2]), ([7], [2]), ([8, 9, 3], [4, 2])]
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=12,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.3,
    attention=MLAConfig(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=None,
)


def test_only_completions_count():
    batch = sft_batch(EXAMPLES, width=5)
    np.testing.assert_array_equal(batch.tokens_BT, [[3, 4, 5, 6, 2], [7, 2, 0, 0, 0], [8, 9, 3, 4, 2]])
    np.testing.assert_array_equal(batch.targets_BT, [[4, 5, 6, 2, 0], [2, 0, 0, 0, 0], [9, 3, 4, 2, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]])


def test_an_example_may_fill_the_width_and_no_more():
    batch = sft_batch(EXAMPLES, width=4)
    assert batch.mask_BT[0].tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="example 0: got 5 tokens, wanted at most 4"):
        sft_batch(EXAMPLES, width=3)


@pytest.mark.parametrize(("example", "empty"), [(([], [3, 4]), "prompt"), (([3], []), "completion")])
def test_an_empty_part_is_refused_and_not_masked_in_silence(example, empty):
    with pytest.raises(ValueError, match=f"example 1: got an empty {empty}"):
        sft_batch([EXAMPLES[0], example], width=5)


def test_loss_is_the_mean_of_each_examples_mean():
    model = jax.jit(lambda: nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))))
    weights = model()[1]
    batch = sft_batch(EXAMPLES, width=5)

    @jax.jit
    def run(weights, batch):
        model = nnx.merge(graphdef, weights)
        return sft_objective(model, batch, jnp.float32(3))[:2], model.logits(model(batch.tokens_BT).x_BTD)

    (loss, metrics), logits = run(weights, batch)
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    each = []
    for row, (prompt, completion) in enumerate(EXAMPLES):
        at = np.arange(len(completion)) + len(prompt) - 1
        each.append(-logp[row, at, completion])
    assert loss == pytest.approx(np.mean([e.mean() for e in each]), rel=1e-5)
    metrics = values(metrics)
    assert metrics["nll"] == pytest.approx(np.concatenate(each).mean(), rel=1e-5)
    assert metrics["tokens_per_example"] == 2.0
