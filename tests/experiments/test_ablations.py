"""Each ablation changes one thing of RL-1, and imitation gets the seconds that RL-1 took."""

import json

import pytest

from deepseek_jax.commands.r1_again import RL, again, beside, done
from experiments.ablations import (
    advantage_std,
    imitation,
    kl,
    language_reward,
    shuffled_rewards,
)
from tests.evals.test_comparison import folder

CHANGED = [
    (shuffled_rewards, {"shuffled": {"control": "shuffled"}}),
    (kl, {"no_kl": {"beta": 0.0}, "kl": {"beta": 0.01}}),
    (advantage_std, {"no_std": {"scale_rewards": "none"}}),
    (language_reward, {"no_language": {"weight_language": 0.0}}),
]


@pytest.mark.parametrize(("file", "changed"), CHANGED)
def test_an_ablation_is_the_runs_rl_1_but_for_what_it_changes(marked_run, file, changed):
    own = json.loads((marked_run / RL / "stage.json").read_text())["settings"]
    found = file.stages(marked_run)
    assert {of.name: {key: it for key, it in of.settings.items() if it != own.get(key)} for of in found} == changed
    for of in found:
        assert of.settings.keys() == own.keys() and of.model == marked_run / "cold_start" / "model"
        questions = marked_run / "questions"
        assert of.data == {"ask": questions / "train.jsonl", "held_out": questions / "held_out.jsonl"}


def test_a_stage_again_without_a_change_has_the_settings_of_its_mark(marked_run):
    for name in ("base", "cold_start", RL, "sft"):
        mark = json.loads((marked_run / name / "stage.json").read_text())
        assert json.loads(json.dumps(again(marked_run, name, "it").settings)) == mark["settings"]


def test_a_stage_that_learns_from_more_than_rules_is_not_made_again_without_it(marked_run):
    for name in ("rl_2", "rejection", "mixture"):
        with pytest.raises(ValueError, match=f"{name}/stage.json: got a stage of other data, wanted fine-tuning or RL"):
            again(marked_run, name, "it")


def test_imitation_takes_as_long_as_cold_start_and_rl_1(marked_run):
    assert imitation.updates_of_equal_seconds(marked_run) == 4 + 15
    (found,) = imitation.stages(marked_run)
    assert found.settings["steps"] == 19 and found.model == marked_run / "base" / "model"
    assert found.data["learn"] == marked_run / "questions" / "demonstrations.jsonl"


def test_what_the_user_gave_is_taken_from_where_it_lies(marked_run, tmp_path):
    path = marked_run / RL / "stage.json"
    mark = json.loads(path.read_text())
    mark["from"] = {
        "model": "cold_start",
        "data": {"ask": str(tmp_path / "my" / "rows.jsonl"), "held_out": "rows.jsonl"},
    }
    path.write_text(json.dumps(mark))
    found = again(marked_run, RL, "it")
    assert [str(found.data[name]) for name in ("ask", "held_out")] == [
        str(tmp_path / "my" / "rows.jsonl"),
        "rows.jsonl",
    ]


def test_what_is_beside_rl_1_is_paired_by_question(marked_run):
    """Of five questions RL-1 solves two that imitation does not, and misses one that it solves."""
    folder(marked_run / RL / "evaluation", [[1.0], [1.0], [0.0], [1.0], [0.0]])
    folder(marked_run / "cold_start" / "evaluation", [[0.0], [0.0], [1.0], [1.0], [0.0]])
    found = beside(marked_run / RL, marked_run / "cold_start")
    assert (found["control"], found[RL], found["it"], found["mean"]) == ("cold_start", 0.6, 0.4, 0.2)
    assert found["stderr"] == pytest.approx(2.8**0.5 / 5, abs=1e-4)  # of 1, 1, -1, 0, 0, as `clustered` has it
    assert (found["seconds"], found["its seconds"]) == (30, 8)


def test_a_run_without_rl_and_one_with_options_of_another_version_are_refused(marked_run):
    path = marked_run / RL / "stage.json"
    mark = json.loads(path.read_text())
    path.write_text(json.dumps(mark | {"settings": mark["settings"] | {"luck": 1}}))
    with pytest.raises(ValueError, match="rl_1/stage.json: luck: no such option any more"):
        again(marked_run, RL, "it")
    path.write_text(json.dumps({name: of for name, of in mark.items() if name != "outputs"}))
    with pytest.raises(ValueError, match="got no stage that is done, wanted the folder of a run of r1"):
        imitation.stages(marked_run)
    path.unlink()
    with pytest.raises(ValueError, match="got no stage that is done"):
        done(marked_run, RL)
