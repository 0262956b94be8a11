"""Compiled programs that are kept: the next start compiles nothing, and no folder makes a start fail."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from deepseek_jax import compilation_cache
from deepseek_jax.compilation_cache import folder_of_user, hush_loader, keep_compiled, processor

ROOT = Path(__file__).resolve().parents[1]
COMMAND = """
import json, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax, jax.numpy as jnp

from deepseek_jax.cli import run
from deepseek_jax.commands.options import command

events = Counter()
jax.monitoring.register_event_listener(lambda event, **of: events.update([event.rpartition("/")[2]]))

@dataclass(frozen=True, kw_only=True)
class Config:
    '''Settings.

    Args:
        config: none.
        power: of the numbers.
    '''
    config: Path | None = None
    power: int = 3

@command(Config, common=("power",), deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    '''Compute.'''
    jax.config.update("jax_disable_most_optimizations", True)
    found = [float(jax.jit(lambda x, n=n: jnp.sum(x**n))(jnp.arange(float(n)))) for n in range(1, config.power + 6)]
    print(json.dumps([found, events["cache_hits"], events["cache_misses"]]))

run(main)
"""


def start(home: Path) -> subprocess.Popen:
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND], env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(child: subprocess.Popen) -> tuple[list[float], int, int, str]:
    """What it computed, the programs that it took and those that it kept, and what it said."""
    printed, said = child.communicate(timeout=120)
    assert child.returncode == 0, said
    return *json.loads(printed), said


def test_a_second_start_compiles_nothing_and_several_at_once_are_safe(tmp_path):
    together = [end(child) for child in [start(tmp_path), start(tmp_path)]]
    found, hits, misses, said = end(start(tmp_path))
    assert misses == 0 and hits >= 8 and said == ""
    for same, taken, kept, heard in together:
        assert same == found and taken + kept == hits and heard == ""
    (folder,) = (tmp_path / "deepseek_jax" / "compiled").iterdir()
    assert folder.name == processor() and folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("*-cache"))) >= 8
    # half an entry is neither an error nor there for good
    torn = max(folder.glob("jit__lambda*-cache"))
    torn.write_bytes(torn.read_bytes()[:50])
    Path(f"{torn}".removesuffix("-cache") + "-atime").unlink()
    assert end(start(tmp_path)) == (found, hits - 1, 1, "")
    assert end(start(tmp_path)) == (found, hits, 0, "")


def test_no_folder_is_a_warning_in_one_line(tmp_path):
    (tmp_path / "deepseek_jax").write_text("a file in its place")
    found, hits, misses, said = end(start(tmp_path))
    assert (hits, misses) == (0, 0) and len(found) == 8
    assert said.startswith("warning: compiled programs are not kept: ") and said.count("\n") == 1


@pytest.fixture
def settings(monkeypatch, tmp_path) -> Iterator[dict]:
    """jax's settings after `keep_compiled`, which stay as they were before."""
    names = [
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: {name: getattr(jax.config, name) for name in names}
    for name, value in before.items():
        jax.config.update(name, value)


def test_what_the_user_set_stays(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    jax.config.update("jax_compilation_cache_max_size", 7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "jit_f-0-cache").write_text("as jax writes it where there is no bound")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_compiled()
    assert list(settings().values()) == [True, str(tmp_path / "mine"), 7, 0.0]
    assert not (tmp_path / "deepseek_jax").exists() and len(list((tmp_path / "mine").iterdir())) == 1


def test_a_folder_that_the_user_names_and_that_cannot_be_is_a_warning_too(settings, tmp_path):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled programs are not kept: .*file"):
        keep_compiled()
    assert settings()["jax_enable_compilation_cache"] is False


def test_what_is_switched_off_makes_no_folder(settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled()
    assert settings()["jax_compilation_cache_dir"] is None and not list(tmp_path.iterdir())


def test_a_folder_that_others_write_to_is_not_taken(settings):
    folder = folder_of_user() / processor()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="compiled programs are not kept: .* others can write to it, wanted"):
        keep_compiled()
    assert settings()["jax_enable_compilation_cache"] is False and list(folder.iterdir()) == []


def test_other_processors_have_other_folders(monkeypatch):
    """jax takes machine code that a processor cannot run as well."""
    names = set()
    for features in (["avx2"], ["avx2", "avx512f"], []):
        monkeypatch.setattr(compilation_cache, "_features", lambda features=features: features)
        names.add(processor())
    assert len(names) == 3


@pytest.mark.parametrize(
    ("features", "platforms", "plugins", "wanted"),
    [
        (["avx512f"], "cpu", True, "3"),
        (["avx512f"], "", False, "3"),
        (["avx512f"], "cuda", True, None),
        (["avx2"], "cpu", False, None),
    ],
)
def test_the_loader_is_hushed_where_it_errs(monkeypatch, features, platforms, plugins, wanted):
    monkeypatch.setattr(compilation_cache, "_features", lambda: features)
    monkeypatch.setattr(compilation_cache, "find_spec", lambda name: plugins or None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    hush_loader()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1"  # what the user chose stays
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    hush_loader()
    assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == wanted
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
