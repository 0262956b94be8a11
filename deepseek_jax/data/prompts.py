"""Questions and answers: rows of data sets in, batches of prompts out, their exact position kept in checkpoints."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax import distributed
from deepseek_jax.data.curriculum import EasyToHard, Pool, Staged, draws
from deepseek_jax.data.examples import (
    Columns,
    DataConfig,
    Example,
    SourceConfig,
    example_of,
)
from deepseek_jax.data.filters import Dropped, asked_by, filtered, survey
from deepseek_jax.data.sources import Source

__all__ = [
    "DataConfig",
    "Dropped",
    "EasyToHard",
    "Example",
    "PromptBatches",
    "PromptData",
    "SourceConfig",
    "Staged",
    "batches",
    "open_prompts",
    "prompt_batches",
]


_HELD_OUT_PART = 10  # at most one row in so many is held out
_SPLIT = 0x48454C44  # beside the seed, so that the split's draw is no other draw's

# --- rows in memory ------------------------------------------------------------------------------


def batches(rows: Sequence[Any], *, size: int, seed: int) -> grain.DatasetIterator:
    """Endless lists of `size` rows, every epoch in another order; `get_state` and `set_state` keep the position.

    Raises:
        ValueError: fewer rows than a batch takes.
    """
    if len(rows) < size:
        raise ValueError(f"data set: got {len(rows)} rows, wanted at least {size}, one batch; add rows or lower it")
    # An endless repeat has sys.maxsize rows, which a batch of one rounds up past what len() can say.
    return _iterator(grain.MapDataset.source(rows).seed(seed).shuffle().repeat(2**31), size)


def _iterator(dataset: grain.MapDataset, size: int) -> grain.DatasetIterator:
    # Threads would read ahead of the position that a checkpoint saves; rows in memory or a file apart need none.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.batch(size, batch_fn=list).to_iter_dataset(options))


# --- what to train on ----------------------------------------------------------------------------


class _Kept(NamedTuple):
    config: SourceConfig
    source: Source
    columns: Columns
    rows: np.ndarray
    difficulty: np.ndarray | None


class PromptData(Sequence[Example]):
    """The rows that are left of all sources, one source after the other; `open_prompts` makes it.

    A row is read from its file when it is asked for.

    Attributes:
        report: what each filter dropped from each source, in the order in which they ran.
        columns: the names in every example's `columns`.
    """

    def __init__(
        self, config: DataConfig, kept: Sequence[_Kept], columns: tuple[str, ...], report: tuple[Dropped, ...]
    ):
        self.config, self.columns, self.report = config, columns, report
        self._kept = list(kept)

    def __len__(self) -> int:
        return sum(len(kept.rows) for kept in self._kept)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        for number, kept in enumerate(self._kept):
            if index < len(kept.rows):
                return self.example(number, index)
            index -= len(kept.rows)
        raise AssertionError("range() has checked the index")

    def example(self, source: int, place: int) -> Example:
        """The row at this place among the rows left of a source."""
        kept = self._kept[source]
        row = int(kept.rows[place])
        found = example_of(kept.source, source, row, kept.columns)
        return found._replace(columns={name: found.columns.get(name) for name in self.columns})

    def split(self, count: int, *, seed: int) -> tuple[list[Example], "PromptData"]:
        """Rows drawn by the seed, to evaluate on, and the data without them; a function of the rows and the seed alone.

        Args:
            count: rows to draw, and a tenth of all at most, yet at least one. No source gives its last row.
            seed: at least 0.

        Raises:
            ValueError: every source has but one row.
        """
        left = [len(kept.rows) for kept in self._kept]
        source_of = np.repeat(np.arange(len(left)), left)
        firsts = np.cumsum([0, *left[:-1]])
        taken: list[int] = []
        for index in np.random.default_rng((seed, _SPLIT)).permutation(len(self)).tolist():
            if len(taken) < min(count, max(1, len(self) // _HELD_OUT_PART)) and left[source_of[index]] > 1:
                taken.append(index)
                left[source_of[index]] -= 1
        if not taken:
            raise ValueError(f"{self._kept[0].source.name}: got {len(self)} rows, wanted 2 or more: one is held out")
        stays = np.ones(len(self), bool)
        stays[taken] = False
        rest = []
        for kept, first in zip(self._kept, firsts, strict=True):
            here = stays[first : first + len(kept.rows)]
            difficulty = None if kept.difficulty is None else kept.difficulty[here]
            rest.append(kept._replace(rows=kept.rows[here], difficulty=difficulty))
        return [self[index] for index in taken], PromptData(self.config, rest, self.columns, self.report)

    def pools(self) -> list[Pool]:
        """The sources as what an order is made of."""
        return [
            Pool(k.source.name, len(k.rows), k.config.weight, k.config.first_step, k.difficulty) for k in self._kept
        ]

    def identity(self) -> list[dict[str, Any]]:
        """What a checkpoint knows the data by: of each source, the digests of its rows and of those chosen."""
        return [
            {
                "name": kept.source.name,
                "rows": len(kept.source),
                "digest": kept.source.digest,
                "kept": len(kept.rows),
                "choice": _digest(kept.rows.astype("<i8"), kept.difficulty),
                "columns": [list(kept.columns.question), kept.columns.answer],
            }
            for kept in self._kept
        ]


def open_prompts(config: DataConfig, *, count_tokens: Callable[[Example], int] | None = None) -> PromptData:
    """Opens the sources, checks every row, and filters them.

    Reads all rows once, one at a time; of each it keeps a few numbers. In several processes all call it alike; they
    refuse to start when their files differ.

    Args:
        config: what to open.
        count_tokens: an example's prompt, in tokens of the model with its template. Needed where their number is
            bounded.

    Raises:
        ValueError: a source that cannot be opened or has not the columns wanted (the message lists those it has), a
            row without a question, contamination where it is refused, or no rows left.
    """
    bounded = config.min_prompt_tokens is not None or config.max_prompt_tokens is not None
    if bounded and count_tokens is None:
        raise ValueError("max_prompt_tokens: got a bound, but no count_tokens to count with; pass it to open_prompts")
    held_out = asked_by(config.held_out)
    seen: set[bytes] = set()
    kept, report, columns = [], [], {"answer": None}
    for number, wanted in enumerate(config.sources):
        found = survey(config, wanted, number, count_tokens if bounded else None)
        rows, dropped = filtered(config, found, held_out, seen)
        columns |= dict.fromkeys(found.names)
        report += dropped
        difficulty = None if found.difficulty is None else found.difficulty[rows]
        kept.append(_Kept(wanted, found.source, found.columns, rows, difficulty))
    data = PromptData(config, kept, tuple(columns), tuple(report))
    check_agreed(data.identity())
    return data


def _digest(*arrays: np.ndarray | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def check_agreed(identity: list[dict[str, Any]]) -> None:
    """Refuse data that is not the same in all processes; all call this alike."""
    content = [[source["digest"], source["choice"]] for source in identity]
    for number, found in enumerate(distributed.all_gather_objects(content)):
        if found != content:
            raise ValueError(
                f"data: process {number} has other rows than process {distributed.process_index()}; give all the same"
            )


# --- batches -------------------------------------------------------------------------------------


class PromptBatches(grain.DatasetIterator):
    """Endless lists of prompts; `prompt_batches` makes it.

    `get_state` gives what JSON holds: Grain's position, and what the data and the order are made of. `set_state`
    refuses the position of other data.
    """

    def __init__(self, positions: grain.DatasetIterator, order: Mapping[str, Any], data: Sequence[Mapping[str, Any]]):
        super().__init__(positions)
        self._positions, self._order, self._data = positions, dict(order), [dict(source) for source in data]

    def __next__(self) -> list[Any]:
        return next(self._positions)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._positions.get_state(), "order": self._order, "data": self._data}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on at a saved position.

        Raises:
            ValueError: the position was saved with other rows, filters, weights, curriculum, batch size or seed.
        """
        if not {"position", "order", "data"} <= state.keys():
            raise ValueError("data: the checkpoint holds a position in other data; start a new run")
        _same_data(self._data, state["data"])
        for name, value in self._order.items():
            if value != (before := state["order"].get(name)):
                raise ValueError(
                    f"data: {name}: got {value}, the checkpoint has {before}; give the same, or start a new run"
                )
        self._positions.set_state(dict(state["position"]))

    def __str__(self) -> str:
        return f"PromptBatches({', '.join(source['name'] for source in self._data)})"


def prompt_batches(
    data: PromptData, *, size: int, seed: int, make: Callable[[Example], Any] = lambda example: example
) -> PromptBatches:
    """Endless lists of `size` prompts; in several processes the same ones in each.

    Without a curriculum every source gives each of its rows once before any again, in another order each epoch.

    Args:
        data: what `open_prompts` gave.
        size: prompts in a batch.
        seed: of the order, at least 0.
        make: what becomes of each example, such as a prompt with its tokens; a function of the example alone.

    Raises:
        ValueError: a source with fewer rows than its share of a batch, or no difficulty where a curriculum needs it.
    """
    if size < 1 or seed < 0:
        raise ValueError(f"prompts: got size {size} and seed {seed}, wanted at least 1 and 0")
    curriculum = data.config.curriculum
    places = draws(data.pools(), curriculum=curriculum, size=size, seed=seed)
    prompts = places.map(lambda place: make(data.example(*place)))
    order = {
        "size": size,
        "seed": seed,
        "weights": [source.weight for source in data.config.sources],
        "first_steps": [source.first_step for source in data.config.sources],
        "curriculum": repr(curriculum),
    }
    return PromptBatches(_iterator(prompts, size), order, data.identity())


def _same_data(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    if len(now) != len(before):
        raise ValueError(
            f"data: got {len(now)} sources, the checkpoint has {len(before)}; give the same, or start anew"
        )
    for ours, theirs in zip(now, before, strict=True):
        if ours["digest"] != theirs["digest"]:
            raise ValueError(
                f"{ours['name']}: changed since the checkpoint: got {ours['rows']} rows with digest {ours['digest']}, "
                f"the checkpoint has {theirs['rows']} with {theirs['digest']}; put the old back, or start a new run"
            )
        if any(ours[part] != theirs[part] for part in ("kept", "choice", "columns")):
            raise ValueError(
                f"{ours['name']}: got {ours['kept']} rows after filters from columns {ours['columns']}, the checkpoint "
                f"has {theirs['kept']} from {theirs['columns']}; give the same columns and filters, or start a new run"
            )
