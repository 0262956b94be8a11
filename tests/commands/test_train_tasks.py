"""Rows of benchmarks in training: asked, graded and held out as their Task says."""

import dataclasses
import json
import sys

import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.cli import run
from deepseek_jax.commands import train
from deepseek_jax.commands.settings_file import with_values
from deepseek_jax.commands.train_data import read
from deepseek_jax.commands.train_settings import Config
from deepseek_jax.commands.train_tasks import check_tasks
from deepseek_jax.config import preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.puzzle_text import general_prompts, puzzle_tokenizer
from deepseek_jax.data.puzzles import draw
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.rewarding import task_reward
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.model.decoder import Decoder, split
from deepseek_jax.rewards.combine import combine
from deepseek_jax.text.tokenizer import Tokenizer

GSM8K = [{"question": f"What is {n}+1?", "answer": f"It is.\n#### {n + 1}"} for n in range(12)]
MBPP = [
    {
        "task_id": n,
        "text": f"Write f that adds {n}.",
        "code": f"def f(x): return x + {n}",
        "test_list": [f"assert f(1) == {n + 1}"],
    }
    for n in range(12)
]
MMLU = [{"question": f"Which is {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(12)]
PUZZLES = [puzzle.row() for puzzle in draw(60, part="train", levels=(2, 3), seed=0)]
LETTERS = "".join(map(chr, range(32, 127))) + "\n"


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path, **changes) -> Config:
    files = [("gsm8k", GSM8K), ("mbpp", MBPP), ("mmlu", MMLU)]
    given = {
        "data": tuple(rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in files),
        "tasks": tuple(name for name, _ in files),
        "accuracy": "task",
        "weight_format": 0.0,
        "chat": False,
        "prompts_per_step": 18,
    }
    return with_values(Config(), given | changes)


def test_every_row_is_asked_and_rewarded_by_its_own_task(tmp_path):
    config = settings(tmp_path, eval_questions=3)
    asked = read(config, Tokenizer.characters(LETTERS, chat_template=TEMPLATE))
    prompts = [*next(asked.prompts), *asked.held_out]
    seen = {prompt.columns["task"] for prompt in prompts}
    assert seen == {"gsm8k", "mbpp", "mmlu"}
    for prompt in prompts:
        task, row = TASKS[prompt.columns["task"]], prompt.columns["row"]
        assert prompt.text.removeprefix("<bos>") == task.style("deepseek").write(task.read(row, 0))
    right = {
        "gsm8k": lambda row: rf"\boxed{{{row['answer'].split()[-1]}}}",
        "mbpp": lambda row: f"```python\n{row['code']}\n```",
        "mmlu": lambda row: f"Answer: {'ABCD'[row['answer']]}",
    }
    wrong = {"gsm8k": r"\boxed{99}", "mbpp": "```python\ndef f(x): return None\n```", "mmlu": "Answer: E"}
    with Graders() as graders:
        reward = combine({"accuracy": task_reward(graders)}, {"accuracy": 1.0})
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in ("task", "row")}
        texts = [right[prompt.columns["task"]](prompt.columns["row"]) for prompt in prompts]
        given = {"prompts": [prompt.text for prompt in prompts], "completion_ids": [[]] * len(prompts), **columns}
        assert set(reward.graded(completions=texts, **given).parts["accuracy"]) == {1.0}
        texts = [wrong[prompt.columns["task"]] for prompt in prompts]
        assert set(reward.graded(completions=texts, **given).parts["accuracy"]) == {0.0}


def test_held_out_rows_have_a_task_of_their_own(tmp_path):
    others = rows_file(tmp_path / "held.jsonl", [{"question": "A or B?", "choices": ["x", "y"], "answer": 1}])
    config = settings(tmp_path, held_out=(others,), held_out_tasks=("mmlu",))
    (prompt,) = read(config, Tokenizer.characters(LETTERS, chat_template=TEMPLATE)).held_out
    assert prompt.columns["task"] == "mmlu" and "y" in prompt.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks: got none with accuracy 'task', wanted both"),
        ({"accuracy": "math"}, "tasks: got gsm8k, mbpp, mmlu with accuracy 'math', wanted both"),
        ({"tasks": ("gsm8k", "mbpp")}, "tasks: got gsm8k, mbpp, wanted one for each of 3 data sets"),
        ({"tasks": ("gsm9k",)}, "benchmark: got 'gsm9k', wanted one of"),
        ({"weight_format": 1.0}, "format: got 'tags' with accuracy 'task'"),
        ({"tasks": ("formal",)}, "checker"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with Graders() as graders, pytest.raises(ValueError, match=message) as told:
        check_tasks(settings(tmp_path, **changes), graders)
    assert "\n" not in str(told.value)


def test_a_row_of_another_benchmark_is_refused_by_its_place(tmp_path):
    config = settings(tmp_path, tasks=("mbpp",), data=(rows_file(tmp_path / "rows.jsonl", GSM8K),))
    with pytest.raises(ValueError, match=r"rows.jsonl.*: .*; mbpp wants ") as told:
        read(config, Tokenizer.characters(LETTERS, chat_template=TEMPLATE))
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_run_trains_on_and_is_evaluated_by_the_task(tmp_path, monkeypatch):
    """The whole command, with a model that has nothing learnt: its figures are those of the Task."""
    tokenizer = Tokenizer.characters(LETTERS + "".join(set(ALPHABET) - set(LETTERS)), chat_template=TEMPLATE)
    folder = tmp_path / "model"
    config = dataclasses.replace(preset("tiny"), num_hidden_layers=1, vocab_size=128, num_nextn_predict_layers=0)
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    save_model(Model(config, graphdef, weights), folder, tokenizer=tokenizer.files)
    data = rows_file(tmp_path / "rows.jsonl", GSM8K)
    given = ["--model", str(folder), "--data", data, "--tasks", "gsm8k", "--accuracy", "task", "--weight-format", "0"]
    sizes = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["train", *given, *sizes, "--output", str(tmp_path / "run")])
    run(train.main)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] == summary["accuracy_after"] == 0.0 and summary["questions"] == 1


def test_puzzles_ask_for_tags_and_late_questions_are_of_no_task(tmp_path):
    """One data set of puzzles, and talk without answers that joins it: each reward sees the columns that it wants."""
    talk = [row | {"numbers": []} for row in general_prompts()]
    files = [rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in (("puzzles", PUZZLES), ("talk", talk))]
    given = {"data": (files[0],), "late_data": (files[1],), "tasks": ("puzzles",), "weight_format": 1.0}
    config = settings(tmp_path, prompts_per_step=16, eval_questions=3, **given)
    with Graders() as graders:
        check_tasks(config, graders)
        with pytest.raises(ValueError, match="format: got 'boxed' .* wanted what benchmarks ask for: --format tags"):
            check_tasks(with_values(config, {"format": "boxed"}), graders)
        prompts = next(read(config, puzzle_tokenizer()).prompts)
        names = {name for prompt in prompts for name in prompt.columns}
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        assert set(columns["task"]) == {"puzzles", None}
        texts = [f"<think>1</think><answer>{right}</answer>" for right in columns["answer"]]
        scores = task_reward(graders)([""] * len(texts), texts, [[]] * len(texts), **columns)
    assert scores == [None if task is None else 1.0 for task in columns["task"]]
    assert set(columns["language"]) == {"en", "zh"}
    assert [who is None for who in columns["who"]] == [task is not None for task in columns["task"]]
