"""Rollouts: how samples are laid out, and that their log-probs are the trainer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import MLAConfig, preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.ops.metrics import BatchTotals
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.advantage import group_advantages
from deepseek_jax.rl.batch import make_batch, pack
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.rl.rollout import RolloutWorker, dynamic_sampling, joined, rollout_metrics
from deepseek_jax.text.tokenizer import Tokenizer

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
    return RolloutWorker(
        generator=Generator(CONFIG, model[0]),
        tokenizer=TOKENIZER,
        sampling=SamplingConfig(max_new_tokens=9, temperature=0.7, stop_ids=TOKENIZER.eos_ids),
        group_size=G,
        reward=combine({"digits": digits}, {"digits": 2.0}),
    )


@pytest.fixture(scope="module")
def rollout(model, roll):
    return roll(model[1], prompts(), seed=1, step=2)


def batch_of(rollout):
    advantages = np.asarray(group_advantages(jnp.asarray(rollout.rewards))).ravel()
    return make_batch([p.tokens for p in rollout.prompts_of_samples()], rollout.completions, advantages, width=32)


def test_old_logprobs_are_the_trainers_at_the_samplers_temperature(model, rollout):
    batch = batch_of(rollout)
    scored = np.asarray(frozen_scores(model[0], model[1], batch, temperature=0.7))
    in_parts = frozen_scores(model[0], model[1], batch, temperature=0.7, micro_batches=4)
    np.testing.assert_allclose(in_parts, scored, atol=1e-5)
    np.testing.assert_allclose(scored[batch.mask_BT], batch.old_logprobs_BT[batch.mask_BT], atol=1e-5)
    assert (batch.old_logprobs_BT[~batch.mask_BT] == 0).all()
    assert batch.mask_BT.sum() == sum(len(c.tokens) for c in rollout.completions)


@pytest.mark.parametrize(
    "shaped",
    [
        {"min_p": 0.3},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "min_p": 0.1, "top_p": 0.9, "top_k": 11},
    ],
    ids=str,
)
def test_old_logprobs_are_the_trainers_within_what_min_p_and_the_penalty_leave(model, roll, rollout, shaped):
    """One sample a row and packed; without the penalty the trainer would say otherwise."""
    sampling = dataclasses.replace(roll.sampling, **shaped)
    drawn = dataclasses.replace(roll, sampling=sampling, record=Record(support=True))(
        model[1], prompts(), seed=1, step=2
    )
    given = [p.tokens for p in drawn.prompts_of_samples()], drawn.completions, np.zeros(2 * G, np.float32)
    penalty = shaped.get("repetition_penalty", 1.0)
    for batch in (make_batch(*given, width=32), pack(*given, width=64, per_row=4, rows_of=2)):
        of = lambda penalty, batch=batch: np.asarray(
            frozen_scores(model[0], model[1], batch, temperature=0.7, repetition_penalty=penalty)
        )[batch.mask_BT]
        np.testing.assert_allclose(of(penalty), batch.old_logprobs_BT[batch.mask_BT], atol=1e-5)
        assert penalty == 1 or np.abs(of(1.0) - of(penalty)).max() > 1e-2
    assert (drawn.completions[0].penalised is None) == (penalty == 1)
    assert any(len(c.tokens) and (c.support != 2**24 - 1).any() for c in drawn.completions) == ("min_p" in shaped)


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not(model, rollout):
    """Ratio 1, KL 0, and the advantages of a group sum to 0; within the rounding of sampler against trainer."""
    graphdef, weights = model
    batch = batch_of(rollout)
    batch = batch._replace(ref_logprobs_BT=batch.old_logprobs_BT)
    whole = BatchTotals(np.float32(2 * G), np.float32(batch.mask_BT.sum()))
    params, rest = nnx.split_state(weights, nnx.Param, ...)

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            found = grpo_objective(
                nnx.merge(graphdef, params, rest), batch, whole, config=GRPOLossConfig(beta=0.04), temperature=0.7
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
    advantages = (centred / (wanted.std(axis=1, ddof=1, keepdims=True) + 1e-4)).ravel()
    batch = batch_of(rollout)
    for row, (prompt, tokens) in enumerate(zip(np.repeat(np.arange(2), G), ids, strict=True)):
        text = prompts()[prompt].tokens + tokens
        assert batch.tokens_BT[row, : len(text) - 1].tolist() == text[:-1]
        drawn = batch.advantages_BT[row][batch.mask_BT[row]]
        np.testing.assert_allclose(drawn, advantages[row], rtol=1e-4, atol=1e-5)


def test_draws_are_a_function_of_seed_step_and_place(model, roll, rollout):
    texts = lambda r: [c.tokens.tolist() for c in r.completions]
    assert texts(roll(model[1], prompts(), seed=1, step=2)) == texts(rollout)
    assert texts(roll(model[1], prompts(), seed=1, step=3)) != texts(rollout)
    assert texts(roll(model[1], prompts(), seed=2, step=2)) != texts(rollout)
    same = roll(model[1], prompts()[:1] * 2, seed=1, step=2)  # one prompt in two places
    assert texts(same)[:G] == texts(rollout)[:G] and texts(same)[G:] != texts(same)[:G]


def test_grading_some_prompts_while_others_are_sampled_changes_nothing(model, roll, rollout):
    apart = dataclasses.replace(roll, at_once=1)(model[1], prompts(), seed=1, step=2)
    assert [c.tokens.tolist() for c in apart.completions] == [c.tokens.tolist() for c in rollout.completions]
    np.testing.assert_array_equal(apart.rewards, rollout.rewards)
    assert apart.parts == rollout.parts


def test_groups_keep_what_belongs_together(rollout):
    swapped = rollout.groups([1, 0])
    assert [p.text for p in swapped.prompts] == [p.text for p in rollout.prompts][::-1]
    assert swapped.completions == rollout.completions[G:] + rollout.completions[:G]
    np.testing.assert_array_equal(swapped.rewards, rollout.rewards[::-1])
    assert swapped.parts["digits"] == rollout.parts["digits"][G:] + rollout.parts["digits"][:G]
    both = joined([rollout.groups([0]), rollout.groups([1])])
    np.testing.assert_array_equal(both.rewards, rollout.rewards)
    assert both.completions == rollout.completions and both.parts == rollout.parts


class Rewarding:
    """A stand-in for a sampler: rewards come from a list, draw by draw."""

    def __init__(self, rollout, rewards):
        self.rollout, self.rewards, self.places = rollout, list(rewards), []

    def __call__(self, weights, prompts, *, seed, step, first=0):
        self.places.append(first)
        return self.rollout._replace(prompts=list(prompts), rewards=np.array(self.rewards.pop(0), np.float32))


SAME, DIFFER = [1, 1, 1, 1], [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("rewards", "rounds", "drawn", "used"),
    [
        ([[DIFFER, DIFFER]], 3, 1, [0, 1]),
        ([[SAME, DIFFER], [DIFFER, SAME]], 3, 2, [1, 2]),
        ([[SAME, SAME], [DIFFER, DIFFER]], 3, 2, [2, 3]),
        ([[SAME, DIFFER], [SAME, SAME]], 2, 2, [0, 1]),
        ([[SAME, SAME], [SAME, DIFFER]], 2, 2, [0, 3]),
        ([[SAME, SAME]], 1, 1, [0, 1]),
    ],
)
def test_groups_of_equal_rewards_are_sampled_again(rollout, rewards, rounds, drawn, used):
    roll, numbers = Rewarding(rollout, rewards), iter(range(100))
    draw = lambda: [Prompt(str(next(numbers)), [1], {}) for _ in range(2)]
    everything, chosen = dynamic_sampling(roll, None, draw, seed=0, step=0, rounds=rounds)
    assert roll.places == [2 * number for number in range(drawn)]  # so that no noise is used twice
    assert [p.text for p in everything.prompts] == [str(n) for n in range(2 * drawn)]
    assert [p.text for p in chosen.prompts] == [str(n) for n in used]
    assert chosen.rewards.shape == (2, G)


def test_metrics_of_a_rollout(rollout):
    metrics = rollout_metrics(rollout)
    lengths = [len(c.tokens) for c in rollout.completions]
    assert metrics["reward"] == pytest.approx(rollout.rewards.mean(), rel=1e-6)
    assert metrics["reward_std"] == pytest.approx(rollout.rewards.std(ddof=1), rel=1e-5)
    assert metrics["rewards/digits/mean"] == pytest.approx(rollout.rewards.mean() / 2, rel=1e-5)
    assert metrics["completions/mean_length"] == np.mean(lengths)
    assert metrics["completions/clipped_ratio"] == np.mean([not c.finished for c in rollout.completions])
    equal = rollout._replace(rewards=np.array([[1, 1, 1, 1], [0, 1, 0, 0]], np.float32))
    assert rollout_metrics(equal)["frac_reward_zero_std"] == 0.5


def test_metrics_leave_out_what_is_not_known(rollout):
    nan = np.nan
    unknown = rollout._replace(rewards=np.array([[1, nan, 1, nan], [0, 1, nan, 0]], np.float32))
    metrics = rollout_metrics(unknown)
    known = [1, 1, 0, 1, 0]
    assert metrics["reward"] == pytest.approx(np.mean(known))
    assert metrics["reward_std"] == pytest.approx(np.std(known, ddof=1))
    assert metrics["frac_reward_zero_std"] == 0.5 and metrics["frac_reward_unknown"] == 3 / 8
    none = rollout_metrics(rollout._replace(rewards=np.full((2, G), nan, np.float32)))
    assert "reward" not in none and none["frac_reward_zero_std"] == none["frac_reward_unknown"] == 1
    assert all(np.isfinite(list(none.values())))


def test_a_group_whose_known_rewards_are_alike_is_not_informative(rollout):
    nan = np.nan
    roll = Rewarding(rollout, [[[1, 1, nan, nan], [nan] * 4], [[nan, nan, nan, 1], [1, 0, nan, nan]]])
    draw = lambda: [Prompt("?", [1], {}) for _ in range(2)]
    _, chosen = dynamic_sampling(roll, None, draw, seed=0, step=0, rounds=2)
    np.testing.assert_array_equal(chosen.rewards, np.float32([[1, 1, nan, nan], [1, 0, nan, nan]]))


async def counted(completions, log_extra, log_metric, **kwargs):
    log_extra("length", [len(c) for c in completions])
    log_metric("seen", float(len(completions)))
    return [float(len(c)) for c in completions]


def test_what_reward_functions_log_comes_with_the_rollout(model, roll):
    of = lambda at_once: dataclasses.replace(roll, at_once=at_once, reward=combine({"n": counted}, {"n": 1.0}))
    whole, apart = (of(n)(model[1], prompts(), seed=1, step=2) for n in (None, 1))
    assert whole.extra == apart.extra == {"length": [len(c.text) for c in whole.completions]}
    assert whole.logged == apart.logged == {"seen": [1.0 * G] * 2}  # a group at a time
    assert rollout_metrics(apart)["seen"] == G
    both = joined([whole.groups([1]), whole.groups([0])])
    assert both.extra["length"] == whole.extra["length"][G:] + whole.extra["length"][:G]


def test_a_group_of_one_is_refused(roll):
    with pytest.raises(ValueError, match="group_size: got 1, wanted at least 2"):
        dataclasses.replace(roll, group_size=1)
