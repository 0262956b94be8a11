"""Several processes of one program, one a host or GPU: how they start, agree, and end together.

Process 0 is the main one: it alone prints and writes what is written once. All run the same program on the same
arguments, and call what is here in the same order. In one process every function here does nothing, or answers at once.

Source: jax.distributed and jax.experimental.multihost_utils (jax-ml/jax).
"""

# ruff: noqa: F401  (the names of the package)
from deepseek_jax.distributed.agreement import all_gather_objects, barrier, on_main, preemption, replicate, together
from deepseek_jax.distributed.identity import is_main, printable, process_count, process_index, say
from deepseek_jax.distributed.lifetime import PEER_ENDED, PREEMPTED, fail, finish, leave, start
