"""Each control changes one thing of RL-1, and imitation gets the seconds that RL-1 took."""

import json

import pytest

from deepseek_jax.commands import r1
from experiments.r1_controls import IMITATION, VARIANTS, Config, stages, updates_of_equal_seconds


@pytest.fixture
def run(tmp_path):
    """As much of a run as the list of controls reads: 4 updates of about 2 s, then 3 steps of 10 s."""
    for name, seconds in {"cold_start": (9.0, 2.0, 2.0, 2.0), "rl_1": (50.0, 10.0, 10.0)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage.json").write_text(json.dumps({"outputs": {}}))
        rows = [{"stage": "x", "step": step, "time": 0.0, "step_time": of} for step, of in enumerate(seconds, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_control_is_rl_1_but_for_what_it_changes(run):
    config = r1.Config()
    (of_recipe,) = (of for of in r1.stages(config, r1.options_by_stage(config)) if of.name == "rl_1")
    found = {of.name: of for of in stages(Config(run=run, only=(*VARIANTS, IMITATION)))}
    for name, changed in VARIANTS.items():
        settings = found[name].settings
        assert {key: of for key, of in settings.items() if of != of_recipe.settings.get(key)} == changed
        assert found[name].model == run / "cold_start" / "model"


def test_imitation_takes_as_long_as_cold_start_and_rl_1(run):
    assert updates_of_equal_seconds(run) == 4 + 15
    (found,) = stages(Config(run=run, only=(IMITATION,)))
    assert found.settings["steps"] == 19 and found.model == run / "base" / "model"


def test_the_numbers_of_the_run_are_given_as_it_was_given_them(run):
    (found,) = stages(Config(run=run, only=("no_kl",), seed=3, set=("rl_1.steps=7",)))
    assert (found.settings["seed"], found.settings["steps"], found.settings["beta"]) == (3, 7, 0.0)


def test_a_run_without_rl_and_an_unknown_control_are_refused(run, tmp_path):
    (run / "rl_1" / "stage.json").write_text("{}")
    with pytest.raises(ValueError, match="got no stage that is done, wanted the folder of a run of r1"):
        stages(Config(run=run))
    with pytest.raises(ValueError, match="only: got 'luck', wanted some of shuffled"):
        Config(run=tmp_path, only=("luck",))
