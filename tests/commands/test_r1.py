"""The recipe: all its stages at their smallest, what goes on and what is refused, and the report from files alone."""

import dataclasses
import json
import re
import shutil
import sys

import pytest

from deepseek_jax.cli import run
from deepseek_jax.commands import r1, rejection, report, toy
from deepseek_jax.commands.r1_presets import LAPTOP, PAPER
from deepseek_jax.config import preset

TINY = {
    "questions": {"train": 60, "held_out": 24, "demonstrations": 48, "facts": 64},
    "base": {"steps": 2, "eval_rows": 4},
    "cold_start": {"steps": 2, "eval_rows": 4},
    "rl_1": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "eval_questions": 4},
    "rejection": {"samples": 2, "max_tokens": 8, "limit": 4},
    "sft": {"steps": 2, "eval_rows": 1, "batch_size": 4},
    "rl_2": {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 8,
        "eval_questions": 4,
        "late_step": 1,
    },
    "distill": {"steps": 2, "batch_size": 2, "max_new_tokens": 8, "eval_rows": 2, "warmup": 0},
    "evaluation": {"max_tokens": 8},
}
SETS = [f"{stage}.{name}={value}" for stage, values in TINY.items() for name, value in values.items()]
MODELS = ["base", "cold_start", "rl_1", "sft", "rl_2"]


def shallow():
    moe = dataclasses.replace(preset("tiny").moe, first_k_dense_replace=0)
    return dataclasses.replace(preset("tiny"), num_hidden_layers=1, moe=moe)  # less to compile


def main(monkeypatch, command, *given: str) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["r1", *given])
    monkeypatch.setattr(toy, "preset", lambda name: shallow())
    try:
        run(command.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, which was stopped on its way: of the first start rejection sampling keeps nothing."""
    folder = tmp_path_factory.mktemp("r1") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = ("--output", str(folder), "--set", *SETS)
        assert main(monkeypatch, r1, *asked) == 1
        before = times(folder)
        assert list(before) == ["questions", "base", "cold_start", "rl_1", "rejection"]
        counts = json.loads((folder / "rejection" / rejection.COUNTS).read_text())
        assert counts["kept"] == 0 and sum(counts["rejected"].values()) == counts["samples"] == 8
        drawn = (folder / "rejection" / "samples.jsonl").read_bytes()
        keep = lambda samples, *_, **__: [*[None] * (len(samples) - 1), "false step"]
        monkeypatch.setattr(rejection, "verdicts", keep)
        assert main(monkeypatch, r1, *asked) == 0
        after = times(folder)
        assert {name: after[name] for name in before if name != "rejection"} == {
            name: of for name, of in before.items() if name != "rejection"
        }
        assert (folder / "rejection" / "samples.jsonl").read_bytes() == drawn  # none is drawn again
    return folder


def times(folder) -> dict[str, int]:
    """When each stage was last marked, by its name, in order."""
    found = sorted((json.loads(path.read_text())["number"], path) for path in folder.glob("*/stage.json"))
    return {path.parent.name: path.stat().st_mtime_ns for _, path in found}


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_a_score_after_every_stage_and_one_report(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [of["name"] for of in summary["stages"]] == MODELS and summary["finished"]
    for of in summary["stages"]:
        assert of.keys() == {"name", "accuracy", "stderr", "questions", "seconds"}
        assert 0 <= of["accuracy"] <= 1 and of["questions"] == 24 and of["seconds"] > 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    for words in (
        "Rejection sampling",
        "Lineage",
        "Accuracy by level and family",
        "rl_2: grpo",
        "Settings",
        "Cost",
        "Left out",
    ):
        assert words in page
    assert not re.search(r'(src|href)="https?:', page)


@pytest.mark.slow
def test_the_report_is_written_anew_from_the_files_alone(finished, tmp_path, monkeypatch):
    copy = tmp_path / "moved"
    shutil.copytree(finished, copy)
    for name in ("report.html", "summary.json"):
        (copy / name).unlink()
    assert main(monkeypatch, report, str(copy)) == 0
    for name in ("report.html", "summary.json"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_a_changed_number_is_refused(finished, monkeypatch, capsys):
    before = times(finished)
    monkeypatch.setattr(rejection, "main", None)
    assert main(monkeypatch, r1, "--output", str(finished), "--set", *SETS) == 0
    assert times(finished) == before and "stage rl_2: done before, in " in capsys.readouterr().out
    assert main(monkeypatch, r1, "--output", str(finished), "--set", *SETS, "rl_1.lr=0.5") == 1
    assert f"rl_1/stage.json: the stage there has lr {LAPTOP['rl_1']['lr']}, not 0.5" in capsys.readouterr().err
    assert times(finished) == before


@pytest.mark.slow
def test_the_last_stage_may_be_distillation_of_what_is_there(finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "distilled"
    shutil.copytree(finished, copy)
    assert main(monkeypatch, r1, "--output", str(copy), "--last-stage", "distill", "--set", *SETS) == 0
    told = capsys.readouterr().out
    assert "stage sft: done before" in told and "stage distill: done in" in told
    mark = json.loads((copy / "distill" / "stage.json").read_text())
    assert set(mark["inputs"]) == {"model", "data ask", "data held_out", "data teacher 0"}
    assert (
        mark["inputs"]["data teacher 0"]
        == json.loads((copy / "rl_1" / "stage.json").read_text())["outputs"]["digests"]["model"]
    )


@pytest.mark.slow
def test_no_held_out_question_stands_in_what_any_stage_learnt(finished):
    rows = lambda name: [json.loads(line) for line in (finished / name).read_text("utf-8").splitlines()]
    held_out = {row["question"] for row in rows("questions/held_out.jsonl")}
    learnt = [row["messages"][0]["content"] for row in rows("questions/demonstrations.jsonl")]
    learnt += [row["question"] for row in rows("questions/train.jsonl")]
    learnt += [row["messages"][0]["content"] for row in rows("mixture/rows.jsonl")]
    assert len(held_out) == 24 and not held_out & set(learnt)


# --- settings ------------------------------------------------------------------------------------


def test_the_recipe_reads_top_to_bottom():
    config = r1.Config()
    found = r1.stages(config, r1.options_by_stage(config))
    assert [(of.name, of.model) for of in found] == [
        ("questions", None), ("base", None), ("cold_start", "base"), ("rl_1", "cold_start"), ("rejection", "rl_1"),
        ("mixture", None), ("sft", "base"), ("rl_2", "sft"),
    ]  # fmt: skip
    settings = {of.name: of.settings for of in found}
    assert settings["rl_1"]["evaluation samples"] == LAPTOP["evaluation"]["samples"]
    assert settings["rl_2"]["late_step"] == LAPTOP["rl_2"]["late_step"] and settings["rl_2"]["scorer"]
    json.dumps(settings)  # as stage.json holds them


def test_the_paper_is_with_a_given_model_and_its_numbers(tmp_path):
    model, file = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file.write_text("{}")
    config = r1.Config(
        preset="paper", model=model, data=file, held_out=file, cold_start=file, benchmark="gsm8k", set=("rl_1.steps=3",)
    )
    found = {of.name: of for of in r1.stages(config, r1.options_by_stage(config))}
    assert list(found) == ["cold_start", "rl_1", "rejection", "mixture", "sft", "rl_2"]
    rl = found["rl_1"].settings
    published = {
        "lr": 3e-6,
        "beta": 0.001,
        "temperature": 1.0,
        "group_size": 16,
        "max_new_tokens": 32_768,
        "epsilon_high": 10,
    }
    assert {name: rl[name] for name in published} == published and rl["steps"] == 3
    assert rl["prompts_per_step"] * rl["group_size"] == 8_192 and rl["updates_per_rollout"] == 16
    assert found["rl_2"].settings["temperature"] == 0.7 and PAPER["rl_1"]["steps"] * 16 == 10_400
    sft = found["sft"].settings
    assert (sft["lr"], sft["final_ratio"], sft["batch_size"], sft["max_length"]) == (5e-5, 0.1, 128, 32_768)
    assert found["rejection"].settings["benchmark"] == "gsm8k"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--preset", "paper"], "model: got none with --preset paper, wanted the base model: --model FOLDER"),
        (["--benchmark", "gsm8k"], "benchmark: got gsm8k without --model"),
        (["--data", "x.jsonl"], "data: got x.jsonl without --model"),
        (["--model", "x"], "data: got none with --model, wanted a file: --data FILE"),
        (["--set", "rl_1.lr"], "set: got 'rl_1.lr', wanted STAGE.OPTION=VALUE"),
        (["--set", "rl_9.lr=1"], "set: got the stage 'rl_9', wanted one of questions, base"),
        (["--set", "rl_1.lrr=1"], "set: rl_1 has no option 'lrr'"),
        (["--set", "rl_1.lr=fast"], "set: rl_1.lr: got 'fast', wanted a number"),
        (["--set", "rl_1.group_size=1"], "group_size: got 1, wanted at least 2"),
        (["--set", "mixture.general_share=1.5"], "mixture.general_share: got 1.5"),
        (["--set", "questions.train=many"], "set: questions.train: got 'many', wanted a whole number"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, given, says):
    assert main(monkeypatch, r1, "--output", str(tmp_path / "run"), *given) in (1, 2)
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


GOOD = '{"question": "1 + 1?", "answer": "#### 2"}\n'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("data", None, "data: {file}: no such file or folder"),
        ("held_out", None, "held_out: {file}: no such file or folder"),
        ("cold_start", "", "cold_start: {file}: the data set is empty"),
        ("data", '{"question": "1 + 1?"}\n', "data: {file}:1: "),
        ("held_out", GOOD + '{"question": "1 + 1?"}\n', "held_out: {file}:2: "),
        ("general", "[\n", "general: {file}"),
    ],
)
def test_given_files_are_read_before_anything_is_trained(tmp_path, monkeypatch, capsys, name, text, says):
    files = {of: tmp_path / f"{of}.jsonl" for of in ("data", "held_out", "cold_start", "general")}
    for of, file in files.items():
        if of != name or text is not None:
            file.write_text(GOOD if of != name else text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    given = [word for of, file in files.items() for word in (f"--{of.replace('_', '-')}", str(file))]
    asked = ["--output", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--benchmark", "gsm8k"]
    assert main(monkeypatch, r1, *asked, *given) == 1
    assert says.format(file=files[name]) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_samples_are_kept_in_the_form_that_is_reinforced(tmp_path, name):
    """Whatever the questions are, and the preset."""
    (tmp_path / "config.json").write_text("{}")
    files = {of: tmp_path / "rows.jsonl" for of in ("data", "held_out", "cold_start")}
    config = r1.Config(model=tmp_path, preset=name, benchmark="gsm8k", **files)
    found = {stage.name: stage for stage in r1.stages(config, r1.options_by_stage(config))}
    assert found["rejection"].settings["form"] == found["rl_1"].settings["format"] == "boxed"


def test_what_would_be_run_is_shown_and_nothing_is(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, r1, "--output", str(tmp_path / "run"), "--show", "--set", "rl_1.lr=0.25") == 0
    told = capsys.readouterr().out
    assert "[rl_1]" in told and "lr = 0.25" in told and not (tmp_path / "run").exists()


def test_a_folder_without_stages_has_no_report(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, report, str(tmp_path)) == 1
    assert "got no folder with a stage.json in it" in capsys.readouterr().err
