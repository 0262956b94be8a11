"""The two students begin alike, and each learns from what it is said to."""

import json

import pytest

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.commands.r1_again import Config
from deepseek_jax.commands.toy import small_config
from deepseek_jax.data.puzzle_text import puzzle_tokenizer
from deepseek_jax.plan.weights import parameters
from experiments.ablations.distill_or_rl import dense, main, stages, start


def test_both_students_come_from_one_base(marked_run):
    found = {of.name: of for of in stages(marked_run)}
    assert found["distilled"].model == found["cold_start"].model == "base" and found["base"].model == "start"
    assert found["reinforced"].model == "cold_start"
    assert found["distilled"].data["learn"] == marked_run / "mixture" / "rows.jsonl"
    held_out = {of.data["held_out"] for of in found.values() if "held_out" in of.data}
    assert held_out == {marked_run / "questions" / "held_out.jsonl"}
    assert {of.settings["seed"] for of in found.values()} == {3}


def test_each_learns_as_the_run_did_but_for_how_long(marked_run):
    like = {"base": "base", "cold_start": "cold_start", "distilled": "sft", "reinforced": "rl_1"}
    own = lambda name: json.loads((marked_run / name / "stage.json").read_text())["settings"]
    found = {of.name: of.settings for of in stages(marked_run) if of.name in like}
    differs = {name: {k: v for k, v in of.items() if v != own(like[name])[k]} for name, of in found.items()}
    assert differs == {"base": {}, "cold_start": {}, "distilled": {"epochs": 24.0}, "reinforced": {"steps": 80}}


def test_the_student_is_dense_and_smaller_than_its_teacher(tmp_path):
    tokenizer = puzzle_tokenizer()
    assert parameters(dense(tokenizer)).total < parameters(small_config(tokenizer)).total / 2
    found = load_model(start(tmp_path, 0).model)
    assert found.config.moe is None and found.config.model_type == "qwen2"


def test_a_run_without_a_mixture_is_refused(marked_run):
    (marked_run / "sft" / "stage.json").unlink()
    with pytest.raises(ValueError, match="sft/stage.json: got no stage that is done, wanted the folder of a run of r1"):
        main(Config(run=marked_run))
    assert not (marked_run / "students").exists()
