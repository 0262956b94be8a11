"""Which rows are trained on: by difficulty, pass rate and length, without duplicates and held-out questions."""

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.examples import Columns, DataConfig, Example, NoAnswer, SourceConfig, columns_of, example_of
from deepseek_jax.data.sources import JsonLines, Source, open_source

_MOST_COLUMNS = 256
_LEVEL = re.compile(r"\s*(?:level\s*)?([+-]?\d+(?:\.\d*)?)\s*", re.IGNORECASE)


class Dropped(NamedTuple):
    """What a filter did to a source: `rows` dropped of the `before` that the filters ahead of it left, and why."""

    source: str
    reason: str
    rows: int
    before: int

    def __str__(self) -> str:
        return f"{self.source}: dropped {self.rows} of {self.before} rows: {self.reason}"


class Survey(NamedTuple):
    """What filters look at: of every row of a source; of one without an answer, nothing but that, and why."""

    source: Source
    columns: Columns
    names: dict[str, None]
    asked: list[bytes]
    difficulty: np.ndarray | None
    pass_rate: np.ndarray | None
    tokens: np.ndarray | None
    unanswered: dict[int, str]


def survey(
    config: DataConfig, wanted: SourceConfig, number: int, count_tokens: Callable[[Example], int] | None
) -> Survey:
    """Opens a source and reads all its rows once, one at a time.

    Args:
        config: what will be looked at.
        wanted: the source.
        number: of the source.
        count_tokens: of an example's prompt; None counts none.

    Raises:
        ValueError: a source, column or row that is not as it should be.
    """
    source = open_source(wanted.name)
    columns = columns_of(wanted, source)
    rates = _pass_rates(wanted.pass_rates) if wanted.pass_rates is not None else None
    column = config.difficulty_column
    names: dict[str, None] = {}
    asked, difficulty, pass_rate, tokens = [], [], [], []
    unanswered: dict[int, str] = {}
    for row in range(len(source)):
        try:
            example = example_of(source, number, row, columns)
        except NoAnswer as problem:
            if config.without_answer == "refuse":
                raise
            unanswered[row] = str(problem).partition(", wanted")[0]
            for column_of_row, nothing in ((asked, b""), (difficulty, math.nan), (pass_rate, math.nan), (tokens, 0)):
                column_of_row.append(nothing)
            continue
        names |= dict.fromkeys(example.columns)
        if len(names) > _MOST_COLUMNS:
            raise ValueError(f"{source.where(row)}: got over {_MOST_COLUMNS} columns up to here; drop some")
        asked.append(_same(example))
        if column is not None:
            difficulty.append(_difficulty(example.columns, column, source.where(row)))
        if rates is not None:
            pass_rate.append(rates(example))
        if count_tokens is not None:
            tokens.append(count_tokens(example))
    measured = None if rates is None else np.array(pass_rate)
    if measured is not None and np.isnan(measured).all():
        raise ValueError(f"{wanted.pass_rates}: none of its rows belongs to {source.name}; wanted its indices or ids")
    if column is not None:
        hardness = np.array(difficulty)
    else:
        hardness = None if measured is None else 1 - measured
    bounded = config.min_difficulty is not None or config.max_difficulty is not None
    if bounded and hardness is None:
        raise ValueError(f"{source.name}: a bound on difficulty, but no difficulty_column and no pass_rates; give one")
    counts = None if count_tokens is None else np.array(tokens)
    return Survey(source, columns, names, asked, hardness, measured, counts, unanswered)


def filtered(
    config: DataConfig, found: Survey, held_out: Mapping[bytes, str], seen: set[bytes]
) -> tuple[np.ndarray, list[Dropped]]:
    """Runs the filters over a source.

    Args:
        config: their bounds.
        found: of the source.
        held_out: what `asked_by` gave for the held-out data.
        seen: what is asked by the rows of earlier sources; what stays of this one is added.

    Returns:
        The numbers of the rows that stay, rising, int64; and what each filter dropped.

    Raises:
        ValueError: no rows left, or contamination where it is refused.
    """
    rows, report = np.arange(len(found.source)), []

    def keep(reason: str, stays: np.ndarray) -> None:
        nonlocal rows
        report.append(Dropped(found.source.name, reason, int((~stays).sum()), len(rows)))
        if not stays.any():
            raise ValueError(f"{found.source.name}: no rows left: the last {len(rows)} fell to {reason!r}; widen it")
        rows = rows[stays]

    if found.unanswered:
        first = next(iter(found.unanswered.values()))
        keep(f"no final answer found; the first: {first}", np.array([row not in found.unanswered for row in rows]))
    for reason, stays in _bounds(config, found):
        keep(reason, stays[rows])
    if config.duplicates == "drop":
        keep("question asked before", _firsts(found.asked, rows, seen))
    if config.held_out:
        leaked = np.array([found.asked[row] in held_out for row in rows])
        if leaked.any() and config.contamination == "refuse":
            row = int(rows[leaked][0])
            raise ValueError(
                f"{found.source.where(row)}: asks the same as {held_out[found.asked[row]]}, which is held out, and "
                f"{leaked.sum()} rows do; drop them with contamination='drop'"
            )
        keep("question is held out", ~leaked)
    return rows, report


def _bounds(config: DataConfig, found: Survey) -> Iterator[tuple[str, np.ndarray]]:
    """The filters that look at one number a row: why, and which of all rows stay."""
    yield from _between("difficulty", found.difficulty, config.min_difficulty, config.max_difficulty)
    if (rates := found.pass_rate) is not None:
        low, high = config.pass_rate_above, config.pass_rate_below
        yield "no measured pass rate", ~np.isnan(rates)
        yield f"pass rate not above {low:g} and below {high:g}", (rates > low) & (rates < high)
    yield from _between("prompt tokens", found.tokens, config.min_prompt_tokens, config.max_prompt_tokens)


def _between(
    name: str, values: np.ndarray | None, low: float | None, high: float | None
) -> Iterator[tuple[str, np.ndarray]]:
    if low is not None:
        yield f"{name} below {low:g}", values >= low
    if high is not None:
        yield f"{name} above {high:g}", values <= high


def _firsts(asked: Sequence[bytes], rows: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """Which rows ask what none before them did; what they ask is then `seen`."""
    first = np.zeros(len(rows), bool)
    for place, row in enumerate(rows):
        if asked[row] not in seen:
            first[place] = True
            seen.add(asked[row])
    return first


def asked_by(sources: Iterable[SourceConfig]) -> dict[bytes, str]:
    """What held-out data asks, and where."""
    found: dict[bytes, str] = {}
    for wanted in sources:
        source = open_source(wanted.name)
        columns = columns_of(wanted, source)._replace(answer=None)  # what a row asks does not depend on its answer
        for row in range(len(source)):
            found.setdefault(_same(example_of(source, 0, row, columns)), source.where(row))
    return found


def _same(example: Example) -> bytes:
    """Equal for examples that ask the same. Of a chat, everything but its system prompt counts."""
    text = example.question
    if example.messages is not None and len(example.messages) > 1:
        text = "\n".join(m["content"] for m in example.messages if m["role"] != "system")
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8"), digest_size=16).digest()


def _difficulty(columns: Mapping[str, Any], name: str, where: str) -> float:
    value = columns.get(name)
    level = _LEVEL.fullmatch(value) if isinstance(value, str) else None
    number = float(level[1]) if level else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{where}: difficulty {name!r}: got {value!r}, wanted a number, or text such as 'Level 3'")
    return float(number)


def _pass_rates(path: Path) -> Callable[[Example], float]:
    """What gives an example its measured pass rate, NaN where there is none."""
    source, by_index, by_id = JsonLines(path), {}, {}
    for place in range(len(source)):
        row, where = source[place], source.where(place)
        rate = row.get("pass_rate")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"{where}: 'pass_rate': got {rate!r}, wanted a number from 0 to 1")
        table, key = (by_index, row["index"]) if "index" in row else (by_id, str(row.get("id")))
        if ("index" not in row and "id" not in row) or key in table:
            raise ValueError(f"{where}: wanted an 'index' or 'id' that no row before has, got {key!r}")
        table[key] = float(rate)
    if by_index and by_id:
        raise ValueError(f"{path}: some rows have an 'index' and some an 'id'; wanted one of the two throughout")
    if by_index:
        return lambda example: by_index.get(example.row, math.nan)
    return lambda example: by_id.get(str(example.columns.get("id")), math.nan)
