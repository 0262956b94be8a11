"""The one command to run before a commit: format, lint, layering and size, types, test names, doctests, fast tests.

    python tools/check.py                   check everything with this Python
    python tools/check.py --fix             let ruff repair format and lint first
    python tools/check.py --skip-tests      all but the fast tests
    python tools/check.py --python 3.12     the fast tests under another Python, in a cached environment

Every step runs even when one before it fails, and the exit status says whether all passed. Types are checked twice:
what users call, statically, by the examples of docs/api.md (tools/check_types.py says why no more than these); and
shapes, which a static checker does not see, by jaxtyping and beartype under pytest.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERING, SIZE = "tests/test_layering.py", "tests/test_size.py"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One check: a name and the command that makes it."""

    name: str
    command: list[str]
    passes: tuple[int, ...] = (0,)  # exit statuses that count as passed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step."""

    name: str
    passed: bool
    seconds: float


def steps(python: str, *, fix: bool, skip_tests: bool) -> list[Step]:
    """The checks of this tree, in the order of what fails fastest."""
    ruff = [python, "-m", "ruff"]
    pytest = [python, "-m", "pytest", "-q"]
    repairs = [
        Step(name="fix lint", command=[*ruff, "check", "--fix-only", "."]),
        Step(name="fix format", command=[*ruff, "format", "."]),
    ]
    checks = [
        Step(name="format", command=[*ruff, "format", "--check", "."]),
        Step(name="lint", command=[*ruff, "check", "."]),
        Step(name="layering, size", command=[*pytest, LAYERING, SIZE]),
        Step(name="types", command=[python, "tools/check_types.py"]),
        Step(name="test names", command=[python, "tools/same_tests.py"]),
        # pytest ends with 5 where there is nothing to run, which is no fault of a docstring.
        Step(name="doctests", command=[*pytest, "--doctest-modules", "deepseek_jax"], passes=(0, 5)),
    ]
    return (repairs if fix else []) + checks + ([] if skip_tests else [fast_tests(python)])


def fast_tests(python: str) -> Step:
    """The tests that run by default, less those that have a step of their own."""
    others = [f"--ignore={path}" for path in (LAYERING, SIZE)]
    return Step(name="fast tests", command=[python, "-m", "pytest", "-q", "-n", "auto", *others])


def package_size() -> str:
    """How many files and lines the package has."""
    counts = [len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "deepseek_jax").rglob("*.py")]
    return f"deepseek_jax: {len(counts)} files, {sum(counts):,} lines, the longest {max(counts)}"


def run(step: Step) -> Outcome:
    """Runs a step in the repository's root, its output going where this process's goes."""
    print(f"\n== {step.name}: {' '.join(['python', *step.command[1:]])}", flush=True)
    start = time.monotonic()
    # Checks are about the code and not about this machine's accelerator.
    env = {"JAX_PLATFORMS": "cpu"} | os.environ
    status = subprocess.run(step.command, cwd=ROOT, env=env).returncode
    return Outcome(name=step.name, passed=status in step.passes, seconds=time.monotonic() - start)


def table(outcomes: list[Outcome]) -> str:
    """A line for every step with its seconds, and the total."""
    lines = [f"{o.name:<16}{'passed' if o.passed else 'FAILED':<8}{o.seconds:7.1f} s" for o in outcomes]
    failed = sum(not o.passed for o in outcomes)
    verdict = f"{failed} FAILED" if failed else "passed"
    return "\n".join([*lines, f"{'all':<16}{verdict:<8}{sum(o.seconds for o in outcomes):8.1f} s"])


def find_python(version: str) -> Path:
    """Finds an interpreter of a version such as "3.12": on PATH, among pyenv's, or uv's.

    Raises:
        LookupError: There is none.
    """
    candidates = [shutil.which(f"python{version}")]
    if shutil.which("pyenv"):
        root = Path(_output(["pyenv", "root"]))
        candidates += sorted(root.glob(f"versions/{version}.*/bin/python{version}"))
    if shutil.which("uv"):
        candidates.append(_output(["uv", "python", "find", "--no-python-downloads", version]))
    # A file of the right name need not run: pyenv leaves stand-ins for versions that are not switched on.
    probe = ["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    for candidate in candidates:
        if candidate and _output([str(candidate), *probe]) == version:
            return Path(candidate)
    raise LookupError(
        f"no Python {version} found on PATH, in pyenv or in uv: install it, say by `pyenv install {version}`"
    )


def environment(version: str) -> str:
    """The Python of `.venv-<version>`, made anew whenever pyproject.toml has changed since it was.

    Raises:
        LookupError: There is no interpreter of this version.
        subprocess.CalledProcessError: The environment could not be made; pip has said why.
    """
    folder = ROOT / f".venv-{version}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    interpreter = find_python(version)
    print(f"== making {folder.name} with {interpreter}", flush=True)
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", ".[test]"], cwd=ROOT, check=True)
    # Last, so that an install that broke off is done again.
    stamp.write_text(wanted)
    return str(python)


def main(argv: list[str] | None = None) -> int:
    """Runs the checks that the command line asks for and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fix", action="store_true", help="repair format and lint before checking them")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the fast tests")
    parser.add_argument("--python", metavar="VERSION", help="run only the fast tests, under this Python (3.12)")
    args = parser.parse_args(argv)
    if args.python and (args.fix or args.skip_tests):
        parser.error("--python runs the fast tests and nothing else: leave out --fix and --skip-tests")

    if args.python:
        try:
            todo = [fast_tests(environment(args.python))]
        except LookupError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    else:
        todo = steps(sys.executable, fix=args.fix, skip_tests=args.skip_tests)
    outcomes = [run(step) for step in todo]
    print(f"\n{table(outcomes)}\n{package_size()}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _output(command: list[str]) -> str:
    """What a command prints, without the space around it; nothing where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
