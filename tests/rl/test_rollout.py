"""Rollouts: how samples are laid out, and that their log-probs are the trainer's."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.generate.engine import Generator, SamplingConfig
from deepseek_jax.generate.text import TextCompletion
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.loss import GRPOConfig
from deepseek_jax.rl.objective import grpo_objective, reference_logprobs
from deepseek_jax.rl.rollout import Prompt, Roller, make_batch, rollout_metrics
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.arithmetic import ALPHABET, TEMPLATE

pytestmark = pytest.mark.usefixtures("quick_compilation")

G = 4
TOKENIZER = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
CONFIG = dataclasses.replace(
    preset("tiny"),
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    attention=MLAConfig(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=dataclasses.replace(preset("tiny").moe, moe_intermediate_size=8, first_k_dense_replace=0),
)


def completion(tokens, finished=True):
    return TextCompletion("", np.array(tokens, np.int32), -np.arange(1, len(tokens) + 1, dtype=np.float32), finished)


def test_mask_marks_exactly_the_completions_tokens():
    batch = make_batch([[7], [5, 6]], [completion([8, 9]), completion([4])], np.array([1.0, -1.0]), width=4)
    np.testing.assert_array_equal(batch.tokens_BT, [[7, 8, 9, 0], [5, 6, 4, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[8, 9, 0, 0], [6, 4, 0, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[1, 1, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.old_logprobs_BT, [[-1, -2, 0, 0], [0, -1, 0, 0]])
    np.testing.assert_array_equal(batch.ref_logprobs_BT, np.zeros((2, 4)))
    np.testing.assert_array_equal(batch.advantages_B, [1, -1])
    assert batch.mask_BT.dtype == bool and batch.advantages_B.dtype == batch.old_logprobs_BT.dtype == np.float32


def test_a_pad_token_inside_a_completion_counts():
    """The mask is made from lengths: token 0 is padding here and may be a real token there."""
    batch = make_batch([[7]], [completion([0, 0, 3])], np.zeros(1), width=5)
    np.testing.assert_array_equal(batch.mask_BT, [[1, 1, 1, 0, 0]])


def test_width_fits_exactly_or_is_refused():
    sample = [[7, 7]], [completion([8, 9, 1])], np.zeros(1)
    assert make_batch(*sample, width=4).mask_BT.tolist() == [[False, True, True, True]]
    assert make_batch(*sample).tokens_BT.shape == (1, 16)
    with pytest.raises(ValueError, match="width: got 3, wanted at least 4"):
        make_batch(*sample, width=3)


@pytest.fixture(scope="module")
def model():
    graphdef, _ = abstract_weights(CONFIG)
    return graphdef, jax.jit(lambda: split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1])()


def digits(prompts, completions, completion_ids, *, answer, **columns):
    """Share of digits, less a little for every token: rewards that differ within a group."""
    return [
        sum(ch.isdigit() for ch in c) / (1 + len(i)) + 0.1 * (a in c)
        for c, i, a in zip(completions, completion_ids, answer, strict=True)
    ]


def prompts():
    tokens = lambda text: TOKENIZER.chat([{"role": "user", "content": text}])
    return [Prompt(text, tokens(text), {"answer": answer}) for text, answer in (("1+2=?", "3"), ("10+20+3=?", "33"))]


@pytest.fixture(scope="module")
def roll(model):
    return Roller(
        generator=Generator(CONFIG, model[0]),
        tokenizer=TOKENIZER,
        sampling=SamplingConfig(max_new_tokens=9, temperature=0.7, stop_ids=TOKENIZER.eos_ids),
        group_size=G,
        reward=combine({"digits": digits}, {"digits": 2.0}),
        width=32,
    )


@pytest.fixture(scope="module")
def rollout(model, roll):
    return roll(model[1], prompts(), seed=1, step=2)


def test_old_logprobs_are_the_trainers_at_the_samplers_temperature(model, rollout):
    batch = rollout.batch
    scored = np.asarray(reference_logprobs(model[0], model[1], batch, temperature=0.7))
    np.testing.assert_allclose(scored[batch.mask_BT], batch.old_logprobs_BT[batch.mask_BT], atol=1e-5)
    assert (batch.old_logprobs_BT[~batch.mask_BT] == 0).all()
    assert batch.mask_BT.sum() == sum(len(c.tokens) for c in rollout.completions)


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not(model, rollout):
    """Ratio 1, KL 0, and the advantages of a group sum to 0; within the rounding of sampler against trainer."""
    graphdef, weights = model
    batch = rollout.batch._replace(ref_logprobs_BT=rollout.batch.old_logprobs_BT)
    params, rest = nnx.split_state(weights, nnx.Param, ...)

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            found = grpo_objective(
                nnx.merge(graphdef, params, rest), batch, 2.0 * G, config=GRPOConfig(), temperature=0.7
            )
            return found[0], found[1]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, metrics), grads = gradient(params, batch)
    assert abs(loss) < 1e-5
    assert metrics["ratio"].value() == pytest.approx(1, abs=1e-5)
    assert metrics["kl"].value() < 1e-8
    assert max(abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3


def test_rewards_and_advantages_belong_to_their_samples(rollout):
    answers = np.repeat(["3", "33"], G)
    texts = [c.text for c in rollout.completions]
    ids = [c.tokens.tolist() for c in rollout.completions]
    assert texts == [TOKENIZER.decode(i) for i in ids]
    wanted = 2 * np.array(digits(None, texts, ids, answer=answers)).reshape(2, G)
    np.testing.assert_allclose(rollout.rewards, wanted, rtol=1e-6)
    centred = wanted - wanted.mean(axis=1, keepdims=True)
    advantages = centred / (wanted.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollout.batch.advantages_B, advantages.ravel(), rtol=1e-4, atol=1e-5)
    for row, (prompt, tokens) in enumerate(zip(np.repeat(np.arange(2), G), ids, strict=True)):
        text = prompts()[prompt].tokens + tokens
        assert rollout.batch.tokens_BT[row, : len(text) - 1].tolist() == text[:-1]


def test_draws_are_a_function_of_seed_step_and_place(model, roll, rollout):
    texts = lambda r: [c.tokens.tolist() for c in r.completions]
    assert texts(roll(model[1], prompts(), seed=1, step=2)) == texts(rollout)
    assert texts(roll(model[1], prompts(), seed=1, step=3)) != texts(rollout)
    assert texts(roll(model[1], prompts(), seed=2, step=2)) != texts(rollout)
    same = roll(model[1], prompts()[:1] * 2, seed=1, step=2)  # one prompt in two places
    assert texts(same)[:G] == texts(rollout)[:G] and texts(same)[G:] != texts(same)[:G]


def test_altered_rewards_change_the_advantages_alone(model, roll, rollout):
    seen = []
    alter = lambda rewards, step: seen.append((rewards.copy(), step)) or rewards[:, ::-1]
    altered = dataclasses.replace(roll, alter_rewards=alter)(model[1], prompts(), seed=1, step=2)
    np.testing.assert_array_equal(altered.rewards, rollout.rewards)
    np.testing.assert_array_equal(seen[0][0], rollout.rewards)
    assert seen[0][1] == 2
    flipped = rollout.batch.advantages_B.reshape(2, G)[:, ::-1].ravel()
    np.testing.assert_allclose(altered.batch.advantages_B, flipped, rtol=1e-5)


def test_metrics_of_a_rollout(rollout):
    metrics = rollout_metrics(rollout, G)
    lengths = [len(c.tokens) for c in rollout.completions]
    assert metrics["reward"] == pytest.approx(rollout.rewards.mean(), rel=1e-6)
    assert metrics["reward_std"] == pytest.approx(rollout.rewards.std(axis=1, ddof=1).mean(), rel=1e-5)
    assert metrics["rewards/digits/mean"] == pytest.approx(rollout.rewards.mean() / 2, rel=1e-5)
    assert metrics["completions/mean_length"] == np.mean(lengths)
    assert metrics["completions/clipped_ratio"] == np.mean([not c.finished for c in rollout.completions])
    equal = rollout._replace(rewards=np.array([[1, 1, 1, 1], [0, 1, 0, 0]], np.float32))
    assert rollout_metrics(equal, G)["frac_reward_zero_std"] == 0.5


def test_a_group_of_one_and_a_narrow_batch_are_refused(model, roll):
    with pytest.raises(ValueError, match="group_size: got 1, wanted at least 2"):
        dataclasses.replace(roll, group_size=1)
    with pytest.raises(ValueError, match="width: got 4, wanted at least"):
        dataclasses.replace(roll, width=4)(model[1], prompts(), seed=1, step=2)
