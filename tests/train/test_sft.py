"""The SFT stage: masters, micro-batches, packing, adapters, precision, and runs that were broken off."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model, lay_out
from deepseek_jax.config import preset
from deepseek_jax.data.prompts import batches
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from deepseek_jax.text.turns import MaskedTokens
from deepseek_jax.train.sft import SFTTrainer, run_sft
from deepseek_jax.train.sft_config import SFTConfig
from tests.checkpoint.folders import QWEN2
from tests.laws import found_of
from tests.test_sharded_steps import GQA

CONFIG = dataclasses.replace(QWEN2, num_hidden_layers=1, initializer_range=0.2)
ROUTED = dataclasses.replace(
    preset("tiny"),
    vocab_size=CONFIG.vocab_size,
    num_hidden_layers=1,
    moe=dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0),
)
WIDTH, STEPS = 16, 6
SETTINGS = {"batch_size": 8, "lr": 1e-2, "dtype": "float32", "weight_decay": 0.0}


@cache
def rows(count: int = 16) -> tuple[MaskedTokens, ...]:
    rng = np.random.default_rng(0)
    found = []
    for length in rng.integers(4, WIDTH + 1, count):
        tokens = rng.integers(0, CONFIG.vocab_size, length).astype(np.int32)
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, True
        found.append(MaskedTokens(tokens, mask))
    return tuple(found)


@cache
def model(config=CONFIG) -> Model:
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    return Model(config, abstract_weights(config)[0], weights)


def trainer(config=CONFIG, **settings) -> SFTTrainer:
    return SFTTrainer(SFTConfig(**{**SETTINGS, **settings}), model(config), steps=STEPS, width=WIDTH)


def flat(state) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...], np.float32) for path, leaf in nnx.to_flat_state(state)}


@cache
def stepped(steps: int = 1, config=CONFIG, **settings):
    """Weights and metrics of the last of some steps on the same rows in order."""
    made = trainer(config, **settings)
    state, losses = made.first_state(), []
    for number in range(steps):
        size = made.config.batch_size
        state, values = made.step(state, rows()[number % 2 * size :][:size], number)
        losses.append(values["loss"])
    return flat(state.weights), values, losses


def assert_close(found, wanted, atol):
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=atol, err_msg=str(path))


PACK, PARTS, BOTH = {"pack": True}, {"micro_batches": 4}, {"pack": True, "micro_batches": 2}


@pytest.mark.parametrize(
    ("settings", "loss_mean"),
    [
        (PACK, "tokens"),
        (PARTS, "examples"),
        (BOTH, "examples"),
        # what the three above hold together
        pytest.param(PACK, "examples", marks=pytest.mark.slow),
        pytest.param(PARTS, "tokens", marks=pytest.mark.slow),
        pytest.param(BOTH, "tokens", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packing_and_micro_batches_change_nothing_but_rounding(settings, loss_mean):
    wanted, values, _ = stepped(loss_mean=loss_mean)
    found, other, _ = stepped(loss_mean=loss_mean, **settings)
    for name in ("loss", "nll", "mean_token_accuracy", "grad_norm", "tokens_per_example"):
        assert other[name] == pytest.approx(values[name], rel=1e-5), name
    assert_close(found, wanted, 2e-3 * SETTINGS["lr"] * 50)  # Adam's first step is the gradient's sign
    assert other["rows"] <= values["rows"] == 8


def test_the_two_means_differ_as_they_should():
    """Over tokens the loss is the mean of what counts; over examples each row has the same weight."""
    _, of_tokens, _ = stepped()
    _, of_examples, _ = stepped(loss_mean="examples")
    assert of_tokens["loss"] == pytest.approx(of_tokens["nll"], rel=1e-6)
    assert of_examples["nll"] == pytest.approx(of_tokens["nll"], rel=1e-6)
    assert abs(of_examples["loss"] - of_examples["nll"]) > 1e-3


def test_it_learns_and_the_held_out_loss_is_that_of_the_same_weights():
    made = trainer()
    before = made.evaluate_first(rows(16)[:8])
    _, values, losses = stepped(STEPS)
    assert losses[0] == pytest.approx(before["eval/loss"], rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert values["learning_rate"] < 1e-2 and values["tokens_per_second"] > 0
    # parts of three rows, the last one filled up, and packed ones
    for settings in ({"batch_size": 3}, {"pack": True, "batch_size": 8}):
        other = trainer(**settings).evaluate_first(rows(16)[:8])
        assert other == pytest.approx(before, rel=1e-5)


def test_bfloat16_beside_float32_over_some_steps():
    """Masters are float32 in both, so that the losses stay within a bfloat16's rounding of each other."""
    _, _, single = stepped(STEPS)
    weights, _, half = stepped(STEPS, dtype="bfloat16")
    np.testing.assert_allclose(half, single, rtol=0.02)
    assert half != single
    rounded = [np.any(np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32) != w) for w in weights.values()]
    assert all(rounded)


def test_an_adapter_is_trained_beside_weights_that_stay():
    made = SFTTrainer(SFTConfig(**SETTINGS, lora_rank=2), model(), steps=STEPS, width=WIDTH, donate=True)
    before = made.evaluate_first(rows()[:8])
    state = made.first_state()
    assert made.evaluate(state, rows()[:8]) == pytest.approx(before, rel=1e-6)  # a new adapter changes nothing
    for number in range(3):
        state, values = made.step(state, rows()[:8], number)
    after = made.evaluate(state, rows()[:8])
    assert after["eval/loss"] < before["eval/loss"] - 0.05
    assert {path[-1] for path in flat(state.weights)} == {"a", "b"}
    merged, base = flat(made.trained(state)), flat(model().weights)
    changed = {path for path in base if not np.array_equal(merged[path], base[path])}
    assert changed and all("embed" not in path for path in changed)


def test_the_modules_for_multi_token_prediction_learn_where_there_are_some():
    config = dataclasses.replace(ROUTED, num_nextn_predict_layers=1)
    start = flat(model(config).weights)
    found, values, _ = stepped(1, config)
    moved = {path[0] for path, value in found.items() if not np.array_equal(value, start[path])}
    assert "mtp" in moved and "mtp/nll" in values
    assert values["loss"] == pytest.approx(values["nll"] + 0.1 * values["mtp/nll"], rel=0.2)
    found, values, _ = stepped(1, config, mtp_weight=0.0)
    assert all(np.array_equal(value, start[path]) for path, value in found.items() if path[0] == "mtp")
    assert "mtp/nll" not in values
    assert SFTConfig(lora_rank=2).mtp_weight_of(config) == 0 == SFTConfig().mtp_weight_of(CONFIG)


BAD = {
    "batch_size: got 0": {"batch_size": 0},
    "micro_batches 3 does not divide the 128 rows": {"micro_batches": 3},
    "epochs: got nan": {"epochs": math.nan},
    "steps: got 0": {"steps": 0},
    "loss_mean: got 'rows', wanted one of tokens, examples": {"loss_mean": "rows"},
    "lora_rank: got -1": {"lora_rank": -1},
    "mtp_weight: got -1": {"mtp_weight": -1},
    "learning_rate: got 0": {"lr": 0},
}


@pytest.mark.parametrize("says", BAD)
def test_settings_that_cannot_work_are_refused(says):
    with pytest.raises(ValueError, match=says):
        SFTConfig(**BAD[says])


def test_steps_are_those_of_the_epochs():
    config = SFTConfig(batch_size=8, epochs=1.5)
    assert [config.steps_of(rows) for rows in (8, 16, 17)] == [2, 3, 4]
    assert dataclasses.replace(config, steps=7).steps_of(8) == 7
    with pytest.raises(ValueError, match="batch_size: got 8, wanted at most 7, the rows to learn from"):
        config.steps_of(7)
    with pytest.raises(ValueError, match="profile_steps: got '2:3'"):
        dataclasses.replace(config, profile_steps="2:3").steps_of(8)
    with pytest.raises(ValueError, match="mtp_weight: got 0.1 for a model without MTP modules"):
        SFTTrainer(SFTConfig(mtp_weight=0.1), model(), steps=1, width=8)


class Killed(Exception):
    pass


def run(folder: Path, *, at: int | None = None):
    """The stage, killed before step `at`; its state and metrics."""
    made = trainer(pack=True, save_every=2, eval_every=3)
    step = made.step

    def dying(state, examples, number):
        if number == at:
            raise Killed
        return step(state, examples, number)

    made.step = dying
    with MetricLog(folder) as log:
        data = batches(rows(), size=8, seed=0)
        state = run_sft(made, data, folder=folder, log=log, held_out=rows()[:3])
    timed = ("time", "step_time", "tokens_per_second")
    return state, [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder)]


def test_a_stage_that_was_killed_ends_as_an_unbroken_one(tmp_path):
    wanted, metrics = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", at=3)
    state, found = run(tmp_path / "broken")
    assert found == metrics and [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert [row["step"] for row in metrics if "eval/loss" in row] == [3, 6]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# --- on a mesh, in a process of its own that has the devices ----------------------------------------


def packed_steps_on_a_mesh_are_those_of_one_device():
    """Loss, metrics and held-out loss over two updates of packed rows in micro-batches, with scanned layers."""
    settings = SFTConfig(**SETTINGS, pack=True, micro_batches=2)
    found = []
    for layout in (LOCAL, Layout(mesh=make_mesh(data=2, fsdp=2, tensor=2), scan_layers=True)):
        own = Model(GQA, abstract_weights(GQA)[0], split(Decoder(GQA, rngs=nnx.Rngs(0)))[1])
        made = SFTTrainer(settings, lay_out(own, layout), steps=2, width=WIDTH)
        state = made.first_state()
        values = [made.evaluate(state, rows()[:5])]
        for number in range(2):
            state, metrics = made.step(state, rows()[8 * number :][:8], number)
            values.append({name: metrics[name] for name in ("loss", "grad_norm", "mean_token_accuracy")})
        found.append([*values, made.evaluate(state, rows()[:5])])
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_eight_devices_give_what_one_does():
    assert found_of([packed_steps_on_a_mesh_are_those_of_one_device]) == {
        "packed_steps_on_a_mesh_are_those_of_one_device": ""
    }
