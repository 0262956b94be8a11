"""Tries examples of a kernel, and makes one that breaks a law small."""

from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st

from deepseek_jax.testing.kernel import Case, Fault, Kernel
from deepseek_jax.testing.laws import examine
from deepseek_jax.testing.programs import Programs

_SEEDS = 2**16


@dataclass
class Found:
    """What a search found.

    Attributes:
        examples: that held, or were tried until one did not.
        worst: error as a part of what is allowed.
        worst_case: of which example.
        fault: with the smallest example that has one.
        programs: how many were compiled.
        compiled: for each accelerator "" where it compiles, else what its compiler says.
    """

    examples: int = 0
    worst: float = 0.0
    worst_case: Case | None = None
    fault: Fault | None = None
    programs: int = 0
    compiled: dict[str, str] = field(default_factory=dict)

    def _add(self, case: Case, error: float) -> None:
        self.examples += 1
        if error > self.worst or self.worst_case is None:
            self.worst, self.worst_case = error, case


@st.composite
def cases(draw: st.DrawFn, kernel: Kernel) -> Case:
    """Examples of a kernel, which shrink to the first of its sizes, dtypes and numbers, no counts, and seed 0."""
    sizes = {name: draw(st.sampled_from(values)) for name, values in kernel.sizes.items()}
    ragged = {name: draw(of(sizes)) for name, of in kernel.ragged.items()}
    return Case(
        sizes=sizes,
        ragged=ragged,
        dtype=draw(st.sampled_from(kernel.dtypes)),
        numbers=draw(st.sampled_from(kernel.numbers)),
        seed=draw(st.integers(0, _SEEDS - 1)),
    )


def search(
    kernel: Kernel, examples: int = 100, *, seed: int = 0, tell: Callable[[Found], None] = lambda found: None
) -> Found:
    """Tries examples until one breaks a law.

    Args:
        kernel: what is tested.
        examples: how many.
        seed: of the choice of examples.
        tell: called after each.
    """
    found, programs = Found(), Programs(kernel)
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
    @hypothesis.given(cases(kernel))
    def each(case: Case) -> None:
        try:
            error = examine(kernel, programs, case)
        except Fault as fault:
            found.examples += not faults
            faults.append(fault)
            raise
        if not faults:
            found._add(case, error)
            tell(found)

    try:
        each()
    except Fault as fault:
        found.fault = fault
    except hypothesis.errors.Flaky:  # a race goes one way or the other
        last = faults[-1]
        found.fault = Fault(last.law, f"{last.said} (not every time)", last.case)
    found.programs = programs.count
    return found


def check(kernel: Kernel, case: Case) -> Found:
    """Tries one example."""
    found, programs = Found(), Programs(kernel)
    try:
        found._add(case, examine(kernel, programs, case))
    except Fault as fault:
        found.examples, found.fault = 1, fault
    found.programs = programs.count
    return found
