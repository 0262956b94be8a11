"""Generation against repeated full forward passes and against what a trainer scores."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import GQAConfig, MLAConfig, ModelConfig, RopeConfig, preset
from deepseek_jax.generation.generator import Generator, bucket
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.generation.text import seeds_for
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scoring import score

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT, V = 40, 24

MOE = dataclasses.replace(
    preset("tiny"),
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,  # far from uniform predictions
    attention=MLAConfig(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8),
)
DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    attention=GQAConfig(num_key_value_heads=2, head_dim=8, qkv_bias=True),
    rope=RopeConfig(theta=10000.0),
    moe=None,
    initializer_range=0.3,
)
PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 8, 3, 2, 20], [6]]


class Subject:
    """A model, its generator, and its logits by a full forward pass without any cache."""

    def __init__(self, config: ModelConfig):
        self.graphdef, _ = abstract_weights(config)
        self.weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(3)))[1])()
        if config.moe is not None:
            self.weights.layers[1].mlp.bias = RouterBias(-0.3 * jnp.arange(8.0))
        self.generator = Generator(config, self.graphdef)
        self.forward = jax.jit(self._forward)
        self.scored = jax.jit(self._scored, static_argnames="temperature")

    def _forward(self, weights, tokens_BT):
        model = nnx.merge(self.graphdef, weights)
        return model.logits(model(tokens_BT).x_BTD)

    def _scored(self, weights, tokens, targets, mask, *, temperature):
        return score(nnx.merge(self.graphdef, weights), tokens, targets, mask, temperature=temperature)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the token that follows, float64."""
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self.forward(self.weights, padded), np.float64)[0, len(tokens) - 1]

    def __call__(self, prompts, *, seeds=None, samples=1, **sampling):
        seeds = range(len(prompts) * samples) if seeds is None else seeds
        settings = SamplingConfig(**{"max_new_tokens": 8, **sampling})
        return self.generator(self.weights, prompts, settings, seeds=list(seeds), samples=samples)


built = cache(Subject)  # what one test compiled serves the next


@pytest.fixture(scope="module", params=[MOE, DENSE], ids=["mla-moe", "gqa"])
def subject(request):
    return built(request.param)


@pytest.fixture(scope="module")
def moe():
    return built(MOE)


def penalised(logits, text, penalty):
    """Positive logits of the text's tokens divided, negative ones multiplied."""
    logits = logits.copy()
    for seen in set(text):
        logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
    return logits


def tokens_of(completions):
    return [c.tokens.tolist() for c in completions]


def test_greedy_generation_is_the_best_token_of_repeated_full_passes(subject):
    completions = subject(PROMPTS, temperature=0.0)
    seen = set()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        text = list(prompt)
        for token, logprob in zip(completion.tokens.tolist(), completion.logprobs, strict=True):
            logits = subject.logits(text)
            assert token == int(np.argmax(logits))
            assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            text.append(token)
        seen |= set(completion.tokens.tolist())
    assert len(seen) > 5  # or the test would show little


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_trainers(subject, temperature):
    completions = subject(PROMPTS, temperature=temperature)
    tokens, mask = np.zeros((4, 17), np.int32), np.zeros((4, 16), bool)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids = prompt + completion.tokens.tolist()
        tokens[row, : len(ids)] = ids
        mask[row, len(prompt) - 1 : len(ids) - 1] = True
    found = subject.scored(subject.weights, tokens[:, :-1], tokens[:, 1:], mask, temperature=temperature)
    sampled = np.concatenate([c.logprobs for c in completions])
    np.testing.assert_allclose(np.asarray(found.logprobs_BT)[mask], sampled, atol=1e-5)
    assert sampled.min() < -1  # not only sure tokens


FILTERS = [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 4, "top_p": 0.8}]


@pytest.mark.parametrize("filters", FILTERS)
def test_filtered_draws_stay_within_the_filters_and_their_logprobs_know_nothing_of_them(moe, filters):
    """A trainer scores the plain distribution: the log-probs are those before top-k, top-p and penalty."""
    for prompt, completion in zip(PROMPTS, moe(PROMPTS, **filters, repetition_penalty=1.4), strict=True):
        text = list(prompt)
        for token, logprob in zip(completion.tokens.tolist(), completion.logprobs, strict=True):
            logits = moe.logits(text)
            assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            logits = penalised(logits, text, 1.4)
            kept = np.sort(logits)[::-1][: filters.get("top_k", V)]
            p = np.exp(kept) / np.exp(kept).sum()
            better = p[kept > logits[token]]
            assert better.size < kept.size and better.sum() < filters.get("top_p", 1) + 1e-6
            text.append(token)


def test_top_k_1_is_greedy(moe):
    settings = dict(repetition_penalty=1.8)
    assert tokens_of(moe(PROMPTS, top_k=1, **settings)) == tokens_of(moe(PROMPTS, temperature=0.0, **settings))


def test_settings_compile_nothing_new(moe):
    """The engine's programs serve all settings in one bucket."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **of: compiled.append(event))
    count = lambda: sum("backend_compile" in event for event in compiled)
    moe(PROMPTS), moe(PROMPTS[:3])
    compiled.append("backend_compile of nothing, to see that they are counted")
    before = count()
    for temperature, top_p, top_k, penalty, stops in (
        (1.0, 0.9, 5, 1.1, ()),
        (0.6, 0.95, 0, 1.02, (2,)),
        (2.0, 1.0, 3, 2.0, (2, 3, 4)),
    ):
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty, stop_ids=stops)
        moe(PROMPTS, seeds=[9, 8, 7, 6], **sampling)
        moe([[4] * 9, [3], [2, 1]], max_new_tokens=5, **sampling)
    assert count() == before > 0


def test_a_completion_does_not_depend_on_the_batch_around_it(subject):
    together = subject(PROMPTS, seeds=[11, 12, 13, 14])
    assert tokens_of(subject(PROMPTS[::-1], seeds=[14, 13, 12, 11])) == tokens_of(together)[::-1]
    for other in ([5] * 9, [2]):
        _, _, third, _ = subject([other, other, PROMPTS[2], other], seeds=[1, 2, 13, 4])
        np.testing.assert_array_equal(third.tokens, together[2].tokens)
        np.testing.assert_allclose(third.logprobs, together[2].logprobs, atol=1e-5)


def test_a_completion_is_the_same_alone(moe):
    together = moe(PROMPTS, seeds=[11, 12, 13, 14])
    for prompt, seed, completion in zip(PROMPTS, (11, 12, 13, 14), together, strict=True):
        (alone,) = moe([prompt], seeds=[seed])
        np.testing.assert_array_equal(alone.tokens, completion.tokens)
        np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=1e-5)


def test_completions_end_with_their_own_context_and_padding_changes_nothing(moe):
    """Neighbours near the context's end put a short prompt into larger buckets and do not shorten its completion."""
    prompts = [PROMPTS[0], [3] * (CONTEXT - 3), [3], [3] * (CONTEXT - 1)]
    completions = moe(prompts, max_new_tokens=1000, temperature=0.0)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.tokens) == len(completion.logprobs) == CONTEXT - len(prompt)
        assert not completion.finished
        text = prompt + completion.tokens.tolist()
        assert text[-1] == int(np.argmax(moe.logits(text[:-1])))
    plain, *_ = moe(PROMPTS, temperature=0.0)
    np.testing.assert_array_equal(completions[0].tokens[:8], plain.tokens)
    np.testing.assert_allclose(completions[0].logprobs[:8], plain.logprobs, atol=1e-5)


def test_samples_equal_repeated_prompts(subject):
    several = subject(PROMPTS[:2], samples=2, seeds=range(50, 54))
    repeated = [p for p in PROMPTS[:2] for _ in range(2)]
    assert tokens_of(several) == tokens_of(subject(repeated, seeds=range(50, 54)))
    assert len({tuple(t) for t in tokens_of(several)}) == 4


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others(moe):
    first, second, third, _ = moe([PROMPTS[0]] * 4, seeds=[1, 1, 2, 3])
    assert first.tokens.tolist() == second.tokens.tolist() != third.tokens.tolist()
    assert tokens_of(moe(PROMPTS, seeds=[1, 2, 3, 4]))[0] == first.tokens.tolist()


def test_stop_ids_end_a_completion_and_belong_to_it(moe):
    free, *_ = moe(PROMPTS, temperature=0.0)
    stop = int(free.tokens[2])
    first = free.tokens.tolist().index(stop)
    stopped, *_ = moe(PROMPTS, temperature=0.0, stop_ids=(V + 5, stop))
    assert stopped.tokens.tolist() == free.tokens.tolist()[: first + 1]
    assert stopped.finished and not free.finished
    np.testing.assert_array_equal(stopped.logprobs, free.logprobs[: first + 1])


def test_a_stopped_completion_leaves_its_neighbours_alone(moe):
    free = moe(PROMPTS, temperature=0.0)
    stop = int(free[0].tokens[0])
    for before, after in zip(free, moe(PROMPTS, temperature=0.0, stop_ids=(stop,)), strict=True):
        tokens = before.tokens.tolist()
        wanted = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert after.tokens.tolist() == wanted and after.finished == (stop in tokens)


@pytest.mark.parametrize("limit", [1, 2, 7, 10])
def test_completions_have_exactly_max_new_tokens(moe, limit):
    assert {len(c.tokens) for c in moe(PROMPTS, max_new_tokens=limit, temperature=0.0)} == {limit}


def test_repetition_penalty_equals_a_greedy_twin(moe):
    """Every prompt and completion token is penalised before the best one is taken."""
    completions = moe(PROMPTS, temperature=0.0, repetition_penalty=1.8)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        text = list(prompt)
        for token in completion.tokens.tolist():
            assert token == int(np.argmax(penalised(moe.logits(text), text, 1.8)))
            text.append(token)
    assert tokens_of(completions) != tokens_of(moe(PROMPTS, temperature=0.0))


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([], [], "prompts: got none"),
        ([[1], []], [0, 0], "prompt 1: got 0 tokens"),
        ([[1] * CONTEXT], [0], f"prompt 0: got {CONTEXT} tokens, wanted 1 to {CONTEXT - 1}"),
        ([[1], [2]], [0], "seeds: got 1, wanted 2"),
        ([[1]], [0, 1], "seeds: got 2, wanted 1"),
    ],
)
def test_impossible_requests_are_refused(moe, prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        moe(prompts, seeds=seeds)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert [bucket(n, least=1) for n in (1, 2, 3, 5)] == [1, 2, 4, 8]


def test_seeds_are_a_function_of_the_key_and_distinct():
    keys = [(seed, step, place) for seed in range(3) for step in range(20) for place in range(16)]
    drawn = [seeds_for(*key, count=16) for key in keys]
    assert drawn == [seeds_for(*key, count=16) for key in keys]
    flat = [s for part in drawn for s in part]
    # 15,360 draws of 32 bits: 0.03 equal pairs are to be expected, and these have none
    assert len(set(flat)) == len(flat) and 0 <= min(flat) and max(flat) < 2**32
    assert seeds_for(1, 2, 3, count=4) == seeds_for(1, 2, 3, count=16)[:4]


@pytest.mark.parametrize("steps", [1, 3, 64])
@pytest.mark.parametrize("stop", [(), (0,), (7, 3)])
def test_a_stream_ends_as_the_completion_of_a_call(moe, steps, stop):
    """The very tokens and log-probs, and on the way ever more of them."""
    for seed in range(3):
        sampling = SamplingConfig(max_new_tokens=9, temperature=1.2, stop_ids=stop)
        (wanted,) = moe.generator(moe.weights, [PROMPTS[2]], sampling, seeds=[seed])
        found = list(moe.generator.stream(moe.weights, PROMPTS[2], sampling, seed=seed, steps=steps))
        assert [len(each.tokens) for each in found] == [*range(1, len(wanted.tokens), steps), len(wanted.tokens)]
        assert all(each.tokens.tolist() == wanted.tokens[: len(each.tokens)].tolist() for each in found)
        np.testing.assert_array_equal(found[-1].logprobs, wanted.logprobs)
        assert [each.finished for each in found] == [*[False] * (len(found) - 1), wanted.finished]
