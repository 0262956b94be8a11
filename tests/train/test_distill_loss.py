"""Distillation by logits on models: against NumPy, dtypes, layouts, packing, adapters, and what it learns."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model, lay_out
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.ops.divergence import Divergence
from deepseek_jax.ops.metrics import values
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from deepseek_jax.train.distill_loss import DistillConfig, make_distill_objective
from deepseek_jax.train.sft import SFTTrainer
from deepseek_jax.train.sft_config import SFTConfig
from deepseek_jax.train.sft_loss import SFTBatch
from deepseek_jax.train.sft_loss import lay_out as one_a_row
from deepseek_jax.train.step import StepConfig, init_state, make_train_step
from tests.checkpoint.folders import LLAMA_TIED
from tests.laws import fixture_of
from tests.ops.test_divergence import twin
from tests.test_sharded_steps import GQA, MLA, same
from tests.train.test_sft import CONFIG, ROUTED, SETTINGS, WIDTH, flat, rows

SGD = optax.sgd(1.0)
WIDER = dataclasses.replace(ROUTED, vocab_size=CONFIG.vocab_size + 8)  # whose last columns belong to no token
LLAMA = dataclasses.replace(LLAMA_TIED, num_hidden_layers=1, initializer_range=0.2)
FORWARD, REVERSE = Divergence("forward", 3.0), Divergence("reverse", 1.0, (0.25, 0.75))


@cache
def model(config: ModelConfig, seed: int = 0) -> Model:
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(seed)))[1])()
    return Model(config, abstract_weights(config)[0], weights)


def batch() -> SFTBatch:
    return one_a_row(rows()[:4], width=WIDTH)


@cache
def stepped(student: ModelConfig, teachers: tuple[ModelConfig, ...], of: Divergence, **settings):
    """The gradient, which one step of plain descent is, and the metrics; teachers are of other seeds."""
    theirs = [model(config, seed + 1) for seed, config in enumerate(teachers)]
    return step_of(model(student), theirs, of, **settings)


def step_of(own: Model, theirs: list[Model], of: Divergence, hard_share: float = 0.0, **settings):
    objective = make_distill_objective([each.graphdef for each in theirs], of, hard_share=hard_share)
    update = make_train_step(own.graphdef, objective, SGD, StepConfig(**settings))
    before = flat(own.weights)
    state, metrics = update(init_state(own.weights, SGD), batch(), tuple(each.weights for each in theirs))
    return {path: before[path] - after for path, after in flat(state.weights).items()}, values(metrics)


def logits_of(of: Model) -> np.ndarray:
    decoder = nnx.merge(of.graphdef, of.weights)
    return np.asarray(decoder.logits(decoder(jnp.asarray(batch().tokens_BT)).x_BTD), np.float64)


KINDS = {
    "an MLA teacher and a Qwen2 student": (CONFIG, (WIDER,), FORWARD),
    "two teachers of a Llama": (LLAMA, (CONFIG, WIDER), REVERSE),
    "a dense teacher of an MLA student": (ROUTED, (CONFIG,), Divergence("reverse", 1.5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_divergence_of_the_models_logits(kind):
    student, teachers, of = KINDS[kind]
    gradient, metrics = stepped(student, teachers, of)
    shared = min(config.vocab_size for config in (student, *teachers))
    theirs = [logits_of(model(config, seed + 1))[..., :shared] for seed, config in enumerate(teachers)]
    apart = twin(logits_of(model(student))[..., :shared], theirs, of)[batch().mask_BT]
    assert metrics["loss"] == pytest.approx(apart.mean(), rel=2e-4)
    assert metrics["kl"] == pytest.approx(apart.mean() / of.temperature**2, rel=2e-4)
    assert any(np.any(value) for value in gradient.values())


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    for of in (FORWARD, Divergence("reverse")):
        gradient, metrics = step_of(model(CONFIG), [model(CONFIG)], of)
        assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["kl"] == 0
        assert not any(np.any(value) for value in gradient.values())


def test_a_hard_share_adds_the_cross_entropy_of_the_tokens():
    _, soft = stepped(CONFIG, (WIDER,), FORWARD)
    _, mixed = step_of(model(CONFIG), [model(WIDER, 1)], FORWARD, hard_share=0.25)
    assert mixed["loss"] == pytest.approx(0.75 * soft["loss"] + 0.25 * soft["nll"], rel=1e-5)


def test_bfloat16_beside_float32():
    gradient, single = stepped(CONFIG, (ROUTED,), FORWARD)
    half, metrics = stepped(CONFIG, (ROUTED,), FORWARD, dtype="bfloat16")
    assert metrics["kl"] == pytest.approx(single["kl"], rel=0.02) and metrics["kl"] != single["kl"]
    joined = lambda parts: np.concatenate([parts[path].ravel() for path in sorted(parts, key=str)])
    one, other = joined(gradient), joined(half)
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.995


def test_scanned_layers_give_what_unrolled_ones_do():
    deep, layout = dataclasses.replace(CONFIG, num_hidden_layers=2), Layout(scan_layers=True)
    own, theirs = model(deep), model(deep, 1)
    _, wanted = step_of(own, [theirs], FORWARD)
    _, found = step_of(lay_out(own, layout), [lay_out(theirs, layout)], FORWARD)
    for name in ("loss", "kl", "nll", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


def trainer(of: Divergence = FORWARD, **settings) -> SFTTrainer:
    teacher = model(ROUTED, 1)
    objective = make_distill_objective([teacher.graphdef], of)
    config = SFTConfig(**{**SETTINGS, **settings})
    return SFTTrainer(config, model(CONFIG), steps=6, width=WIDTH, objective=objective, given=((teacher.weights,),))


@pytest.mark.parametrize("settings", [{"pack": True, "micro_batches": 2}, {"loss_mean": "tokens", "micro_batches": 4}])
def test_packing_and_micro_batches_change_nothing_but_rounding(settings):
    _, wanted = trainer().step(trainer().first_state(), rows()[:8], 0)
    other = trainer(**settings)
    _, found = other.step(other.first_state(), rows()[:8], 0)
    for name in ("loss", "kl", "nll", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["weights", "adapter"])
def test_a_student_comes_nearer_to_its_teacher_on_held_out_rows(settings):
    made = trainer(**settings, lr=2e-2)
    before, state = made.evaluate_first(rows()[:3]), made.first_state()
    for number in range(6):
        state, metrics = made.step(state, rows()[3:11], number)
    after = made.evaluate(state, rows()[:3])
    assert metrics["kl"] < 0.8 * made.step(made.first_state(), rows()[3:11], 0)[1]["kl"]
    assert before["eval/kl"] > 0 and after.keys() == {"eval/loss", "eval/mean_token_accuracy", "eval/kl"}


BAD = {
    "temperature: got it for text alone": {"temperature": 3.0},
    "temperature: got 0, wanted a finite": {"temperature": 0, "loss": "forward-kl"},
    "hard_share: got 1 with forward-kl": {"hard_share": 1, "loss": "forward-kl"},
    "hard_share: got 0.5 with reverse-kl": {"hard_share": 0.5, "loss": "reverse-kl"},
    "teacher_weights: got .1.0, -1.0., wanted finite": {"teacher_weights": (1.0, -1.0)},
}


@pytest.mark.parametrize("says", BAD)
def test_settings_that_cannot_work_are_refused(says):
    with pytest.raises(ValueError, match=says):
        DistillConfig(**BAD[says])


def test_weights_of_teachers_sum_to_one_and_temperatures_are_the_losses_own():
    assert DistillConfig(loss="forward-kl").divergence(1) == Divergence("forward", 3.0, (1.0,))
    of = DistillConfig(loss="reverse-kl", teacher_weights=(1.0, 3.0))
    assert of.divergence(2) == Divergence("reverse", 1.0, (0.25, 0.75))
    with pytest.raises(ValueError, match="teacher_weights: got 2 for 3 teachers"):
        of.divergence(3)


# --- on meshes, in a process of its own that has the devices ----------------------------------------

MESHES = {
    "gqa": (GQA, {"fsdp": 2, "context": 2, "tensor": 2}, {"scan_layers": True, "remat": "layers"}),
    "mla": (MLA, {"data": 2, "expert": 2, "tensor": 2}, {}),
}


def a_step_on_a_mesh_is_that_of_one_device():
    """Loss, metrics and gradient of two students, the vocabulary cut, with a teacher of routed experts."""
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    given = SFTBatch(tokens[:, :-1], tokens[:, 1:], np.arange(16) < np.arange(4, 12)[:, None])
    theirs = model(MLA, 1)
    for kind, (config, sizes, further) in MESHES.items():
        own, found = model(config), []
        for layout in (LOCAL, Layout(mesh=make_mesh(**sizes), **further)):
            student, teacher = lay_out(own, layout), lay_out(theirs, layout)
            objective = make_distill_objective([teacher.graphdef], FORWARD, hard_share=0.1)
            update = make_train_step(student.graphdef, objective, SGD, StepConfig(micro_batches=1))
            _, metrics = update(init_state(student.weights, SGD, layout), layout.put(given), (teacher.weights,))
            found.append(values(metrics))
        assert found[0].keys() == found[1].keys()
        for name, wanted in found[0].items():
            same(found[1][name], wanted, f"{kind} {name}", 5e-5)


found = fixture_of([a_step_on_a_mesh_is_that_of_one_device])


@pytest.mark.slow
def test_eight_devices_give_what_one_does(found):
    assert found == {"a_step_on_a_mesh_is_that_of_one_device": ""}
