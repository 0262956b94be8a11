"""XLA's flags under which tests compile sooner and compute the same."""

from importlib.metadata import version

# jaxlib 0.10 compiles each fusion through MLIR unless told otherwise, which takes three times as long, and splits a
# program for more threads than a machine that tests has to spare. Later versions do not know the first flag.
SOONER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10.")
    else ""
)


def flags(devices: int) -> str:
    """XLA_FLAGS of a process of so many CPU devices, whose code is not optimised either."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 {SOONER}"
