"""What is measured, and how: all contestants of a case and the machine's ceilings in turn, round by round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import track

Timed = Callable[[], float]
"""Does the work once and gives its seconds."""


class Work(NamedTuple):
    """What the algorithm needs, in closed form: FLOPs of matrix products, and bytes between memory and processor."""

    flops: float
    nbytes: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        suite, name: what it is called.
        unit: of what there are `amount` in the work of one call, "tokens" say.
        work: None where no closed form says what is needed.
        ours: this project's way.
        peer, peer_name: another's way to the same end, and what it is called.
        alone: why there is no peer.
        dtype: what products are computed in, which picks the ceiling.
    """

    suite: str
    name: str
    unit: str
    amount: float
    work: Work | None
    ours: Timed
    peer: Timed | None = None
    peer_name: str = ""
    alone: str = ""
    dtype: str = "float32"


class Row(NamedTuple):
    """A case measured: seconds of every round, the same round at the same place of each list.

    Attributes:
        suite, name, unit, amount, alone: of the case.
        ours, peer: seconds; no peer, an empty list.
        peer_name: "" without one.
        flops, nbytes: the work; 0 where it is not known.
        flops_rate, bandwidth: the machine's ceilings in each round, FLOP/s and bytes/s.
    """

    suite: str
    name: str
    unit: str
    amount: float
    ours: list[float]
    peer_name: str
    peer: list[float]
    alone: str
    flops: float
    nbytes: float
    flops_rate: list[float]
    bandwidth: list[float]

    @property
    def rate(self) -> float:
        """Units a second, the median."""
        return self.amount / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """The peer's seconds over ours, by round: above 1 we are faster."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.peer, strict=True)] if self.peer else []

    @property
    def shares(self) -> list[float]:
        """The least seconds that the round's ceilings allow over ours: 1 is the machine's limit."""
        return [
            max(self.flops / rate, self.nbytes / bandwidth) / seconds
            for seconds, rate, bandwidth in zip(self.ours, self.flops_rate, self.bandwidth, strict=True)
        ]

    @property
    def bound(self) -> str:
        """What stands in the way of more: the ceiling that would be met first, and whether it is met."""
        if not self.flops and not self.nbytes:
            return "no closed form"
        of_flops = statistics.median(self.flops / rate for rate in self.flops_rate)
        of_bytes = statistics.median(self.nbytes / rate for rate in self.bandwidth)
        first = "products" if of_flops >= of_bytes else "memory"
        return first if statistics.median(self.shares) >= 0.5 else f"neither; {first} first"


def measured(case: Case, ceilings: Mapping[str, Callable[[str], float]], rounds: int) -> Row:
    """All in turn, once before that is not counted: compilation and first touches.

    Args:
        case: what to measure.
        ceilings: `flops_rate` and `bandwidth`, each measured anew every round for the case's dtype.
        rounds: at least 1.
    """
    contestants = [case.ours, *([case.peer] if case.peer else [])]
    for contestant in contestants:
        contestant()
    found: list[list[float]] = [[] for _ in contestants]
    limits: dict[str, list[float]] = {name: [] for name in ceilings}
    bar = track(range(rounds), f"{case.suite}: {case.name}", transient=True, console=Console(stderr=True))
    for number in bar:
        for name, ceiling in ceilings.items():
            limits[name].append(ceiling(case.dtype))
        for place in range(len(contestants)):  # who goes first takes turns too
            at = (place + number) % len(contestants)
            found[at].append(contestants[at]())
    flops, nbytes = case.work or (0.0, 0.0)
    theirs = found[1] if case.peer else []
    told = (case.suite, case.name, case.unit, case.amount, found[0], case.peer_name, theirs, case.alone)
    return Row(*told, flops, nbytes, **limits)


def clocked(call: Callable[[], Any]) -> Timed:
    """`call` timed until what it gives is there."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return once


def beyond_the_first(draw: Callable[[int], Any], count: int) -> Timed:
    """Seconds of drawing `count` tokens beyond those of drawing one, so that prefill does not count."""
    one, all_ = clocked(lambda: draw(1)), clocked(lambda: draw(count))
    return lambda: max(1e-9, -one() + all_())
