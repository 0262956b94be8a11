"""Conversion: killed anywhere it goes on, Orbax reads what it wrote, memory stays bounded, one writer at a time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from deepseek_jax.checkpoint import files, names, stored_arrays
from deepseek_jax.checkpoint.convert import convert_hf, export_hf, verify
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.model_folder import open_folder
from tests.checkpoint.folders import R1, V32, random_folder

ROOT = Path(__file__).resolve().parents[2]
PIECE = 2048  # so that there are many moments to be killed at
KILLED = f"""
import os, signal, sys, threading
from pathlib import Path
from deepseek_jax.checkpoint import stored_arrays
from deepseek_jax.checkpoint.convert import convert_hf
from deepseek_jax.checkpoint.model_folder import open_folder

stored_arrays.PIECE = {PIECE}
source, target, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
calls, lock = 0, threading.Lock()

def advance(count):
    global calls
    with lock:
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)

convert_hf(open_folder(source), target, advance=advance)
"""


def kill_at(moment: int, source: Path, target: Path) -> None:
    """Convert in a process of its own, killed when `moment` pieces are written."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(source), str(target), str(moment)]
    killed = subprocess.run(command, capture_output=True, text=True, env=env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target.exists()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_and_ends_the_same(kills, tmp_path: Path, monkeypatch):
    """Nothing stands under the target's name before the end, and what was whole is not written again."""
    source, target, partial = tmp_path / "hf", tmp_path / "converted", tmp_path / ".converted.partial"
    random_folder(source, R1, shards=4)
    monkeypatch.setattr(stored_arrays, "PIECE", PIECE)
    pieces = []
    convert_hf(open_folder(source), tmp_path / "unbroken", advance=pieces.append)
    moments = random.Random(5).sample(range(1, len(pieces)), kills)
    for moment in moments:
        kill_at(moment, source, target)
        whole = {f"weights/{note.name.removesuffix('.done')}" for note in partial.glob("*.done")}
        written = {shelf: (partial / shelf).stat().st_mtime_ns for shelf in whole}
        convert_hf(open_folder(source), target)
        assert {shelf: (target / shelf).stat().st_mtime_ns for shelf in whole} == written
        assert (target / "manifest.json").read_bytes() == (tmp_path / "unbroken" / "manifest.json").read_bytes()
        assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "unbroken").iterdir()}
        assert not partial.exists()
        export_hf(open_folder(target), tmp_path / "exported")
        assert content(tmp_path / "exported") == content(source)
        shutil.rmtree(target)
        shutil.rmtree(tmp_path / "exported")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A folder with what a killed conversion of its `hf` left behind."""
    root = tmp_path_factory.mktemp("half")
    random_folder(root / "hf", R1, shards=2)
    kill_at(250, root / "hf", root / "converted")
    return root


def test_another_source_starts_afresh(half: Path, tmp_path: Path):
    """What was left behind by the conversion of a folder that has changed since is not gone on with."""
    source, target = tmp_path / "hf", tmp_path / "converted"
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    assert list((tmp_path / ".converted.partial").glob("*.done"))
    shutil.rmtree(source)
    random_folder(source, V32, shards=3)
    convert_hf(open_folder(source), target)
    export_hf(open_folder(target), tmp_path / "exported")
    assert content(tmp_path / "exported") == content(source)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "converted", "exported"}


def test_plain_orbax_loads_each_layer(tmp_path: Path):
    """The shapes of our own arrays, FP8 and scales as stored."""
    random_folder(tmp_path / "hf", R1)
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    exact = names.flat(load_model(tmp_path / "hf").weights)
    for unit in ("model", "layers.0", "layers.1", "mtp.0"):
        path = (tmp_path / "converted" / "weights" / unit).absolute()
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        held = ocp.metadata(path).metadata
        like = {key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for key, a in held.items()}
        for key, value in ocp.load(path, like).items():
            path_key = key if unit == "model" else f"{unit}.{key}"
            if path_key in exact:
                assert value.shape == exact[path_key].shape
                if key + ".scale" not in held:
                    np.testing.assert_array_equal(value, exact[path_key])


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path):
    random_folder(tmp_path / "hf", R1)
    opened = open_folder(tmp_path / "hf")
    with files.new_folder(tmp_path / "converted", resume="the other"):
        with pytest.raises(ValueError, match="converted: another process is writing it"):
            convert_hf(opened, tmp_path / "converted")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == []


def test_verify_finds_what_changed_since(tmp_path: Path):
    random_folder(tmp_path / "hf", R1)
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    written = open_folder(tmp_path / "converted")
    counted = []
    verify(written.source, written.stored.hashes, advance=counted.append)
    assert sum(counted) == written.nbytes
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    changed = {**written.stored.hashes, name: "0" * 32}
    with pytest.raises(ValueError, match=f"{name}' is not what was converted"):
        verify(written.source, changed)


def test_progress_counts_every_byte_also_after_a_kill(half: Path, tmp_path: Path):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    opened = open_folder(tmp_path / "hf")
    assert opened.nbytes == sum(entry.nbytes for entry in opened.stored.entries.values())
    assert list((tmp_path / ".converted.partial").glob("*.done"))
    counted = []
    convert_hf(opened, tmp_path / "converted", advance=counted.append)
    assert sum(counted) == opened.nbytes
    counted.clear()
    export_hf(open_folder(tmp_path / "converted"), tmp_path / "exported", advance=counted.append)
    assert sum(counted) == opened.nbytes


@pytest.mark.parametrize("piece", [2000, 10**9])
def test_the_size_of_pieces_changes_nothing(piece, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored_arrays, "PIECE", piece)
    source = random_folder(tmp_path / "hf", V32)
    opened = open_folder(tmp_path / "hf")
    for array in opened.arrays:
        pieces = array.pieces()
        assert all(size % part == 0 for size, part in zip(array.shape, pieces, strict=True))
    convert_hf(opened, tmp_path / "converted")
    hashes = json.loads((tmp_path / "converted" / "manifest.json").read_text())["tensors"]
    assert hashes.keys() == source.keys()
    export_hf(open_folder(tmp_path / "converted"), tmp_path / "exported")
    assert content(tmp_path / "exported") == content(tmp_path / "hf")
