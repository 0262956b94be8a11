"""Stages: what is done stays done, what was begun goes on, and other settings or inputs are told by name."""

import json
import re

import pytest

from deepseek_jax.train.stages import MARK, Done, Stage, marks, run_stages


class Log(list):
    """Stages that write down that they ran, and what they were given."""

    def stage(self, name, model=None, data=None, *, fails=False, **settings):
        def does(folder, given_model, given_data):
            self.append(name)
            texts = [path.read_text() for path in given_data.values()]
            if given_model is not None:
                texts.append((given_model / "weights.safetensors").read_text())
            if fails:
                raise ValueError(f"{name} fails")
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "weights.safetensors").write_text(f"{name}({' '.join(texts)})")
            (folder / "rows.jsonl").write_text(f"rows of {name}")
            return Done(folder / "model", {"rows": folder / "rows.jsonl"}, {"accuracy": 0.5})

        return Stage(name, does, settings, model, data or {})

    def three(self, **changes):
        return [
            self.stage("one", lr=1.0),
            self.stage("two", "one", {"rows": ("one", "rows")}, lr=changes.get("lr", 2.0), fails="fails" in changes),
            self.stage("three", "two", {"first": ("one", "rows"), "second": ("two", "rows")}),
        ]


@pytest.fixture
def log():
    return Log()


def test_models_and_data_go_from_stage_to_stage(tmp_path, log):
    found = run_stages(tmp_path, log.three())
    assert (found["three"].model / "weights.safetensors").read_text() == (
        "three(rows of one rows of two two(rows of one one()))"
    )
    assert log == ["one", "two", "three"]
    assert [(mark["folder"], mark["report"]) for mark in marks(tmp_path)] == [
        (name, {"accuracy": 0.5}) for name in ("one", "two", "three")
    ]


def test_what_is_done_is_not_run_again_and_what_failed_goes_on(tmp_path, log):
    with pytest.raises(ValueError, match="two fails"):
        run_stages(tmp_path, log.three(fails=True))
    assert "outputs" not in json.loads((tmp_path / "two" / MARK).read_text())
    found = run_stages(tmp_path, log.three())
    assert log == ["one", "two", "two", "three"]
    again = run_stages(tmp_path, log.three())
    assert log == ["one", "two", "two", "three"]
    assert again == {name: done._replace(data=dict(done.data)) for name, done in found.items()}


def test_a_finished_run_may_be_moved(tmp_path, log):
    run_stages(tmp_path / "here", log.three())
    (tmp_path / "here").rename(tmp_path / "there")
    run_stages(tmp_path / "there", log.three())
    assert log == ["one", "two", "three"]


@pytest.mark.parametrize("fails", [True, False])
def test_changed_settings_are_refused_by_name_before_anything_runs(tmp_path, log, fails):
    if fails:  # a stage that was begun is held to its settings too
        with pytest.raises(ValueError, match="fails"):
            run_stages(tmp_path, log.three(fails=True))
    else:
        run_stages(tmp_path, log.three())
    count = len(log)
    with pytest.raises(ValueError, match=re.escape("the stage there has lr 2.0, not 3.0; give the same settings")):
        run_stages(tmp_path, log.three(lr=3.0))
    assert len(log) == count


def test_changed_inputs_are_refused_by_name(tmp_path, log):
    rows = tmp_path / "own.jsonl"
    rows.write_text("1")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.safetensors").write_text("base")
    stages = lambda: [log.stage("one", model, {"rows": rows})]
    run_stages(tmp_path / "run", stages())
    rows.write_text("2")
    with pytest.raises(ValueError, match=r"one began with another data rows: its fingerprint was \w+ and is \w+"):
        run_stages(tmp_path / "run", stages())
    rows.write_text("1")
    (model / "weights.safetensors").write_text("other")
    with pytest.raises(ValueError, match="one began with another model"):
        run_stages(tmp_path / "run", stages())
    (model / "weights.safetensors").write_text("base")
    run_stages(tmp_path / "run", stages())
    assert log == ["one"]


@pytest.mark.parametrize("what", ["model/weights.safetensors", "rows.jsonl"])
def test_what_a_stage_gave_and_somebody_changed_is_refused(tmp_path, log, what):
    run_stages(tmp_path, log.three())
    (tmp_path / "one" / what).write_text("tampered")
    with pytest.raises(ValueError, match="one/stage.json: .* of this stage was changed or removed after it was done"):
        run_stages(tmp_path, log.three())
    (tmp_path / "one" / what).unlink()
    with pytest.raises(ValueError, match="changed or removed"):
        run_stages(tmp_path, log.three())
