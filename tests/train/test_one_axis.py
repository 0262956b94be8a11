"""Twenty-five steps with weight decay on two devices, divided by each axis of the mesh alone, against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.model.scan_layers import stack_layers, unstack_layers
from deepseek_jax.sharding import AXES, LOCAL, Layout, make_mesh
from deepseek_jax.train.step import StepConfig
from tests.flags import environment
from tests.train import test_mixed_precision as one_device

ROOT = Path(__file__).resolve().parents[2]
STEPS = 25


def trained(layout: Layout) -> dict:
    """Losses of all steps, and the last weights by layer; of an unrolled model on LOCAL, else of a scanned one."""
    config, weights = one_device.CONFIGS["latent"], one_device.first_weights("latent")
    if layout.scan_layers:
        weights = stack_layers(weights, config, layout)
    step = StepConfig(bias_gamma=1e-3)
    of_adamw = {"weight_decay": 0.1, "learning_rate": 1e-3}
    state, losses = one_device.trained("latent", STEPS, step, weights=weights, layout=layout, **of_adamw)
    last = unstack_layers(state.weights, config, LOCAL) if layout.scan_layers else state.weights
    return {"losses": losses, "weights": one_device.params(last)}


def compare() -> None:
    """In the process with two devices: the largest differences on each axis, as JSON."""
    wanted, found = trained(LOCAL), {}
    most = max(1, wanted["losses"].max())
    for axis in AXES:
        got = trained(Layout(mesh=make_mesh(**{axis: 2}), scan_layers=True))
        of_weights = (np.abs(got["weights"][name] - leaf).max() for name, leaf in wanted["weights"].items())
        found[axis] = float(np.abs(got["losses"] - wanted["losses"]).max() / most), float(max(of_weights))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def differences() -> dict[str, tuple[float, float]]:
    own = os.environ | environment(2) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from tests.train.test_one_axis import compare; compare()"]
    child = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_a_stack_on_one_axis_trains_as_its_layers_do_on_one_device(axis, differences):
    losses, weights = differences[axis]
    print(f"{axis}: losses {losses:.1e}, weights {weights:.1e}")
    assert losses < 1e-6 and weights < 2e-5
