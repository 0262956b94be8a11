"""Log-probs by chunks against NumPy, and against the whole at once."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from deepseek_jax.ops.logprobs import logprobs_of_logits, token_logprobs

B, T, D, V = 3, 11, 8, 17


def inputs(seed):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return hidden, head, rng.integers(0, V, (B, T)), rng.normal(size=(2, B, T))


def twin(hidden, head, tokens, temperature):
    logits = hidden @ head / temperature
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]
    return np.log(chosen), -(p * np.log(p)).sum(axis=-1), p


def twin_gradient(hidden, head, tokens, temperature, seeds):
    """Of sum(seeds[0] * logp + seeds[1] * entropy): d logp = onehot - p, d entropy = -p (log p + entropy)."""
    _, entropy, p = twin(hidden, head, tokens, temperature)
    d_logits = seeds[0][..., None] * (np.eye(V)[tokens] - p)
    d_logits += seeds[1][..., None] * -p * (np.log(p) + entropy[..., None])
    d_logits /= temperature
    return d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits)


@partial(jax.jit, static_argnames=("temperature", "chunk"))
def ours(hidden, head, tokens, seeds, *, temperature, chunk):
    def weighted(hidden, head):
        found = token_logprobs(hidden, head, tokens, temperature=temperature, chunk=chunk)[:2]
        return sum(jnp.sum(s * f) for s, f in zip(seeds, found, strict=True)), found

    gradient, found = jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, head)
    return found, gradient


# 11 positions: one at a time, a chunk that divides nothing, exactly all, and more than there are.
@given(seed=st.integers(0, 2**31), setting=st.sampled_from([(1, 1.0), (4, 0.7), (4, 1.0), (11, 1.0), (128, 0.7)]))
def test_chunks_equal_numpy_value_and_gradient(seed, setting):
    chunk, temperature = setting
    hidden, head, tokens, seeds = inputs(seed)
    single = [jnp.asarray(a, jnp.float32) for a in (hidden, head)]
    (logp, entropy), (d_hidden, d_head) = ours(
        *single, jnp.asarray(tokens), jnp.asarray(seeds, jnp.float32), temperature=temperature, chunk=chunk
    )
    wanted_logp, wanted_entropy, _ = twin(hidden, head, tokens, temperature)
    np.testing.assert_allclose(logp, wanted_logp, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, wanted_entropy, rtol=1e-4, atol=2e-5)
    wanted_hidden, wanted_head = twin_gradient(hidden, head, tokens, temperature, seeds)
    np.testing.assert_allclose(d_hidden, wanted_hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_head, wanted_head, rtol=1e-4, atol=2e-4)


def test_chunks_change_nothing_but_rounding():
    hidden, head, tokens, seeds = (jnp.asarray(a) for a in inputs(0))
    whole = ours(hidden, head, tokens, seeds, temperature=0.7, chunk=128)
    parts = ours(hidden, head, tokens, seeds, temperature=0.7, chunk=4)
    for first, second in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_the_likeliest_tokens_logprob_has_no_gradient():
    hidden, head = jnp.ones((1, 1, 2)), jnp.asarray([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    of_likeliest = lambda hidden: token_logprobs(hidden, head, jnp.asarray([[2]]))[2].sum()
    np.testing.assert_array_equal(jax.grad(of_likeliest)(hidden), jnp.zeros_like(hidden))


def test_entropy_has_its_known_ends():
    logits = jnp.asarray([[0.0] * V, [100.0] + [0.0] * (V - 1)])
    logp, entropy = logprobs_of_logits(logits, jnp.asarray([3, 0]))
    np.testing.assert_allclose(entropy, [np.log(V), 0.0], atol=1e-5)
    np.testing.assert_allclose(logp, [-np.log(V), 0.0], atol=1e-6)


def test_large_logits_keep_what_a_sure_token_lacks():
    """Log-prob -5e-5 and entropy 5e-4 beside logits of 200, whose last place in float32 is worth 1.5e-5."""
    logits = np.array([200.0, 190.0, 185.0])
    p = np.exp(logits - 200) / np.exp(logits - 200).sum()
    logp, entropy = logprobs_of_logits(jnp.asarray(np.tile(logits, (3, 1)), jnp.float32), jnp.arange(3))
    np.testing.assert_allclose(logp, np.log(p), rtol=2e-3)  # log of 1 + 5e-5: its own last place is worth 1e-7
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=2e-3)


def test_huge_logits_stay_finite():
    logp, entropy = logprobs_of_logits(jnp.asarray([[1e4, 0.0, -1e4]]), jnp.asarray([0]))
    np.testing.assert_allclose(logp, [0.0], atol=1e-6)
    np.testing.assert_allclose(entropy, [0.0], atol=1e-3)


def array_sizes(jaxpr):
    """Sizes of every array in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def largest_array(chunk):
    hidden, head, tokens = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000)), jnp.zeros((2, 64), jnp.int32)
    loss = lambda hidden, head: sum(jnp.sum(x) for x in token_logprobs(hidden, head, tokens, chunk=chunk))
    return max(array_sizes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head).jaxpr))


@pytest.mark.parametrize("chunk", [8, 32])
def test_the_logits_of_a_whole_batch_never_exist(chunk):
    assert largest_array(chunk) == 2 * chunk * 1000
    assert largest_array(64) == 2 * 64 * 1000  # the measure does see them where they do exist


def compiled(chunk):
    """Value and gradient for 11 positions of 50 words."""
    hidden, head, tokens = jnp.zeros((1, 11, 4)), jnp.zeros((4, 50)), jnp.zeros((1, 11), jnp.int32)
    loss = lambda hidden, head: sum(jnp.sum(x) for x in token_logprobs(hidden, head, tokens, chunk=chunk))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()


def test_what_fits_at_once_is_not_computed_twice_and_chunks_are_of_equal_length():
    products = lambda text: len(re.findall(r" dot\(", text))
    assert products(compiled(11)) == products(compiled(128)) == 3
    in_two = compiled(8)
    assert products(in_two) == 4
    assert re.search(r"\[(1,)?6,50\]", in_two) and not re.search(r"\[(1,)?8,50\]", in_two)
