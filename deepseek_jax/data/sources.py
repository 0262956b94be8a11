"""Rows of data sets by their number: JSON Lines, JSON, CSV, Parquet and hub data sets, none of them held in memory.

A file is read through once when it is opened, for an index and a digest; a row is read and parsed when it is asked
for. So a global shuffle is exact however large the file is.
"""

import bisect
import csv
import glob
import gzip
import json
import os
import re
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import xxhash

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""What a folder or a pattern is searched for."""

# Decoded row groups that a Parquet file keeps. A shuffle of a larger file reads a group for nearly every row.
PARQUET_CACHE_BYTES = 2**30
_LONGEST_LINE = 2**28
# Text packs to a third or a tenth; what unpacks to more than this is made to fill the disk.
_LARGEST_RATIO, _RATIO_FROM_BYTES = 200, 2**28
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:]*))?(?::([^:]+))?")
# The readers of the hub library for plain tables, and for its cache. Others decode media, or unpack archives.
_HUB_FORMATS = ("parquet", "json", "csv", "arrow", "text", "cache")
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = {".csv": None, ".tsv": "\t"}  # where there is none, the head of the table says it
# A JSON array is parsed as one piece.
_LARGEST_ARRAY = 2**30


class Source(Protocol):
    """Rows by number.

    Attributes:
        name: of the file, folder or data set, for messages.
        digest: of the content: equal for equal rows in the same order, other for other ones.
    """

    name: str
    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """A row by its number from 0; ValueError names the place of one that cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Where a row stands, for messages."""
        ...

    def columns(self) -> list[str]:
        """The names of the columns: those of the schema, or of the first row where there is none."""
        ...


def open_source(name: str) -> Source:
    """Opens what a user named.

    Args:
        name: a file (.parquet, .csv, .tsv, .gz, a .json that holds an array of objects; anything else is JSON Lines),
            a folder of .jsonl, .jsonl.gz and .parquet files, a pattern such as "data/*.jsonl" (several files are one
            source, in the order of their names), or a hub data set as "owner/name", "owner/name:config" or
            "owner/name:config:split". The split is "train" where none is
            given, and "owner/name::test" is a split of the only configuration.

    Raises:
        ValueError: nothing of that name, no rows, a row group or file that cannot be read, or a library that is not
            installed.
    """
    if not name.strip():  # Path("") is the current folder
        raise ValueError(f"data: got {name!r}, wanted a file, a folder, a pattern, or a hub data set as owner/name")
    path = Path(name)
    if path.is_file():
        return _nonempty(_open_file(path))
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        return _joined(name, found)
    if glob.has_magic(name):
        return _joined(name, sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file()))
    parts = _HUB.fullmatch(name)
    if parts is None or name.endswith(SUFFIXES) or name.startswith((".", "/")):
        raise ValueError(f"{name}: no such file or folder; wanted one, a pattern, or a hub data set as owner/name")
    return _nonempty(HubTable(parts[1], parts[2] or None, parts[3] or "train"))


def _open_file(path: Path) -> Source:
    if path.suffix == ".parquet":
        return ParquetRows(path)
    if path.suffix in _DELIMITERS:
        return Rewritten(path, _table_rows(path, _DELIMITERS[path.suffix] or _delimiter(path)))
    return Rewritten(path, _array_rows(path)) if _is_array(path) else JsonLines(path)


def _joined(name: str, paths: Sequence[Path]) -> Source:
    if not paths:
        raise ValueError(f"{name}: no files; wanted some that end in {', '.join(SUFFIXES)}")
    return _nonempty(Joined(name, [_open_file(path) for path in paths]))


def _nonempty(source: Source) -> Source:
    if not len(source):
        raise ValueError(f"{source.name}: the data set is empty; wanted at least one row")
    return source


class JsonLines:
    """The objects of a JSON Lines file, blank lines left out. A .gz is unpacked once, into a nameless temporary file.

    Takes 16 bytes of memory a row.

    Raises:
        ValueError: no such file, a line of more than 256 MiB, or a .gz that is damaged or unpacks to over 200 times
            its size.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; wanted JSON Lines, an object in every row")
        self.name = str(path)
        self._file = _unpacked(path) if path.suffix == ".gz" else path.open("rb")
        # Where each row starts, and last where the file ends; and the number of its line.
        self._starts, self._numbers, self.digest = _index(self._file, self.name)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        start = self._starts[index]
        line = os.pread(self._file.fileno(), self._starts[index + 1] - start, start)
        return _object(line, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.name}:{self._numbers[index]}"

    def columns(self) -> list[str]:
        return list(self[0])


class Rewritten(JsonLines):
    """The rows of a file in another form, written once as JSON Lines into a nameless temporary file."""

    def __init__(self, path: Path, rows: Iterable[Row]):
        self.name = str(path)
        self._file = tempfile.TemporaryFile()
        for row in rows:
            self._file.write(json.dumps(row).encode() + b"\n")
        self._file.seek(0)
        self._starts, self._numbers, self.digest = _index(self._file, self.name)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"


def _is_array(path: Path) -> bool:
    """Whether a file begins a JSON array, and no row of JSON Lines that is one: no row may be."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(2**16).removeprefix(_BOM).lstrip()[:1] == b"["


def _array_rows(path: Path) -> Iterable[Row]:
    if path.stat().st_size > _LARGEST_ARRAY:
        raise ValueError(f"{path}: a JSON array of over {_LARGEST_ARRAY} bytes; write an object a line, as .jsonl")
    rows = _parsed(path.read_bytes().removeprefix(_BOM), str(path))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: got a JSON {type(row).__name__}, wanted an object")
        yield row


def _delimiter(path: Path) -> str:
    """What divides the head of a table of comma-separated values: semicolons where programs have commas in numbers."""
    with path.open("rb") as file:
        head = file.readline(2**16).decode("utf-8-sig", errors="replace")
    return ";" if len(next(csv.reader([head], delimiter=","), [])) == 1 and ";" in head else ","


def _table_rows(path: Path, delimiter: str) -> Iterable[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _records(path, csv.reader(file, delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: not a table in UTF-8: {problem}; mend it, or write it as .jsonl") from None


def _records(path: Path, lines: Iterable[list[str]]) -> Iterable[Row]:
    names: list[str] = []
    for number, fields in enumerate(line for line in lines if line):
        if not number:
            names = fields
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: two columns of one name among {', '.join(names)}; rename one")
            continue
        if len(fields) != len(names):
            raise ValueError(
                f"{path}, row {number - 1}: got {len(fields)} fields, wanted {len(names)}, as its head has"
            )
        yield dict(zip(names, fields, strict=True))


def _index(file: BinaryIO, name: str) -> tuple[array, array, str]:
    starts, numbers, digest, at = array("q"), array("q"), xxhash.xxh3_128(), 0
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
        if len(line) > _LONGEST_LINE:
            raise ValueError(
                f"{name}:{number}: got a line of over {_LONGEST_LINE} bytes, wanted one JSON object a line"
            )
        digest.update(line)
        skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        if line[skipped:].strip():
            starts.append(at + skipped)
            numbers.append(number)
        at += len(line)
    starts.append(at)
    return starts, numbers, digest.hexdigest()


def _unpacked(path: Path) -> BinaryIO:
    packed, total = path.stat().st_size, 0
    target = tempfile.TemporaryFile()
    try:
        with gzip.open(path) as file:
            while block := file.read(2**20):
                total += len(block)
                if total > max(_RATIO_FROM_BYTES, _LARGEST_RATIO * packed):
                    raise ValueError(f"{path}: unpacks to over {_LARGEST_RATIO} times its size; unpack it yourself")
                target.write(block)
    except (OSError, EOFError) as problem:
        raise ValueError(f"{path}: not a whole gzip file: {problem}") from None
    target.seek(0)
    return target


def _object(line: bytes, where: str) -> Row:
    row = _parsed(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, wanted an object on a line of its own")
    return row


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as problem:
        raise ValueError(f"{where}: not JSON: {problem}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: not JSON: {problem}; wanted one object a line") from None


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object none of whose names is there twice: one of the two values would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is there twice in one object")
    return row


class ParquetRows:
    """The rows of a Parquet file, read a row group at a time; the last ones used are kept, up to 1 GiB of them.

    Raises:
        ValueError: no pyarrow, or a file that it cannot read.
    """

    def __init__(self, path: Path):
        _need("pyarrow", f"{path}: Parquet")
        import pyarrow
        import pyarrow.parquet

        self.name = str(path)
        # pyarrow's errors are no ValueErrors throughout, and a damaged file raises several kinds.
        self._problems = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except self._problems as problem:
            raise ValueError(f"{path}: not Parquet: {_one_line(problem)}") from None
        groups = self._file.metadata
        self._ends = list(accumulate(groups.row_group(g).num_rows for g in range(groups.num_row_groups)))
        self._held: OrderedDict[int, Any] = OrderedDict()
        with path.open("rb") as file:
            self.digest = _digest(iter(lambda: file.read(2**20), b""))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        try:
            return self._group(group).slice(index - first, 1).to_pylist()[0]
        except self._problems as problem:
            raise ValueError(f"{self.where(index)}: cannot be read: {_one_line(problem)}") from None

    def _group(self, group: int) -> Any:
        if group not in self._held:
            self._held[group] = self._file.read_row_group(group)
            while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > PARQUET_CACHE_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def columns(self) -> list[str]:
        return list(self._file.schema_arrow.names)


class HubTable:
    """A split of a data set of the Hugging Face hub, through the `datasets` library and its cache on disk.

    No code of a data set is ever run: only plain tables are taken (Parquet, JSON, CSV, Arrow, text), and media columns
    stay undecoded.

    Raises:
        ValueError: no `datasets` library, no such data set, configuration or split, no network, or another format.
    """

    def __init__(self, repository: str, config: str | None, split: str):
        self.name = f"{repository}:{config or ''}:{split}"
        _need("datasets", f"{repository}: no such file or folder; a hub data set")
        import datasets

        try:
            builder = datasets.load_dataset_builder(repository, config)
            if _format_of(builder) not in _HUB_FORMATS:
                raise ValueError(f"got the format {_format_of(builder)!r}, wanted {', '.join(_HUB_FORMATS)}")
            builder.download_and_prepare()
            table = builder.as_dataset(split=split)
        except Exception as problem:  # the library's own, the network's and the cache's have no common kind
            raise ValueError(
                f"{self.name}: no such file, and not to be had from the hub: {_one_line(problem)}; "
                "check the name, config and split, or give a downloaded file"
            ) from None
        self._table = table.with_format("arrow")
        self._names = list(table.column_names)
        # Of the rows and not of the cache's bytes, which another version of the library may lay out otherwise.
        self.digest = _digest(json.dumps(self[i], sort_keys=True, default=repr).encode() for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        return self._table[range(len(self))[index]].to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def columns(self) -> list[str]:
        return list(self._names)


def _format_of(builder: Any) -> str:
    """The packaged reader that a builder belongs to, such as "parquet"."""
    return type(builder).__module__.rpartition(".")[2]


class Joined:
    """Several sources as one, one after the other."""

    def __init__(self, name: str, parts: Sequence[Source]):
        self.name = name
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self.digest = _digest(part.digest.encode() for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        part, rest = self._place(range(len(self))[index])
        return part[rest]

    def where(self, index: int) -> str:
        part, rest = self._place(index)
        return part.where(rest)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for part in self._parts for name in part.columns()))

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def _digest(blocks: Iterable[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _need(library: str, what: str) -> None:
    if find_spec(library) is None:
        raise ValueError(
            f"{what} needs the library {library}, which is not installed: pip install 'deepseek_jax[data]'"
        )


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
