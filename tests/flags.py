"""Settings under which tests compile sooner and compute the same."""

import gc
from importlib.metadata import version

# jaxlib 0.10 compiles each fusion through MLIR unless told otherwise, which takes three times as long, and splits a
# program for more threads than a machine that tests has to spare. Later versions do not know the first flag.
SOONER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10.")
    else ""
)


def environment(devices: int) -> dict[str, str]:
    """Variables of a process of so many CPU devices that compiles as the tests do, and so takes what they compiled."""
    flags = f"--xla_force_host_platform_device_count={devices} {SOONER}".strip()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def collect_seldom() -> None:
    """What tests import and compile stays to the end; at Python's own thresholds the collector would walk it often."""
    gc.set_threshold(20_000, 20, 50)
