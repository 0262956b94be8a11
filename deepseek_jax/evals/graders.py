"""What grading needs open while it lasts: the mathematical grader's processes, limits of programs, outer programs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from deepseek_jax.rewards.math import MathGrader
from deepseek_jax.rewards.pool import PoolConfig
from deepseek_jax.rewards.sandbox import processors


@dataclass(frozen=True, kw_only=True)
class GraderConfig:
    """What graders may use.

    Args:
        repositories: of swebench: a folder of repositories, each in a folder named by its instance_id, or by its repo
            with __ for the slash.
        checker: of formal: a command that checks a file, its words apart; {file} stands for the file's name.
        folders: what outer programs (compilers, the checker) see of this machine, read-only, beside their own folders.
        language: of port: the language to port to, cpp, c or javascript; None takes the first whose tools are here.
        seconds: of a program on one test of livecodebench, codeforces and port, of formal's checker, or of all tests of
            a repository of swebench; None takes the benchmark's own.
        allow_unsandboxed: run programs of the model even where they cannot be isolated. Do not.
    """

    repositories: Path | None = None
    checker: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    language: str | None = None
    seconds: float | None = None
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds: got {self.seconds}, wanted more than 0")


@dataclass
class Graders:
    """Graders that are open; use it as a context manager.

    Args:
        config: what they may use.
    """

    config: GraderConfig = GraderConfig()
    math: MathGrader = field(init=False)

    def __post_init__(self) -> None:
        # published right answers leave the percent sign out; no process starts before the first answer that needs one
        self.math = MathGrader(PoolConfig(workers=processors()), percent="either")

    def __enter__(self) -> "Graders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.math.close()
