"""The train command's settings: its help, the defaults of each kind of model, and a run's file that repeats it."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from deepseek_jax.cli import run
from deepseek_jax.commands import train
from deepseek_jax.commands.options import prepared
from deepseek_jax.commands.run_options import enter
from deepseek_jax.commands.settings_file import options_of, values_of, with_values
from deepseek_jax.commands.train_data import held_out_of, make_prompt
from deepseek_jax.commands.train_settings import (
    BOXED,
    COMMON,
    R1_ZERO,
    TAGS,
    Config,
    DataOptions,
    check,
    repeatable,
    run_settings,
    settings,
    stated,
)
from deepseek_jax.config import preset, to_hf
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.prompts import Example, open_prompts
from deepseek_jax.rewards.recipe import RewardConfig
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo_config import GRPOConfig
from deepseek_jax.train.runs import enter_folder

THINKING = TEMPLATE.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>{% endif %}")


def parsed(*arguments: str) -> Config:
    """What the command line makes of these arguments."""
    seen: list[Config] = []

    def main(config: Config) -> None:
        seen.append(config)

    main.command = train.main.command
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        run(main)
    return seen[0]


def saved(folder: Path, template: str | None, context: int) -> Path:
    """The folder, but for weights, of a model with a context and a chat template."""
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    shape = dataclasses.replace(
        preset("tiny"), vocab_size=32, num_hidden_layers=1, moe=moe, max_position_embeddings=context
    )
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=template or TEMPLATE)
    files = dict(tokenizer.files)
    if template is None:
        of_tokenizer = json.loads(files["tokenizer_config.json"])
        del of_tokenizer["chat_template"]
        files["tokenizer_config.json"] = json.dumps(of_tokenizer).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(shape)))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- help ----------------------------------------------------------------------------------------


def test_the_short_help_is_one_screen_and_a_half(monkeypatch, capsys):
    shown = {}
    for columns in (80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        for option in ("--help", "--help-all"):
            monkeypatch.setattr(sys, "argv", ["train", option])
            with pytest.raises(SystemExit):
                run(train.main)
            shown[columns, option] = capsys.readouterr().out
    assert len(shown[100, "--help"].splitlines()) <= 72 and len(shown[80, "--help"].splitlines()) <= 80
    found = set(re.findall(r"^\W*--([a-z][a-z-]*)", shown[100, "--help"], re.MULTILINE)) - {"h"}
    assert {name.replace("-", "_") for name in found} == set(COMMON)
    groups = ["model", "data", "rewards", "algorithm", "algorithm.loss", "mesh", "toy", "logging"]
    assert re.findall(r"^\W*([a-z.]+) options\W*$", shown[100, "--help-all"], re.MULTILINE) == groups
    every = set(re.findall(r"--([a-z0-9-]+)", shown[100, "--help-all"]))
    assert {name.replace("_", "-") for name in options_of(Config)} <= every


# --- defaults ------------------------------------------------------------------------------------


def test_without_a_model_the_numbers_are_the_toys():
    config = parsed()
    grpo, rewards = config.grpo, config.rewards
    assert (grpo.steps, grpo.prompts_per_step, grpo.group_size, grpo.max_new_tokens) == (60, 16, 16, 48)
    assert (grpo.lr, grpo.loss.beta, grpo.temperature, grpo.warmup) == (2e-4, 0.001, 1.0, 5)
    assert (rewards.accuracy, rewards.format, rewards.weight_accuracy, rewards.weight_format) == (
        "exact",
        "tags",
        1,
        0.3,
    )
    assert "toy task's numbers" in stated(config)[0] and "lr 0.0002" in stated(config)[1]


def test_the_library_has_the_papers_numbers():
    grpo = GRPOConfig()
    assert (grpo.lr, grpo.group_size, grpo.prompts_per_step, grpo.temperature) == (1e-6, 16, 32, 1.0)
    assert (grpo.loss.beta, grpo.reference_every, grpo.max_new_tokens) == (0.001, 400, 32_768)
    assert Config().grpo == grpo and Config().rewards == RewardConfig()


@pytest.mark.parametrize(
    ("template", "context", "options", "form", "prompt", "tokens"),
    [
        (THINKING, 256, (), "boxed", BOXED, 128),
        (TEMPLATE, 4_000, (), "tags", TAGS, 2_000),
        (None, 32_768, ("--no-chat",), "tags", R1_ZERO, 4_096),
        (THINKING, 256, ("--no-chat",), "tags", R1_ZERO, 128),
        (THINKING, 256, ("--format", "tags"), "tags", TAGS, 128),
        (TEMPLATE, 256, ("--format=boxed",), "boxed", BOXED, 128),
    ],
)
def test_with_a_model_prompt_and_format_fit_each_other_and_its_context(
    tmp_path, template, context, options, form, prompt, tokens
):
    model = saved(tmp_path / "model", template, context)
    config = parsed("--model", model, *options)
    assert (config.rewards.format, config.prompt, config.grpo.max_new_tokens) == (form, prompt, tokens)
    assert config.grpo == dataclasses.replace(GRPOConfig(), max_new_tokens=tokens)
    assert config.rewards == RewardConfig(format=form)
    said = " ".join(stated(config))
    assert "papers' numbers" in said and f"up to {tokens} tokens" in said and f"format {form}" in said
    assert f"f{'' if context // 2 == tokens else ', at most 4096'}"[1:] in said


def test_what_is_asked_follows_the_format_of_the_reward(tmp_path):
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=THINKING)
    config = with_values(Config(), {"model": tmp_path, "prompt": "{question}"})
    asked = make_prompt(config, tokenizer, Example("1+1=?", "2", None, {"answer": "2"}, 0, 0))
    assert asked.text.endswith("<｜User｜>1+1=?<｜Assistant｜><think>")


def test_a_model_that_is_not_there_is_refused_by_that_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--model", "nowhere"])
    with pytest.raises(SystemExit) as end:
        run(train.main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder; wanted ")


def test_given_options_win_over_quick():
    quick = parsed("--quick", "--steps", "60", "--eval-questions=512", "--save-every", "7")
    assert (quick.grpo.steps, quick.grpo.save_every, quick.grpo.eval_every) == (60, 7, 4)
    assert (quick.questions.eval_questions, quick.toy.cold_start_epochs) == (512, 4)
    assert parsed("--quick").grpo.steps == 8 and parsed().toy.cold_start_epochs == 12


# --- files ---------------------------------------------------------------------------------------


def test_a_runs_own_file_repeats_it_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def f(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    monkeypatch.chdir(tmp_path)
    given = ["--modulus", "None", "--lora-targets", "q_proj", "--steps", "7", "--reward", "own.py:f", "--quick"]
    first = parsed(*given, "--data", "rows.jsonl", "--output", "run", "--prompt", "{question}\n\"\\boxed\" '\u2028ü'")
    (tmp_path / "config.toml").write_text(repeatable(first), encoding="utf-8")
    whole = settings(first)
    monkeypatch.chdir("/")
    again = parsed("--config", tmp_path / "config.toml", "--output", tmp_path / "run")
    assert settings(again) | {"output": "run"} == whole
    assert again.questions.data == (str(tmp_path / "rows.jsonl"),) and again.rewards.reward[0].startswith(str(tmp_path))
    assert parsed("--config", tmp_path / "config.toml", "--steps", "8").grpo.steps == 8


def test_a_run_writes_that_file(tmp_path):
    config = parsed("--output", tmp_path / "run", "--lr", "3e-4")
    enter(config.output, run_settings(config, None), repeatable(config))
    assert parsed("--config", tmp_path / "run" / "config.toml") == dataclasses.replace(
        config, config=tmp_path / "run" / "config.toml"
    )
    check(parsed("--config", tmp_path / "run" / "config.toml"))  # and goes on in the same folder


def test_a_yaml_file_and_the_kind_of_model_that_it_names(tmp_path):
    model = saved(tmp_path / "model", THINKING, 256)
    (tmp_path / "a.yaml").write_text(
        f"model: {{model: {model}}}\nalgorithm:\n  lr: 3e-6\n  loss: {{beta: 0}}\nquick: true\n"
    )
    config = parsed("--config", tmp_path / "a.yaml")
    assert (config.grpo.lr, config.grpo.loss.beta, config.grpo.steps, config.rewards.format) == (3e-6, 0.0, 8, "boxed")


def test_a_changed_file_of_rewards_is_refused_when_a_run_goes_on(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def f(completions, **columns):\n    return [0.0 for _ in completions]\n")
    config = parsed("--output", tmp_path / "run", "--reward", f"{own}:f:0.5")
    enter_folder(config.output, run_settings(config, check(config)))
    check(config)
    own.write_text("def f(completions, **columns):\n    return [1.0 for _ in completions]\n")
    with pytest.raises(ValueError, match=r"has reward \['.*own.py:f:0.5 \(content .*\)'\], not \["):
        check(config)


# --- held-out questions --------------------------------------------------------------------------


def questions_of(tmp_path: Path, count: int, **changes):
    path = tmp_path / f"{count}.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": n}) + "\n" for n in range(count)))
    config = with_values(Config(), {"data": (str(path),), **changes})
    of = config.questions.config(need_answer=True)
    held_out, rest, said = held_out_of(config, of, open_prompts(of))
    return [e.question for e in held_out], [e.question for e in rest], said


@pytest.mark.parametrize(
    ("rows", "asked", "held"), [(2, 512, 1), (9, 512, 1), (40, 512, 4), (40, 3, 3), (1_000, 512, 100)]
)
def test_held_out_questions_are_a_seeded_sample_of_a_tenth_at_most(tmp_path, rows, asked, held):
    held_out, rest, said = questions_of(tmp_path, rows, eval_questions=asked)
    assert len(held_out) == held and said == f"held out: {held} of {rows} questions, drawn by the seed"
    assert sorted([*held_out, *rest]) == sorted(f"q{n}" for n in range(rows)) and len(rest) == rows - held
    assert questions_of(tmp_path, rows, eval_questions=asked)[:2] == (held_out, rest)
    if rows == 1_000:
        assert held_out != questions_of(tmp_path, rows, seed=1)[0]
        numbers = [int(question[1:]) for question in held_out]
        assert 350 < sum(numbers) / held < 650 and max(numbers) > 900  # no head of the file


def test_a_single_question_cannot_be_held_out(tmp_path):
    with pytest.raises(ValueError, match="1.jsonl: got 1 rows, wanted 2 or more: one is held out"):
        questions_of(tmp_path, 1)


def test_no_source_of_a_mixture_gives_its_last_row(tmp_path):
    for seed in range(5):
        paths = []
        for name, count in (("a", 1), ("b", 30)):
            paths.append(tmp_path / f"{name}.jsonl")
            paths[-1].write_text(
                "".join(json.dumps({"question": f"{name}{n}", "answer": n}) + "\n" for n in range(count))
            )
        config = with_values(Config(), {"data": tuple(map(str, paths)), "seed": seed})
        of = config.questions.config(need_answer=True)
        held_out, rest, _ = held_out_of(config, of, open_prompts(of))
        assert "a0" in [e.question for e in rest] and len(held_out) == 3


def test_values_and_options_have_the_same_names():
    assert values_of(Config()).keys() == options_of(Config).keys()
    assert prepared(train.main, [])[0].__doc__ == train.main.__doc__


def test_questions_without_an_answer_join_late():
    options = DataOptions(data=("a.jsonl",), late_data=("b.jsonl",), late_step=8, late_weight=0.25)
    first, late = options.config(need_answer=True).sources
    assert (first.name, first.need_answer, first.first_step, first.weight) == ("a.jsonl", True, 0, 1.0)
    assert (late.name, late.need_answer, late.first_step, late.weight) == ("b.jsonl", False, 8, 0.25)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"late_step": 3}, "late_step: got it without --late-data"),
        ({"late_data": ("b.jsonl",), "late_weight": 0.0}, "weight: got 0.0"),
        ({"late_data": ("b.jsonl",), "late_step": -1}, "first_step: got -1"),
    ],
)
def test_late_questions_that_cannot_be_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        DataOptions(data=("a.jsonl",), **given)
