"""Devices that need not be there, to compile for: slices of TPUs by libtpu, clusters of GPUs by the CUDA plugin.

Source of the GPUs' figures: XLA's own target files (xla/backends/gpu/target_config/specs).
"""

import os
import re
from importlib.util import find_spec

import jax

from deepseek_jax.plan.chips import Chip, chip

_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*){0,2}")
# libtpu is here for its compiler alone: it must not look for TPUs, nor keep others from using it
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}
# What libtpu calls the generations that it compiles for as one device a chip, or as two of a v7x. (A v4 it describes
# by cores, of which it would want meshes.)
_OF_TPUS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}
# What kernels of matrix products are chosen by measuring on the GPU: without one, XLA's defaults.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}


def topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """The devices of some chips, for `sharding.make_mesh`; a v7x is two devices.

    Args:
        name: generation and shape of a TPU slice, such as v5p:4x4x4 or v7x:4x4x4, or a GPU and hosts x GPUs of each,
            such as h200:8 or h100:2x8.

    Raises:
        ValueError: the compiler is not installed, or knows no such chips.
    """
    generation, _, shape = name.partition(":")
    wanted = (
        f"topology: got {name!r}, wanted a TPU and its shape such as v5p:4x4x4, or a GPU and hosts x GPUs: h200:2x8"
    )
    if not _SHAPE.fullmatch(shape):
        raise ValueError(wanted)
    try:
        of_chip = chip(generation)
    except ValueError as problem:
        raise ValueError(f"{wanted} ({problem})") from None
    return of_chip, (_gpus if of_chip.kind == "gpu" else _tpus)(of_chip, shape, wanted)


def compilable(of_chip: Chip) -> bool:
    """Whether there is a compiler for these chips that does not need one of them."""
    return of_chip.name in _OF_TPUS or of_chip.name in _TARGETS


def _tpus(of_chip: Chip, shape: str, wanted: str) -> list[jax.Device]:
    if of_chip.name not in _OF_TPUS:
        raise ValueError(f"{wanted}; of TPUs there are {', '.join(_OF_TPUS)}")
    if find_spec("libtpu") is None:
        raise ValueError("libtpu: not installed; the TPU compiler is in the extra: pip install 'deepseek_jax[pod]'")
    for key, value in _ALONE.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies  # looks for libtpu when it is imported

    named = f"{_OF_TPUS[of_chip.name]}:{shape}"
    alone = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) == {"1", "x"} else {}  # else four chips a host
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=named, **alone).devices
    except jax.errors.JaxRuntimeError as problem:
        raise ValueError(f"{wanted} ({str(problem).splitlines()[0]})") from None


def _gpus(of_chip: Chip, shape: str, wanted: str) -> list[jax.Device]:
    if of_chip.name not in _TARGETS:
        raise ValueError(f"{wanted}; there are descriptions for the compiler of {', '.join(_TARGETS)}")
    if shape.count("x") > 1:
        raise ValueError(wanted)
    if find_spec("jax_cuda12_plugin") is None and find_spec("jax_cuda13_plugin") is None:
        extra = "pip install 'deepseek_jax[gpu-compiler]'"
        raise ValueError(f"jax_cuda12_plugin: not installed; the GPU compiler is in the extra: {extra}")
    from jax.experimental import topologies

    hosts, gpus = ("1x" + shape).split("x")[-2:]
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1 x {hosts} x {gpus}", target_config=target(of_chip.name)
        ).devices
    except jax.errors.JaxRuntimeError as problem:
        raise ValueError(f"{wanted} ({str(problem).splitlines()[0]})") from None


# --- what XLA wants to know of a GPU -------------------------------------------------------------

_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}
_TARGETS = {
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        8,
        {
            "core_count": 108,
            "fpus_per_core": 64,
            "clock_rate_ghz": 1.41,
            "memory_bandwidth": 2039040000000,
            "device_memory_size": 85100068864,
            "l2_cache_size": 41943040,
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
        },
    ),
    "h100": (
        "NVIDIA H100 80GB HBM3",
        9,
        {**_HOPPER, "memory_bandwidth": 3352320000000, "device_memory_size": 84942979072},
    ),
    "h200": (
        "NVIDIA H200",
        9,
        {**_HOPPER, "memory_bandwidth": 4800000000000, "device_memory_size": 151397597184},
    ),
    "b200": (
        "NVIDIA B200",
        10,
        {
            **_HOPPER,
            "core_count": 148,
            "clock_rate_ghz": 1.965,
            "memory_bandwidth": 7672320000000,
            "device_memory_size": 191514411008,
            "l2_cache_size": 132644864,
        },
    ),
}


def target(name: str) -> str:
    """A GPU as XLA's GpuTargetConfigProto, in text.

    >>> "cuda_compute_capability { major: 9 minor: 0 }" in target("h200")
    True
    """
    described, capability, own = _TARGETS[name]
    numbers = " ".join(f"{key}: {value}" for key, value in {**_COMMON, **own}.items())
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {capability} minor: 0 }} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{described}"\n'
    )
