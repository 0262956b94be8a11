"""Every step lowers for CUDA where there is none: what a program chooses by platform is chosen then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("prefill", "decode", "train", "grpo")
CODE = """
import json, sys
from deepseek_jax.config import preset
from deepseek_jax.plan.compiled import Task, trace
from deepseek_jax.sharding import Layout, make_mesh

def text(step):
    training = step in ("train", "grpo")
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2} if training else {"data": 2, "expert": 2, "tensor": 2}
    layout = Layout(
        mesh=make_mesh(**sizes),
        workload="train" if training else "serve",
        scan_layers=True,
        remat="all_but_attention" if training else "nothing",
    )
    task = Task(config=preset("tiny"), layout=layout, step=step, batch=16, context=32)
    task.check()
    return trace(task).lower("cuda").as_text(debug_info=True)

texts = {step: text(step) for step in sys.argv[1:]}
words = ("ragged_all_to_all", "all_to_all", "tpu_custom_call", "chlo.ragged_dot", "/tiles_", "mhlo.num_partitions = 8")
print(json.dumps({step: {word: found.count(word) for word in words} for step, found in texts.items()}))
"""


@pytest.fixture(scope="module")
def lowered() -> dict[str, dict[str, int]]:
    """How often words stand in each step's StableHLO, for a mesh of eight CPU devices."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, *STEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_lowers_for_cuda(step, lowered):
    """Rows travel raggedly and experts run in tiles; nothing of a TPU's kernels is in it."""
    found = lowered[step]
    assert found["ragged_all_to_all"] and found["/tiles_"] and found["mhlo.num_partitions = 8"]
    assert not found["tpu_custom_call"] and not found["chlo.ragged_dot"]
