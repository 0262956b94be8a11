"""Settings that every test shares: one CPU device, checked shapes, repeatable hypothesis examples."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from deepseek_jax.compilation_cache import hush_loader
from tests.flags import SOONER, collect_seldom

MAKER = Path(__file__).resolve().parents[1].parent / "shared" / "bin" / "make_smollm2"

# Set before anything imports jax. One device: tests that need eight ask for them in a process of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Three to seven times faster compilation without LLVM's passes, in the processes that tests start too; XLA's own stay.
# With XLA_FLAGS in the environment, even empty, nothing is added: so .ci/run tests the ops as users compile them.
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = SOONER
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What one process compiles, the others take: pytest's own and those that tests start. A folder for this run alone,
# so that nothing is kept in the user's cache or taken from there.
if os.environ["JAX_PLATFORMS"] == "cpu" and "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
    hush_loader()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="deepseek_jax-compiled-")
        OWN = os.getpid()  # what this process forks must leave the folder
        atexit.register(lambda: os.getpid() == OWN and shutil.rmtree(folder, ignore_errors=True))

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

collect_seldom()

# What carries shapes. Must come before the first import of it, so that it stands here and not in a fixture.
SHAPED = ("ops", "parallel", "rl.advantage", "rl.entropy", "rl.kl", "rl.loss")
install_import_hook([f"deepseek_jax.{name}" for name in SHAPED], "beartype.beartype")

# No deadline: the first example of a jitted function pays for its compilation.
settings.register_profile("deepseek_jax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("deepseek_jax")


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """For tests of a function's own message about its arguments, which checked shapes and types would forestall."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def quick_compilation():
    """Of a module that is compiled without LLVM's passes even where XLA_FLAGS is in the environment."""
    import jax

    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test, saying why, where what its marker needs is not installed or not there."""
    if item.get_closest_marker("oracle"):
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if missing:
            pytest.skip(f"needs {' and '.join(missing)}: pip install -e '.[oracle]'")
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU, got {jax.default_backend()}: run with JAX_PLATFORMS=cuda")


@pytest.fixture
def command_line(monkeypatch, capsys) -> Callable[..., Callable[..., tuple[int, str, str]]]:
    """A tool's `main` as a call with the words of a command line: exit status, stdout, stderr."""

    from deepseek_jax.cli import run

    def of(main: Callable) -> Callable[..., tuple[int, str, str]]:
        def call(*words: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, words)])
            status = 0
            try:
                run(main)
            except SystemExit as stop:
                status = stop.code
            printed = capsys.readouterr()
            return status, printed.out, printed.err

        return call

    return of


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: the folder that SMOLLM2 names, or one made for this run."""
    if "SMOLLM2" in os.environ:
        return Path(os.environ["SMOLLM2"])
    if not MAKER.exists():
        pytest.skip("needs SmolLM2: name its folder in SMOLLM2 (no shared maker beside the project)")
    made = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, MAKER, made], check=True, capture_output=True)
    return made
