"""Disks that fill and refuse, and targets named in unlucky ways: one line, nothing lost, nothing half-written."""

import errno
import os
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from deepseek_jax.checkpoint import files, orbax_layers, writer
from deepseek_jax.checkpoint.adapters import new_adapter, save_adapter
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.headers import parse_header
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.checkpoint.state import RunCheckpoints
from deepseek_jax.cli import run
from deepseek_jax.commands import merge as merge_lora
from deepseek_jax.model.lora import LoRAConfig
from tests.checkpoint.folders import LLAMA_TIED, QWEN2, R1, random_folder

FULL = "RESOURCE_EXHAUSTED: Error writing \"k/c/3/0\": Failed to write 10 bytes: {} [os_error_code='{}']"
REASONS = {
    errno.ENOSPC: "no space left on its disk",
    errno.EDQUOT: "no space left in the disk quota",
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "permission denied",
    errno.EIO: "input/output error",
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in REASONS if code != errno.ENOSPC)],
    ids=errno.errorcode.get,
)
def test_a_conversion_stopped_by_the_system_is_kept_and_goes_on(code, tmp_path: Path, monkeypatch):
    """TensorStore says a full disk as a ValueError, which is what damage is."""
    random_folder(tmp_path / "hf", R1)
    target, partial = tmp_path / "converted", tmp_path / ".converted.partial"
    close, closed = orbax_layers.OrbaxLayerWriter.close, []

    def full(self) -> None:
        if closed:
            with files.writing(self._folder):
                raise ValueError(FULL.format(os.strerror(code), code))
        closed.append(self._folder)
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_layers.OrbaxLayerWriter, "close", full)
        with pytest.raises(
            OSError, match=rf"{target}: {REASONS[code]} \(at .*weights.*\); .* kept in {partial}"
        ) as told:
            convert_hf(open_folder(tmp_path / "hf"), target)
    assert told.value.errno == code and "\n" not in str(told.value)
    kept = partial / "weights" / closed[0].name
    written = kept.stat().st_mtime_ns
    assert not target.exists()
    convert_hf(open_folder(tmp_path / "hf"), target)
    assert (target / "weights" / kept.name).stat().st_mtime_ns == written
    export_hf(open_folder(target), tmp_path / "exported")
    assert content(tmp_path / "exported") == content(tmp_path / "hf")


@pytest.mark.parametrize("of", ["hf", "converted"])
def test_an_export_stopped_by_a_full_disk_goes_on_after_the_last_whole_tensor(of, tmp_path: Path, monkeypatch):
    random_folder(tmp_path / "hf", R1, shards=2)
    convert_hf(open_folder(tmp_path / "hf"), tmp_path / "converted")
    target, written = tmp_path / "exported", []
    write = writer.ShardWriter.write

    def full(self, name, start, value) -> None:
        if len(written) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(name)
        write(self, name, start, value)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "write", full)
        with pytest.raises(OSError, match=f"{target}: no space left on its disk.*same command goes on"):
            export_hf(open_folder(tmp_path / of), target)
    assert not target.exists()
    log = tmp_path / ".exported.partial" / ".written"
    done = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert 10 <= len(done) <= 20
    # a line that was cut, and a tensor whose bytes did not reach the disk
    log.write_text(log.read_text() + "0123")
    for file in (tmp_path / ".exported.partial").glob("*.safetensors"):
        raw = file.read_bytes()[:8]
        header = parse_header(file.read_bytes()[: 8 + int.from_bytes(raw, "little")], None, file)
        if (entry := header.entries.get(done[0])) is not None:
            with file.open("r+b") as stream:
                stream.seek(entry.start)
                stream.write(b"\x55" * entry.nbytes)
    again, counted = [], []
    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "write", lambda self, *of: (again.append(of[0]), write(self, *of)))
        export_hf(open_folder(tmp_path / of), target, advance=counted.append)
    assert done[0] in again and not set(done[1:]) & set(again)
    assert sum(counted) == open_folder(tmp_path / "hf").nbytes
    export_hf(open_folder(tmp_path / of), tmp_path / "unbroken")
    assert content(target) == content(tmp_path / "unbroken")


def test_a_saved_model_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch):
    random_folder(tmp_path / "hf", QWEN2, "float32")
    model = load_model(tmp_path / "hf")

    def full(*of) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(writer, "_pwrite", full)
    with pytest.raises(OSError, match="saved: no space left in the disk quota.*nothing of it is left"):
        save_model(model, tmp_path / "saved", source=tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def with_adapter(folder: Path) -> None:
    lora = LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    save_adapter(new_adapter(LLAMA_TIED, lora, seed=0), lora, LLAMA_TIED, folder)


@pytest.mark.parametrize("full", ["_pwrite", "write_whole"])
def test_a_merged_model_that_does_not_fit_is_one_line_and_leaves_nothing(full, tmp_path: Path, monkeypatch, capsys):
    """By the command; the first file of all may be what does not fit."""
    random_folder(tmp_path / "hf", LLAMA_TIED, "float32")
    with_adapter(tmp_path / "adapter")

    def refuse(*of) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer if full == "_pwrite" else files, full, refuse)
    monkeypatch.setattr("sys.argv", ["merge_lora.py", *(str(tmp_path / name) for name in ("hf", "adapter", "merged"))])
    with pytest.raises(SystemExit) as end:
        run(merge_lora.main)
    said = capsys.readouterr()
    assert end.value.code == 1 and not said.out and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {tmp_path}/merged: no space left on its disk")
    assert "nothing of it is left" in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "adapter"}


def test_a_checkpoint_of_a_run_says_a_full_disk_as_an_os_error(tmp_path: Path, monkeypatch):
    with RunCheckpoints(tmp_path / "run") as run:
        run.save(1, {"a": jnp.ones(3)}, {})
        run.save(2, {"a": jnp.ones(3)}, {})

        class Full:
            def result(self):
                raise ValueError(FULL.format("No space left on device", errno.ENOSPC))

        run.wait()
        run._saving = Full()
        with pytest.raises(OSError, match=f"No space left on device.*{tmp_path}/run"):
            run.wait()
        assert run.latest() == 2


# --- names of targets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../{}/out", "./out", "a/../out", ".//out/", "link/out", "link/../out", "a b%20c?d#e/öut", "a%2e%2e/o'u\"t"],
)
def test_every_tool_takes_a_path_as_it_is_spelled(name, tmp_path: Path, monkeypatch):
    work = tmp_path / "work"
    for folder in (work / "a", tmp_path / "far" / "place"):
        folder.mkdir(parents=True)
    (work / "link").symlink_to(tmp_path / "far" / "place")
    random_folder(work / "hf", LLAMA_TIED, "float32")
    monkeypatch.chdir(work)
    target = Path(name.format("work"))
    convert_hf(open_folder(Path("a/../hf/")), target)
    assert os.path.realpath(target) == str(target.resolve()) and (target / "manifest.json").is_file()
    load_model(target)
    exported = target.parent / "exported"
    export_hf(open_folder(target), exported)
    assert content(exported) == content(Path("hf"))
    save_model(load_model(target), target.parent / "saved", source=target)
    with_adapter(target.parent / "adapter")
    merge_lora.main(target, target.parent / "adapter", target.parent / "merged")
    merged, saved = content(target.parent / "merged"), content(target.parent / "saved")
    # a new adapter changes no weight, but B A = 0 makes a 0 of its -0 and of subnormals
    assert {name: len(of) for name, of in merged.items()} == {name: len(of) for name, of in saved.items()}
    run = target.parent / "run"
    with RunCheckpoints(run) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, {"at": 3})
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.restore({"a": jnp.zeros(2)})[1:] == ({"at": 3}, 1)


@pytest.mark.parametrize(
    "name, said",
    [
        ("dangling", "is a link to nowhere, which is not there"),
        ("loop", "is a link to loop, which is not there"),
        ("hf", "exists already"),
        (".", "exists already"),
        ("hf/..", "exists already"),
        ("file", "exists already"),
        ("empty", "exists already"),
        ("file/out", "is a file; choose a folder"),
        ("hf/out", "lies within hf, which it would be made from"),
        ("hf/x/../out", "lies within hf"),
        ("link/y/out", "lies within hf"),
    ],
)
def test_a_target_that_cannot_be_made_is_refused_at_once(name, said, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_folder(Path("hf"), LLAMA_TIED, "float32")
    Path("hf/x").mkdir()
    Path("link").symlink_to("hf")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("file").touch()
    Path("empty").mkdir()
    opened, before = open_folder(Path("hf")), sorted(Path().rglob("*"))
    for write in (convert_hf, export_hf):
        with pytest.raises(ValueError, match=re.escape(said)):
            write(opened, Path(name))
    with pytest.raises(ValueError, match=re.escape(said)):
        save_model(load_model(Path("hf")), Path(name), source=Path("hf"))
    for model, adapter in (("hf", "elsewhere"), ("elsewhere", "hf")):
        with pytest.raises(ValueError, match=re.escape(said)):
            merge_lora.main(Path(model), Path(adapter), Path(name))
    assert sorted(Path().rglob("*")) == before
