"""The hacked run is RL-1 but for its format, and its reward pays what no strict form would."""

from pathlib import Path

import pytest

from deepseek_jax.commands import r1
from deepseek_jax.rewards.format import format_reward
from deepseek_jax.rewards.own import own_rewards
from experiments import reward_hacking
from experiments.reward_hacking import Config, equations_written, main, stage, told


def test_it_is_rl_1_but_for_its_format(tmp_path):
    config = r1.Config(seed=3)
    (of_recipe,) = (of for of in r1.stages(config, r1.options_by_stage(config)) if of.name == "rl_1")
    found = stage(Config(run=tmp_path, steps=7, seed=3))
    differs = {key: of for key, of in found.settings.items() if of != of_recipe.settings.get(key)}
    (own,) = own_rewards([f"{Path(reward_hacking.__file__)}:equations_written"])
    assert differs == {"steps": 7, "weight_format": 0.0, "scorer": [own.digest]}
    assert found.model == tmp_path / "cold_start" / "model"


def test_the_weak_format_pays_what_the_strict_one_does_not():
    honest = "<think>first 3+4=7</think><answer>7</answer>"
    hacked = "<think>first 3+4=7 then 7+0=7 then 7+0=7 then 7+0=7"
    weak, strict = (of(["", ""], [honest, hacked], [[], []]) for of in (equations_written, format_reward))
    assert weak == pytest.approx([0.2, 0.8]) and strict == [1.0, 0.0]


def test_means_are_of_eight_steps():
    rows = [{"step": n, **dict.fromkeys(reward_hacking._TOLD, float(n))} for n in range(1, 11)]
    assert [(of["step"], of["reward"]) for of in told(rows)] == [(8, 4.5), (10, 9.5)]


def test_a_run_that_has_fewer_steps_is_refused(tmp_path):
    (tmp_path / "rl_1").mkdir()
    (tmp_path / "rl_1" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="got 0 steps, wanted 40; give fewer --steps"):
        main(Config(run=tmp_path))
    assert not (tmp_path / "hacking").exists()
