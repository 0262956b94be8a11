"""The hacked run is RL-1 but for its format, and its reward pays what no strict form would."""

import json
from pathlib import Path

import pytest

from deepseek_jax.rewards.format import format_reward
from deepseek_jax.rewards.own import own_rewards
from experiments.ablations import reward_hacking
from experiments.ablations.reward_hacking import STEPS, equations_written, stages, told


def test_it_is_rl_1_but_for_its_format(marked_run):
    own = json.loads((marked_run / "rl_1" / "stage.json").read_text())["settings"]
    (found,) = stages(marked_run)
    differs = {key: of for key, of in found.settings.items() if of != own.get(key)}
    (reward,) = own_rewards([f"{Path(reward_hacking.__file__)}:equations_written"])
    assert differs == {"steps": STEPS, "weight_format": 0.0, "scorer": [reward.digest]}
    assert found.model == marked_run / "cold_start" / "model"


def test_the_weak_format_pays_what_the_strict_one_does_not():
    honest = "<think>first 3+4=7</think><answer>7</answer>"
    hacked = "<think>first 3+4=7 then 7+0=7 then 7+0=7 then 7+0=7"
    weak, strict = (of(["", ""], [honest, hacked], [[], []]) for of in (equations_written, format_reward))
    assert weak == pytest.approx([0.2, 0.8]) and strict == [1.0, 0.0]


def test_means_are_of_eight_steps():
    rows = [{"step": n, **dict.fromkeys(reward_hacking._TOLD, float(n))} for n in range(1, 11)]
    assert [(of["step"], of["reward"]) for of in told(rows)] == [(8, 4.5), (10, 9.5)]
