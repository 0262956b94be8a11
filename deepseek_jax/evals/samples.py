"""samples.jsonl: every sample of an evaluation, appended as it is graded, and in order at the end.

A line is whole or it is not there: what a killed process left half-written is cut off at the next start.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checkpoint.files import write_whole

FILE = "samples.jsonl"


class Key(NamedTuple):
    """What a sample is known by: benchmark, problem and sample by number from 0, and its budget of thinking, -1 for
    none."""

    benchmark: str
    number: int
    sample: int
    budget: int = -1


class Samples:
    """The samples of a folder.

    Args:
        folder: of the evaluation; it is there.
        mend: cut a half-written line off the file; else it is passed over, for another process may be writing it.

    Raises:
        ValueError: its file has a line that is no sample.
    """

    def __init__(self, folder: Path, *, mend: bool = True):
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._held: dict[Key, dict[str, Any]] = {}
        if self.path.exists():
            self._read(mend)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> dict[str, Any] | None:
        """A sample, where it is there."""
        return self._held.get(key)

    def of(self, benchmark: str) -> list[dict[str, Any]]:
        """The samples of a benchmark without a budget of thinking, by problem and sample."""
        keys = sorted(key for key in self._held if key.benchmark == benchmark and key.budget < 0)
        return [self._held[key] for key in keys]

    def _read(self, mend: bool) -> None:
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if mend and len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        for number, line in enumerate(kept.splitlines(), 1):
            try:
                record = json.loads(line)
                self._held[key_of(record)] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
                raise ValueError(
                    f"{self.path}:{number}: not a sample ({type(problem).__name__}: {problem}); remove the line, or "
                    "choose another --output"
                ) from None

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add samples; when this returns a kill of the process does not lose them.

        Raises:
            OSError: the disk is full, say; none is added then, and no part of a line.
        """
        records = list(records)
        with self._lock:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab") as file:
                    file.writelines(map(json_line, records))
            except OSError as problem:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
                raise OSError(problem.errno, problem.strerror, str(self.path)) from None
            self._held |= {key_of(record): record for record in records}

    def put_in_order(self, benchmarks: Sequence[str]) -> None:
        """Write the file anew, by benchmark, budget, problem and sample."""
        place = {name: number for number, name in enumerate(benchmarks)}
        first = lambda key: (place.get(key.benchmark, len(place)), key.benchmark, key.budget, key.number, key.sample)
        write_whole(self.path, b"".join(json_line(self._held[key]) for key in sorted(self._held, key=first)))


def key_of(record: dict[str, Any]) -> Key:
    """What a sample is known by."""
    budget = record.get("budget")
    return Key(str(record["benchmark"]), int(record["number"]), int(record["sample"]), -1 if budget is None else budget)


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON Lines. Half a surrogate pair, which a server's answer may hold, is written as its escape."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
