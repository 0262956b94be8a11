"""Settings in files: what is written reads as the same, and a mistake is named by file, key and what is wanted."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.commands.settings_file import (
    options_of,
    read_settings,
    settings_text,
    toml_text,
    values_of,
    with_values,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    beta: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    lr: float = 1e-6
    files: tuple[str, ...] = ()
    inner: Inner = Inner()


@dataclass(frozen=True, kw_only=True)
class Settings:
    config: Path | None = None
    steps: int = 3
    flag: bool = False
    name: str | None = None
    least: int | None = 4
    outer: Outer = Outer()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.one_of(TEXT, st.booleans(), st.integers(), st.floats(allow_nan=False))
TABLE = st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.one_of(PLAIN, st.lists(TEXT)), max_size=5)


@given(st.dictionaries(st.sampled_from(["one", "two"]), TABLE), TABLE)
def test_toml_reads_as_what_was_written(tables, top):
    written = toml_text({"": top, **tables})
    assert tomllib.loads(written) == {**tables, **top} or tables.keys() & top.keys()
    for table, name in [(top, ""), *((table, name) for name, table in tables.items())]:
        read = tomllib.loads(written if not tables.keys() & top.keys() else toml_text({name: table}))
        read = read.get(name, {}) if name else read
        assert {key: type(read[key]) for key in table} == {key: type(value) for key, value in table.items()}


@given(
    st.builds(
        Settings,
        steps=st.integers(),
        flag=st.booleans(),
        name=st.none() | TEXT.filter(lambda text: text != "None"),
        least=st.none() | st.integers(),
        outer=st.builds(
            Outer,
            lr=st.floats(allow_nan=False),
            files=st.lists(TEXT).map(tuple),
            inner=st.builds(Inner, beta=st.floats(allow_nan=False), kind=st.sampled_from("ab")),
        ),
    )
)
def test_settings_read_as_what_was_written(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("settings") / "config.toml"
    path.write_bytes(settings_text(settings, Settings()).encode())
    assert with_values(Settings(), read_settings(path, Settings)) == settings


@pytest.mark.parametrize("text", ["half \ud800", "\udcff.jsonl"])
def test_text_that_no_file_of_settings_can_hold_is_refused(text):
    with pytest.raises(ValueError, match="no Unicode text"):
        toml_text({"": {"name": text}})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.toml",
            'steps = 5\nflag = true\nleast = "None"\n[outer]\nlr = 1\nfiles = ["x"]\n[outer.inner]\nkind = "b"\n',
        ),
        ("a.toml", 'steps = 5\nflag = true\nleast = "None"\nlr = 1.0\nfiles = ["x"]\nkind = "b"\n'),
        ("a.yaml", "steps: 5\nflag: true\nleast:\nouter:\n  lr: 1e0\n  files: [x]\n  inner: {kind: b}\n"),
        ("a.yml", "steps: 5\nflag: yes\nleast: None\nlr: 1\nfiles: [x]\nkind: b\n"),
    ],
)
def test_one_thing_in_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = with_values(Settings(), read_settings(tmp_path / name, Settings))
    assert found == Settings(steps=5, flag=True, least=None, outer=Outer(lr=1.0, files=("x",), inner=Inner(kind="b")))


def test_yaml_reads_1e_6_as_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-6\nbeta: -2E+3\nname: e5\n")
    assert read_settings(tmp_path / "a.yaml", Settings) == {"lr": 1e-6, "beta": -2000.0, "name": "e5"}
    (tmp_path / "empty.yaml").write_text("")
    assert read_settings(tmp_path / "empty.yaml", Settings) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stepz = 3", "stepz: no such option; did you mean 'steps'?"),
        ("a.toml", "[outer]\nzzzzzz = 3", "[outer] zzzzzz: no such option; --help-all shows all"),
        ("a.toml", "[enner]\nbeta = 3", "[enner]: no such group of options; wanted one of outer, outer.inner"),
        ("a.toml", "[outer]\nbeta = 3", "[outer] beta: got it in that table, wanted it in [outer.inner]"),
        ("a.toml", "[outer]\nsteps = 3", "[outer] steps: got it in that table, wanted it in no table"),
        ("a.toml", "lr = 1.0\n[outer]\nlr = 2.0", "[outer] lr: is there twice"),
        ("a.toml", 'steps = "3"', "steps: got '3', wanted a whole number"),
        ("a.toml", "steps = 3.0", "steps: got 3.0, wanted a whole number"),
        ("a.toml", "steps = true", "steps: got True, wanted a whole number"),
        ("a.toml", "flag = 1", "flag: got 1, wanted true or false"),
        ("a.toml", "least = 1.5", "least: got 1.5, wanted a whole number"),
        ("a.toml", "name = 1", "name: got 1, wanted text"),
        ("a.toml", "[outer]\nlr = 'x'", "[outer] lr: got 'x', wanted a number"),
        ("a.toml", "files = 'x'", "files: got 'x', wanted a list, each text"),
        ("a.toml", "files = [1]", "files: got [1], wanted text"),
        ("a.toml", "kind = 'c'", "kind: got 'c', wanted one of 'a', 'b'"),
        ("a.toml", "steps = ", "not TOML"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.yaml", "- 3", "got a list, wanted names of options"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "not YAML"),
        ("a.json", "{}", "got settings as '.json', wanted .toml or .yaml"),
        ("b.toml", None, "no such file"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_what_is_wanted(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_settings(path, Settings)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_values_go_to_their_options_in_whatever_group():
    changed = with_values(Settings(), {"kind": "b", "steps": 9})
    assert changed == Settings(steps=9, outer=Outer(inner=Inner(kind="b")))
    assert values_of(changed).keys() == options_of(Settings).keys()
    assert options_of(Settings)["kind"].group == ("outer", "inner")


def test_two_options_of_one_name_are_our_own_mistake():
    twice = dataclasses.make_dataclass("Twice", [("steps", int, 1), ("settings", Settings, Settings())])
    with pytest.raises(AssertionError, match="two options of one name"):
        options_of(twice)
