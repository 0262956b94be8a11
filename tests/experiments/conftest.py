"""A run of `r1` as its marks tell of it, without any model."""

import json

import pytest

from deepseek_jax.commands import r1
from deepseek_jax.train.stages import _told

FILES = {
    "questions": {of: f"{of}.jsonl" for of in ("train", "held_out", "demonstrations", "facts")},
    "mixture": {"rows": "rows.jsonl"},
}


@pytest.fixture
def marked_run(tmp_path):
    """Every stage of seed 3 is done; of the updates of two there are times: 4 of about 2 s, then 3 of 10 s."""
    config = r1.Config(seed=3, set=("rl_1.lr=3e-4",))
    for number, stage in enumerate(r1.stages(config, r1.options_by_stage(config))):
        came = {"model": stage.model, "data": {name: _told(of) for name, of in stage.data.items()}}
        outputs = {"model": "model", "data": FILES.get(stage.name, {})}
        mark = {"name": stage.name, "number": number, "settings": stage.settings, "from": came, "outputs": outputs}
        (tmp_path / stage.name).mkdir()
        (tmp_path / stage.name / "stage.json").write_text(json.dumps(mark))
    for name, seconds in {"cold_start": (9.0, 2.0, 2.0, 2.0), "rl_1": (50.0, 10.0, 10.0)}.items():
        rows = [{"stage": "x", "step": step, "time": 0.0, "step_time": of} for step, of in enumerate(seconds, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
