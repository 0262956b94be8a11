"""Every step lowers for GPUs and TPUs where there are none: what the platforms choose between is chosen then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from deepseek_jax.config import preset
from deepseek_jax.plan.compiled import Task, trace
from deepseek_jax.sharding import Layout, make_mesh

step, platform = sys.argv[1:]
training = step in ("train", "grpo")
sizes = {"fsdp": 2, "expert": 2, "tensor": 2} if training else {"data": 2, "expert": 2, "tensor": 2}
layout = Layout(
    mesh=make_mesh(**sizes),
    workload="train" if training else "serve",
    stacked=True,
    remat="all_but_attention" if training else "nothing",
    lanes=128 if platform == "tpu" else 1,
)
task = Task(config=preset("tiny"), layout=layout, step=step, batch=16, context=32)
task.check()
text = trace(task).lower(platform).as_text()
for found in ("ragged_all_to_all", "all_to_all", "all_gather", "tpu_custom_call", "chlo.ragged_dot", "tiles_"):
    print(found, found in text)
"""


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("step", ["prefill", "decode", "train", "grpo"])
def test_a_step_lowers_for_a_platform_that_is_not_there(step, platform):
    """Rows travel raggedly on both; experts are grouped products on TPU and loops over tiles on GPU."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, step, platform]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {name: word == "True" for name, word in map(str.split, done.stdout.splitlines())}
    assert found["ragged_all_to_all"]
    assert found["chlo.ragged_dot"] is (platform == "tpu")
    if platform == "cuda":
        assert not found["tpu_custom_call"]
