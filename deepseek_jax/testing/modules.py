"""The kernels that modules declare at their top level."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from deepseek_jax.own_code import run_file
from deepseek_jax.testing.kernel import Kernel

OURS = ("attention", "causal", "experts", "indexer", "logprobs", "paged", "products", "sampling", "transports")


def declared() -> list[Kernel]:
    """Those of this project: functions of it that compute what another one does, in another way."""
    modules = [import_module(f"deepseek_jax.testing.declared.{name}") for name in OURS]
    return list({id(kernel): kernel for module in modules for kernel in _kernels_in(module)}.values())


def kernels_of(file: Path) -> list[Kernel]:
    """Those of a file, which is run as any module is: it is the user's own code.

    Raises:
        ValueError: there is no such file, it raises something, or declares no kernel, or two of one name.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"module: {file}: no such .py file")
    module = run_file(file, f"_kernels_of_{file.stem}", kind="module")
    found = _kernels_in(module)
    if not found:
        raise ValueError(f"module: {file}: no kernel, wanted a deepseek_jax.testing.Kernel at its top level")
    names = [kernel.name for kernel in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"module: {file}: got two kernels named {twice[0]!r}, wanted a name each")
    return found


def _kernels_in(module: ModuleType) -> list[Kernel]:
    """In the order in which they stand."""
    return [value for value in vars(module).values() if isinstance(value, Kernel)]
