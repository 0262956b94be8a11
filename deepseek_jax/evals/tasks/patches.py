"""SWE-bench: a patch of the model's, applied to a repository, under the repository's own tests."""

import importlib.util
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import lines, maybe, parsed, text, value
from deepseek_jax.evals.graders import GraderConfig, Graders
from deepseek_jax.evals.patches import FilePatch, applied, diff_of, read_diff
from deepseek_jax.evals.running import need_sandbox, tried
from deepseek_jax.evals.task import Answered, Grade, Problem, Style, Task
from deepseek_jax.rewards.assertions import TestsUnusable
from deepseek_jax.rewards.programs import labelled_blocks
from deepseek_jax.rewards.sandbox import Limits, Program, run_program
from deepseek_jax.text.think import after_thoughts

_SECONDS = 1800.0
_PACKAGES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "numpy")
_MOST_BYTES = 1 << 30
_ASKED = (
    "This is an issue of the repository {}. Solve it. Give the change as one unified diff, with paths from the root of "
    "the repository, in one ```diff block.\n\n{}"
)
# What pytest says of each test is told at the end, on the standard output that nothing else had.
_RUNNER = """
import io, json, os, sys, tarfile
import pytest
tarfile.open("repository.tar").extractall("/tmp/repository", filter="data")
os.remove("repository.tar")
tests = json.load(open("tests.json"))
os.chdir("/tmp/repository")
sys.path[:1] = ["/tmp/repository", "/tmp/repository/src"]
sys.dont_write_bytecode = True
class Told:
    def __init__(self):
        self.passed, self.failed = set(), set()
    def pytest_runtest_logreport(self, report):
        if report.failed or (report.when == "call" and report.skipped):
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
told, out = Told(), os.dup(1)
os.dup2(2, 1)
os.write(out, b"r")  # what comes from here on is the repository's doing
pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[told])
os.write(out, json.dumps(sorted(told.passed - told.failed)).encode())
"""


def _read(row: Row, number: int) -> Problem:
    given = {name: parsed(value(row, name) or [], name) for name in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    for name, tests in given.items():
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"{name!r}: got {tests!r:.80}, wanted a list of tests")
    if not given["FAIL_TO_PASS"]:
        raise ValueError("'FAIL_TO_PASS': got none, wanted a list of tests")
    test_patch = maybe(row, "test_patch")
    if test_patch:
        try:
            read_diff(test_patch)
        except ValueError as problem:
            raise ValueError(f"'test_patch': {problem}") from None
    more = {
        "repo": text(row, "repo"),
        "test_patch": test_patch,
        "patch": maybe(row, "patch"),
        "shown": maybe(row, "text"),
    }
    id = text(row, "instance_id")
    if not re.fullmatch(r"[\w.-]+", id) or not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", more["repo"]):
        raise ValueError(f"'instance_id', 'repo': got {id!r:.60} and {more['repo']!r:.60}, wanted plain names")
    return Problem(id=id, question=text(row, "problem_statement"), tests=given, more=more)


def _ready(graders: Graders) -> None:
    need_sandbox(graders)
    if graders.config.repositories is None or not graders.config.repositories.is_dir():
        raise ValueError(
            "repositories: got none for swebench, wanted a folder with one folder a repository, checked out at its "
            "base_commit: --repositories FOLDER"
        )


def folder_of(problem: Problem, repositories: Path) -> Path | None:
    """Where a problem's repository is."""
    names = (problem.id, problem.more["repo"].replace("/", "__"))
    return next((repositories / name for name in names if (repositories / name).is_dir()), None)


@lru_cache(maxsize=8)
def _files(folder: Path) -> Mapping[str, bytes]:
    """The files of a repository, without its history; links are left out."""
    found, total = {}, 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if ".git" in name.parts or path.is_symlink() or not path.is_file():
            continue
        total += path.stat().st_size
        if total > _MOST_BYTES:
            raise ValueError(f"{folder}: holds over {_MOST_BYTES} bytes, wanted a repository")
        found[name.as_posix()] = path.read_bytes()
    return found


def patch_of(row: Answered) -> str | None:
    """The diff in a completion."""
    return diff_of(after_thoughts(row.text), labelled_blocks(row.text, ("diff", "patch", "")))


def prediction(row: Answered, model: str) -> dict[str, Any]:
    """A line of SWE-bench's predictions file."""
    return {"instance_id": row.problem.id, "model_name_or_path": model, "model_patch": patch_of(row) or ""}


def _grade(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """All of FAIL_TO_PASS and PASS_TO_PASS pass after the patch, which fits.

    The repository's code and its tests run in one process, as in SWE-bench: a patch that is made to deceive its own
    tests can. What the patch does to files of the test patch is undone. A patch is wrong only where the row's own one
    passes; tests that fail with that too (a library that is not here, names that are not pytest's) give no score.
    """
    return [tried(lambda row=row: _one(row, graders.config)) for row in rows]


def _one(row: Answered, config: GraderConfig) -> Grade:
    folder, more = folder_of(row.problem, config.repositories), row.problem.more
    if folder is None:
        return Grade(None, reason=f"no folder of the repository: {row.problem.id}")
    patch = patch_of(row)
    try:
        changed = _changed(folder, read_diff(patch or ""), more["test_patch"])
    except ValueError:
        return Grade(0.0, parts={"applies": 0.0})
    tests = (*row.problem.tests["FAIL_TO_PASS"], *row.problem.tests["PASS_TO_PASS"])
    passed = _passed(changed, tests, config)
    if not set(tests) <= passed and (reason := _unusable(folder, more["patch"], more["test_patch"], tests, config)):
        return Grade(None, reason=reason[:300])
    return Grade(float(set(tests) <= passed), parts={"applies": 1.0, "tests": len(passed & set(tests)) / len(tests)})


def _changed(folder: Path, patch: Sequence[FilePatch], test_patch: str) -> dict[str, bytes]:
    """A repository with a patch and the test patch, which has the last word on its files.

    Raises:
        ValueError: the patch does not fit.
        TestsUnusable: the test patch does not.
    """
    files = _files(folder)
    changed = applied(files, patch)
    wanted = read_diff(test_patch) if test_patch else []
    for name in {name for each in wanted for name in (each.before, each.after) if name is not None}:
        changed.pop(name, None)
        if name in files:
            changed[name] = files[name]
    try:
        return applied(changed, wanted)
    except ValueError as problem:
        raise TestsUnusable(f"test_patch: {problem}") from None


@lru_cache(maxsize=1024)
def _unusable(folder: Path, patch: str, test_patch: str, tests: tuple[str, ...], config: GraderConfig) -> str:
    """Why tests say nothing: they fail with the row's own patch too, or do not start; "" where they do."""
    try:
        passed = _passed(
            _changed(folder, read_diff(patch) if patch else [], test_patch), tests, config, must_start=True
        )
    except (ValueError, TestsUnusable) as problem:
        return f"{problem}; check out the row's base_commit"
    missing = [name for name in tests if name not in passed] if patch else []
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(tests)} tests fail with the row's own patch too, such as {missing[0]!r:.80}; they run "
        "by pytest, beside numpy: put what else they import into the repository's folder"
    )


def _passed(
    files: Mapping[str, bytes], tests: Sequence[str], config: GraderConfig, *, must_start: bool = False
) -> set[str]:
    """The tests that pass, by pytest's names of them; none where they do not start."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    limits = Limits(
        seconds=config.seconds or _SECONDS,
        memory_bytes=4 << 30,
        processes=16,
        file_bytes=2 * packed.tell() + (256 << 20),
        output_bytes=16 << 20,
    )
    given = {"repository.tar": packed.getvalue(), "tests.json": json.dumps(tests), **_shim()}
    folders = tuple(map(str, config.folders))
    program = Program(source=_RUNNER, files=given, limits=limits, packages=_PACKAGES, folders=folders)
    ran = run_program(program, allow_unsandboxed=config.allow_unsandboxed)
    if not ran.stdout.startswith(b"r") and must_start:
        last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TestsUnusable(f"swebench: the tests did not start ({ran.kind}): {last}; pip install pytest")
    try:
        found = json.loads(ran.stdout[1:] or b"[]")
    except (ValueError, RecursionError):  # the repository's doing
        return set()
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _shim() -> dict[str, bytes]:
    """The one module of pytest's that is a file and no folder."""
    found = importlib.util.find_spec("py")
    alone = found is not None and found.origin is not None and not found.submodule_search_locations
    return {"py.py": Path(found.origin).read_bytes()} if alone else {}


def _written(problem: Problem) -> str:
    shown = problem.more["shown"] or problem.question
    return lines(_ASKED.format(problem.more["repo"], shown))


PATCHES = Task(
    name="swebench",
    read=_read,
    styles={"deepseek": Style(_written)},
    grade=_grade,
    hub="SWE-bench/SWE-bench_Verified::test",
    source="SWE-bench; one answer without tools (R1's figure is of Agentless, which asks several times)",
    ready=_ready,
    needs="instance_id, repo, problem_statement, test_patch, FAIL_TO_PASS and PASS_TO_PASS",
)
