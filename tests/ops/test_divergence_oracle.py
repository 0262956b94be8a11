"""The divergences are torch's kl_div and those of TRL's trainer of distillation, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.divergence import Divergence, divergence_of_logits

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(0)
STUDENT, TEACHER, SECOND = RNG.normal(size=(3, 2, 5, 11)) * 3
MASK = RNG.random((2, 5)) < 0.7


def ours(of: Divergence, *teachers: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over what counts, and its gradient in the student's logits."""
    theirs = [jnp.float32(teacher) for teacher in teachers]

    def loss(student):
        return jnp.sum(jnp.where(MASK, divergence_of_logits(student, theirs, of), 0)) / MASK.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.float32(STUDENT))
    return float(value), np.asarray(gradient)


def of_torch(loss) -> tuple[float, np.ndarray]:
    import torch

    student = torch.tensor(STUDENT, requires_grad=True)
    value = loss(student)
    value.backward()
    return value.item(), student.grad.numpy()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_div_of_torch(direction, temperature):
    import torch
    import torch.nn.functional as F

    def loss(student):
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(torch.tensor(TEACHER) / temperature, dim=-1)
        pair = (log_q, log_p) if direction == "forward" else (log_p, log_q)
        kl = F.kl_div(*pair, reduction="none", log_target=True).sum(dim=-1)
        return temperature**2 * kl[torch.tensor(MASK)].mean()

    (value, gradient), (wanted, of_theirs) = ours(Divergence(direction, temperature), TEACHER), of_torch(loss)
    assert value == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, of_theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("direction", "beta"), [("forward", 0), ("reverse", 1)])
def test_trls_generalized_divergence_has_no_square_of_the_temperature(direction, beta, temperature):
    """Its means over tokens is ours but for the square, which Hinton et al. ask for."""
    import torch

    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs the oracle extra with trl")
    labels = torch.tensor(np.where(MASK, 0, -100))

    def loss(student):
        given = {"beta": beta, "temperature": temperature, "reduction": "batchmean"}
        return gkd.GKDTrainer.generalized_jsd_loss(student, torch.tensor(TEACHER), labels, **given)

    (value, gradient), (wanted, of_theirs) = ours(Divergence(direction, temperature), TEACHER), of_torch(loss)
    assert value == pytest.approx(temperature**2 * wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, temperature**2 * of_theirs, rtol=1e-4, atol=1e-6)


def test_several_teachers_are_the_weighted_sum():
    import torch
    import torch.nn.functional as F

    def loss(student):
        log_q, total = F.log_softmax(student, dim=-1), 0.0
        for weight, teacher in ((0.3, TEACHER), (0.7, SECOND)):
            log_p = F.log_softmax(torch.tensor(teacher), dim=-1)
            total = total + weight * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
        return total[torch.tensor(MASK)].mean()

    value, gradient = ours(Divergence("reverse", 1.0, (0.3, 0.7)), TEACHER, SECOND)
    wanted, of_theirs = of_torch(loss)
    assert value == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, of_theirs, rtol=1e-4, atol=1e-6)
