"""The two students begin alike, and each learns from what it is said to."""

import pytest

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.commands.toy import small_config
from deepseek_jax.data.puzzle_text import puzzle_tokenizer
from deepseek_jax.plan.weights import parameters
from experiments.distill_or_rl import Config, dense, main, stages, start


def test_both_students_come_from_one_base(tmp_path):
    found = {of.name: of for of in stages(Config(run=tmp_path))}
    assert found["distilled"].model == found["cold_start"].model == "base" and found["base"].model == "start"
    assert found["reinforced"].model == "cold_start"
    assert found["distilled"].data["learn"] == tmp_path / "mixture" / "rows.jsonl"
    held_out = {of.data["held_out"] for of in found.values() if "held_out" in of.data}
    assert held_out == {tmp_path / "questions" / "held_out.jsonl"}


def test_the_student_is_dense_and_smaller_than_its_teacher(tmp_path):
    tokenizer = puzzle_tokenizer()
    assert parameters(dense(tokenizer)).total < parameters(small_config(tokenizer)).total / 2
    found = load_model(start(tmp_path, 0).model)
    assert found.config.moe is None and found.config.model_type == "qwen2"


def test_a_run_without_a_mixture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl: no such file; wanted the folder of a run of r1 that has its"):
        main(Config(run=tmp_path))
    assert not (tmp_path / "students").exists()
