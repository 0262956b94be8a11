"""Settings under which tests compile sooner and compute the same."""

import functools
import gc
import os
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


def quicken() -> None:
    """What this process is spared: most walks of the collector, and an MLIR context for each program that it lowers.

    To make one takes longer than to lower most programs. Where jax makes them elsewhere one day, nothing is shared.
    """
    # What tests import and compile stays to the end; at Python's own thresholds it would be walked all the time.
    gc.set_threshold(20_000, 20, 50)
    from jax._src.interpreters import mlir

    if os.environ.get("JAX_PLATFORMS") == "cpu" and hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
