"""This project's kernels, a few examples each; `deepseek-jax kernels --examples 2000` tries more."""

from importlib.util import find_spec

import pytest

from deepseek_jax.testing import search
from deepseek_jax.testing.modules import declared
from deepseek_jax.testing.shapes import SHAPES
from deepseek_jax.testing.targets import TARGETS, compile_for, targets_of
from tests.laws import found_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

BY_NAME = {kernel.name: kernel for kernel in declared()}
ALONE = [kernel.name for kernel in BY_NAME.values() if kernel.devices == 1]
ON_MESHES = [kernel.name for kernel in BY_NAME.values() if kernel.devices > 1]


def holds(name: str, examples: int, shapes: int = SHAPES) -> None:
    found = search(BY_NAME[name], examples, shapes=shapes)
    assert found.fault is None, f"{found.fault}\n{found.fault.case and found.fault.case.as_json()}"
    assert found.examples == examples and found.worst <= 1


@pytest.mark.parametrize("name", ALONE)
def test_a_kernel_holds(name):
    """In its simplest shape and the outermost one."""
    holds(name, 4, shapes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_kernel_holds_at_length(name):
    holds(name, 60)


def kernels_on_meshes() -> None:
    for name in ON_MESHES:
        holds(name, 2, shapes=2)


def kernels_on_meshes_at_length() -> None:
    for name in ON_MESHES:
        holds(name, 30)


@pytest.mark.parametrize("law", [kernels_on_meshes, pytest.param(kernels_on_meshes_at_length, marks=pytest.mark.slow)])
def test_on_eight_devices(law):
    (said,) = found_of([law], devices=8).values()
    assert said == "", said


def test_every_kernel_says_where_it_is_compiled():
    for kernel in BY_NAME.values():
        assert kernel.compiled and targets_of(kernel), kernel.name


def every_kernel_compiles(kind: str) -> None:
    for kernel in BY_NAME.values():
        for target in targets_of(kernel):
            if target.startswith(kind):
                assert compile_for(kernel, target) == "", (kernel.name, target)


def every_kernel_compiles_for_tpus() -> None:
    every_kernel_compiles("v")


def every_kernel_compiles_for_gpus() -> None:
    every_kernel_compiles("h")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "module", "extra"),
    [
        (every_kernel_compiles_for_tpus, "libtpu", "pod"),
        (every_kernel_compiles_for_gpus, "jax_cuda12_plugin", "gpu-compiler"),
    ],
)
def test_compiles_where_there_is_a_compiler(law, module, extra):
    if find_spec(module) is None:
        pytest.skip(f"needs {module}: pip install -e '.[{extra}]'")
    (said,) = found_of([law], devices=8).values()
    assert said == "", said


def test_what_it_compiles_for():
    assert targets_of(BY_NAME["latent_decode"]) == ("v5e", "v5p", "v6e", "v7x")
    assert targets_of(BY_NAME["expert_mlp"]) == tuple(TARGETS)
