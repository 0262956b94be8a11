"""Tries examples of a kernel, and makes one that breaks a law small."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st

from deepseek_jax.testing.kernel import Case, Fault, Kernel
from deepseek_jax.testing.laws import Held, examine
from deepseek_jax.testing.programs import Programs
from deepseek_jax.testing.shapes import SHAPES, Shape, one_of, pool, read

_SEEDS = 2**16
_SELDOM, _MOST = 16, 8  # one example in so many is thorough, and so many at most
_ENOUGH = 16  # examples, of which some have a result to compare


@dataclass
class Found:
    """What a search found.

    Attributes:
        examples: that held, or were tried until one did not.
        worst: error as a part of what is allowed.
        worst_case: of which example.
        compared: how many numbers of the result, in all examples.
        fault: with the smallest example that has one.
        programs: how many were compiled.
        seconds: of this process's processors.
        compiled: for each accelerator "" where it compiles, else what its compiler says.
    """

    examples: int = 0
    worst: float = 0.0
    worst_case: Case | None = None
    compared: int = 0
    fault: Fault | None = None
    programs: int = 0
    seconds: float = 0.0
    compiled: dict[str, str] = field(default_factory=dict)

    def _add(self, case: Case, held: Held) -> None:
        self.examples += 1
        self.compared += held.compared
        if held.error > self.worst or self.worst_case is None:
            self.worst, self.worst_case = held.error, case


@st.composite
def cases(draw: st.DrawFn, kernel: Kernel, shapes: Sequence[Shape] | None = None, thorough: bool = False) -> Case:
    """Examples of a kernel, which shrink to the first of these shapes, its first numbers, no counts, and seed 0."""
    sizes, dtype = read(kernel, draw(one_of(shapes or pool(kernel))))
    ragged = {name: draw(of(sizes)) for name, of in kernel.ragged.items()}
    return Case(
        sizes=sizes,
        ragged=ragged,
        dtype=dtype,
        numbers=draw(st.sampled_from(kernel.numbers)),
        seed=draw(st.integers(0, _SEEDS - 1)),
        thorough=thorough,
    )


def search(
    kernel: Kernel,
    examples: int = 100,
    *,
    seed: int = 0,
    shapes: int = SHAPES,
    tell: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Tries examples until one breaks a law: first what each costs little, then a few by all laws.

    Args:
        kernel: what is tested.
        examples: how many.
        seed: of the choice of shapes and of examples.
        shapes: how many different ones at most; programs are compiled for each.
        tell: called after each.
    """
    found, programs = Found(), Programs(kernel)
    among, start = pool(kernel, shapes, seed), time.process_time()
    thorough = min(-(-examples // _SELDOM), _MOST)

    def add(case: Case, held: Held) -> None:
        found._add(case, held)
        found.programs = programs.count
        tell(found)

    for count, is_thorough in ((examples - thorough, False), (thorough, True)):
        if count and found.fault is None:
            strategy = cases(kernel, among, is_thorough)
            found.fault = _first_fault(kernel, programs, strategy, count, seed, add)
    found.examples += found.fault is not None
    if found.fault is None and not found.compared and examples >= _ENOUGH:
        found.fault = Fault("values", "the twin's results are empty or NaN: nothing was compared")
    found.programs, found.seconds = programs.count, time.process_time() - start
    return found


def _first_fault(kernel, programs, strategy, examples, seed, tell) -> Fault | None:
    """Of so many examples, made small; `tell` is told each that has none."""
    faults: list[Fault] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @hypothesis.given(strategy)
    def each(case: Case) -> None:
        try:
            held = examine(kernel, programs, case)
        except Fault as fault:
            faults.append(fault)
            raise
        if not faults:  # else it is one that a fault shrinks to
            tell(case, held)

    try:
        each()
    except Fault as fault:
        return fault
    except hypothesis.errors.Flaky:  # a race goes one way or the other
        last = faults[-1]
        return Fault(last.law, f"{last.said} (not every time)", last.case)
    return None


def check(kernel: Kernel, case: Case) -> Found:
    """Tries one example."""
    found, programs = Found(), Programs(kernel)
    try:
        found._add(case, examine(kernel, programs, case))
    except Fault as fault:
        found.examples, found.fault = 1, fault
    found.programs = programs.count
    return found
