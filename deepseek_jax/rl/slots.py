"""Where samples lie in rows that hold several, each by itself or behind a prompt that it shares."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class PackedSlot(NamedTuple):
    """Where a sample lies: its row, its first column, and which one of the row it is, from 0.

    prompt: where its prompt lies, all but the last token, if that is not with the sample; None: it is.
    """

    row: int
    start: int
    number: int
    prompt: "PackedSlot | None" = None


def first_fit(lengths: Sequence[int], width: int, per_row: int) -> list[PackedSlot]:
    """Each sample's place, found from the longest to the shortest; of equal ones the first comes first."""
    used: list[int] = []
    held: list[int] = []
    slots: dict[int, PackedSlot] = {}
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r in range(len(used)) if held[r] < per_row and used[r] + lengths[sample] <= width)
        row = next(fits, len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        slots[sample] = PackedSlot(row, used[row], held[row])
        used[row] += lengths[sample]
        held[row] += 1
    return [slots[sample] for sample in range(len(lengths))]


class Text(NamedTuple):
    """A sample to find a place for: `own` columns, behind `shared` ones that samples with the same key have once."""

    key: Hashable
    shared: int
    own: int


@dataclass
class _Row:
    used: int = 0
    held: int = 0
    samples: dict[Hashable, list[int]] = field(default_factory=dict)

    def needs(self, text: Text) -> int:
        return text.own if text.key in self.samples else text.shared + text.own


def fit_shared(texts: Sequence[Text], width: int, per_row: int) -> list[PackedSlot]:
    """Each sample's place where equal prompts of a row are there once, right before their samples.

    Prompts are taken by their longest sample, from the longest on, and a prompt's samples likewise. A sample goes in
    the first row with its prompt that has room, else in the first that has room for both. Shared columns have the
    numbers from per_row on. A group of at most R x per_row samples opens R rows at most, if one holds per_row of them.

    Args:
        texts: none longer than a row.
        width: columns of a row.
        per_row: samples a row at most.
    """
    first: dict[Hashable, int] = {}
    longest: dict[Hashable, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text.key, place)
        longest[text.key] = max(longest.get(text.key, 0), text.shared + text.own)
    order = lambda i: (-longest[texts[i].key], first[texts[i].key], -texts[i].own)
    rows: list[_Row] = []
    for sample in sorted(range(len(texts)), key=order):
        text = texts[sample]
        fits = [row for row in rows if row.held < per_row and row.used + row.needs(text) <= width]
        row = min(fits, key=lambda row: text.key not in row.samples, default=None)
        if row is None:
            rows.append(row := _Row())
        row.used += row.needs(text)
        row.held += 1
        row.samples.setdefault(text.key, []).append(sample)
    slots: dict[int, PackedSlot] = {}
    for number, row in enumerate(rows):
        slots |= _in_row(number, row, texts, per_row)
    return [slots[sample] for sample in range(len(texts))]


def _in_row(number: int, row: _Row, texts: Sequence[Text], per_row: int) -> dict[int, PackedSlot]:
    slots: dict[int, PackedSlot] = {}
    column = 0
    for which, samples in enumerate(row.samples.values()):
        shared = texts[samples[0]].shared
        prompt = PackedSlot(number, column, per_row + which) if shared else None
        column += shared
        for sample in samples:
            slots[sample] = PackedSlot(number, column, len(slots), prompt)
            column += texts[sample].own
    return slots


def rows_multiple(samples: int, parts: int) -> int:
    """What the number of packed rows is a multiple of, so that rows come in at most eight numbers.

    Each number is a compilation. `parts` is what rows are divided into, by micro-batches and the mesh.
    """
    return math.ceil(math.ceil(samples / 8) / parts) * parts
