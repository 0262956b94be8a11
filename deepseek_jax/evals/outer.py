"""Programs that are not Python in the sandbox: compilers, what they make, and checkers."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.evals.graders import GraderConfig
from deepseek_jax.rewards.sandbox import Limits, Program, run_program

_BIN = ("/usr/bin", "/bin", "/usr/local/bin")
_SEEN = ("/usr/bin", "/bin", "/usr/local", "/usr/libexec", "/usr/include", "/usr/share", "/etc/alternatives")
# Builds, then runs once for each input, and tells of each run its status and what it wrote. It never knows what is
# wanted, so that a program that forges its words gains nothing. Time is a processor's: a busy machine fails none.
_DRIVER = """
import json, os, resource, subprocess, sys
os.environ.update(PATH={path!r}, HOME="/tmp", LC_ALL="C.UTF-8")
def limited():
    resource.setrlimit(resource.RLIMIT_CPU, ({cpu!r}, {cpu!r}))
for words in {builds!r}:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit("build: " + done.stdout.decode(errors="replace")[-2000:])
inputs = json.load(open("inputs.json"))
os.remove("inputs.json")
for given in inputs:
    try:
        done = subprocess.run({run!r}, input=given.encode("utf-8", "surrogatepass"), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, preexec_fn=limited, timeout={wall!r})
        found = done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")[-2000:]
    except subprocess.TimeoutExpired:
        found = -1, "", "time"
    print(json.dumps(found), flush=True)
    if found[0]:
        break
"""
_WALL = 10  # times the processor time


class Ran(NamedTuple):
    """How a program ended on one input: its status, 0 where all is well, and what it wrote."""

    status: int
    stdout: str
    stderr: str


class Language(NamedTuple):
    """A language to port to: labels of its blocks, its file, how it is built and run, and its addresses and time."""

    labels: tuple[str, ...]
    file: str
    builds: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]
    memory_bytes: int = 2 << 30
    seconds: float = 20.0  # to build


LANGUAGES = {
    "cpp": Language(
        ("cpp", "c++", "cc"), "solution.cpp", (("g++", "-O2", "-std=c++17", "-o", "solution", "solution.cpp"),),
        ("./solution",),
    ),
    "c": Language(("c",), "solution.c", (("gcc", "-O2", "-o", "solution", "solution.c", "-lm"),), ("./solution",)),
    "javascript": Language(
        # node reserves far more addresses than it uses
        ("javascript", "js", "node"), "solution.js", (), ("node", "solution.js"), memory_bytes=64 << 30,
    ),
}  # fmt: skip


def language_here(name: str | None) -> str:
    """A language whose tools are on this machine: the one asked for, or the first.

    Raises:
        ValueError: it is none, or nothing of it is here.
    """
    if name is not None and name not in LANGUAGES:
        raise ValueError(f"language: got {name!r}, wanted one of {', '.join(LANGUAGES)}")
    names = [name] if name is not None else list(LANGUAGES)
    here = [each for each in names if all(map(_found, _tools(LANGUAGES[each])))]
    if not here:
        tools = ", ".join(dict.fromkeys(tool for each in names for tool in _tools(LANGUAGES[each])))
        raise ValueError(
            f"language: none of {tools} is in {', '.join(_BIN)}; install one, or choose another --language"
        )
    return here[0]


def _tools(language: Language) -> list[str]:
    return [words[0] for words in (*language.builds, language.run) if not words[0].startswith(".")]


@cache
def _found(tool: str) -> bool:
    return shutil.which(tool, path=os.pathsep.join(_BIN)) is not None


def run_outer(
    words: Sequence[str],
    *,
    files: Mapping[str, str],
    inputs: Sequence[str] = ("",),
    builds: Sequence[Sequence[str]] = (),
    build_seconds: float = 0.0,
    seconds: float,
    memory_bytes: int,
    config: GraderConfig,
) -> list[Ran] | str:
    """Runs a program of this machine's in one sandbox, beside these files; nothing of it is a shell's.

    Args:
        words: the program and its arguments.
        files: by plain name, in the folder it runs in.
        inputs: it runs once for each, until one run fails.
        builds: programs that run before.
        build_seconds: for these.
        seconds: of processor time for each input.
        memory_bytes: of addresses, of each process.
        config: what it may see beside the system's own folders.

    Returns:
        How it ended on each input as far as it came, or what went wrong before.

    Raises:
        SandboxUnavailable: as `run_program`.
    """
    cpu = math.ceil(seconds)
    source = _DRIVER.format(
        path=os.pathsep.join(_path(config, words)),
        builds=[list(each) for each in builds],
        run=list(words),
        cpu=cpu,
        wall=_WALL * cpu,
    )
    limits = Limits(
        seconds=build_seconds + (1 + cpu) * len(inputs),
        memory_bytes=memory_bytes,
        processes=64,
        threads=256,
        file_bytes=256 << 20,
        output_bytes=64 << 20,
    )
    files = {**files, "inputs.json": json.dumps(list(inputs))}
    seen = (*_SEEN, *map(str, config.folders))
    program = Program(source=source, files=files, limits=limits, folders=seen)
    ran = run_program(program, allow_unsandboxed=config.allow_unsandboxed)
    found = [_told(line) for line in ran.stdout.decode(errors="replace").splitlines()]
    if None in found or not found:
        return f"{ran.kind}: {ran.stderr.decode(errors='replace').strip()[-300:]}"
    return found[: len(inputs)]


def _told(line: str) -> Ran | None:
    """A line of the driver's, which a program may have forged."""
    try:
        status, out, err = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return Ran(status, out, err) if isinstance(status, int) and isinstance(out, str) and isinstance(err, str) else None


def _path(config: GraderConfig, words: Sequence[str]) -> list[str]:
    own = [folder for each in config.folders for folder in (str(each), f"{each}/bin")]
    head = [str(Path(words[0]).parent)] if words[0].startswith("/") else []
    return [*head, *own, *_BIN]
