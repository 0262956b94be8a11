"""What the environment says of the other processes: variables of our own, Slurm, Open MPI, TPU pods."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")


def initialize_arguments(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`, none where it finds them itself; None for a single process."""
    given = [name for name in _EXPLICIT if name in variables]
    if given:
        return _explicit(variables)
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 and "OMPI_MCA_orte_hnp_uri" in variables:
        return {}
    # sbatch sets the number of tasks for its own script too, which is one process; srun alone says where its step runs
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        missing = [name for name in _SLURM if name not in variables]
        if missing:
            raise ValueError(
                f"{missing[0]}: not set, though SLURM_NTASKS is {variables['SLURM_NTASKS']}; start by srun"
            )
        return {}
    return {} if _several_tpu_hosts(variables) else None


def _explicit(variables: Mapping[str, str]) -> dict[str, Any] | None:
    missing = [name for name in _EXPLICIT if not variables.get(name)]
    if missing:
        raise ValueError(f"{missing[0]}: not set, wanted {', '.join(_EXPLICIT)} together; set all three, or none")
    address, *numbers = (variables[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS: got {address!r}, wanted HOST:PORT of process 0")
    for name, text in zip(_EXPLICIT[1:], numbers, strict=True):
        if not text.isdecimal():
            raise ValueError(f"{name}: got {text!r}, wanted a whole number")
    processes, number = map(int, numbers)
    if not number < processes:
        raise ValueError(f"JAX_PROCESS_ID: got {number}, wanted less than JAX_NUM_PROCESSES, which is {processes}")
    if processes == 1:
        return None
    return {"coordinator_address": address, "num_processes": processes, "process_id": number}


def _several_tpu_hosts(variables: Mapping[str, str]) -> bool:
    """Whether this is one of several hosts of a TPU pod; only a TPU host asks anyone (Google's metadata server)."""
    platforms = variables.get("JAX_PLATFORMS", "")
    if find_spec("libtpu") is None or (platforms and "tpu" not in platforms):
        return False
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    found = next((kind for kind in (GkeTpuCluster, GceTpuCluster) if kind.is_env_present()), None)
    return found is not None and found.get_process_count() > 1
