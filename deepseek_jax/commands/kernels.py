"""Property-test kernels beside their plain twins in float64, and compile them for accelerators."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.table import Table

from deepseek_jax.distributed import printable
from deepseek_jax.report.progress import Progress

if TYPE_CHECKING:
    from deepseek_jax.testing import Found, Kernel

_FAULTY = 3
_WIDTH = 120  # of a table that goes to a file


def main(
    *,
    kernel: tuple[str, ...] = (),
    module: Path | None = None,
    examples: int = 100,
    seed: int = 0,
    shapes: int = 24,
    case: str | None = None,
    compile: bool = True,
    json: bool = False,
) -> None:
    """Try examples of kernels, and make one that is wrong small. Exit status 0: no fault was found, 3: one was.

    On a TPU or a GPU that is there the kernels run on it; elsewhere those of another platform are interpreted.

    Args:
        kernel: names of kernels; none is all of them.
        module: a file that declares kernels (docs/kernels.md); without it, those of this project are meant.
        examples: of each kernel.
        seed: of the choice of shapes and of examples.
        shapes: different ones that a kernel is tried in at most; programs are compiled for each.
        case: the JSON of one example to try in their place, as a fault is reported with.
        compile: for TPUs and GPUs, as far as their compilers are installed (extras pod and gpu-compiler).
        json: print one JSON object, by kernel, in place of the table.
    """
    if find_spec("hypothesis") is None:
        raise ValueError("kernels: hypothesis is not installed; pip install 'deepseek_jax[test]'")
    for name, number in (("examples", examples), ("shapes", shapes)):
        if number < 1:
            raise ValueError(f"{name}: got {number}, wanted 1 or more")
    from deepseek_jax.testing import modules  # what it needs is installed

    known = modules.declared() if module is None else modules.kernels_of(module)
    chosen = _chosen(known, kernel)
    if case is not None and len(chosen) != 1:
        raise ValueError(f"case: got it with {len(chosen)} kernels, wanted one; name it with --kernel")
    _provide_devices(chosen)
    targets = _compilers() if compile and case is None else {}
    results = {of.name: _tried(of, (examples, seed, shapes), case, targets, quiet=json) for of in chosen}
    if json:
        print(dumps({name: _as_json(found, module, name) for name, found in results.items()}, indent=2))
    else:
        _show(results, targets, module)
    if any(found.fault or any(found.compiled.values()) for found in results.values()):
        raise SystemExit(_FAULTY)


def _chosen(known: Sequence["Kernel"], names: Sequence[str]) -> list["Kernel"]:
    by_name = {of.name: of for of in known}
    for name in names:
        if name not in by_name:
            raise ValueError(f"kernel: got {name!r}, wanted one of {', '.join(by_name)}")
    return [by_name[name] for name in names] if names else list(known)


def _provide_devices(chosen: Sequence["Kernel"]) -> None:
    """As many CPU devices as a kernel runs on; of accelerators there are as many as there are."""
    wanted = max(of.devices for of in chosen)
    with suppress(RuntimeError):  # of a process that has used jax already, which keeps those that it has
        jax.config.update("jax_num_cpu_devices", wanted)
    if jax.device_count() < wanted:
        names = ", ".join(of.name for of in chosen if of.devices > jax.device_count())
        got = f"{jax.device_count()} {jax.default_backend()} devices"
        raise ValueError(f"kernel: got {got}, wanted {wanted} for {names}; set JAX_PLATFORMS=cpu, or leave these out")


def _compilers() -> dict[str, bool]:
    """For each accelerator, whether its compiler is installed."""
    from deepseek_jax.testing.targets import TARGETS

    gpu = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return {name: gpu if name[0] == "h" else find_spec("libtpu") is not None for name in TARGETS}


def _tried(
    of: "Kernel", how: tuple[int, int, int], case: str | None, targets: dict[str, bool], *, quiet: bool
) -> "Found":
    from deepseek_jax.testing.search import check, search
    from deepseek_jax.testing.targets import compile_for, targets_of

    if case is not None:
        return check(of, of.case(case))
    (examples, seed, shapes), console = how, Console(stderr=True, quiet=quiet)
    with Progress(examples, of.name, console=console) as progress:
        tell = lambda found: progress.update(found.examples, error=f"{found.worst:.2g}", programs=f"{found.programs}")
        found = search(of, examples, seed=seed, shapes=shapes, tell=tell)
    for name in targets_of(of) if of.compiled and not found.fault else ():
        if targets.get(name):
            found.compiled[name] = compile_for(of, name)
    return found


def _as_json(found: "Found", module: Path | None, name: str) -> dict[str, Any]:
    fault = found.fault
    return {
        "examples": found.examples,
        "worst_error": found.worst,
        "worst_case": found.worst_case and asdict(found.worst_case),
        "programs": found.programs,
        "seconds": round(found.seconds, 1),
        "compiled": found.compiled,
        "fault": fault and {"law": fault.law, "said": fault.said, "case": fault.case and asdict(fault.case)},
        "reproduce": _reproduction(found, module, name),
    }


def _reproduction(found: "Found", module: Path | None, name: str) -> str | None:
    """The command that tries the smallest example again."""
    if found.fault is None or found.fault.case is None:
        return None
    program = sys.argv[0]
    called = ["python", os.path.relpath(program)] if program.endswith(".py") else program.split()
    where = [] if module is None else ["--module", str(module)]
    return shlex.join([*called, *where, "--kernel", name, "--case", found.fault.case.as_json()])


def _show(results: dict[str, "Found"], targets: dict[str, bool], module: Path | None) -> None:
    console = Console(width=None if Console().is_terminal else _WIDTH)
    table = Table("kernel", "examples", "worst error", "of", "programs", "s", "compiles for", "")
    for name, found in results.items():
        said = [of for of, problem in found.compiled.items() if not problem]
        worst = found.worst_case
        of = "" if worst is None else f"{worst.dtype}, {worst.numbers}"
        verdict = "FAULTY" if found.fault else "does NOT compile" if any(found.compiled.values()) else "no fault"
        numbers = [str(found.examples), f"{found.worst:.2f}", of, str(found.programs), f"{found.seconds:.0f}"]
        table.add_row(printable(name), *numbers, " ".join(said) or "-", verdict)
    console.print(table)
    devices = f"{jax.device_count()} {jax.default_backend()}"
    console.print(f"Errors are parts of what is allowed, s of this process's processors. Devices: {devices}.")
    if missing := [name for name, there in targets.items() if not there]:
        console.print(f"Not compiled for {', '.join(missing)}: no compiler (extras pod, gpu-compiler).")
    for line in _faults(results, module):
        print(line)


def _faults(results: dict[str, "Found"], module: Path | None) -> Iterator[str]:
    for name, found in results.items():
        if found.fault:
            yield printable(f"{name}: {found.fault.law}: {found.fault.said}")
            if again := _reproduction(found, module, name):
                yield printable(f"  {again}")
        for target, problem in found.compiled.items():
            if problem:
                yield printable(f"{name}: {target}: {problem}")
