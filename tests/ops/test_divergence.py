"""Divergences over the whole vocabulary against NumPy in float64: values, gradients, and what never exists at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops.divergence import Divergence, divergence_of_logits, token_divergences
from deepseek_jax.ops.logprobs import scores_of_logits
from tests.ops.test_logprobs import array_sizes

B, T, D, V = 2, 7, 6, 19
SETTINGS = [
    Divergence("forward"),
    Divergence("forward", 3.0),
    Divergence("reverse"),
    Divergence("reverse", 0.7, (0.25, 0.75)),
    Divergence("forward", 2.0, (0.6, 0.4)),
]


def log_softmax(logits):
    from_best = logits - logits.max(axis=-1, keepdims=True)
    return from_best - np.log(np.exp(from_best).sum(axis=-1, keepdims=True))


def twin(student, teachers, of: Divergence):
    """float64: sum over v of p (log p - log q), with the roles that the direction gives, temperature squared times."""
    log_q, total = log_softmax(student / of.temperature), 0.0
    for weight, teacher in zip(of.weights, teachers, strict=True):
        log_p = log_softmax(teacher / of.temperature)
        first, second = (log_p, log_q) if of.direction == "forward" else (log_q, log_p)
        total = total + weight * (np.exp(first) * (first - second)).sum(axis=-1)
    return of.temperature**2 * total


def twin_gradient(student, teachers, of: Divergence, step=1e-5):
    """By central differences, of the sum over positions."""
    found = np.zeros_like(student)
    for v in range(student.shape[-1]):
        moved = np.zeros_like(student)
        moved[..., v] = step
        found[..., v] = (twin(student + moved, teachers, of) - twin(student - moved, teachers, of)) / (2 * step)
    return found


def logits(seed, of: Divergence):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, V)) * 3, [rng.normal(size=(B, T, V)) * 3 for _ in of.weights]


@partial(jax.jit, static_argnums=2)
def ours(student, teachers, of):
    value = lambda student: (jnp.sum(found := divergence_of_logits(student, teachers, of)), found)
    gradient, found = jax.grad(value, has_aux=True)(student)
    return found, gradient


@given(seed=st.integers(0, 2**31), of=st.sampled_from(SETTINGS))
def test_value_and_gradient_are_those_of_float64(seed, of):
    student, teachers = logits(seed, of)
    value, gradient = ours(jnp.float32(student), [jnp.float32(teacher) for teacher in teachers], of)
    np.testing.assert_allclose(value, twin(student, teachers, of), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, twin_gradient(student, teachers, of), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("of", SETTINGS, ids=str)
def test_a_student_that_equals_its_teachers_has_loss_and_gradient_of_exactly_nothing(of):
    student, _ = logits(0, of)
    value, gradient = ours(jnp.float32(student), [jnp.float32(student)] * len(of.weights), of)
    assert not np.any(value) and not np.any(gradient)


def test_a_hot_gradient_is_that_of_matching_logits():
    """Hinton et al., equation 4: times the temperature's square it tends to the difference of centred logits / V."""
    of = Divergence("forward", 300.0)
    student, teachers = logits(1, of)
    centred = lambda x: x - x.mean(axis=-1, keepdims=True)
    _, gradient = ours(jnp.float32(student), [jnp.float32(teachers[0])], of)
    np.testing.assert_allclose(gradient, (centred(student) - centred(teachers[0])) / V, rtol=0.05, atol=3e-3)


def test_the_directions_are_told_apart_where_a_teacher_has_two_likely_tokens():
    """Forward asks for both, reverse is content with one of them: log 2 and about nothing beside a student of one."""
    teacher, student = np.array([9.0, 9.0, -9.0]), np.array([9.0, -3.0, -9.0])
    forward, reverse = (
        float(divergence_of_logits(jnp.float32(student), [jnp.float32(teacher)], Divergence(direction)))
        for direction in ("forward", "reverse")
    )
    assert reverse == pytest.approx(np.log(2), abs=1e-3)
    assert forward == pytest.approx(0.5 * 12 - np.log(2), abs=1e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_huge_logits_stay_finite(direction):
    far = jnp.float32([[1e4, 0.0, -1e4]])
    value, gradient = ours(far, [far[:, ::-1]], Divergence(direction))
    np.testing.assert_allclose(value, [2e4], rtol=1e-6)
    assert np.all(np.isfinite(gradient))


# --- from states, by chunks ------------------------------------------------------------------------


def states(seed, teachers=2):
    """A student's, and those of teachers of other widths."""
    rng = np.random.default_rng(seed)
    of = lambda width: (jnp.float32(rng.normal(size=(B, T, width))), jnp.float32(rng.normal(size=(width, V))))
    return of(D), [of(D + 3 * n) for n in range(1, teachers + 1)], jnp.asarray(rng.integers(0, V, (B, T)))


OF = Divergence("reverse", 1.5, (0.5, 0.5))


@partial(jax.jit, static_argnames="chunk")
def from_states(student, teachers, tokens, *, chunk):
    def loss(student, teachers):
        found = token_divergences(*student, teachers, tokens, OF, chunk=chunk)
        return jnp.sum(found[0] * jnp.arange(T)), found

    gradients, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(student, teachers)
    return found, gradients


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunks_are_what_whole_logits_give_and_no_gradient_reaches_a_teacher(chunk):
    student, teachers, tokens = states(0)
    (value, *scores), (gradient, of_teachers) = from_states(student, teachers, tokens, chunk=chunk)

    def direct(student):
        theirs = [hidden @ head for hidden, head in teachers]
        return jnp.sum(divergence_of_logits(student[0] @ student[1], theirs, OF) * jnp.arange(T))

    own = np.float64(student[0]) @ np.float64(student[1])
    wanted = twin(own, [np.float64(hidden) @ np.float64(head) for hidden, head in teachers], OF)
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    for found, of in zip(scores, scores_of_logits(jnp.float32(own), tokens), strict=True):
        np.testing.assert_allclose(found, of, rtol=1e-4, atol=1e-4)
    for found, of in zip(gradient, jax.grad(direct)(student), strict=True):
        np.testing.assert_allclose(found, of, rtol=1e-4, atol=1e-4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teachers))


@pytest.mark.parametrize("chunk", [4, 16])
def test_neither_models_logits_of_a_whole_batch_ever_exist(chunk):
    student = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000))
    given = [student, (jnp.zeros((2, 64, 8)), jnp.zeros((8, 1000)))], jnp.zeros((2, 64), jnp.int32)

    def largest(chunk):
        loss = lambda hidden, head: jnp.sum(token_divergences(hidden, head, *given, OF, chunk=chunk)[0])
        return max(array_sizes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*student).jaxpr))

    assert largest(chunk) == 2 * chunk * 1000
    assert largest(64) == 2 * 64 * 1000  # the measure does see them where they do exist
