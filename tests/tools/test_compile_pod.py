"""Steps compiled by the TPU compiler, for pods that are not there: what fits, and what it costs beside theory."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_jax.config import preset
from deepseek_jax.plan.compiled import Task, trace
from deepseek_jax.sharding import Layout, make_mesh

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[pod]'"),
]


def compile_pod(*further: str, **options: object) -> subprocess.CompletedProcess:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / "tools/compile_pod.py"), *words, *further]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as users compile
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


def figures(**options: object) -> dict:
    done = compile_pod("--json", **options)
    assert done.returncode in (0, 3), done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is (done.returncode == 0)
    return found


R1_ON_64 = {"preset": "r1-671b", "topology": "v5p:4x4x4"}
R1_ON_512 = {"preset": "r1-671b", "topology": "v5p:8x8x8", "batch": 512, "context": 4096}


def test_r1_decodes_on_64_chips():
    found = figures(**R1_ON_64, step="decode", batch=512, context=4096)
    assert found["fits"] and found["chips"] == 64 and found["headroom"] >= 0.10
    assert found["compile_seconds"] < 300
    assert found["flops"] <= 1.10 * found["analytic_flops"]
    assert found["bytes_accessed"] <= 1.3 * found["analytic_bytes"]


def test_r1_prefills_on_64_chips():
    found = figures(**R1_ON_64, step="prefill", batch=64, context=4096)
    assert found["fits"] and found["headroom"] >= 0.10
    assert found["compile_seconds"] < 300
    assert found["flops"] <= 1.12 * found["analytic_flops"]  # room for blocks of rows that are part empty


@pytest.mark.parametrize("step", ["train", "grpo"])
def test_r1_learns_on_512_chips(step):
    found = figures(**R1_ON_512, step=step)
    assert found["fits"]
    assert found["flops"] <= 1.4 * found["analytic_flops"]
    assert found["collective_bytes"] <= 1.5 * found["analytic_collective_bytes"]


@pytest.mark.parametrize("step", ["decode", "prefill"])
@pytest.mark.parametrize(
    "preset, topology", [("v2-lite", "v5e:4x4"), ("v2-lite", "v6e:4x4"), ("distill-qwen-32b", "v6e:4x4")]
)
def test_smaller_models_are_served_by_sixteen_chips(preset, topology, step):
    found = figures(preset=preset, topology=topology, step=step)
    assert found["fits"] and found["chips"] == 16


@pytest.mark.parametrize("step", ["train", "grpo"])
def test_a_smaller_model_learns_on_sixteen_chips(step):
    found = figures(preset="v2-lite", topology="v6e:4x4", step=step)
    assert found["fits"] and found["planned_bytes"] == pytest.approx(found["used_bytes"], rel=0.05)


@pytest.mark.parametrize("preset, topology", [("v2-lite", "v6e:4x4"), ("r1-671b", "v5p:8x8x8")])
def test_trained_weights_are_laid_out_for_sampling(preset, topology):
    """Whatever a chip is sent is less than twice what it lacks; memory is what the planner says."""
    found = figures(preset=preset, topology=topology, step="sync")
    assert found["fits"] and found["tokens_per_second"] is None
    assert 1 <= found["collective_bytes"] / found["analytic_collective_bytes"] <= 2
    assert found["planned_bytes"] == pytest.approx(found["used_bytes"], rel=0.05)


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_a_v7x_is_two_devices(step):
    """Figures are a device's, half a chip's; names of the maker's and of the compiler's are the same chips."""
    found = figures(preset="v2-lite", topology="v7x:2x2x1", step=step)
    assert (found["fits"], found["chips"], found["devices"]) == (True, 4, 8)
    assert found["hbm_bytes"] == 96 * 2**30 and found["headroom"] >= 0.5
    assert 0.99 * found["analytic_flops"] <= found["flops"] <= 1.10 * found["analytic_flops"]
    assert found["collective_bytes"] >= found["analytic_collective_bytes"]  # what the sparse cores send is counted
    assert found["uncounted"] == []
    assert found["seconds"] == max(found["bounds"].values())
    assert found["bounds"]["compute"] == pytest.approx(found["flops"] / (2307e12 / 2))


@pytest.mark.parametrize("stage, parts", [("rl_1", 8), ("sft", 2)])
def test_r1s_own_stages_fit_512_chips(stage, parts):
    """512 samples, or 128 packed rows, of 32,768 tokens an update, by the paper's preset; moments in float32."""
    cut = {"mesh": "expert=32,fsdp=2,context=8", "micro_batches": parts}
    found = figures(preset="r1-671b", topology="v5p:8x8x8", stage=stage, **cut)
    assert found["fits"] and found["headroom"] >= 0.05
    assert found["flops"] <= 1.55 * found["analytic_flops"]
    assert found["collective_bytes"] <= 3.5 * found["analytic_collective_bytes"]


def sums_of_parts_are_cut() -> None:
    """No loop carries a gradient of the whole vocabulary from one part of a batch to the next."""
    from jax.experimental import topologies

    config = dataclasses.replace(preset("r1-671b"), quantization=None, moe=None, num_nextn_predict_layers=0)
    small = {"num_hidden_layers": 2, "hidden_size": 1024, "vocab_size": 65536, "num_attention_heads": 8}
    config = dataclasses.replace(config, intermediate_size=256, **small)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh(devices, fsdp=2, context=2)
    layout = Layout(mesh=mesh, lanes=128, scan_layers=True, remat="all_but_attention")
    task = Task(config=config, layout=layout, step="grpo", batch=16, context=512, micro_batches=8)
    text = trace(task).lower().compile().as_text()
    carried = re.findall(r" = \((.*)\) while\(", text)
    assert any("f32[65536,256]" in of for of in carried)
    assert not any("f32[65536,1024]" in of or "f32[1024,65536]" in of for of in carried)


def test_sums_of_parts_are_cut():
    code = f"from {__name__} import sums_of_parts_are_cut as law; law()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_says_so():
    """V2-Lite's state of training on four chips of 16 GB: the compiler gives up, and says what it would have taken."""
    found = figures(preset="v2-lite", topology="v5e:2x2", step="train")
    assert not found["fits"] and found["used_bytes"] > found["hbm_bytes"] and found["chips"] == 4


@pytest.mark.parametrize(
    "options, says",
    [
        ({"topology": "v5p:2x3x4"}, "topology: got 'v5p:2x3x4', wanted a TPU and its shape"),
        ({"topology": "v4:2x2x1"}, "of TPUs there are v5e, v5p, v6e, v7x"),
        ({"topology": "h100"}, "topology: got 'h100', wanted a TPU and its shape"),
        ({"topology": "v9z:4x4"}, "topology: got 'v9z:4x4', wanted a TPU and its shape"),
        ({"mesh": "expert=64,tensor=2"}, "mesh: 1 x 1 x 64 x 1 x 2 does not make the 64 devices there are"),
        ({"mesh": "expert=64,pipeline=1"}, "mesh: got axis 'pipeline', wanted one of data, fsdp, expert"),
        ({"mesh": "expert:64"}, "mesh: got 'expert:64', wanted sizes of axes such as expert=64,fsdp=8"),
        ({"preset": "v2-lite", "mesh": "tensor=64"}, "num_attention_heads 16 is not divisible by mesh axis tensor 64"),
        (
            {"topology": "v5p:4x4x5", "mesh": "expert=80", "step": "train"},
            "n_routed_experts 256 is not divisible by mesh axis expert 80",
        ),
        ({"preset": "distill-qwen-32b", "mesh": "expert=64"}, "mesh: expert 64 for a model without experts, wanted 1"),
        ({"batch": 100}, "batch 100 is not divisible by the 64 parts that the mesh cuts it into"),
        ({"step": "train", "batch": 100}, "batch 100 is not divisible by mesh ax"),
        ({"preset": "r1"}, "preset: got 'r1'"),
        ({"serve_mesh": "tensor=8"}, "serve_mesh: got 'tensor=8' to decode, wanted it with --step sync alone"),
        ({"step": "sync", "serve_mesh": "data=2"}, "serve_mesh: got axis 'data', wanted expert or tensor"),
        ({"step": "sync", "serve_mesh": "tensor=3"}, "mesh: expert 1 x tensor 3 do not divide the 64 devices"),
    ],
)
def test_what_cannot_work_is_refused_before_compiling(options, says):
    done = compile_pod(**(R1_ON_64 | {"step": "decode"} | options))
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]


def test_slices_lie_along_data():
    """Of two slices, every other axis stays inside one; and a mesh that cannot be cut so is refused."""
    code = """
import sys
sys.path[:0] = [sys.argv[1]]
from deepseek_jax.plan.topology import topology
topology("v5p:2x2x2")
from jax.experimental import topologies
from deepseek_jax.sharding import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2", num_slices=2).devices
mesh = make_mesh(devices, data=4, expert=4)
slices = [[device.slice_index for device in part.flat] for part in mesh.devices]
assert slices == [[0] * 4, [0] * 4, [1] * 4, [1] * 4], slices
try:
    make_mesh(devices, expert=16)
except ValueError as refusal:
    assert str(refusal) == "mesh: data 1 is not divisible by the 2 slices there are", refusal
else:
    raise AssertionError("not refused")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
