"""A mean over seeds has the error of the seeds, and a difference that of the seeds' differences."""

import json

import pytest

from experiments.r1_seeds import Config, accuracies, main, over_seeds, rows


def stage(folder, number: int, name: str, accuracy: float | None) -> None:
    (folder / name).mkdir(parents=True)
    done = {} if accuracy is None else {"report": {"accuracy": accuracy}, "outputs": {}}
    (folder / name / "stage.json").write_text(json.dumps({"name": name, "number": number, **done}))


@pytest.fixture
def runs(tmp_path):
    """Two seeds, the second of which has no control and is still in its last stage."""
    values = {"0": (0.1, 0.3, 0.4), "1": (0.2, 0.5, None)}
    for seed, of in values.items():
        for number, (name, accuracy) in enumerate(zip(("cold_start", "rl_1", "rl_2"), of, strict=True)):
            stage(tmp_path / seed, number, name, accuracy)
    stage(tmp_path / "0" / "controls", 0, "shuffled", 0.15)
    return tmp_path / "0", tmp_path / "1"


def test_differences_are_of_the_same_seed(runs):
    found = {row["of"]: row for row in rows([accuracies(run) for run in runs])}
    assert found["rl_1"]["mean"] == 0.4 and found["rl_1"]["stderr"] == pytest.approx(0.1)
    assert found["rl_1 less cold_start"]["seeds"] == [0.2, 0.3]
    assert found["rl_1 less cold_start"]["stderr"] == pytest.approx(0.05)
    assert found["rl_1 less shuffled"] == {"of": "rl_1 less shuffled", "mean": 0.15, "stderr": None, "seeds": [0.15]}
    assert found["rl_2 less rl_1"]["seeds"] == [0.1] and "base less rl_1" not in found


def test_the_error_is_that_of_the_mean():
    assert over_seeds("x", [0.0, 0.3, 0.6])["stderr"] == pytest.approx(0.3 / 3**0.5, abs=1e-4)


def test_each_is_a_line(runs, capsys):
    main(Config(runs=runs))
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {
        "of": "cold_start", "mean": 0.15, "stderr": 0.05, "seeds": [0.1, 0.2],
    }  # fmt: skip


def test_one_seed_and_a_run_without_rl_are_refused(runs):
    with pytest.raises(ValueError, match="runs: got 1, wanted at least 2"):
        Config(runs=runs[:1])
    (runs[1] / "rl_1" / "stage.json").write_text(json.dumps({"name": "rl_1", "number": 1}))
    with pytest.raises(ValueError, match="got no stage rl_1 that is done"):
        accuracies(runs[1])
