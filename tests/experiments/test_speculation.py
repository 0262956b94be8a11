"""What a trained MTP module saves, and what its guesses are worth by other rules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops import sampling as ops
from experiments.speculation import accepted

ROOT = Path(__file__).resolve().parents[2]
GRID = (np.arange(4096) + 0.5) / 4096


@given(seed=st.integers(0, 2**31), width=st.sampled_from([0.1, 1.0, 4.0]))
def test_the_share_that_the_same_noise_accepts_is_what_the_sampler_accepts(seed, width):
    """Over even noise, to one part in 500; and it lies between none and what rejection sampling accepts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (2, 8)) + [[0], [1]] * rng.normal(0, width, (1, 8))
    p, q = (np.exp(of) / np.exp(of).sum() for of in logits)
    best, same, rejection = (float(part[0]) for part in accepted(p[None], q[None]))
    drawn = [ops.sample(jnp.tile(jnp.float32(of), (4096, 1)), jnp.float32(GRID)) for of in logits]
    assert same == pytest.approx(float(np.mean(drawn[0] == drawn[1])), abs=2e-3)
    assert 0 <= same <= rejection + 1e-9 and best == p[q.argmax()]
    assert rejection == pytest.approx(1 - np.abs(p - q).sum() / 2, abs=1e-9)


@pytest.mark.slow
def test_a_module_that_was_trained_with_its_model_saves_a_third_of_the_steps(tmp_path):
    """With 1 to 3 drafts, greedily and at temperature 1; the commands as in docs/benchmarks.md."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in (
        ["experiments/sft.py", "--mtp-modules", "1", "--output", str(tmp_path / "run")],
        ["experiments/speculation.py", str(tmp_path / "run" / "model"), "--output", str(tmp_path / "found.json")],
    ):
        child = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(row["temperature"], row["drafts"]) for row in found["engine"]} == {
        (t, n) for t in (0, 1) for n in (1, 2, 3)
    }
    for row in found["engine"]:
        assert row["steps saved"] >= 0.3 and row["acceptance"] >= 0.5
        assert row["accept length"] == pytest.approx(1 / (1 - row["steps saved"]))
    [worth] = found["first guess"]
    assert worth["same noise"] <= worth["rejection"] + 1e-6 and worth["same noise"] >= 0.5
