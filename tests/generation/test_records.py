"""What generation writes down for a trainer: the experts of every token, and the tokens that it was drawn from."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.generation.completion import Completion, Record
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.ops.logprobs import has_bits, to_bits, token_logprobs
from tests.generation.test_generator import DENSE, MOE, PROMPTS, V, built

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOTH = Record(routes=True, support=True)
FILTERED = SamplingConfig(max_new_tokens=8, temperature=0.8, top_p=0.8, top_k=9, stop_ids=(3, 11))
SEEDS = list(range(20, 28))


def generated(record: Record, sampling: SamplingConfig = FILTERED, config=MOE) -> list[Completion]:
    subject = built(config)
    return subject.generator(subject.weights, PROMPTS, sampling, seeds=SEEDS, samples=2, record=record)


@pytest.fixture(scope="module")
def recorded() -> list[Completion]:
    return generated(BOTH)


@pytest.fixture(scope="module")
def plain() -> list[Completion]:
    return generated(Record())


def prompt_of(row: int) -> list[int]:
    return PROMPTS[row // 2]


def tokens_in(words: np.ndarray) -> list[set[int]]:
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def test_recording_changes_no_token(recorded, plain):
    assert [c.tokens.tolist() for c in recorded] == [c.tokens.tolist() for c in plain]
    assert [c.finished for c in recorded] == [c.finished for c in plain]
    assert len({len(c.tokens) for c in plain}) > 1  # some stopped before others
    assert all(c.routes is None and c.support is None for c in plain)


def test_routes_are_those_of_a_full_pass(recorded):
    """Of prompt and completion but the last token, for which nothing was computed."""
    subject = built(MOE)
    tokens, mask = np.zeros((8, 16), np.int32), np.zeros((8, 16), bool)
    for row, completion in enumerate(recorded):
        fed = [*prompt_of(row), *completion.tokens][:-1]
        tokens[row, : len(fed)], mask[row, : len(fed)] = fed, True
    found = np.asarray(subject.scored(subject.weights, tokens, tokens, mask, temperature=1.0).experts_BTLA)
    for row, completion in enumerate(recorded):
        assert completion.routes.dtype == np.int16
        np.testing.assert_array_equal(np.sort(completion.routes), np.sort(found[row, mask[row]]))
    assert len(np.unique(found[mask])) > 3


def test_the_support_is_what_top_k_and_top_p_leave(recorded):
    subject = built(MOE)
    sizes = set()
    for row, completion in enumerate(recorded):
        text = list(prompt_of(row))
        assert completion.support.shape == (len(completion.tokens), 1) and completion.support.dtype == np.uint32
        for token, kept in zip(completion.tokens.tolist(), tokens_in(completion.support), strict=True):
            logits = subject.logits(text) / FILTERED.temperature
            best = np.argsort(-logits)[: FILTERED.top_k]
            p = np.exp(logits[best]) / np.exp(logits[best]).sum()
            wanted = best[: int(np.sum(np.cumsum(p) - p < FILTERED.top_p))]
            assert kept == set(wanted.tolist()) and token in kept
            sizes.add(len(kept))
            text.append(token)
    assert len(sizes) > 3


def test_logprobs_beside_a_support_are_of_the_draw(recorded, plain):
    """And without one those before the filters."""
    subject, largest = built(MOE), 0.0
    for row, (completion, other) in enumerate(zip(recorded, plain, strict=True)):
        text, kept = list(prompt_of(row)), tokens_in(completion.support)
        for place, token in enumerate(completion.tokens.tolist()):
            logits = subject.logits(text) / FILTERED.temperature
            within = logits[sorted(kept[place])]
            wanted = [logits[token] - np.log(np.exp(of).sum()) for of in (within, logits)]
            assert [completion.logprobs[place], other.logprobs[place]] == pytest.approx(wanted, abs=1e-5)
            largest = max(largest, wanted[0] - wanted[1])
            text.append(token)
    assert largest > 0.1


def test_without_filters_the_support_is_the_vocabulary():
    sampling = SamplingConfig(max_new_tokens=3)
    plain = generated(Record(), sampling, DENSE)
    for completion, other in zip(generated(Record(support=True), sampling, DENSE), plain, strict=True):
        np.testing.assert_array_equal(completion.support, np.full((3, 1), 2**V - 1, np.uint32))
        np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=1e-6)
        assert completion.routes is None


@pytest.mark.parametrize(
    ("record", "sampling", "config", "message"),
    [
        (Record(support=True), {"temperature": 0.0}, MOE, "support beside temperature 0"),
        (Record(routes=True), {}, DENSE, "routes for a model without experts"),
    ],
)
def test_a_record_of_nothing_is_refused(record, sampling, config, message):
    with pytest.raises(ValueError, match=f"^record: got {message}"):
        generated(record, SamplingConfig(max_new_tokens=2, **sampling), config)


def test_texts_come_with_their_records(recorded):
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    subject = built(MOE)
    given = {"seeds": SEEDS, "samples": 2, "record": BOTH, "tokenizer": Letters()}
    found = subject.generator(subject.weights, PROMPTS, FILTERED, **given)
    for text, completion in zip(found, recorded, strict=True):
        assert text.text == Letters().decode(completion.tokens)
        jax.tree.map(np.testing.assert_array_equal, text._replace(text=None), completion)


# --- supports as bits ----------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), size=st.integers(1, 130))
def test_bits_are_numpys(seed, size):
    support = np.random.default_rng(seed).random((2, 3, size)) < 0.5
    words = np.asarray(to_bits(jnp.asarray(support)))
    assert words.shape == (2, 3, -(-size // 32)) and words.dtype == np.uint32
    back = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(back[..., :size], support)
    assert not back[..., size:].any()


part = jax.jit(has_bits, static_argnames="count")


@pytest.mark.parametrize(("size", "parts"), [(130, 2), (96, 3), (64, 1), (60, 4), (7, 7)])
def test_parts_of_the_vocabulary_find_their_bits(size, parts):
    """Wherever a part begins inside a word."""
    support = np.random.default_rng(size).random((2, size)) < 0.5
    words, count = to_bits(jnp.asarray(support)), size // parts
    for first in range(0, size, count):
        np.testing.assert_array_equal(part(words, jnp.int32(first), count), support[:, first : first + count])


@pytest.mark.parametrize("chunk", [3, 128])
def test_logprobs_within_a_support_equal_numpy(chunk):
    """Values and gradients, of chunks that divide nothing and of the whole."""
    rng = np.random.default_rng(0)
    B, T, D, size, temperature = 2, 7, 5, 37, 0.7
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, size))
    support, tokens = rng.random((B, T, size)) < 0.3, rng.integers(0, size, (B, T))
    np.put_along_axis(support, tokens[..., None], True, axis=-1)
    support[0, 0] = np.arange(size) == tokens[0, 0]  # one token alone
    seeds = rng.normal(size=(2, B, T))

    @partial(jax.jit, static_argnames="chunk")
    def ours(hidden, head, words, chunk):
        def weighted(hidden, head):
            found = token_logprobs(
                hidden, head, jnp.asarray(tokens), temperature=temperature, support=words, chunk=chunk
            )[:2]
            return sum(jnp.sum(s * f) for s, f in zip(jnp.asarray(seeds, jnp.float32), found, strict=True)), found

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, head)

    single = [jnp.asarray(a, jnp.float32) for a in (hidden, head)]
    (d_hidden, d_head), (logp, entropy) = ours(*single, to_bits(jnp.asarray(support)), chunk=chunk)
    p = np.where(support, np.exp(hidden @ head / temperature), 0)
    p /= p.sum(axis=-1, keepdims=True)
    log_p = np.log(np.where(support, p, 1))
    wanted_entropy = -(p * log_p).sum(axis=-1)
    np.testing.assert_allclose(logp, np.take_along_axis(log_p, tokens[..., None], -1)[..., 0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, wanted_entropy, rtol=1e-4, atol=2e-5)
    d_logits = seeds[0][..., None] * (np.eye(size)[tokens] - p) - seeds[1][..., None] * p * (
        log_p + wanted_entropy[..., None]
    )
    np.testing.assert_allclose(d_hidden, d_logits @ head.T / temperature, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_head, np.einsum("btd,btv->dv", hidden, d_logits) / temperature, rtol=1e-4, atol=2e-4)


def test_a_support_of_nothing_stays_finite():
    """As in the columns of a batch where nothing was drawn and nobody wrote a support."""
    ones = jnp.ones((1, 2, 3))
    loss = lambda hidden: sum(
        jnp.sum(of)
        for of in token_logprobs(
            hidden, jnp.ones((3, 40)), jnp.zeros((1, 2), int), support=jnp.zeros((1, 2, 2), jnp.uint32)
        )
    )
    value, gradient = jax.value_and_grad(loss)(ones)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
