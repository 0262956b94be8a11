"""PPO in a run of training: what it learns from a rollout, and that a run which goes on ends as an unbroken one."""

import numpy as np
import pytest
from flax import nnx

from deepseek_jax.data.prompts import batches
from deepseek_jax.report.metrics import MetricLog, read_metrics
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.loss_config import GRPOLossConfig
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.grpo_stage import run_grpo
from experiments.ablations import ppo
from experiments.ppo.trainer import PPO, PPOTrainer
from tests.train.test_grpo import SMALL, TOKENIZER, digits, generator, model, prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def trainer(**changes) -> PPOTrainer:
    config = GRPOConfig(**SMALL | {"share_prompts": False} | changes)
    reward = combine({"digits": digits}, {"digits": 1.0})
    return PPOTrainer(config, model(), TOKENIZER, generator(), reward, width=32, seed=3)


def test_advantages_are_those_of_a_critic_that_expects_nothing_yet():
    """Whitened, lambda^(tokens to come) times the reward; the critic is told the same before whitening."""
    of, seen = trainer(), []
    of.update = of.critic_update = lambda train, batch: (train, seen.append(batch) or {})
    rollout = of.step(of.first_state(), lambda: prompts(2), 0).rollout
    rewards = rollout.rewards.copy()
    rewards[0, 1] = np.nan  # a reward function that could not say
    seen.clear()
    of.learn(of.first_state(), rollout._replace(rewards=rewards), 0)
    policy_batch, critic_batch = seen
    lengths = [len(completion.tokens) for completion in rollout.completions]
    assert policy_batch.mask_BT.sum() == sum(lengths) - lengths[1] and not policy_batch.mask_BT[1].any()
    earned = [
        float(reward) * PPO.lam ** np.arange(length)[::-1]
        for reward, length in zip(rewards.reshape(-1), lengths, strict=True)
        if not np.isnan(reward)
    ]
    told = np.concatenate(earned)
    mask = np.asarray(policy_batch.mask_BT)
    np.testing.assert_allclose(np.asarray(critic_batch.returns_BT)[mask], told, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(policy_batch.advantages_BT)[mask], (told - told.mean()) / told.std(ddof=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_run_that_goes_on_ends_as_an_unbroken_one_with_its_critic(tmp_path):
    def leaves(folder, *lengths):
        for steps in lengths:
            of = trainer(steps=steps)
            data = batches(prompts(), size=2, seed=5)
            state = run_grpo(of, data, folder=tmp_path / folder, log=MetricLog(tmp_path / folder))
        return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in _flat(state)}

    whole, broken = leaves("whole", 4), leaves("broken", 2, 4)
    assert any(name.startswith("critic") for name in whole) and whole.keys() == broken.keys()
    for name, leaf in whole.items():
        np.testing.assert_array_equal(broken[name], leaf, err_msg=name)
    first, *_, last = read_metrics(tmp_path / "whole")
    assert first["critic/value/mean"] == 0 != last["critic/value/mean"] and last["critic/loss"] > 0


def _flat(state):
    for part, of in (("train", state.train), ("critic", state.critic)):
        for path, leaf in nnx.to_flat_state(of.weights):
            yield (part, *path), leaf.get_raw_value()


@pytest.mark.parametrize(
    "name, changes",
    [
        ("pack", {"pack": True}),
        ("share_prompts", {"share_prompts": True}),
        ("updates_per_rollout", {"updates_per_rollout": 2}),
        ("num_iterations", {"num_iterations": 2}),
        ("use_adaptive_entropy", {"loss": GRPOLossConfig(use_adaptive_entropy=True)}),
        ("top_entropy_quantile", {"loss": GRPOLossConfig(top_entropy_quantile=0.5)}),
    ],
)
def test_what_the_critic_does_not_learn_from_is_refused(name, changes):
    with pytest.raises(ValueError, match=f"{name}: got .* with PPO, wanted"):
        trainer(**changes)


def test_the_ablation_changes_the_algorithm_and_how_long(marked_run):
    (found,) = ppo.stages(marked_run)
    own = {"steps": ppo.STEPS, "pack": False, "share_prompts": False}
    assert own.items() <= found.settings.items() and found.settings["ppo"]["lam"] == PPO.lam
    assert found.model == marked_run / "cold_start" / "model"
