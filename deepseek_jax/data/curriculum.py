"""The order in which training draws rows: shuffled epochs, mixtures of pools, easy before hard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

# Endless for any run. Grain's own endless repeat has no length that a mixture or a concatenation could reckon with.
_EPOCHS = 2**24


@dataclass(frozen=True, kw_only=True)
class EasyToHard:
    """Every epoch goes from the easiest rows to the hardest.

    Args:
        window: so many rows next to each other in difficulty are shuffled together; 1 is a strict order. Rows of equal
            difficulty stand in no order. Both are drawn anew each epoch.

    Raises:
        ValueError: a window below 1.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: got {self.window}, wanted at least 1 row to shuffle")


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Easy rows only at first, then harder ones as well, and at last all.

    Args:
        limits: (batch, difficulty) pairs, both rising: before that many batches are drawn, rows up to that difficulty,
            itself included, take part. After the last pair all do. A stage starts an epoch of its own.

    Raises:
        ValueError: no pairs, a batch below 1, or pairs that do not rise.
    """

    limits: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        batches, difficulties = [b for b, _ in self.limits], [d for _, d in self.limits]
        rising = all(a < b for values in (batches, difficulties) for a, b in zip(values, values[1:], strict=False))
        if not self.limits or batches[0] < 1 or not rising or not all(map(math.isfinite, difficulties)):
            raise ValueError(
                f"limits: got {self.limits}, wanted (batch, difficulty) pairs that rise, such as (100, 1) and (300, 2)"
            )


Curriculum = EasyToHard | Staged | None


class Pool(NamedTuple):
    """Rows that are shuffled together.

    Attributes:
        name: for messages.
        size: its rows.
        weight: its share of the draws, relative to the other pools'.
        first_step: batches that are drawn before it takes part.
        difficulty: [size] float64, where a curriculum needs it.
    """

    name: str
    size: int
    weight: float = 1.0
    first_step: int = 0
    difficulty: np.ndarray | None = None


def draws(pools: Sequence[Pool], *, curriculum: Curriculum, size: int, seed: int) -> grain.MapDataset:
    """Endless (pool, row) pairs of ints, each a function of its place alone.

    Every pool gives each of its rows once before any again, in another order each time, and goes on where it was when
    another pool joins. Pools are interleaved evenly by their weights, to a hundredth of the smallest.

    Args:
        pools: at least one with `first_step` 0.
        curriculum: None shuffles every epoch whole.
        size: of a batch. Stages, and steps at which pools join, are counted in batches.
        seed: at least 0.

    Raises:
        ValueError: a pool that has fewer rows than its share of one batch, in any stage, or one without difficulties
            though a curriculum is asked for.
    """
    steps = [until for until, _ in curriculum.limits] if isinstance(curriculum, Staged) else []
    starts = sorted({0, *steps, *(pool.first_step for pool in pools)})
    phases, taken = [], {}  # of each pool, by its number: the limit of its stage, and the draws it gave in it
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        limit = _limit(curriculum, start)
        active = [number for number, pool in enumerate(pools) if pool.first_step <= start]
        given = {n: taken[n][1] if taken.get(n, (None, 0))[0] == limit else 0 for n in active}
        weights = [pools[n].weight for n in active]
        streams = [
            _stream(n, pools[n], curriculum, limit, seed, least=int(size * pools[n].weight / sum(weights)))[given[n] :]
            for n in active
        ]
        phase = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
        if end is not None:
            count = (end - start) * size
            phase = phase[:count]
            for number, more in zip(active, _shares(weights, count), strict=True):
                taken[number] = (limit, given[number] + more)
        phases.append(phase)
    return phases[0] if len(phases) == 1 else grain.MapDataset.concatenate(phases)


def _limit(curriculum: Curriculum, step: int) -> float:
    """The difficulty up to which rows take part from a step on."""
    if not isinstance(curriculum, Staged):
        return math.inf
    return next((difficulty for until, difficulty in curriculum.limits if step < until), math.inf)


def _stream(
    number: int, pool: Pool, curriculum: Curriculum, limit: float, seed: int, *, least: int
) -> grain.MapDataset:
    """A pool's own endless draws in a stage."""
    if curriculum is not None and pool.difficulty is None:
        raise ValueError(f"{pool.name}: a curriculum needs a difficulty of every row; give difficulty_column")
    rows = np.arange(pool.size) if limit == math.inf else np.flatnonzero(pool.difficulty <= limit)
    if len(rows) < max(least, 1):
        within = "" if limit == math.inf else f" up to difficulty {limit:g}"
        raise ValueError(
            f"{pool.name}: got {len(rows)} rows{within}, wanted at least {max(least, 1)}, its part of a batch; "
            "add rows, or lower the batch size (--prompts-per-step) or its weight"
        )
    if isinstance(curriculum, EasyToHard):
        endless = grain.MapDataset.source(_Windowed(pool.difficulty, curriculum.window, (seed, number)))
    else:
        stage = 0 if limit == math.inf else 1 + [difficulty for _, difficulty in curriculum.limits].index(limit)
        # Grain adds the epoch to a seed: seeds next to each other would repeat each other's orders.
        drawn = int(np.random.SeedSequence((seed, number, stage)).generate_state(1)[0])
        endless = grain.MapDataset.source(rows).shuffle(seed=drawn).repeat(_EPOCHS)
    return endless.map(lambda row: (number, int(row)))


class _Windowed:
    """Epochs of rows, from easy to hard but for a shuffle within windows: a random access source for Grain.

    Grain's own window shuffle lets a window reach from one epoch into the next, and rows come twice.
    """

    def __init__(self, difficulty: np.ndarray, window: int, key: tuple[int, ...]):
        self._difficulty, self._window, self._key = difficulty, window, key
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._difficulty) * _EPOCHS

    def __getitem__(self, place: int) -> int:
        epoch, rank = divmod(place, len(self._difficulty))
        if epoch != self._epoch:
            count = len(self._difficulty)
            ties, within = np.random.default_rng((*self._key, epoch)).random((2, count))
            ranked = np.lexsort((ties, self._difficulty))
            self._epoch, self._order = epoch, ranked[np.lexsort((within, np.arange(count) // self._window))]
        return int(self._order[rank])


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """How many of a mixture's first draws come from each part."""
    if len(weights) == 1:
        return [count]
    parts = [grain.MapDataset.range(2**50).map(lambda k, n=n: (n, k)) for n in range(len(weights))]
    mixed, shares = grain.MapDataset.mix(parts, weights), {}
    for place in range(count - 1, -1, -1):
        number, before = mixed[place]
        shares.setdefault(number, before + 1)
        if len(shares) == len(weights):
            break
    return [shares.get(number, 0) for number in range(len(weights))]
