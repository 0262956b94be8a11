"""Property tests of kernels: what one computes beside a plain twin in float64, over inputs that hypothesis draws.

A `Kernel` says what to run, its twin, and what inputs it takes. `search` tries examples of it by the laws of `laws`,
and shrinks one that breaks a law to a small `Case`, whose JSON makes it again; `rounding` works out what each element
may be off; `targets` compiles it for TPUs and GPUs that need not be there. `deepseek-jax kernels` does this for the
kernels of a file, or for those of this project (`declared`). docs/kernels.md has an example. Needs hypothesis, of the
extra `test`.
"""

from deepseek_jax.testing.draw import Draw
from deepseek_jax.testing.invariance import Invariance, order, padding, split
from deepseek_jax.testing.kernel import Case, Fault, Kernel
from deepseek_jax.testing.search import Found, cases, search
from deepseek_jax.testing.spaces import choices, counts, group_sizes

__all__ = [
    "Case",
    "Draw",
    "Fault",
    "Found",
    "Invariance",
    "Kernel",
    "cases",
    "choices",
    "counts",
    "group_sizes",
    "order",
    "padding",
    "search",
    "split",
]
