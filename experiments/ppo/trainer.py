"""PPO in the place of GRPO in a run of training: advantages of a critic's, and everything else as it is."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.metrics import Metrics
from deepseek_jax.rl.rollout import Rollout
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.optimizer import make_optimizer
from deepseek_jax.train.step import TrainState, init_state, make_train_step
from experiments.ppo.critic import critic_from
from experiments.ppo.ppo import PPOConfig, critic_objective, frozen_values, ppo_targets, ppo_update, with_targets

PPO = PPOConfig(kl_coef=0.0, ppo_epochs=1)
"""The KL stays in the loss, and a rollout has one update, as in the runs that it stands beside."""
_ALONE = {
    **{"pack": False, "share_prompts": False, "lora_rank": 0},  # the critic reads rows of one sample
    **{"updates_per_rollout": 1, "num_iterations": 1},
    **{"use_adaptive_entropy": False, "top_entropy_quantile": 1.0},  # the loss's
}
CRITIC_LR = 10.0
"""Of the critic's rate as a multiple of the policy's, as verl has it: values begin at 0."""


class PPOState(NamedTuple):
    """`GRPOState`, and the critic's training."""

    train: TrainState
    reference: Any
    tokens: jax.Array
    entropy: jax.Array | None
    critic: TrainState


class PPOTrainer(GRPOTrainer):
    """GRPO's trainer but for the advantages, which a critic gives that starts from the policy's trunk.

    Raises:
        ValueError: samples share rows, a step has several updates, or the loss wants what is not computed here.
    """

    def __init__(self, config, model, *of, **options):
        for name, wanted in _ALONE.items():
            found = getattr(config if hasattr(config, name) else config.loss, name)
            if found != wanted:
                raise ValueError(f"{name}: got {found} with PPO, wanted {wanted}")
        super().__init__(config, model, *of, **options)
        self.critic_graphdef, self.critic_weights = critic_from(model.config, model.weights, self.layout)
        rates = replace(config.adamw, learning_rate=CRITIC_LR * config.lr)
        self.critic_optimizer = make_optimizer(rates, self._updates)
        objective = partial(critic_objective, config=PPO)
        self.critic_update = make_train_step(self.critic_graphdef, objective, self.critic_optimizer, config.step_config)

    def first_state(self) -> PPOState:
        critic = init_state(self.critic_weights, self.critic_optimizer, self.layout)
        return PPOState(*super().first_state(), critic=critic)

    def learn(self, state: PPOState, rollout: Rollout, number: int) -> tuple[PPOState, Metrics]:
        rewards_B = (rollout.rewards if self.alter is None else self.alter(rollout.rewards, number)).reshape(-1)
        known_B = ~np.isnan(rewards_B)  # what is not known teaches nothing
        (batch,) = self.batches(rollout, number)
        batch = self._scored(batch._replace(mask_BT=batch.mask_BT & known_B[:, None]), state.reference, None)
        expected_BT = frozen_values(self.critic_graphdef, state.critic.weights, batch.tokens_BT, batch.mask_BT)
        scores_B, old_BT = jnp.where(known_B, rewards_B, 0.0), batch.old_logprobs_BT
        targets, metrics = ppo_targets(scores_B, old_BT, old_BT, expected_BT, batch.mask_BT, config=PPO)
        del metrics["kl_from_reference"]  # of a KL in the rewards
        steps = {"policy_step": self.update, "critic_step": self.critic_update}
        both = with_targets(batch, expected_BT, targets)
        train, critic, (of_update,) = ppo_update(state.train, state.critic, *both, **steps, config=PPO)
        return state._replace(train=train, critic=critic), metrics | of_update
