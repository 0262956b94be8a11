"""Supervised batches and their loss, with multi-token prediction and without."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.ops.metrics import BatchTotals, values
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.sft_loss import (
    lay_out,
    make_sft_objective,
    mean_of_examples,
    mean_of_tokens,
    pack,
    sft_batch,
    sft_mtp_objective,
    sft_objective,
)
from deepseek_jax.train.step import batch_totals

THREE = BatchTotals(jnp.float32(3), jnp.float32(7))
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
        return sft_objective(model, batch, THREE)[:2], model.logits(model(batch.tokens_BT).x_BTD)

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
    hits = [logp[row, len(p) - 1 : len(p) + len(c) - 1].argmax(-1) == c for row, (p, c) in enumerate(EXAMPLES)]
    assert metrics["mean_token_accuracy"] == pytest.approx(np.concatenate(hits).mean(), rel=1e-6)


# --- packed rows -----------------------------------------------------------------------------------

# a conversation of two turns among them, one that is cut off, and lengths that share rows of 8 columns
TURNS = [
    MaskedTokens(np.array(tokens, np.int32), np.array(mask, bool))
    for tokens, mask in (
        ([3, 4, 5, 6, 2], [0, 0, 1, 1, 1]),
        ([7, 8, 2, 9, 3, 2], [0, 1, 1, 0, 1, 1]),
        ([5, 2], [0, 1]),
        ([8, 9, 3, 4], [0, 0, 1, 0]),
        ([4, 6, 7, 8, 9, 3, 5, 2, 4], [0, 0, 0, 0, 0, 1, 1, 1, 1]),
    )
]


def test_rows_are_packed_first_fit_and_empty_ones_fill_up():
    batch = pack(TURNS, width=8, per_row=3, parts=4)
    np.testing.assert_array_equal(batch.segments_BT, [[1] * 8, [1] * 5 + [2] * 3, [1] * 4 + [2] + [0] * 3, [0] * 8])
    np.testing.assert_array_equal(batch.lengths_BK, [[4, 0, 0], [4, 1, 0], [3, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.tokens_BT[1], [7, 8, 2, 9, 3, 8, 9, 3])
    np.testing.assert_array_equal(batch.targets_BT[1], [8, 2, 9, 3, 2, 9, 3, 4])
    np.testing.assert_array_equal(batch.mask_BT[1], [1, 1, 0, 1, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="example 4: got 9 tokens, wanted at most 8"):
        pack(TURNS, width=7, per_row=3, parts=1)


# With a weight the loss is that without and more.
@pytest.mark.parametrize("mtp_weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("mean", [mean_of_tokens, mean_of_examples])
def test_packed_rows_have_the_loss_and_gradient_of_rows_of_their_own(mean, mtp_weight):
    """Of a model with experts: routing statistics and the modules' targets do not look into the next row either."""
    graphdef, weights = mtp_model()
    params, rest = nnx.split_state(weights, nnx.Param, ...)
    objective = make_sft_objective(mtp_weight=mtp_weight, mean=mean)

    @jax.jit
    def run(params, batch):
        def loss(params):
            value, metrics, scored = objective(nnx.merge(graphdef, params, rest), batch, batch_totals(batch))
            return value + 0.01 * scored.balance, (value, metrics, scored.load_LE)

        return jax.grad(loss, has_aux=True)(params)

    own, packed = lay_out(TURNS, width=8), pack(TURNS, width=8, per_row=3, parts=2)
    assert len(packed.mask_BT) == 4 < len(own.mask_BT)
    wanted, (value, metrics, load) = run(params, jax.tree.map(jnp.asarray, own))
    found, (packed_value, packed_metrics, packed_load) = run(params, jax.tree.map(jnp.asarray, packed))
    assert float(packed_value) == pytest.approx(float(value), rel=2e-6)
    for name, of in values(metrics).items():
        assert values(packed_metrics)[name] == pytest.approx(of, rel=2e-6), name
    np.testing.assert_array_equal(packed_load, load)
    for path, leaf in nnx.to_flat_state(wanted):
        other = dict(nnx.to_flat_state(found))[path][...]
        np.testing.assert_allclose(other, leaf[...], rtol=0, atol=5e-6, err_msg=str(path))


# --- multi-token prediction ------------------------------------------------------------------------

MTP = dataclasses.replace(CONFIG, moe=preset("tiny").moe, num_nextn_predict_layers=2)


@cache
def mtp_model():
    return abstract_weights(MTP)[0], jax.jit(lambda: split(Decoder(MTP, rngs=nnx.Rngs(0)))[1])()


def with_gradient(loss):
    """The loss of a batch of EXAMPLES, what else it returns, and the gradient by path; further arguments are passed."""
    graphdef, weights = mtp_model()
    params, rest = nnx.split_state(weights, nnx.Param, ...)
    of = lambda params, *args: loss(nnx.merge(graphdef, params, rest), *args)
    compiled = jax.jit(jax.value_and_grad(of, has_aux=True))

    def run(*args):
        (loss, aux), gradient = compiled(params, jax.tree.map(jnp.asarray, sft_batch(EXAMPLES, width=6)), *args)
        return float(loss), aux, {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}

    return run


SAMPLES = 4.0  # of a batch of which EXAMPLES are a part
WHOLE = BatchTotals(jnp.float32(SAMPLES), jnp.float32(7))


@cache
def mtp_run():
    """By weight: loss, metrics and gradient; one compilation serves every weight but none at all."""
    objective = lambda model, batch, weight: sft_mtp_objective(model, batch, WHOLE, mtp_weight=weight)[:2]
    return with_gradient(objective)


def direct_mtp(model, batch):
    """Each module's log-probs of the tokens that it can predict, from its logits, and their number by example."""
    hidden = model(batch.tokens_BT)
    found = []
    for depth, draft in enumerate(model.draft(hidden.x_BTD, batch.targets_BT), 1):
        logp = jax.nn.log_softmax(model.logits(draft.x_BTD))
        rows = []
        for row, (prompt, completion) in enumerate(EXAMPLES):
            text = np.array([*prompt, *completion])
            places = np.arange(max(len(prompt), depth + 1), len(text))  # of the tokens to predict
            rows.append(logp[row, places - depth - 1, text[places]])
        found.append(rows)
    return found


def direct_loss(model, batch, weight):
    """Equations 24 and 25 with an example's completion for the sequence."""
    drafts = direct_mtp(model, batch)
    lengths = [len(completion) for _, completion in EXAMPLES]
    modules = [-sum(jnp.sum(row) / n for row, n in zip(rows, lengths, strict=True)) for rows in drafts]
    return sft_objective(model, batch, WHOLE)[0] + weight / len(modules) * sum(modules) / SAMPLES, drafts


def test_mtp_loss_equals_a_direct_computation_from_the_drafts():
    """A prompt of one token keeps the modules from its completion's first tokens, which count in the divisor still."""
    loss, metrics, gradient = mtp_run()(0.3)
    wanted, drafts, wanted_gradient = with_gradient(direct_loss)(0.3)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for path, wanted in wanted_gradient.items():
        np.testing.assert_allclose(gradient[path], wanted, rtol=0, atol=2e-6, err_msg=str(path))
    assert [[row.size for row in rows] for rows in drafts] == [[3, 0, 2], [2, 0, 2]]
    nll = [-np.concatenate(rows) for rows in drafts]
    metrics = values(metrics)
    assert metrics["mtp/nll_1"] == pytest.approx(nll[0].mean(), rel=1e-5)
    assert metrics["mtp/nll_2"] == pytest.approx(nll[1].mean(), rel=1e-5)
    assert metrics["mtp/nll"] == pytest.approx(np.concatenate(nll).mean(), rel=1e-5)


def test_mtp_loss_is_linear_in_its_weight_and_reaches_every_part_of_the_model():
    """Main layers through their states, embedding and head because they are shared."""
    plain = with_gradient(lambda model, batch: make_sft_objective()(model, batch, WHOLE)[:2])
    (none, metrics, without), (some, with_metrics, with_some), (more, _, with_more) = (
        run(*weight) for run, *weight in ((plain,), (mtp_run(), 0.3), (mtp_run(), 0.9))
    )
    assert more - none == pytest.approx(3 * (some - none), rel=1e-4) and some > none
    assert values(metrics).keys() == {"nll", "mean_token_accuracy", "tokens_per_example"}
    assert values(metrics)["nll"] == pytest.approx(values(with_metrics)["nll"], rel=1e-6)
    for path, gradient in without.items():
        share = with_some[path] - gradient
        np.testing.assert_allclose(with_more[path] - gradient, 3 * share, rtol=0, atol=5e-6, err_msg=str(path))
        assert np.abs(share).max() > 1e-4, path
        assert np.any(gradient) == (path[0] != "mtp"), path


def test_one_module_reports_one_figure():
    config = dataclasses.replace(MTP, num_nextn_predict_layers=1)
    metrics = jax.eval_shape(
        lambda batch: make_sft_objective(mtp_weight=0.1)(Decoder(config, rngs=nnx.Rngs(0)), batch, THREE)[1],
        jax.tree.map(jnp.asarray, sft_batch(EXAMPLES, width=6)),
    )
    assert metrics.keys() == {"nll", "mean_token_accuracy", "tokens_per_example", "mtp/nll"}


def test_without_a_weight_the_objective_is_the_plain_one():
    assert make_sft_objective() is sft_objective


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_bad_mtp_weight_is_refused(bad):
    with pytest.raises(ValueError, match=f"mtp_weight: got {bad}, wanted a finite number from 0"):
        make_sft_objective(mtp_weight=bad)


def test_an_mtp_weight_for_a_model_without_modules_is_refused():
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="mtp_weight: got 0.3 for a model without MTP modules"):
        make_sft_objective(mtp_weight=0.3)(model, sft_batch(EXAMPLES, width=6), THREE)
