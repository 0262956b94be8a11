"""Rows by number from JSON Lines, Parquet, folders and the hub, and what of them is refused."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data import sources
from deepseek_jax.data.sources import JsonLines, open_source

ROWS = [{"question": f"{n}+1=?", "answer": n + 1} for n in range(7)]


def jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows=ROWS, **settings) -> Path:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install -e '.[data]'")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none()), min_size=1, max_size=9),
    gaps=st.lists(st.sampled_from(["", "\n", " \t\n", "\r\n\n"]), min_size=9, max_size=9),
    last=st.booleans(),
    mark=st.booleans(),
)
def test_every_line_is_found_by_its_number(tmp_path_factory, rows, gaps, last, mark):
    """Blank lines, carriage returns, a byte order mark, and a last line without its end change no row."""
    text = "".join(gap + json.dumps(row, ensure_ascii=True) + "\n" for row, gap in zip(rows, gaps, strict=False))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + (text if last else text[:-1]).encode())
    source = JsonLines(path)
    assert [source[i] for i in range(len(source))] == rows
    assert [source[i] for i in reversed(range(len(rows)))] == rows[::-1]
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    for i, row in enumerate(rows):
        assert json.loads(lines[int(source.where(i).rpartition(":")[2]) - 1]) == row


def test_packed_and_plain_and_parquet_rows_are_the_same(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    parquet(tmp_path / "c.parquet", row_group_size=3)
    found = [open_source(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert [[source[i] for i in range(len(source))] for source in found] == [ROWS] * 3
    assert [source.columns() for source in found] == [["question", "answer"]] * 3
    assert found[0].digest == found[1].digest


def test_a_parquet_file_keeps_no_more_row_groups_than_it_may(tmp_path, monkeypatch):
    path = parquet(tmp_path / "rows.parquet", row_group_size=2)
    monkeypatch.setattr(sources, "PARQUET_CACHE_BYTES", 0)
    source = open_source(str(path))
    assert [source[i] for i in (6, 0, 3, 6, 1)] == [ROWS[i] for i in (6, 0, 3, 6, 1)]
    assert len(source._held) == 1


def test_a_folder_or_a_pattern_is_its_files_by_name(tmp_path):
    (tmp_path / "more").mkdir()
    jsonl(tmp_path / "b.jsonl", ROWS[2:4])
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    jsonl(tmp_path / "more" / "c.jsonl", ROWS[4:])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("no row")
    folder, pattern = open_source(str(tmp_path)), open_source(str(tmp_path / "[ab].jsonl"))
    assert [folder[i] for i in range(len(folder))] == ROWS
    assert [pattern[i] for i in range(len(pattern))] == ROWS[:4]
    assert folder.where(5) == f"{tmp_path / 'more' / 'c.jsonl'}:2"


@pytest.mark.parametrize("index", [7, -8])
def test_there_is_no_row_beyond_the_ends(tmp_path, index):
    jsonl(tmp_path / "a.jsonl", ROWS[:4])
    jsonl(tmp_path / "b.jsonl", ROWS[4:])
    source = open_source(str(tmp_path))
    assert source[-1] == ROWS[-1]
    with pytest.raises(IndexError):
        source[index]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: rows[::-1],
        lambda rows: [{**rows[0], "answer": 2}, *rows[1:]],
    ],
)
def test_other_rows_have_another_digest(tmp_path, change):
    kinds = [(jsonl, "x.jsonl"), (parquet, "x.parquet")]
    for write, name in kinds:
        before = open_source(str(write(tmp_path / name))).digest
        assert open_source(str(write(tmp_path / name))).digest == before
        assert open_source(str(write(tmp_path / name, change(ROWS)))).digest != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file or folder; wanted one, a pattern, or a hub data set"),
        ("*.jsonl", None, r"no files; wanted some that end in .jsonl, .jsonl.gz, .parquet"),
        ("empty.jsonl", b"\n \n", "the data set is empty"),
        ("bad.jsonl.gz", b"plain", "bad.jsonl.gz: not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cut.jsonl.gz: not a whole gzip file"),
        ("bad.parquet", b"PAR1 and no more PAR1", "bad.parquet: not Parquet: "),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install -e '.[data]'")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_page_names_its_row(tmp_path):
    path = parquet(tmp_path / "rows.parquet", row_group_size=3, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.parquet, row 0: cannot be read"):
        open_source(str(path))[0]


def test_what_is_packed_to_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_RATIO_FROM_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 2**22))
    with pytest.raises(ValueError, match="unpacks to over 200 times its size"):
        open_source(str(path))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST_LINE", 100)
    path = tmp_path / "long.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n')
    with pytest.raises(ValueError, match="long.jsonl:2: got a line of over 100 bytes"):
        open_source(str(path))


@pytest.mark.parametrize(("library", "name"), [("pyarrow", "rows.parquet"), ("datasets", "owner/rows")])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, library, name):
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"PAR1")
    there = importlib.util.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda wanted: None if wanted == library else there(wanted))
    with pytest.raises(ValueError, match=rf"needs the library {library}.*pip install 'deepseek_jax\[data\]'"):
        open_source(name)


class Builder:
    """Stands for the hub library's, which reads the network."""

    asked: list = []

    def __init__(self, path, name):
        self.asked.append((path, name))

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        import datasets

        if split != "train":
            raise ValueError(f"Unknown split\n{split!r}")
        return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="hub data sets need datasets: pip install -e '.[data]'")
    monkeypatch.setattr(Builder, "__module__", "datasets.packaged_modules.parquet.parquet")
    monkeypatch.setattr(Builder, "asked", [])
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    return Builder


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/rows", ("owner/rows", None)),
        ("owner/rows:main", ("owner/rows", "main")),
        ("owner/rows:main:train", ("owner/rows", "main")),
        ("owner/rows::train", ("owner/rows", None)),
    ],
)
def test_a_hub_data_set_is_asked_for_by_name_config_and_split(hub, name, asked):
    source = open_source(name)
    assert hub.asked == [asked]
    assert [source[i] for i in range(len(source))] == ROWS and source.columns() == ["question", "answer"]
    assert source.digest == open_source(name).digest
    assert source.where(3).endswith(", row 3")


def test_an_unknown_split_is_told_in_one_line(hub):
    with pytest.raises(ValueError, match="owner/rows::dev: .*Unknown split 'dev'; check the name") as error:
        open_source("owner/rows::dev")
    assert "\n" not in str(error.value)


def test_only_plain_tables_come_from_the_hub(hub, monkeypatch):
    monkeypatch.setattr(Builder, "__module__", "datasets.packaged_modules.webdataset.webdataset")
    with pytest.raises(ValueError, match="got the format 'webdataset', wanted parquet"):
        open_source("owner/rows")


def test_without_network_the_hub_is_one_line():
    """In a process of its own, for the library reads the setting when it is imported."""
    pytest.importorskip("datasets", reason="hub data sets need datasets: pip install -e '.[data]'")
    code = "from deepseek_jax.data.sources import open_source\nopen_source('owner/no_such_rows')"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: owner/no_such_rows::train: no such file, and not to be had from the hub")
