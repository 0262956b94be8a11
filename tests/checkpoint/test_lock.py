"""A folder is one program's at a time, under any of its names, and no longer than the program lives."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.lock import locked
from deepseek_jax.checkpoint.owned import check_owned, write_owned

HOLD = """
import os, sys, time
from pathlib import Path
from deepseek_jax.checkpoint.lock import locked
with locked(Path(sys.argv[1]), advice="wait"):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    process.stdout.readline()
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_held_folder_is_refused_under_every_name_with_its_holder(tmp_path, holder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for name in (tmp_path / "run", Path("run"), Path("link"), Path("run/../run")):
        wanted = re.escape(f"{name}: in use by another process, {holder.pid} on {socket.gethostname()}; wait")
        with pytest.raises(ValueError, match=wanted), locked(name, advice="wait"):
            pass


def test_the_lock_dies_with_its_holder_and_not_with_what_it_forked(tmp_path, holder):
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 20
    while True:
        try:
            with locked(tmp_path / "run", advice="wait"):
                return
        except ValueError:
            assert time.monotonic() < deadline, "its child holds it on"


def test_a_folder_that_nothing_was_written_into_goes_again(tmp_path):
    with locked(tmp_path / "a", advice=""):
        assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a").exists()
    (tmp_path / "runs").mkdir()
    for below in (tmp_path / "new" / "x", tmp_path / "runs" / "x"):  # with those above it that were made for it
        with locked(below, advice=""):
            assert below.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    with locked(tmp_path / "b", advice=""):
        (tmp_path / "b" / "file").touch()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["file"]
    with locked(tmp_path / "b", advice=""):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=f"{name}: .*file is a file; choose a folder"),
        locked(tmp_path / name, advice=""),
    ):
        pass


def test_many_that_come_and_go_are_never_in_together(tmp_path):
    work = (
        "import sys; from pathlib import Path; from deepseek_jax.checkpoint.lock import locked\n"
        "for _ in range(300):\n"
        "    try:\n"
        "        with locked(Path(sys.argv[1]), advice=''):\n"
        "            (Path(sys.argv[1]) / 'inside').open('x').close(); (Path(sys.argv[1]) / 'inside').unlink()\n"
        "    except ValueError:\n"
        "        pass\n"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", work, str(tmp_path / "run")]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in several] == [("", 0)] * 3


def test_a_base_is_known_by_what_it_holds_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(5_000_000))
    (tmp_path / "b" / "README.md").write_text("words")
    first = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == first
    content = bytearray(5_000_000)
    content[-3] = 1
    (tmp_path / "b" / "model.safetensors").write_bytes(content)
    assert fingerprint(tmp_path / "b") != first
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "other.json")
    assert fingerprint(tmp_path / "a") != first


def test_an_owned_folder_is_replaced_and_another_is_refused(tmp_path):
    target, seen = tmp_path / "model", []

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / f"{len(seen)}").touch()
        seen.append(folder)

    (tmp_path / "model.new").mkdir()  # of a run that was killed while it wrote
    write_owned(target, run="r", steps=4, write=write)
    write_owned(target, run="r", steps=4, write=write)
    assert len(seen) == 1 and (target / "0").exists()
    write_owned(target, run="r", steps=8, write=write)
    assert (target / "1").exists() and not (target / "0").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    for run in ("other", None):
        with pytest.raises(ValueError, match="exists already and was not written by this run"):
            check_owned(target, run)
    check_owned(target, "r")
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(ValueError, match="exists already"):
        check_owned(tmp_path / "dangling", "r")
