"""Tables of a report beside its curves: a heading, columns, and cells that are text or numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table.

    title: its heading. columns: their names. rows: a cell a column each, a text, a number, None, or what JSON can hold.
    note: a sentence below the heading. folded: shown when it is asked for.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    folded: bool = False
